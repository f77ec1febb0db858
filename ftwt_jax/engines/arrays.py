"""Shapes, slices and choices of channels as ONNX nodes."""

import dataclasses
from typing import Any

import numpy as np

from ftwt_jax.engines.layers import weight
from ftwt_jax.engines.nodes import NoOperatorError, Tensor, natural_order
from ftwt_jax.engines.tracing import Translation, Value, rule, sizes


@rule("reshape", "squeeze", "expand_dims")
def _reshape(t: Translation, equation: Any, x: Tensor) -> Tensor:
    return t.graph.reshaped(x, sizes(equation.outvars[0].aval.shape))


@rule("transpose")
def _transpose(t: Translation, equation: Any, x: Tensor) -> Tensor:
    permutation = list(equation.params["permutation"])
    order = tuple(permutation.index(axis) for axis in x.order)
    shape, held = (tuple(sides[axis] for axis in permutation) for sides in (x.shape, x.held))
    return dataclasses.replace(x, shape=shape, held=held, order=order)


@rule("broadcast_in_dim")
def _broadcast(t: Translation, equation: Any, x: Tensor) -> Tensor:
    shape, places = sizes(equation.outvars[0].aval.shape), equation.params["broadcast_dimensions"]
    held: list[Any] = [1] * len(shape)
    for axis, place in enumerate(places):
        held[place] = x.held[axis]
    kept = [places[axis] for axis in x.order if x.held[axis] != 1]
    return t.graph.restored(x, shape, natural_order(kept, len(shape)), tuple(held))


@rule("concatenate")
def _concatenate(t: Translation, equation: Any, *values: Value) -> Tensor:
    axis, shape = equation.params["dimension"], sizes(equation.outvars[0].aval.shape)
    like = max((x for x in values if isinstance(x, Tensor)), key=lambda x: sum(size != 1 for size in x.held))
    lengths = [int(value.shape[axis]) for value in values]
    if all(isinstance(x, Tensor) or isinstance(like.shape[0], int) for x in values):
        names = [t.graph.full(t.tensor(x, like)).name for x in values]
        name = t.graph.op("Concat", *names, axis=like.place(axis))
        return Tensor(name, shape, like.order, shape, like.dtype)
    # A constant has no number of images: zeros take its place, and it is added to them.
    whole = np.zeros([1, *(int(size) for size in shape[1:])], np.float32)
    result: Tensor | None = None
    start = 0
    for value, length in zip(values, lengths, strict=True):
        if isinstance(value, Tensor):
            before = [0] * len(shape)
            after = list(before)
            before[axis], after[axis] = start, sum(lengths) - start - length
            part = _padded(t, t.graph.full(t.graph.stored_as(value, like.order)), before, after, np.float32(0), shape)
            result = (
                part if result is None else dataclasses.replace(part, name=t.graph.op("Add", result.name, part.name))
            )
        else:
            place = [slice(None)] * len(shape)
            place[axis] = slice(start, start + length)
            whole[tuple(place)] = value
        start += length
    assert result is not None
    return t.elementwise("Add", equation, result, whole)


@rule("stack")
def _stack(t: Translation, equation: Any, *values: Value) -> Tensor:
    axis = equation.params["axis"]
    shape = sizes(equation.outvars[0].aval.shape)
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    if not all(isinstance(value, Tensor) for value in values):
        raise NoOperatorError("a part of it does not depend on the images")
    parts = [t.graph.full(t.graph.reshaped(value, one)) for value in values if isinstance(value, Tensor)]
    names = [t.graph.stored_as(part, parts[0].order).name for part in parts]
    order = parts[0].order
    return Tensor(t.graph.op("Concat", *names, axis=order.index(axis)), shape, order, shape, parts[0].dtype)


@rule("unstack")
def _unstack(t: Translation, equation: Any, x: Tensor) -> list[Value]:
    axis = equation.params["axis"]
    shape = sizes(equation.outvars[0].aval.shape)
    parts: list[Value] = []
    for at in range(int(x.shape[axis])):
        starts, ends = [0] * len(x.shape), list(x.shape)
        starts[axis], ends[axis] = at, at + 1
        parts.append(t.graph.reshaped(_sliced(t, x, starts, ends, [1] * len(starts)), shape))
    return parts


