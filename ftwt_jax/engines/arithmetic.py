"""Arithmetic, comparisons and choices between numbers as ONNX nodes."""

import dataclasses
from typing import Any

import numpy as np

from ftwt_jax.engines.layers import mean_of, scaled, with_bias
from ftwt_jax.engines.nodes import NoOperatorError, Tensor
from ftwt_jax.engines.tracing import Translation, Value, rule

_UNARY = {
    **{"exp": "Exp", "log": "Log", "tanh": "Tanh", "sqrt": "Sqrt", "neg": "Neg", "abs": "Abs", "sign": "Sign"},
    **{"floor": "Floor", "ceil": "Ceil", "logistic": "Sigmoid", "erf": "Erf", "sin": "Sin", "cos": "Cos"},
}
_BINARY = {"pow": "Pow", "xor": "Xor", "or": "Or", "and": "And", "eq": "Equal"}
_COMPARED = {"gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual"}


@rule(*_UNARY)
def _unary(t: Translation, equation: Any, x: Tensor) -> Tensor:
    return t.unary(x, _UNARY[equation.primitive.name])


@rule(*_BINARY, *_COMPARED)
def _binary(t: Translation, equation: Any, a: Value, b: Value) -> Tensor:
    name = equation.primitive.name
    if name in ("or", "and", "xor") and equation.outvars[0].aval.dtype != bool:
        raise NoOperatorError("it works on bits")
    return t.elementwise({**_BINARY, **_COMPARED}[name], equation, a, b)


@rule("ne")
def _unequal(t: Translation, equation: Any, a: Value, b: Value) -> Tensor:
    return t.unary(t.elementwise("Equal", equation, a, b), "Not")


@rule("not")
def _not(t: Translation, equation: Any, x: Tensor) -> Tensor:
    if x.dtype != bool:
        raise NoOperatorError("it works on bits")
    return t.unary(x, "Not")


@rule("square", "integer_pow")
def _power(t: Translation, equation: Any, x: Tensor) -> Tensor:
    power = equation.params.get("y", 2)
    if power == 2:
        return t.unary(x, "Mul", x.name)
    if power == -1:
        return t.unary(x, "Reciprocal")
    return t.unary(x, "Pow", t.graph.constant(np.asarray(power, x.dtype)))


@rule("rsqrt")
def _one_by_root(t: Translation, equation: Any, x: Tensor) -> Tensor:
    return t.unary(t.unary(x, "Sqrt"), "Reciprocal")


@rule("erfc")
def _rest_of_erf(t: Translation, equation: Any, x: Tensor) -> Tensor:
    return t.elementwise("Sub", equation, np.float32(1), t.unary(x, "Erf"))


@rule("log1p")
def _log_of_more(t: Translation, equation: Any, x: Tensor) -> Tensor:
    return t.unary(t.elementwise("Add", equation, x, np.float32(1)), "Log")


@rule("copy", "copy_p", "stop_gradient", "reduce_precision", "sharding_constraint", "optimization_barrier", "name")
def _unchanged(t: Translation, equation: Any, *values: Value) -> list[Value]:
    return list(values)


def _parted(a: Value, b: Value) -> tuple[Tensor, Value]:
    """The one of two operands that depends on the images, and the other."""
    if isinstance(a, Tensor):
        return a, b
    assert isinstance(b, Tensor)
    return b, a


@rule("add", "add_any")
def _add(t: Translation, equation: Any, a: Value, b: Value) -> Tensor:
    x, other = _parted(a, b)
    name = with_bias(t, x, other)
    return t.elementwise("Add", equation, a, b) if name is None else dataclasses.replace(x, name=name)


@rule("sub")
def _subtract(t: Translation, equation: Any, a: Value, b: Value) -> Tensor:
    if isinstance(a, Tensor) and not isinstance(b, Tensor):
        name = with_bias(t, a, -b)
        if name is not None:
            return dataclasses.replace(a, name=name)
    return t.elementwise("Sub", equation, a, b)


@rule("mul")
def _multiply(t: Translation, equation: Any, a: Value, b: Value) -> Tensor:
    x, other = _parted(a, b)
    if not isinstance(other, Tensor):
        with np.errstate(divide="ignore"):
            mean = mean_of(t, x, 1 / np.asarray(other)) if x.dtype == np.float32 else None
        if mean is not None:
            return mean
        name = scaled(t, x, other)
        return t.elementwise("Mul", equation, a, b) if name is None else dataclasses.replace(x, name=name)
    for one, factor in ((x, other), (other, x)):
        # x * rsqrt(v)
        root = t.graph.maker(factor.name, "Reciprocal")
        if root is not None:
            normed = _layer_norm(t, one, root.inputs[0])
            if normed is not None:
                return normed
            return t.elementwise("Div", equation, one, dataclasses.replace(factor, name=root.inputs[0]))
    return t.elementwise("Mul", equation, a, b)


