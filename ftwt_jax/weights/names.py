"""What PyTorch networks call the layers of ours.

A *layout* is one such set of names. `published` is that of the method's own code, whose gated networks hold every
convolution a second time, or under another index, beside its gate head; the others are torchvision's, Hugging Face's
and timm's. Those have no gate heads: ours are added to them as a child of the convolution.
"""

import dataclasses
import re
from collections.abc import Callable

import flax.linen as nn

from ftwt_jax.errors import UserError
from ftwt_jax.models.mobilenet import MobileNetV1, MobileNetV2
from ftwt_jax.models.resnet import ResNet
from ftwt_jax.models.vgg import POOL, VGG

# The gate head's one module, in the published code's words.
HEAD = "mask.model.1Conv2dMask"
# Pairs or blocks in each stage as timm groups them.
TIMM_V1_STAGES = (1, 2, 2, 6, 2)
TIMM_V2_STAGES = (1, 2, 3, 4, 3, 3, 1)


@dataclasses.dataclass(frozen=True)
class Place:
    """The modules that hold one layer.

    Attributes:
      conv: the convolution, or the linear layer of the classifier.
      bn: its batch norm.
      head: its gate head.
      copy: a module under which the published gated networks hold the same convolution and batch norm once more.
    """

    conv: str
    bn: str = ""
    head: str = ""
    copy: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One set of names.

    Attributes:
      name: as in `LAYOUTS`.
      gated: whether these are the names of a gated network.
      place: from the path of a layer among our parameters, such as `stage1_block0/conv1`, to its place.
    """

    name: str
    gated: bool
    place: Callable[[str], Place]


def _beside(conv: str, bn: str) -> Place:
    return Place(conv, bn, head=f"{conv}.{HEAD}")


def _masked(prefix: str, conv: str, bn: str, masked: str, gated: bool) -> Place:
    """Names of the published networks that keep both: `conv1`, and `masked_conv1` with the same arrays."""
    copy = f"{prefix}{masked}" if gated else ""
    return Place(prefix + conv, prefix + bn, head=f"{prefix}{masked}.{HEAD}", copy=copy)


def _numbers(unit: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", unit)]


def _staged(index: int, stages: tuple[int, ...]) -> str:
    """timm's number of the block at `index`, as `STAGE.BLOCK`."""
    stage = 0
    while index >= stages[stage]:
        index -= stages[stage]
        stage += 1
    return f"{stage}.{index}"


def _resnet(model: nn.Module, gated: bool) -> Callable[[str], Place]:
    def place(unit: str) -> Place:
        if unit == "stem":
            return _masked("", "conv1", "bn1", "masked_conv", gated)
        if unit == "classifier":
            return Place("fc")
        stage, block, *number = _numbers(unit)
        prefix = f"layer{stage}.{block}."
        if unit.endswith("shortcut"):
            return Place(f"{prefix}downsample.0", f"{prefix}downsample.1")
        return _masked(prefix, f"conv{number[0]}", f"bn{number[0]}", f"masked_conv{number[0]}", gated)

    return place


def _resnet_torchvision(model: nn.Module, gated: bool) -> Callable[[str], Place]:
    place = _resnet(model, gated)
    return lambda unit: dataclasses.replace(place(unit), copy="")


def _resnet_huggingface(model: nn.Module, gated: bool) -> Callable[[str], Place]:
    def place(unit: str) -> Place:
        if unit == "classifier":
            return Place("classifier.1")
        if unit == "stem":
            layer = "resnet.embedder.embedder"
        else:
            stage, block, *number = _numbers(unit)
            layer = f"resnet.encoder.stages.{stage - 1}.layers.{block}."
            layer += f"layer.{number[0] - 1}" if number else "shortcut"
        return _beside(f"{layer}.convolution", f"{layer}.normalization")

    return place


def _vgg(model: nn.Module, gated: bool) -> Callable[[str], Place]:
    assert isinstance(model, VGG)
    starts, index = [], 0
    for step in model.plan:
        if step == POOL:
            index += 1
        else:
            starts.append(index)
            index += 1 if gated else 3

    def place(unit: str) -> Place:
        if unit == "classifier":
            return Place("classifier")
        start = starts[_numbers(unit)[0]]
        if gated:
            return Place(f"features.{start}.conv", f"features.{start}.bn", f"features.{start}.{HEAD}")
        return Place(f"features.{start}", f"features.{start + 1}")

    return place


def _mobilenet_v1(model: nn.Module, gated: bool) -> Callable[[str], Place]:
    def place(unit: str) -> Place:
        if unit == "classifier":
            return Place("fc")
        pair = 0 if unit == "stem" else _numbers(unit)[0] + 1
        second = unit.endswith("pointwise")
        if gated:
            layer = f"model.{2 * pair - (unit != 'stem') + second}"
            return Place(f"{layer}.conv", f"{layer}.bn", f"{layer}.{HEAD}")
        return Place(f"model.{pair}.{3 * second}", f"model.{pair}.{3 * second + 1}")

    return place