@rule("pad")
def _pad(t: Translation, equation: Any, x: Value, value: Value) -> Tensor:
    config = equation.params["padding_config"]
    if any(inner for *_, inner in config) or isinstance(value, Tensor) or not isinstance(x, Tensor):
        raise NoOperatorError("it pads between elements, or with what depends on the images")
    shape = sizes(equation.outvars[0].aval.shape)
    x = t.graph.full(x)
    crops = [(max(0, -low), max(0, -high)) for low, high, _ in config]
    if any(low or high for low, high in crops):
        starts = [low for low, _ in crops]
        ends = [size if not high else size - high for size, (_, high) in zip(x.shape, crops, strict=True)]
        x = _sliced(t, x, starts, ends, [1] * len(shape))
    return _padded(t, x, [max(0, low) for low, *_ in config], [max(0, high) for _, high, _ in config], value, shape)


def _padded(t: Translation, x: Tensor, before: Any, after: Any, value: Any, shape: Any) -> Tensor:
    pads = [int(before[axis]) for axis in x.order] + [int(after[axis]) for axis in x.order]
    if not any(pads):
        return x
    whole = [t.graph.constant(np.array(pads, np.int64)), t.graph.constant(np.asarray(value, x.dtype))]
    return Tensor(t.graph.op("Pad", x.name, *whole, mode="constant"), shape, x.order, shape, x.dtype)


@rule("slice")
def _slice(t: Translation, equation: Any, x: Tensor) -> Tensor:
    params = equation.params
    steps = params["strides"] or [1] * len(x.shape)
    return _sliced(t, x, params["start_indices"], sizes(params["limit_indices"]), steps)


@rule("dynamic_slice")
def _slice_at(t: Translation, equation: Any, x: Tensor, *starts: Value) -> Tensor:
    lengths = sizes(equation.params["slice_sizes"])
    whole = [size == length for size, length in zip(x.shape, lengths, strict=True)]
    return _slice_from(
        t, x, [0 if w else int(weight(start, "place")) for w, start in zip(whole, starts, strict=True)], lengths
    )


def _slice_from(t: Translation, x: Tensor, starts: list[int], lengths: Any) -> Tensor:
    """So many elements from these places on, or from as far as there are so many."""
    ends: list[Any] = []
    for axis, (size, length) in enumerate(zip(x.shape, lengths, strict=True)):
        starts[axis] = 0 if size == length else min(max(starts[axis], 0), int(size) - int(length))
        ends.append(size if size == length else starts[axis] + int(length))
    return _sliced(t, x, starts, ends, [1] * len(starts))


