"""The names of our layers in PyTorch networks.

A *layout* is one such set of names. `published` is that of the method's own code, whose gated networks have every
convolution a second time, or under another index, next to its gate head. The others are torchvision's, Hugging Face's,
timm's and kuangliu's, which have no gate heads: ours are added as children of the convolutions.
"""

import dataclasses

import flax.linen as nn

from ftwt_jax.errors import UserError
from ftwt_jax.models.mobilenet import MobileNetV1, MobileNetV2
from ftwt_jax.models.resnet import ResNet
from ftwt_jax.models.vgg import POOL, VGG
from ftwt_jax.weights.imagenet_names import IMAGENET_LAYOUTS
from ftwt_jax.weights.places import HEAD, Naming, Place, beside, numbers, staged

# Number of depthwise-pointwise pairs (V1) or blocks (V2) in each of timm's stages.
TIMM_V1_STAGES = (1, 2, 2, 6, 2)
TIMM_V2_STAGES = (1, 2, 3, 4, 3, 3, 1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One set of names, for one network.

    Attributes:
      name: as in `LAYOUTS`.
      gated: whether these are the names of a gated network.
    """

    name: str
    gated: bool
    model: nn.Module

    def place(self, unit: str) -> Place:
        """The place of a layer, named by its path in our parameters, such as `stage1_block0/conv1`."""
        naming = self.naming
        return Place(naming.classifier) if unit == "classifier" else naming.place(unit, self.model, self.gated)

    @property
    def naming(self) -> Naming:
        """How its names are made."""
        return LAYOUTS[type(self.model)][self.name]


def _masked(prefix: str, conv: str, bn: str, masked: str, gated: bool) -> Place:
    """Place in a published network that has both `conv1` and, with the same arrays, `masked_conv1`."""
    copy = f"{prefix}{masked}" if gated else ""
    return Place(prefix + conv, prefix + bn, head=f"{prefix}{masked}.{HEAD}", copy=copy)


def _resnet(unit: str, model: nn.Module, gated: bool) -> Place:
    if unit == "stem":
        return _masked("", "conv1", "bn1", "masked_conv", gated)
    stage, block, *number = numbers(unit)
    prefix = f"layer{stage}.{block}."
    if unit.endswith("shortcut"):
        return Place(f"{prefix}downsample.0", f"{prefix}downsample.1")
    return _masked(prefix, f"conv{number[0]}", f"bn{number[0]}", f"masked_conv{number[0]}", gated)


def _resnet_torchvision(unit: str, model: nn.Module, gated: bool) -> Place:
    return dataclasses.replace(_resnet(unit, model, gated), copy="")


def _resnet_kuangliu(unit: str, model: nn.Module, gated: bool) -> Place:
    place = _resnet_torchvision(unit, model, gated)
    conv, bn, head = (name.replace("downsample", "shortcut") for name in (place.conv, place.bn, place.head))
    return Place(conv, bn, head)


def _resnet_huggingface(unit: str, model: nn.Module, gated: bool) -> Place:
    if unit == "stem":
        layer = "resnet.embedder.embedder"
    else:
        stage, block, *number = numbers(unit)
        layer = f"resnet.encoder.stages.{stage - 1}.layers.{block}."
        layer += f"layer.{number[0] - 1}" if number else "shortcut"
    return beside(f"{layer}.convolution", f"{layer}.normalization")


def _vgg(unit: str, model: nn.Module, gated: bool) -> Place:
    assert isinstance(model, VGG)
    widths = [1 if gated or step == POOL else 3 for step in model.plan]
    step = [index for index, step in enumerate(model.plan) if step != POOL][numbers(unit)[0]]
    start = sum(widths[:step])
    if gated:
        return Place(f"features.{start}.conv", f"features.{start}.bn", f"features.{start}.{HEAD}")
    return Place(f"features.{start}", f"features.{start + 1}")


def _mobilenet_v1(unit: str, model: nn.Module, gated: bool) -> Place:
    pair = 0 if unit == "stem" else numbers(unit)[0] + 1
    second = unit.endswith("pointwise")
    if gated:
        layer = f"model.{2 * pair - (unit != 'stem') + second}"
        return Place(f"{layer}.conv", f"{layer}.bn", f"{layer}.{HEAD}")
    return Place(f"model.{pair}.{3 * second}", f"model.{pair}.{3 * second + 1}")


def _mobilenet_v1_timm(unit: str, model: nn.Module, gated: bool) -> Place:
    if unit == "stem":
        return beside("conv_stem", "bn1")
    block = f"blocks.{staged(numbers(unit)[0], TIMM_V1_STAGES)}"
    if unit.endswith("depthwise"):
        return beside(f"{block}.conv_dw", f"{block}.bn1")
    return beside(f"{block}.conv_pw", f"{block}.bn2")


V2_PARTS = ("expand", "depthwise", "project")


def _v2_part(unit: str) -> tuple[int, str]:
    """Index of a unit's block and its part in it; outside the blocks, 0 and the unit's name."""
    block, _, part = unit.rpartition("/")
    return (numbers(block)[0] if block else 0), part


def _mobilenet_v2(unit: str, model: nn.Module, gated: bool) -> Place:
    block, part = _v2_part(unit)
    prefix = f"bottlenecks.{block}."
    if part == "shortcut":
        return Place(f"{prefix}shortcut.0", f"{prefix}shortcut.1")
    if part in ("stem", "last"):
        prefix, number = "", int(part == "last")
    else:
        number = V2_PARTS.index(part) + 1
    return _masked(prefix, f"conv{number}", f"bn{number}", f"masked_conv{number}", gated)


def _mobilenet_v2_torchvision(unit: str, model: nn.Module, gated: bool) -> Place:
    block, part = _v2_part(unit)
    if part == "shortcut":
        return _mobilenet_v2(unit, model, gated)  # Only the CIFAR network has it, and only these names.
    if part in ("stem", "last"):
        number = 0 if part == "stem" else 18
        return beside(f"features.{number}.0", f"features.{number}.1")
    # The first block has no expansion, so its other parts come one position earlier.
    position = V2_PARTS.index(part) - (block == 0)
    layer = f"features.{block + 1}.conv.{position}"
    if part == "project":
        return beside(layer, f"features.{block + 1}.conv.{position + 1}")
    return beside(f"{layer}.0", f"{layer}.1")


def _mobilenet_v2_timm(unit: str, model: nn.Module, gated: bool) -> Place:
    block, part = _v2_part(unit)
    if part == "shortcut":
        return _mobilenet_v2(unit, model, gated)
    if part in ("stem", "last"):
        return beside("conv_stem", "bn1") if part == "stem" else beside("conv_head", "bn2")
    layer = f"blocks.{staged(block, TIMM_V2_STAGES)}"
    # The first block has no expansion: its projection has the name of an expansion elsewhere.
    names = ("conv_pw", "conv_dw", "conv_pwl") if block else ("conv_expand", "conv_dw", "conv_pw")
    position = V2_PARTS.index(part)
    return beside(f"{layer}.{names[position]}", f"{layer}.bn{position + (block != 0)}")


# The layouts of each architecture.
LAYOUTS: dict[type[nn.Module], dict[str, Naming]] = {
    ResNet: {
        "published": Naming("fc", _resnet),
        "torchvision": Naming("fc", _resnet_torchvision),
        "huggingface": Naming("classifier.1", _resnet_huggingface),
        "kuangliu": Naming("linear", _resnet_kuangliu),
    },
    VGG: {"published": Naming("classifier", _vgg)},
    MobileNetV1: {"published": Naming("fc", _mobilenet_v1), "timm": Naming("classifier", _mobilenet_v1_timm)},
    MobileNetV2: {
        "published": Naming("fc", _mobilenet_v2),
        "torchvision": Naming("classifier.1", _mobilenet_v2_torchvision),
        "timm": Naming("classifier", _mobilenet_v2_timm),
    },
    **IMAGENET_LAYOUTS,
}
# The layouts of networks for small images.
CIFAR = ("published", "kuangliu")
# Every name of a classifier; the last of torchvision's VGG tells such a network.
CLASSIFIERS = sorted({"classifier.6", *(naming.classifier for each in LAYOUTS.values() for naming in each.values())})


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a gate head."""
    return f"{HEAD}." in name


def default_layout(model: nn.Module) -> str:
    """The layout in which a network is exported by default: that of its best-known PyTorch counterpart."""
    known = LAYOUTS[type(model)]
    if "published" in known and getattr(model, "stem", "cifar") != "imagenet":
        return "published"
    return next(name for name in known if name != "published")


def layouts(model: nn.Module) -> list[Layout]:
    """Every layout of a network, the default one first; raises `UserError` if there is none."""
    if type(model) not in LAYOUTS:
        raise UserError(f"no PyTorch names are known for {type(model).__name__}: add them to ftwt_jax/weights/names.py")
    known = [name for name in LAYOUTS[type(model)] if name != "kuangliu" or getattr(model, "projection", True)]
    names = sorted(known, key=lambda name: name != default_layout(model))
    return [Layout(name, gated, model) for name in names for gated in (False, True)]
