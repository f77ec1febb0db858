"""The names of the networks that are for ImageNet alone, in torchvision and timm."""

import functools
from collections.abc import Callable

import flax.linen as nn

from ftwt_jax.models.convnext import ConvNeXt
from ftwt_jax.models.densenet import DenseNet
from ftwt_jax.models.efficientnet import EfficientNet
from ftwt_jax.models.inception import InceptionV3, InceptionV4
from ftwt_jax.models.vit import ViT
from ftwt_jax.weights.places import Naming, Place, beside, numbers, staged


def _densenet(unit: str, model: nn.Module, gated: bool, dot: str = "") -> Place:
    """`dot`: what stands before the numbers of norms and convolutions in a layer."""
    if unit in ("stem", "last_norm"):
        return beside("features.conv0", "features.norm0") if unit == "stem" else Place(bn="features.norm5")
    if unit.startswith("transition"):
        layer = f"features.transition{numbers(unit)[0]}"
        return Place(bn=f"{layer}.norm") if unit.endswith("norm") else beside(f"{layer}.conv", "")
    block, number, _ = numbers(unit)
    layer = f"features.denseblock{block}.denselayer{number}"
    norm1, norm2, conv1, conv2 = (f"{layer}.{kind}{dot}{index}" for kind in ("norm", "conv") for index in (1, 2))
    if unit.endswith("norm1"):
        return Place(bn=norm1)
    return beside(conv1, norm2) if unit.endswith("conv1") else beside(conv2, "")


def _inception_v3(unit: str, model: nn.Module, gated: bool) -> Place:
    layer = "Conv2d_1a_3x3" if unit == "stem" else unit.replace("/", ".").capitalize()
    return beside(f"{layer}.conv", f"{layer}.bn")


def _inception_v4(unit: str, model: nn.Module, gated: bool) -> Place:
    assert isinstance(model, InceptionV4)
    block, _, name = unit.partition("/")
    index = 0 if block == "stem" else numbers(block)[0]
    first, second, _ = model.stage_sizes
    # In the last blocks, only branches that begin with a pool are sequences.
    if index < 8 + first + second or name.startswith("branch3"):
        name = name.replace("_", ".")
    layer = f"features.{index}.{name}".rstrip(".")
    return beside(f"{layer}.conv", f"{layer}.bn")


def _efficientnet(unit: str, model: nn.Module, gated: bool) -> Place:
    assert isinstance(model, EfficientNet)
    if unit in ("stem", "last"):
        layer = f"features.{0 if unit == 'stem' else len(model.stages) + 1}"
        return beside(f"{layer}.0", f"{layer}.1")
    place, part, expands = _efficientnet_part(unit, model)
    stage, _, block = place.partition(".")
    layer = f"features.{int(stage) + 1}.{block}.block"
    if part in ("squeeze", "excite"):
        return Place(f"{layer}.{1 + expands}.fc{1 if part == 'squeeze' else 2}")
    position = {"expand": 0, "depthwise": expands, "project": 2 + expands}[part]
    return beside(f"{layer}.{position}.0", f"{layer}.{position}.1")


def _efficientnet_timm(unit: str, model: nn.Module, gated: bool) -> Place:
    assert isinstance(model, EfficientNet)
    if unit in ("stem", "last"):
        return beside("conv_stem", "bn1") if unit == "stem" else beside("conv_head", "bn2")
    place, part, expands = _efficientnet_part(unit, model)
    layer = f"blocks.{place}"
    if part in ("squeeze", "excite"):
        return Place(f"{layer}.se.conv_{'reduce' if part == 'squeeze' else 'expand'}")
    parts = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"} if expands else {}
    parts = parts or {"depthwise": "conv_dw", "project": "conv_pw"}
    return beside(f"{layer}.{parts[part]}", f"{layer}.bn{list(parts).index(part) + 1}")