def _layer_norm(t: Translation, centred: Tensor, root: str) -> Tensor | None:
    """(x - mean) / sqrt(max(0, mean of x^2 - mean^2) + epsilon) over the last axis, as one node; None if it is not."""
    graph = t.graph

    def maker(name: str | None, kind: str) -> Any:
        return None if name is None else graph.maker(name, kind)

    difference, sqrt = maker(centred.name, "Sub"), maker(root, "Sqrt")
    more = sqrt and maker(sqrt.inputs[0], "Add")
    relu = more and maker(more.inputs[0], "Relu")
    variance = relu and maker(relu.inputs[0], "Sub")
    if difference is None or not variance:
        return None
    x, mean = difference.inputs
    last = len(centred.shape) - 1
    means, squares = maker(mean, "ReduceMean"), maker(variance.inputs[0], "ReduceMean")
    squared, square = maker(variance.inputs[1], "Mul"), squares and maker(squares.inputs[0], "Mul")
    epsilon = graph.scalar(more.inputs[1])
    if not (means and square and squared) or epsilon is None or centred.order != tuple(range(last + 1)):
        return None
    over_last = all(list(one.get("axes")) == [last] and one.get("keepdims") == 1 for one in (means, squares))
    if not over_last or means.inputs != (x,) or square.inputs != (x, x) or squared.inputs != (mean, mean):
        return None
    ones = graph.constant(np.ones(int(centred.shape[last]), np.float32))
    name = graph.op("LayerNormalization", x, ones, axis=-1, epsilon=epsilon)
    return dataclasses.replace(centred, name=name)


@rule("div")
def _divide(t: Translation, equation: Any, a: Value, b: Value) -> Tensor:
    mean = mean_of(t, a, b) if isinstance(a, Tensor) else None
    return t.elementwise("Div", equation, a, b) if mean is None else mean


@rule("max", "min")
def _bound(t: Translation, equation: Any, a: Value, b: Value) -> Tensor:
    upper = equation.primitive.name == "min"
    x, other = _parted(a, b)
    number = _number(other)
    if number is None or x.dtype != np.float32:
        return t.elementwise("Min" if upper else "Max", equation, a, b)
    if not upper:
        return t.unary(x, "Relu") if number == 0 else t.unary(x, "Clip", t.graph.constant(np.float32(number)))
    relu, clip = t.graph.maker(x.name, "Relu"), t.graph.maker(x.name, "Clip")
    if clip is not None and len(clip.inputs) == 3:
        clip = None
    bounded = relu or clip
    if bounded is not None:
        lower = 0.0 if clip is None else t.graph.scalar(clip.inputs[1])
        if lower is not None and lower <= number:
            return _clipped(t, dataclasses.replace(x, name=bounded.inputs[0]), lower, number)
    return t.elementwise("Min", equation, a, b)


@rule("clamp")
def _clamp(t: Translation, equation: Any, low: Value, x: Value, high: Value) -> Tensor:
    lower, upper = _number(low), _number(high)
    if isinstance(x, Tensor) and lower is not None and upper is not None and x.dtype == np.float32:
        return _clipped(t, x, lower, upper)
    above = t.elementwise("Max", equation, x, low)
    return t.elementwise("Min", equation, above, high)


def _clipped(t: Translation, x: Tensor, lower: Any, upper: Any) -> Tensor:
    return t.unary(x, "Clip", t.graph.constant(np.float32(lower)), t.graph.constant(np.float32(upper)))


def _number(value: Value) -> float | None:
    """The number that all of a constant's elements are."""
    if isinstance(value, Tensor) or value.size == 0 or not np.all(value == value.flat[0]):
        return None
    return float(value.flat[0])


@rule("select_n")
def _select(t: Translation, equation: Any, which: Value, *cases: Value) -> Value:
    if len(cases) != 2:
        raise NoOperatorError("it has more than two cases")
    if not isinstance(which, Tensor):
        if which.size and np.all(which == which.flat[0]):
            return cases[int(which.flat[0])]
    elif which.dtype != bool:
        which = t.unary(which, "Cast", to=np.dtype(bool), dtype=bool)
    return t.elementwise("Where", equation, which, cases[1], cases[0])


@rule("convert_element_type")
def _convert(t: Translation, equation: Any, x: Tensor) -> Tensor:
    dtype = t.dtype(equation)
    return x if dtype == x.dtype else t.unary(x, "Cast", to=dtype, dtype=dtype)