def _mobilenet_v1_timm(model: nn.Module, gated: bool) -> Callable[[str], Place]:
    def place(unit: str) -> Place:
        if unit == "classifier":
            return Place("classifier")
        if unit == "stem":
            return _beside("conv_stem", "bn1")
        block = f"blocks.{_staged(_numbers(unit)[0], TIMM_V1_STAGES)}"
        if unit.endswith("depthwise"):
            return _beside(f"{block}.conv_dw", f"{block}.bn1")
        return _beside(f"{block}.conv_pw", f"{block}.bn2")

    return place


V2_PARTS = ("expand", "depthwise", "project")


def _v2_shortcut(unit: str) -> Place:
    """The projection that only the CIFAR network has, in whatever layout."""
    prefix = f"bottlenecks.{_numbers(unit)[0]}.shortcut"
    return Place(f"{prefix}.0", f"{prefix}.1")


def _mobilenet_v2(model: nn.Module, gated: bool) -> Callable[[str], Place]:
    def place(unit: str) -> Place:
        if unit == "classifier":
            return Place("fc")
        if unit in ("stem", "last"):
            number = 0 if unit == "stem" else 1
            return _masked("", f"conv{number}", f"bn{number}", f"masked_conv{number}", gated)
        block, part = unit.split("/")
        if part == "shortcut":
            return _v2_shortcut(unit)
        prefix = f"bottlenecks.{_numbers(block)[0]}."
        number = V2_PARTS.index(part) + 1
        return _masked(prefix, f"conv{number}", f"bn{number}", f"masked_conv{number}", gated)

    return place


def _mobilenet_v2_torchvision(model: nn.Module, gated: bool) -> Callable[[str], Place]:
    def place(unit: str) -> Place:
        if unit == "classifier":
            return Place("classifier.1")
        if unit in ("stem", "last"):
            number = 0 if unit == "stem" else 18
            return _beside(f"features.{number}.0", f"features.{number}.1")
        block, part = unit.split("/")
        if part == "shortcut":
            return _v2_shortcut(unit)
        index = _numbers(block)[0]
        # The first block does not expand, so that everything in it stands one place earlier.
        position = V2_PARTS.index(part) - (index == 0)
        layer = f"features.{index + 1}.conv.{position}"
        if part == "project":
            return _beside(layer, f"features.{index + 1}.conv.{position + 1}")
        return _beside(f"{layer}.0", f"{layer}.1")

    return place


def _mobilenet_v2_timm(model: nn.Module, gated: bool) -> Callable[[str], Place]:
    def place(unit: str) -> Place:
        if unit == "classifier":
            return Place("classifier")
        if unit == "stem":
            return _beside("conv_stem", "bn1")
        if unit == "last":
            return _beside("conv_head", "bn2")
        block, part = unit.split("/")
        if part == "shortcut":
            return _v2_shortcut(unit)
        index = _numbers(block)[0]
        layer = f"blocks.{_staged(index, TIMM_V2_STAGES)}"
        # The first block does not expand: its projection is called what an expansion is elsewhere.
        names = ("conv_pw", "conv_dw", "conv_pwl") if index else ("conv_expand", "conv_dw", "conv_pw")
        position = V2_PARTS.index(part)
        return _beside(f"{layer}.{names[position]}", f"{layer}.bn{position + (index != 0)}")

    return place


_Factory = Callable[[nn.Module, bool], Callable[[str], Place]]
# By architecture: its layouts.
LAYOUTS: dict[type[nn.Module], dict[str, _Factory]] = {
    ResNet: {"published": _resnet, "torchvision": _resnet_torchvision, "huggingface": _resnet_huggingface},
    VGG: {"published": _vgg},
    MobileNetV1: {"published": _mobilenet_v1, "timm": _mobilenet_v1_timm},
    MobileNetV2: {
        "published": _mobilenet_v2,
        "torchvision": _mobilenet_v2_torchvision,
        "timm": _mobilenet_v2_timm,
    },
}


def default_layout(model: nn.Module) -> str:
    """The names under which a network trained here leaves: those of its best-known PyTorch twin."""
    if getattr(model, "stem", "cifar") != "imagenet":
        return "published"
    return next(name for name in LAYOUTS[type(model)] if name != "published")


def layouts(model: nn.Module) -> list[Layout]:
    """Every set of names that a network may have, its own default ones first."""
    factories = LAYOUTS.get(type(model))
    if factories is None:
        raise UserError(f"no PyTorch names are known for {type(model).__name__}: add them to ftwt_jax/weights/names.py")
    names = sorted(factories, key=lambda name: name != default_layout(model))
    return [Layout(name, gated, factories[name](model, gated)) for name in names for gated in (False, True)]