def _efficientnet_part(unit: str, model: EfficientNet) -> tuple[str, str, int]:
    """`STAGE.BLOCK` of a unit, its part in the block, and 1 if the block begins with an expansion, otherwise 0."""
    block, _, part = unit.partition("/")
    place = staged(numbers(block)[0], [blocks for *_, blocks, _ in model.stages])
    expansion, *_ = model.stages[int(place.partition(".")[0])]
    return place, part, int(expansion > 1)


def _convnext(unit: str, model: nn.Module, gated: bool) -> Place:
    outside = {"stem": Place("features.0.0", "features.0.1"), "last_norm": Place(bn="classifier.0")}
    parts = {"depthwise": "block.0", "norm": "block.2", "hidden": "block.3", "project": "block.5"}
    return outside.get(unit) or _convnext_part(
        unit,
        lambda stage: f"features.{2 * stage - 2}",
        lambda stage, block: f"features.{2 * stage - 1}.{block}",
        {**parts, "layer_scale": "layer_scale"},
        ones=2,
    )


def _convnext_timm(unit: str, model: nn.Module, gated: bool) -> Place:
    outside = {"stem": Place("stem.0", "stem.1"), "last_norm": Place(bn="head.norm")}
    parts = {"depthwise": "conv_dw", "norm": "norm", "hidden": "mlp.fc1", "project": "mlp.fc2"}
    return outside.get(unit) or _convnext_part(
        unit,
        lambda stage: f"stages.{stage - 1}.downsample",
        lambda stage, block: f"stages.{stage - 1}.blocks.{block}",
        {**parts, "layer_scale": "gamma"},
        ones=0,
    )


def _convnext_part(
    unit: str,
    between: Callable[[int], str],
    within: Callable[[int, int], str],
    parts: dict[str, str],
    ones: int,
) -> Place:
    """The place of what is between stages, or within a block whose parts have these names."""
    stage, *block = numbers(unit)
    if not block:
        layer = between(stage)
        return Place(bn=f"{layer}.0") if unit.endswith("norm") else Place(f"{layer}.1")
    part = unit.rpartition("/")[2]
    name, norm = (f"{within(stage, block[0])}.{parts[each]}" for each in (part, "norm"))
    if part == "hidden":
        return beside(name, "")
    return Place(name, norm if part == "depthwise" else "", ones=ones if part == "layer_scale" else 0)


def _vit(unit: str, model: nn.Module, gated: bool) -> Place:
    outside = {
        "stem": Place("patch_embed.proj"),
        "class_token": Place("cls_token"),
        "positions": Place("pos_embed"),
        "last_norm": Place(bn="norm"),
    }
    if unit in outside:
        return outside[unit]
    block, _, part = unit.partition("/")
    layer = f"blocks.{numbers(block)[0]}"
    if part.startswith("norm"):
        return Place(bn=f"{layer}.{part}")
    name = {"qkv": "attn.qkv", "attended": "attn.proj", "hidden": "mlp.fc1", "project": "mlp.fc2"}[part]
    return beside(f"{layer}.{name}", "")


IMAGENET_LAYOUTS: dict[type[nn.Module], dict[str, Naming]] = {
    DenseNet: {
        "torchvision": Naming("classifier", _densenet),
        # Those in torchvision's own file of weights, which it renames when it reads it.
        "torchvision_file": Naming("classifier", functools.partial(_densenet, dot=".")),
    },
    InceptionV3: {"torchvision": Naming("fc", _inception_v3, {"AuxLogits.": "auxiliary classifier"})},
    InceptionV4: {"timm": Naming("last_linear", _inception_v4)},
    EfficientNet: {
        "torchvision": Naming("classifier.1", _efficientnet),
        "timm": Naming("classifier", _efficientnet_timm),
    },
    ConvNeXt: {"torchvision": Naming("classifier.2", _convnext), "timm": Naming("head.fc", _convnext_timm)},
    ViT: {"timm": Naming("head", _vit)},
}
