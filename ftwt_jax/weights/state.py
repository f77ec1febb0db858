"""Conversion of a PyTorch state dict to variables of our networks, and back."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ftwt_jax.errors import UserError, WeightsWarning, listed, unknown_name
from ftwt_jax.gating.gates import GateConfig, GateHead
from ftwt_jax.models import create_model, options_of
from ftwt_jax.weights.adapt import CLASSIFIER, POSITIONS, adapt, channel_axis, has_fresh_classifier
from ftwt_jax.weights.entries import Entry, Path, entries, parameter_shapes
from ftwt_jax.weights.fitting import implied_stem, network_of, similar, trained_shapes, width_of
from ftwt_jax.weights.foreign import Misfit
from ftwt_jax.weights.names import CIFAR, Layout, default_layout, is_head, layouts
from ftwt_jax.weights.source import Arrays, Source, read_state

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Imported:
    """Variables from a state dict, and what is needed to export the same names again.

    Attributes:
      model: the network of the variables.
      notes: a sentence for each difference from the state dict.
      fresh_classifier: whether the classifier was re-initialised.
    """

    variables: Variables
    model: nn.Module
    layout: Layout
    source: Source
    notes: tuple[str, ...]
    fresh_classifier: bool


def import_state(name: str, source: Source, num_classes: int, gates: GateConfig | None = None, **arch: Any) -> Imported:
    """`from_torch`, with everything that it learnt about the state dict.

    Raises:
      Misfit: as `from_torch`; its `looks_like` is the name of the network that the state dict fits, if there is one.
    """
    try:
        return _imported(name, source, num_classes, gates, arch)
    except Misfit as misfit:
        found = recognise(source)
        if not found or found == name:
            raise
        raise Misfit(f"this looks like {found}, not {name}", found) from misfit


def recognise(source: Source) -> str | None:
    """The name of the network that a state dict fits; None if it fits none.

    Raises:
      Foreign: it is of a network that is known, and that this library does not have.
    """
    for name in similar(source):
        try:
            _imported(name, source, 1, None, {"width": width_of(name, source)} if "width" in options_of(name) else {})
        except Misfit:
            continue
        return name
    return None


def _imported(name: str, source: Source, num_classes: int, gates: GateConfig | None, arch: dict[str, Any]) -> Imported:
    model, layout, asked = network_of(name, source, num_classes, gates, arch)
    wanted = entries(model, layout, trained_shapes(layout, source, asked))
    arrays, notes = dict(source.arrays), list(source.notes)
    implied = "cifar" if layout.name in CIFAR else "imagenet"
    if "stem" in options_of(name) and (model.stem == "imagenet") != (implied == "imagenet"):
        notes.append(f"its names are those of the {implied} network, but stem={model.stem!r} is requested")
    for start, part in layout.naming.left_out.items():
        if any(key.startswith(start) for key in arrays):
            arrays = {key: value for key, value in arrays.items() if not key.startswith(start)}
            notes.append(f"its {part}, {start.rstrip('.')}, is left out: this network has none")
    fresh: dict[Path, Any] = {}
    if gates is None and source.is_gated:
        arrays = {key: value for key, value in arrays.items() if not is_head(key)}
        notes.append("its gate heads are left out: the dense network has none")
    elif gates is not None and not source.is_gated:
        fresh = fresh_heads([entry for entry in wanted if entry.is_head], gates)
        notes.append("it has no gate heads: new ones are initialised, with every filter on")
    found = _match(name, [entry for entry in wanted if entry.path not in fresh], arrays, source.prefix)
    variables = jax.device_put(unflatten_dict({**found, **fresh}), may_alias=False)
    kernel = (*CLASSIFIER, "kernel")
    shapes = {**{entry.path: entry.shape for entry in wanted}, kernel: asked[kernel]}
    new_classifier = has_fresh_classifier(flatten_dict(variables), shapes)
    variables, changes = adapt(variables, shapes)
    return Imported(variables, model, layout, source, (*notes, *changes), new_classifier)


def fresh_heads(heads: Iterable[Entry], gates: GateConfig) -> dict[Path, Any]:
    """Initial parameters of gate heads, by path."""
    kernels = [entry for entry in heads if entry.path[-1] == "kernel"]

    def init() -> list[dict[str, Any]]:
        made = []
        for index, (features_in, features) in enumerate(entry.shape for entry in kernels):
            head = GateHead(features, gates.pool, gates.norm)
            made.append(head.init(jax.random.key(index), jnp.zeros((1, 1, 1, features_in)))["params"]["dense"])
        return made

    made = jax.jit(init)()  # One compilation for all of them.
    return {
        (*entry.path[:-1], leaf): value
        for entry, params in zip(kernels, made, strict=True)
        for leaf, value in params.items()
    }


def _match(name: str, wanted: list[Entry], arrays: Arrays, prefix: str) -> dict[Path, np.ndarray]:
    """Our arrays from those of the state dict.

    Raises:
      Misfit: names what is missing, unexpected or of the wrong shape, or whose two copies differ.
    """
    found, missing, wrong = {}, [], []
    known = {key for entry in wanted for key in (entry.name, entry.copy)}
    # Files of the published code have all copies; ours may have none.
    with_copies = any(entry.copy in arrays for entry in wanted)
    for entry in wanted:
        names = [entry.name, *([entry.copy] if with_copies and entry.copy else [])]
        given = [key for key in names if key in arrays]
        missing += [key for key in names if key not in arrays]
        if not given:
            continue
        shape = entry.torch_shape
        misfits = [
            f"{prefix}{key} is {_kind(arrays[key])}, not {_size(shape)}"
            for key in given
            if arrays[key].shape != shape or arrays[key].dtype != np.float32
        ]
        if not misfits and len(given) == 2 and not np.array_equal(arrays[given[0]], arrays[given[1]], equal_nan=True):
            misfits = [f"{prefix}{entry.name} and {prefix}{entry.copy} should be equal and differ"]
        wrong += misfits
        if not misfits:
            found[entry.path] = entry.to_ours(arrays[given[0]])
    unexpected = set(arrays) - known
    wrong.sort(key=lambda text: (".weight is " not in text, text))  # Kernels say more than the statistics behind them.
    lists = {
        kind: sorted(prefix + key for key in keys) for kind, keys in (("missing", missing), ("unexpected", unexpected))
    }
    problems = [f"{kind}: {listed(texts)}" for kind, texts in {**lists, "wrong": wrong}.items() if texts]
    if problems:
        raise Misfit(f"the state_dict does not fit this {name}: {'; '.join(problems)}")
    broken = [prefix + entry.name for entry in wanted if not np.isfinite(found[entry.path]).all()]
    if broken:
        raise UserError(
            f"the state_dict holds values that are NaN or infinite, in {listed(broken)}: take a checkpoint from before "
            "its training diverged"
        )
    return found


def _kind(array: np.ndarray) -> str:
    return _size(array.shape) + ("" if array.dtype == np.float32 else f" of {array.dtype}")


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def from_torch(
    name: str,
    state_dict: Mapping[str, Any],
    num_classes: int,
    gates: GateConfig | None = None,
    weights: str | None = None,
    **arch: Any,
) -> Variables:
    """Variables of `create_model(name, num_classes, gates, **arch)` from a PyTorch state dict.

    Known are the names of the method's published code (dense and gated CIFAR networks) and, for dense networks, those
    of torchvision, Hugging Face (ResNets), timm and kuangliu's pytorch-cifar (ResNets); the names tell which layout it
    is. A published gate head's kernel is divided by its number of inputs, by which our heads multiply their inputs;
    published heads pool by the mean: `GateConfig.paper(pool="mean")`.

    A `WeightsWarning` tells what differs from the state dict: gates are requested and it has no heads (new ones are
    initialised, with every filter on), or the other way round (they are left out), or it has another number of classes
    (the classifier is re-initialised), or a checkpoint holds more than one network.

    Args:
      name: network, as for `create_model`.
      state_dict: names to arrays (PyTorch's, NumPy's or JAX's), or a checkpoint with one as `state_dict`, `model` or
        under any other key; prefixes such as `module.` and second copies of a tensor are allowed.
      num_classes: number of logits.
      gates: settings of the gates; None: the dense network.
      weights: which network of a checkpoint, such as `state_dict_ema`; None: the one that was trained, not its mean.
      **arch: as for `create_model`. A `stem` that is left out follows from the names; a `WeightsWarning` says if it
        differs from `create_model`'s default, or if a requested one differs from the names.

    Returns:
      {"params": ..., "batch_stats": ...}, float32; no "batch_stats" for a network without batch norm.

    Raises:
      UserError: the tensors do not fit this network; names the network that they fit, or those that are missing,
        unexpected or of the wrong shape.
    """
    imported = import_state(name, read_state(state_dict, weights), num_classes, gates, **arch)
    notes, implied = list(imported.notes), implied_stem(name, imported.layout)
    if "stem" not in arch and implied is not None and implied != create_model(name, num_classes).stem:
        notes.append(f'its names are those of the {implied} network: pass stem="{implied}" to create_model too')
    for note in notes:
        warnings.warn(f"{name} from a state_dict: {note}", WeightsWarning, stacklevel=2)
    return imported.variables


def to_torch(
    name: str,
    variables: Mapping[str, Any],
    num_classes: int,
    gates: GateConfig | None = None,
    layout: str | None = None,
    **arch: Any,
) -> Arrays:
    """The inverse of `from_torch`: variables of a network as a PyTorch state dict of NumPy arrays.

    Args:
      name, num_classes, gates, **arch: the network of the variables, as for `create_model`; the stem of a MobileNetV2
        may be left out.
      variables: {"params": ..., "batch_stats": ...}.
      layout: `published`, `torchvision`, `huggingface`, `timm` or `kuangliu`; None: `published` for CIFAR networks,
        otherwise torchvision's names, or timm's where torchvision has no such network.

    Raises:
      UserError: the network has no such layout, or the variables do not fit it.
    """
    ours = flatten_dict({key: variables.get(key, {}) for key in ("params", "batch_stats")})
    model, misfits = _fitting_model(name, ours, num_classes, gates, arch)
    if misfits:
        paths = ", ".join(sorted("/".join(path) for path in misfits))
        raise UserError(f"the variables do not fit this {name}: missing, unexpected or of the wrong shape: {paths}")
    return export_state(model, variables, layout_called(model, layout or default_layout(model), gates is not None))


def _fitting_model(
    name: str, ours: dict[Path, Any], num_classes: int, gates: GateConfig | None, arch: dict[str, Any]
) -> tuple[nn.Module, list[Path]]:
    """The network of variables, and the paths that do not fit; a stem that is left out follows from the paths."""
    model = create_model(name, num_classes, gates, **arch)
    misfits = _misfits(model, ours)
    if misfits and name == "mobilenet_v2" and arch.get("stem", "cifar") == "cifar":
        for stem in ("published",) if "stem" in arch else ("published", "imagenet"):
            other = create_model(name, num_classes, gates, **{**arch, "stem": stem})
            if not _misfits(other, ours):
                return other, []
    return model, misfits


def _misfits(model: nn.Module, ours: dict[Path, Any]) -> list[Path]:
    needed = parameter_shapes(model)
    odd = [path for path in {**needed, **ours} if (path in needed) != (path in ours)]
    shared = [path for path in needed if path in ours and path != POSITIONS and channel_axis(path) is None]
    return odd + [path for path in shared if np.shape(ours[path]) != needed[path]]


def layout_called(model: nn.Module, name: str, gated: bool) -> Layout:
    """The layout of a network with this name; raises `UserError` if there is none."""
    for found in layouts(model):
        if (found.name, found.gated) == (name, gated):
            return found
    raise unknown_name(f"layout of {type(model).__name__}", name, dict.fromkeys(each.name for each in layouts(model)))


def export_state(model: nn.Module, variables: Mapping[str, Any], layout: Layout) -> Arrays:
    """A network's variables under the names of a layout, with the copies of published gated networks."""
    ours = flatten_dict({key: variables.get(key, {}) for key in ("params", "batch_stats")})
    arrays: Arrays = {}
    for entry in entries(model, layout, {path: np.shape(value) for path, value in ours.items()}):
        array = entry.to_torch(np.asarray(ours[entry.path], np.float32))
        arrays |= {key: np.ascontiguousarray(array) for key in (entry.name, entry.copy) if key}
    return arrays
