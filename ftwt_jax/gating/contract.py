"""What a function does to the channels of feature maps, found by following them through its jaxpr.

Masks and compact execution need to know where a channel that is zero stays zero. A user's function says nothing about
that, so it is traced, at no cost in the compiled program, and each of its operations followed. What cannot be followed
is taken to touch every channel: that costs savings, never a wrong number.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_CALLS = {"jit", "pjit", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "checkpoint", "closed_call"}
_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil",
    "clamp", "convert_element_type", "copy", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "ne", "neg", "nextafter", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n",
    "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a function does to maps [N, ..., C].

    Attributes:
      in_place: the result has the same images and channels, each at its place.
      zero: where a channel of an image is zero, so it is in the result.
      own: each channel of the result depends on that channel alone.
      uniform: every channel is treated alike, however many there are; needs `own`.
      scalars: the numbers in the function, which may depend on how many channels there are.
    """

    in_place: bool = False
    zero: bool = False
    own: bool = False
    uniform: bool = False
    scalars: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Maps:
    """A value that has the images and channels as axes; `rest`: the number it is where the input channel is zero."""

    images: int
    channels: int
    rest: Any = None
    own: bool = True
    uniform: bool = True


@dataclasses.dataclass(frozen=True)
class _Other:
    """Any other value: its number, if all of it is known to be one; axes along which it varies; free of the input."""

    number: Any = None
    varies: frozenset[int] | None = frozenset()
    constant: bool = True


_UNKNOWN = _Other(varies=None, constant=False)


def effect(fn: Callable[[Array], Array], maps: Array | jax.ShapeDtypeStruct) -> Effect:
    """The effect of a function on maps like these, [N, ..., C]; of a Flax module, once it has its variables."""
    if isinstance(fn, nn.Dropout):
        return Effect(in_place=True, zero=True, own=True)
    if isinstance(fn, nn.Module):
        module, variables = fn.clone(parent=None), fn.variables

        def fn(v: Array) -> Array:
            return jnp.asarray(module.apply(variables, v))

    try:
        traced = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct(maps.shape, maps.dtype))
    except Exception:  # What a second call may raise is not for us to list: modules refuse it in many ways.
        return Effect()
    if len(traced.out_avals) != 1 or len(traced.out_avals[0].shape) < 2:
        return Effect()
    scalars: list[Any] = []
    try:
        (found,) = _follow(traced.jaxpr, [_known(c) for c in traced.consts], [_Maps(0, maps.ndim - 1, 0.0)], scalars)
    except (KeyError, IndexError, TypeError, ValueError):
        return Effect()
    shape = traced.out_avals[0].shape
    places = (0, len(shape) - 1)
    if not isinstance(found, _Maps) or (found.images, found.channels) != places or shape[0] != maps.shape[0]:
        return Effect()
    zero = found.rest is not None and found.rest == 0
    return Effect(True, zero, found.own, found.own and found.uniform, tuple(scalars))


def _known(value: Any) -> _Other:
    if isinstance(value, jax.core.Tracer):
        return _Other(None, _wide(np.shape(value)))
    return _Other(np.asarray(value)[()] if np.ndim(value) == 0 else None, _wide(np.shape(value)))


def _wide(shape: Sequence[Any]) -> frozenset[int]:
    return frozenset(axis for axis, size in enumerate(shape) if size != 1)


