"""Which network a state dict is of: by the names and shapes of its tensors."""

import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import numpy as np

from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.models import REGISTRY, create_model, options_of
from ftwt_jax.models.resnet import ResNet
from ftwt_jax.models.vgg import VGG
from ftwt_jax.weights.adapt import CLASSIFIER, FIRST_UNITS, POSITIONS, channel_axis
from ftwt_jax.weights.entries import Shapes, entries, parameter_shapes
from ftwt_jax.weights.foreign import Misfit, refuse_foreign
from ftwt_jax.weights.names import CIFAR, LAYOUTS, Layout, is_head, layouts
from ftwt_jax.weights.source import Source

# Widths of published networks.
COMMON_WIDTHS = (0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4)
# One block of a ResNet in names of any layout: "layer2.0." or "stages.1.layers.0.".
BLOCK = re.compile(r"(?:layer|stages\.)(\d+)\.(?:layers\.)?(\d+)\.")


def width_of(name: str, source: Source) -> float:
    """The width multiplier of a state dict's network.

    It follows from the number of filters of the first unit, or, where that was rounded, is the common width whose
    shapes all fit. If none fits, it is the ratio of those numbers; and 1 where the names are not this network's.
    """
    whole = create_model(name, num_classes=1)
    shapes = parameter_shapes(whole)
    try:
        layout = fitting_layout(whole, shapes, source)
    except Misfit:
        return 1.0
    first = _first_unit(shapes)
    weight = source.arrays.get(f"{layout.place(first).conv}.weight")
    ratio = 1.0 if weight is None or weight.ndim != 4 else len(weight) / shapes["params", first, "conv", "kernel"][-1]
    stem = implied_stem(name, layout)
    arch: dict[str, Any] = {} if stem is None else {"stem": stem}
    for width in (ratio, *COMMON_WIDTHS):
        model = create_model(name, num_classes=1, width=width, **arch)
        wanted = entries(model, layout, trained_shapes(layout, source, parameter_shapes(model)))
        if all(source.arrays[e.name].shape == e.torch_shape for e in wanted if e.name in source.arrays):
            return width
    return ratio


def _first_unit(shapes: Shapes) -> str:
    return next(unit for unit in FIRST_UNITS if ("params", unit, "conv", "kernel") in shapes)


def network_of(
    name: str, source: Source, num_classes: int, gates: GateConfig | None, arch: dict[str, Any]
) -> tuple[nn.Module, Layout, Shapes]:
    """The network of a state dict, its layout, and its shapes for RGB and `num_classes`.

    A stem that the caller does not choose follows from the names.
    """
    model = create_model(name, num_classes, gates, **arch)
    refuse_foreign(model, source)
    shapes = parameter_shapes(model)
    layout = fitting_layout(model, shapes, source)
    stem = arch.get("stem") or implied_stem(name, layout)
    if name == "mobilenet_v2" and layout.name == "published" and stem in (None, "cifar"):
        stem = "cifar" if any(".shortcut." in key for key in source.arrays) else "published"
    if stem not in (None, getattr(model, "stem", stem)):
        model = create_model(name, num_classes, gates, **{**arch, "stem": stem})
        shapes = parameter_shapes(model)
    return model, layout, shapes


def implied_stem(name: str, layout: Layout) -> str | None:
    """The stem that the names of a layout tell of; None where they do not, or the network has only one."""
    if "stem" not in options_of(name) or layout.name == "published":
        return None
    return "cifar" if layout.name in CIFAR else "imagenet"


def fitting_layout(model: nn.Module, shapes: Shapes, source: Source) -> Layout:
    """The layout that has most names in common with the state dict."""
    have = set(source.arrays)

    def shared(layout: Layout) -> int:
        found = entries(model, layout, shapes)
        return len(have.intersection(e.name for e in found)) + len(have.intersection(e.copy for e in found))

    best = max(layouts(model), key=shared)
    if not shared(best):
        names = f"{len(have)} names, such as {source.prefix}{min(have)}"
        raise Misfit(f"none of its {names}, is known for {type(model).__name__} in any layout: {_layout_names(model)}")
    return best


def trained_shapes(layout: Layout, source: Source, shapes: Shapes) -> Shapes:
    """The shapes with the channels and classes of the state dict, as far as it has them."""
    kernel = source.arrays.get(f"{layout.place(_first_unit(shapes)).conv}.weight", np.zeros(0))
    weight = source.arrays.get(f"{layout.place('classifier').conv}.weight", np.zeros(0))
    found = dict(shapes)
    for path, shape in shapes.items():
        axis = channel_axis(path)
        if axis is not None and kernel.ndim == 4:
            found[path] = (*shape[:axis], kernel.shape[1], *shape[axis + 1 :])
        if path[:3] == CLASSIFIER and weight.ndim == 2:
            found[path] = (*shape[:-1], len(weight))
        if path == POSITIONS:
            positions = source.arrays.get(layout.place("positions").conv, np.zeros(shape))
            found[path] = (*shape[:1], *positions.shape[1:2], *shape[2:])
    return found


def similar(source: Source) -> Iterator[str]:
    """The networks whose layers have the names of a state dict; raises `Foreign` if no network here has such layers."""
    blocks = len(set(BLOCK.findall(" ".join(source.arrays))))
    names = [name for name in REGISTRY if name != "vgg_bn"]
    cifar = f"resnet{2 * blocks + 2}"
    if options_of(cifar):
        names.append(cifar)
    for name in dict.fromkeys(names):
        model = create_model(name, num_classes=1)
        # The first convolution and the number of blocks are known without building the network.
        if type(model) not in LAYOUTS or (isinstance(model, ResNet) and sum(model.stage_sizes) != blocks):
            continue
        first = FIRST_UNITS[isinstance(model, VGG)]
        if any(f"{layout.place(first).conv}.weight" in source.arrays for layout in layouts(model)):
            model, layout, shapes = network_of(name, source, 1, None, {})
            wanted = {key for entry in entries(model, layout, shapes) for key in (entry.name, entry.copy)}
            aside = tuple(layout.naming.left_out)
            if {key for key in source.arrays if not is_head(key) and not key.startswith(aside)} <= wanted:
                yield name


def _layout_names(model: nn.Module) -> str:
    return ", ".join(dict.fromkeys(layout.name for layout in layouts(model)))
