"""Convolutions, products, windows and reductions as ONNX nodes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftwt_jax.engines.nodes import CHANNELS_FIRST, Graph, NoOperatorError, Size, Tensor, count
from ftwt_jax.engines.tracing import Translation, Value, rule, sizes


@dataclasses.dataclass(frozen=True)
class Sum:
    """What a sum adds up: `count` numbers of `source`; over windows if `window` is there."""

    source: Tensor
    count: int
    axes: tuple[int, ...] = ()
    window: tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]] | None = None


def weight(value: Value, what: str) -> np.ndarray:
    """A value that has to be known before the images are."""
    if isinstance(value, Tensor):
        raise NoOperatorError(f"its {what} depends on the images")
    return value


def joined(pairs: Any) -> list[int]:
    """((before, after), ...) as ONNX wants pads: all before, then all after."""
    return [int(before) for before, _ in pairs] + [int(after) for _, after in pairs]


@rule("conv_general_dilated")
def _convolution(t: Translation, equation: Any, x: Tensor, kernel: Value) -> Tensor:
    params = equation.params
    numbers = params["dimension_numbers"]
    kernel = weight(kernel, "kernel")
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise NoOperatorError("its inputs are dilated, or its images in groups")
    if any(pad < 0 for pads in params["padding"] for pad in pads):
        raise NoOperatorError("its padding is negative")
    x = t.graph.full(t.graph.stored_as(x, numbers.lhs_spec))
    kernel = kernel.transpose(numbers.rhs_spec)
    name = t.graph.op(
        "Conv",
        x.name,
        t.graph.constant(kernel),
        kernel_shape=list(kernel.shape[2:]),
        strides=list(params["window_strides"]),
        pads=joined(params["padding"]),
        dilations=list(params["rhs_dilation"]),
        group=int(params["feature_group_count"]),
    )
    shape = sizes(equation.outvars[0].aval.shape)
    return Tensor(name, shape, tuple(numbers.out_spec), shape, np.dtype(np.float32))


def with_bias(t: Translation, x: Tensor, bias: Value) -> str | None:
    """A convolution or product with one number for each of its filters added, by a node of its own; None if x is none.

    The node without it remains where something else needs that.
    """
    if isinstance(bias, Tensor):
        return None
    conv, gemm = t.graph.maker(x.name, "Conv"), t.graph.maker(x.name, "Gemm")
    node = conv or gemm
    if node is None:
        return None
    axis = x.order[1]
    features = x.shape[axis]
    shape = bias.shape
    if bias.size != 1 and (len(shape) != len(x.shape) or shape[axis] != features or bias.size != features):
        return None
    if bias.size == 1 and not isinstance(features, int):
        return None
    numbers = np.broadcast_to(np.asarray(bias, np.float32).reshape(-1), (int(features),))
    if len(node.inputs) == 3:
        numbers = numbers + t.graph.constants[node.inputs[2]]
    return t.graph.op(node.kind, *node.inputs[:2], t.graph.constant(numbers), **dict(node.attributes))


def scaled(t: Translation, x: Tensor, factor: Value) -> str | None:
    """A convolution times one number for each of its filters, by its kernel; None if x is none."""
    node = t.graph.maker(x.name, "Conv")
    if node is None or isinstance(factor, Tensor):
        return None
    axis = x.order[1]
    if factor.size != 1 and (factor.ndim != len(x.shape) or factor.shape[axis] != factor.size):
        return None
    numbers = np.asarray(factor, np.float32).reshape(-1)
    kernel = t.graph.constants[node.inputs[1]]
    more = [t.graph.constant(t.graph.constants[name] * numbers) for name in node.inputs[2:]]
    kernel = kernel * numbers.reshape(-1, *(1,) * (kernel.ndim - 1))
    return t.graph.op("Conv", node.inputs[0], t.graph.constant(kernel), *more, **dict(node.attributes))


@rule("dot_general")
def _product(t: Translation, equation: Any, a: Value, b: Value) -> Tensor:
    (a_sum, b_sum), (a_batch, b_batch) = equation.params["dimension_numbers"]
    shape = sizes(equation.outvars[0].aval.shape)
    known = isinstance(a, Tensor) and not isinstance(b, Tensor) and b.ndim == 2 and not a_batch
    if known and tuple(a_sum) == (len(a.shape) - 1,):
        assert isinstance(a, Tensor)
        assert isinstance(b, np.ndarray)
        return _dense(t, a, b if b_sum[0] == 0 else b.T, shape)
    if len(a_sum) != 1:
        raise NoOperatorError("it sums over several axes")

    x, y = _bare(t, a, a_batch, a_sum[0], last=True), _bare(t, b, b_batch, b_sum[0], last=False)
    inner = (*x.shape[:-1], y.shape[-1])
    name = t.graph.op("MatMul", x.name, y.name)
    return t.graph.reshaped(Tensor(name, inner, tuple(range(len(inner))), inner, np.dtype(np.float32)), shape)


def _bare(t: Translation, value: Value, batch: Sequence[int], summed: int, last: bool) -> Tensor:
    """An operand as [batch, ..., free, summed], or summed before free; of its free axes, one is left, not of size 1."""
    if not isinstance(value, Tensor):
        order = tuple(range(value.ndim))
        value = Tensor(t.graph.constant(value), value.shape, order, value.shape, value.dtype)
    free = [axis for axis in range(len(value.shape)) if axis not in (*batch, summed)]
    gone = [axis for axis in free if value.shape[axis] == 1][: len(free) - 1] if free else []
    if len(free) - len(gone) != 1:
        raise NoOperatorError("one of its operands is a vector, or has too many axes")
    kept = [axis for axis in range(len(value.shape)) if axis not in gone]
    value = t.graph.full(t.graph.reshaped(value, tuple(value.shape[axis] for axis in kept)))
    (rest,) = [axis for axis in free if axis not in gone]
    order = tuple(kept.index(axis) for axis in (*batch, *((rest, summed) if last else (summed, rest))))
    value = t.graph.stored_as(value, order)
    return Tensor(value.name, value.stored, tuple(range(len(order))), value.stored, value.dtype)


def _dense(t: Translation, x: Tensor, kernel: np.ndarray, shape: tuple[Size, ...]) -> Tensor:
    """The last axis times a matrix [inputs, outputs]."""
    x, dtype = t.graph.full(x), np.dtype(np.float32)
    if x.order == CHANNELS_FIRST:
        whole = t.graph.constant(kernel.T[:, :, None, None])
        name = t.graph.op(
            "Conv", x.name, whole, kernel_shape=[1, 1], strides=[1, 1], pads=[0] * 4, dilations=[1, 1], group=1
        )
        return Tensor(name, shape, CHANNELS_FIRST, shape, dtype)
    order = tuple(range(len(shape)))
    x = t.graph.stored_as(x, order)
    kind = "Gemm" if len(shape) == 2 else "MatMul"
    return Tensor(t.graph.op(kind, x.name, t.graph.constant(kernel)), shape, order, shape, dtype)


@rule("reduce_window_max", "reduce_window_sum")
def _pool(t: Translation, equation: Any, x: Tensor) -> Tensor:
    params = equation.params
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
    outside = [(window[a], strides[a], tuple(padding[a])) for a in (0, len(window) - 1)]
    if dilated or outside != [(1, 1, (0, 0))] * 2 or any(pad < 0 for pads in padding for pad in pads):
        raise NoOperatorError("its windows are dilated, or reach over images or channels")
    first = (0, len(window) - 1, *range(1, len(window) - 1))
    x = t.graph.full(t.graph.stored_as(x, first))
    shape = sizes(equation.outvars[0].aval.shape)
    maximum = equation.primitive.name == "reduce_window_max"
    inner = tuple(window[1:-1]), tuple(strides[1:-1]), tuple(tuple(pads) for pads in padding[1:-1])
    if maximum:
        return Tensor(_windows(t.graph, "MaxPool", x, inner), shape, first, shape, x.dtype)
    mean = _windows(t.graph, "AveragePool", x, inner, count_include_pad=1)
    name = t.graph.op("Mul", mean, t.graph.constant(np.float32(math.prod(window))))
    t.sums[name] = Sum(x, math.prod(window), window=inner)
    return Tensor(name, shape, first, shape, x.dtype)


def _windows(graph: Graph, kind: str, x: Tensor, window: Any, **attributes: Any) -> str:
    size, strides, padding = window
    return graph.op(kind, x.name, kernel_shape=list(size), strides=list(strides), pads=joined(padding), **attributes)


def mean_of(t: Translation, x: Tensor, divisor: Value) -> Tensor | None:
    """A sum divided by how many numbers it adds up, as a mean or a pool of averages; None if that is not what it is."""
    # Summed with keepdims=True.
    longer = t.graph.maker(x.name, "Unsqueeze")
    known = t.sums.get(longer.inputs[0] if longer is not None else x.name)
    if known is None or isinstance(divisor, Tensor):
        return None
    whole = divisor.size > 0 and bool(np.allclose(divisor, known.count, rtol=1e-6))
    if known.window is None:
        if not whole:
            return None
        axes = sorted(known.source.place(axis) for axis in known.axes)
        name = t.graph.op("ReduceMean", known.source.name, axes=axes, keepdims=0)
        if longer is not None:
            name = t.graph.unsqueezed(name, t.graph.constants[longer.inputs[1]].tolist())
        return dataclasses.replace(x, name=name)
    if whole:
        return dataclasses.replace(
            x, name=_windows(t.graph, "AveragePool", known.source, known.window, count_include_pad=1)
        )
    ones = np.ones(known.source.shape[1:-1])
    if np.array_equal(
        np.broadcast_to(divisor, (1, *map(int, x.shape[1:])))[0, ..., 0], _window_sums(ones, known.window)
    ):
        return dataclasses.replace(
            x, name=_windows(t.graph, "AveragePool", known.source, known.window, count_include_pad=0)
        )
    return None


def _window_sums(maps: np.ndarray, window: Any) -> np.ndarray:
    size, strides, padding = window
    views = np.lib.stride_tricks.sliding_window_view(np.pad(maps, padding), size)
    views = views[tuple(slice(None, None, step) for step in strides)]
    return views.sum(tuple(range(maps.ndim, 2 * maps.ndim)))


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(t: Translation, equation: Any, x: Tensor) -> Tensor:
    axes = tuple(equation.params["axes"])
    x = t.graph.full(x)
    stored = sorted(x.place(axis) for axis in axes)
    kind = f"Reduce{equation.primitive.name.removeprefix('reduce_').capitalize()}"
    shape = sizes(equation.outvars[0].aval.shape)
    if not axes:
        return x
    if kind != "ReduceSum":
        return t.without(x, t.graph.op(kind, x.name, axes=stored, keepdims=0), axes, shape)
    name = t.graph.op(kind, x.name, t.graph.constant(np.array(stored, np.int64)), keepdims=0)
    if all(isinstance(x.shape[axis], int) for axis in axes):
        t.sums[name] = Sum(x, count([x.shape[axis] for axis in axes]), axes)
    return t.without(x, name, axes, shape)


@rule("reduce_or", "reduce_and")
def _any_or_all(t: Translation, equation: Any, x: Tensor) -> Tensor:
    axes = tuple(equation.params["axes"])
    kind = "ReduceMax" if equation.primitive.name == "reduce_or" else "ReduceMin"
    numbers = t.unary(t.graph.full(x), "Cast", to=np.dtype(np.float32))
    stored = sorted(x.place(axis) for axis in axes)
    name = t.graph.op("Cast", t.graph.op(kind, numbers.name, axes=stored, keepdims=0), to=np.dtype(bool))
    return t.without(x, name, axes, sizes(equation.outvars[0].aval.shape))


@rule("argmax", "argmin")
def _largest(t: Translation, equation: Any, x: Tensor) -> Tensor:
    axes = tuple(equation.params["axes"])
    kind = "ArgMax" if equation.primitive.name == "argmax" else "ArgMin"
    x = t.graph.full(x)
    name = t.graph.op(kind, x.name, axis=x.place(axes[0]), keepdims=0)
    name = t.graph.op("Cast", name, to=np.dtype(np.int32))
    return t.without(x, name, axes, sizes(equation.outvars[0].aval.shape), np.int32)