def _follow(jaxpr: Any, consts: list[Any], inputs: list[Any], scalars: list[Any]) -> list[Any]:
    """What each output of a jaxpr is."""
    known = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        if hasattr(atom, "val"):
            scalars.append(atom.val)
            return _known(atom.val)
        return known[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        shapes = [atom.aval.shape for atom in eqn.invars]
        for var, value in zip(eqn.outvars, _results(eqn, operands, shapes, scalars), strict=True):
            known[var] = value
    return [read(atom) for atom in jaxpr.outvars]


def _results(eqn: Any, operands: list[Any], shapes: list[Any], scalars: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name in _CALLS:
        inner = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
        consts = [_known(value) for value in getattr(inner, "consts", ())]
        return _follow(getattr(inner, "jaxpr", inner), consts, operands, scalars)
    out = eqn.outvars[0].aval.shape
    if name in _ELEMENTWISE:
        return [_elementwise(eqn, operands)]
    tracked = [operand for operand in operands if isinstance(operand, _Maps)]
    if not tracked:
        constant = all(operand.constant for operand in operands)
        return [_constant(eqn, operands, constant, var.aval.shape) for var in eqn.outvars]
    followed = _RULES.get(name) or (_reduced if name.startswith(("reduce_", "arg")) else None)
    if name.startswith("reduce_window"):
        followed = _windowed
    if name.startswith("cum"):
        followed = _cumulated
    result = followed(eqn, operands, shapes, out) if followed and len(eqn.outvars) == 1 else None
    return [result or _UNKNOWN] * len(eqn.outvars)


def _constant(eqn: Any, operands: list[Any], constant: bool, shape: Any) -> _Other:
    if not constant:
        return _UNKNOWN
    varies = _wide(shape)
    if eqn.primitive.name == "broadcast_in_dim":
        places = eqn.params["broadcast_dimensions"]
        varies = frozenset(places[axis] for axis in operands[0].varies)
        return _Other(operands[0].number, varies)
    if eqn.primitive.name == "iota":
        varies = frozenset({eqn.params["dimension"]})
    return _Other(None, varies)


def _elementwise(eqn: Any, operands: list[Any]) -> Any:
    numbers = [operand.rest if isinstance(operand, _Maps) else operand.number for operand in operands]
    number = _number(eqn, numbers)
    others = [operand for operand in operands if isinstance(operand, _Other)]
    tracked = [operand for operand in operands if isinstance(operand, _Maps)]
    constant = all(operand.constant for operand in others)
    known = [operand.varies for operand in others if operand.varies is not None]
    varies = frozenset().union(*known) if len(known) == len(others) else None
    if len({(maps.images, maps.channels) for maps in tracked}) > 1:
        return _UNKNOWN
    if not tracked:
        return _Other(number, varies, constant)
    maps = tracked[0]
    alike = varies is not None and maps.channels not in varies and all(each.uniform for each in tracked)
    return _Maps(maps.images, maps.channels, number, constant and all(each.own for each in tracked), alike)


def _number(eqn: Any, numbers: list[Any]) -> Any:
    """The result of an operation on numbers, None for those that are unknown; None if it cannot be known."""
    name = eqn.primitive.name
    if all(number is not None for number in numbers):
        with jax.ensure_compile_time_eval():
            given = [np.asarray(number, atom.aval.dtype) for number, atom in zip(numbers, eqn.invars, strict=True)]
            params = {key: None if "sharding" in key else value for key, value in eqn.params.items()}
            return np.asarray(eqn.primitive.bind(*given, **params))[()]
    if name == "mul" and any(number is not None and number == 0 for number in numbers):
        return 0.0
    if name == "div" and numbers[0] is not None and numbers[0] == 0:
        return 0.0
    if name == "select_n" and all(number is not None and number == numbers[1] for number in numbers[1:]):
        return numbers[1]
    return None


def _zero(maps: _Maps) -> Any:
    """The rest of sums over some of the maps."""
    return 0.0 if maps.rest is not None and maps.rest == 0 else None


def _moved(maps: _Maps, place: Callable[[int], int | None], **changes: Any) -> _Maps | None:
    images, channels = place(maps.images), place(maps.channels)
    if images is None or channels is None:
        return None
    return dataclasses.replace(maps, images=images, channels=channels, **changes)


def _unchanged(maps: Any, shape: Any, out: Any, **changes: Any) -> _Maps | None:
    """Maps that change along other axes; None if the number of images or channels changes."""
    same = all(shape[axis] == out[axis] for axis in (maps.images, maps.channels))
    return dataclasses.replace(maps, **changes) if same else None


def _broadcast(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    places = eqn.params["broadcast_dimensions"]
    moved = _moved(operands[0], lambda axis: places[axis])
    fits = all(shapes[0][axis] == out[places[axis]] for axis in (operands[0].images, operands[0].channels))
    return moved if fits else None


def _reshaped(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    def place(axis: int) -> int | None:
        before = _size(shapes[0][:axis])
        fits = [j for j, size in enumerate(out) if size == shapes[0][axis] and _size(out[:j]) == before]
        return fits[-1] if fits and axis else fits[0] if fits else None

    return _moved(operands[0], place)


def _size(shape: Any) -> Any:
    size: Any = 1
    for length in shape:
        size = size * length
    return size


def _squeezed(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    gone = {axis % len(shapes[0]) for axis in eqn.params["dimensions"]}
    left = [axis for axis in range(len(shapes[0])) if axis not in gone]
    return _moved(operands[0], lambda axis: left.index(axis) if axis in left else None)


def _transposed(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    return _moved(operands[0], lambda axis: eqn.params["permutation"].index(axis))


def _reversed(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    maps = operands[0]
    return None if {maps.images, maps.channels} & set(eqn.params["dimensions"]) else maps


def _sliced(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    maps, places = operands[0], operands[1:]
    if not isinstance(maps, _Maps) or any(isinstance(place, _Maps) for place in places):
        return None
    return _unchanged(maps, shapes[0], out, own=maps.own and all(place.constant for place in places))


def _padded(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    maps, filling = operands
    if not isinstance(maps, _Maps) or not isinstance(filling, _Other):
        return None
    widths = eqn.params["padding_config"]
    if any(tuple(widths[axis]) != (0, 0, 0) for axis in (maps.images, maps.channels)):
        return None
    same = maps.rest is not None and filling.number is not None and filling.number == maps.rest
    return dataclasses.replace(maps, rest=maps.rest if same else None)


def _joined(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    if not all(isinstance(operand, _Maps) for operand in operands):
        return None
    maps = operands[0]
    axis = eqn.params["dimension"]
    if axis in (maps.images, maps.channels) or len({(each.images, each.channels) for each in operands}) > 1:
        return None
    same = all(each.rest is not None and each.rest == maps.rest for each in operands)
    own, alike = all(each.own for each in operands), all(each.uniform for each in operands)
    return _Maps(maps.images, maps.channels, maps.rest if same else None, own, alike)


def _reduced(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    maps, axes = operands[0], set(eqn.params["axes"])
    left = [axis for axis in range(len(shapes[0])) if axis not in axes]
    kept = eqn.primitive.name in ("reduce_max", "reduce_min", "reduce_and", "reduce_or")
    return _moved(
        maps, lambda axis: left.index(axis) if axis in left else None, rest=maps.rest if kept else _zero(maps)
    )


def _windowed(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    maps, params = operands[0], eqn.params
    still = all(
        params["window_dimensions"][axis] == 1 and params["window_strides"][axis] == 1
        for axis in (maps.images, maps.channels)
    )
    kept = eqn.primitive.name in ("reduce_window_max", "reduce_window_min")
    return _unchanged(maps, shapes[0], out, rest=maps.rest if kept else _zero(maps)) if still else None


def _cumulated(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    maps = operands[0]
    over = eqn.params["axis"] in (maps.images, maps.channels)
    return None if over else dataclasses.replace(maps, rest=_zero(maps))


def _multiplied(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    side = 0 if isinstance(operands[0], _Maps) else 1
    maps, other = operands[side], operands[1 - side]
    if isinstance(other, _Maps):
        return None
    contracted, batch = (each[side] for each in eqn.params["dimension_numbers"])
    if {maps.images, maps.channels} & set(contracted):
        return None
    free = [axis for axis in range(len(shapes[side])) if axis not in {*contracted, *batch}]
    behind = 0 if side == 0 else len(shapes[0]) - len(contracted) - len(batch)

    def place(axis: int) -> int:
        return batch.index(axis) if axis in batch else len(batch) + behind + free.index(axis)

    alike = maps.uniform and maps.channels not in batch
    return _moved(maps, place, rest=_zero(maps), own=maps.own and other.constant, uniform=alike)


def _convolved(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    maps, kernel = operands
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if not isinstance(maps, _Maps) or isinstance(kernel, _Maps) or eqn.params["batch_group_count"] != 1:
        return None
    depthwise = groups == shapes[0][maps.channels] == out[numbers.out_spec[1]]
    if not depthwise or (maps.images, maps.channels) != tuple(numbers.lhs_spec[:2]):
        return None
    images, channels = numbers.out_spec[:2]
    return _Maps(images, channels, _zero(maps), maps.own and kernel.constant, False)


def _gathered(eqn: Any, operands: list[Any], shapes: list[Any], out: Any) -> Any:
    maps, numbers = operands[0], eqn.params["dimension_numbers"]
    if not isinstance(maps, _Maps) or isinstance(operands[1], _Maps):
        return None
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    whole = [axis for axis in range(len(shapes[0])) if axis not in gone]

    def place(axis: int) -> int | None:
        if axis not in whole or eqn.params["slice_sizes"][axis] != shapes[0][axis] or axis in numbers.start_index_map:
            return None
        return numbers.offset_dims[whole.index(axis)]

    return _moved(maps, place, own=maps.own and operands[1].constant)


_RULES: dict[str, Callable] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "squeeze": _squeezed,
    "transpose": _transposed,
    "rev": _reversed,
    "slice": _sliced,
    "dynamic_slice": _sliced,
    "pad": _padded,
    "concatenate": _joined,
    "dot_general": _multiplied,
    "conv_general_dilated": _convolved,
    "gather": _gathered,
}