def _sliced(t: Translation, x: Tensor, starts: Any, ends: Any, steps: Any) -> Tensor:
    x = t.graph.full(x)
    axes = [
        axis for axis, size in enumerate(x.shape) if (int(starts[axis]), ends[axis], int(steps[axis])) != (0, size, 1)
    ]
    if not axes:
        return x
    if any(isinstance(x.shape[axis], str) for axis in axes):
        raise NoOperatorError("it takes some of the images")
    parts = [[which[axis] for axis in axes] for which in (starts, ends)]
    numbers = [*parts, [x.place(axis) for axis in axes], [steps[axis] for axis in axes]]
    name = t.graph.op("Slice", x.name, *(t.graph.constant(np.array(part, np.int64)) for part in numbers))
    shape = list(x.shape)
    for axis in axes:
        shape[axis] = -(-(int(ends[axis]) - int(starts[axis])) // int(steps[axis]))
    return Tensor(name, tuple(shape), x.order, tuple(shape), x.dtype)


@rule("split")
def _split(t: Translation, equation: Any, x: Tensor) -> list[Value]:
    axis, start = equation.params["axis"], 0
    parts: list[Value] = []
    for length in equation.params["sizes"]:
        starts, ends = [0] * len(x.shape), list(x.shape)
        starts[axis], ends[axis] = start, start + length
        parts.append(_sliced(t, x, starts, ends, [1] * len(starts)))
        start += length
    return parts


@rule("gather")
def _gather(t: Translation, equation: Any, x: Tensor, indices: Value) -> Tensor:
    numbers, lengths = equation.params["dimension_numbers"], sizes(equation.params["slice_sizes"])
    places = weight(indices, "choice of channels")
    batched = getattr(numbers, "operand_batching_dims", ())
    if places.ndim == 1 and not numbers.collapsed_slice_dims and not batched:
        # One slice.
        at = dict(zip(numbers.start_index_map, places.tolist(), strict=True))
        return _slice_from(t, x, [at.get(axis, 0) for axis in range(len(x.shape))], lengths)
    if len(numbers.start_index_map) != 1 or numbers.collapsed_slice_dims != numbers.start_index_map or batched:
        raise NoOperatorError("it chooses along several axes")
    axis = numbers.start_index_map[0]
    shape = sizes(equation.outvars[0].aval.shape)
    whole = all(size == length for at, (size, length) in enumerate(zip(x.shape, lengths, strict=True)) if at != axis)
    places = places.reshape(places.shape[:-1])
    (gone,) = [at for at in range(len(shape)) if at not in numbers.offset_dims] or (None,)
    if not whole or places.ndim > 1 or (places.ndim and gone != axis):
        raise NoOperatorError("it does more than to choose along an axis")
    x = t.graph.full(x)
    if places.size and not 0 <= places.min() <= places.max() < int(x.shape[axis]):
        raise NoOperatorError("it chooses what is not there")
    if places.ndim and np.array_equal(places, np.arange(int(x.shape[axis]))):
        return x
    if places.ndim:
        longer = _only_longer(t, x, axis, places, shape)
        if longer is not None:
            return longer
    name = t.graph.op("Gather", x.name, t.graph.constant(places.astype(np.int64)), axis=x.place(axis))
    if places.ndim == 0:
        return t.without(x, name, [axis], shape)
    return Tensor(name, shape, x.order, shape, x.dtype)


def _only_longer(t: Translation, x: Tensor, axis: int, places: np.ndarray, shape: Any) -> Tensor | None:
    """Channels chosen from maps with one of zeros behind them, as a pad if all are there in order; None otherwise."""
    node = t.graph.maker(x.name, "Pad")
    if node is None or t.graph.scalar(node.inputs[2]) != 0:
        return None
    pads, rank, zero = t.graph.constants[node.inputs[1]], len(shape), int(x.shape[axis]) - 1
    at = x.place(axis)
    if pads.tolist() != [int(place == rank + at) for place in range(2 * rank)]:
        return None
    (here,) = np.nonzero(places != zero)
    if not np.array_equal(places[here], np.arange(zero)) or not zero or here[-1] - here[0] + 1 != zero:
        return None
    pads = np.zeros_like(pads)
    pads[at], pads[rank + at] = here[0], len(places) - 1 - here[-1]
    name = t.graph.op("Pad", node.inputs[0], t.graph.constant(pads), node.inputs[2], mode="constant")
    return Tensor(name, shape, x.order, shape, x.dtype)


@rule("scatter-add", "scatter_add")
def _add_at(t: Translation, equation: Any, x: Value, indices: Value, updates: Value) -> Tensor:
    """`x.at[:, places].add(updates)`: the updates, spread over all places, are added."""
    numbers = equation.params["dimension_numbers"]
    places, shape = weight(indices, "place"), sizes(equation.outvars[0].aval.shape)
    axis = len(shape) - 1
    simple = numbers.scatter_dims_to_operand_dims == numbers.inserted_window_dims == (axis,) and places.ndim == 2
    places = places.reshape(-1)
    if not simple or not isinstance(updates, Tensor) or len(set(places.tolist())) != places.size:
        raise NoOperatorError("it adds at more than some channels, each once")
    size = int(shape[axis])
    if not np.array_equal(places, np.arange(size)):
        updates = t.graph.full(updates)
        # One zero more, for all other channels.
        after = [0] * len(shape)
        after[axis] = 1
        longer = (*updates.shape[:-1], places.size + 1)
        padded = _padded(t, updates, [0] * len(shape), after, np.float32(0), longer)
        source = np.full(size, places.size)
        source[places] = np.arange(places.size)
        name = t.graph.op("Gather", padded.name, t.graph.constant(source), axis=padded.place(axis))
        updates = Tensor(name, shape, padded.order, shape, padded.dtype)
    return t.elementwise("Add", equation, x, updates)
