"""Operators of our ONNX graphs as functions of PyTorch. Importing this needs PyTorch and onnx."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional

from ftwt_jax.engines.nodes import UnknownOperatorError

Function = Callable[..., Tensor]

# Functions of the same name as their operators.
_NAMED = "Abs Add Ceil Cos Div Erf Exp Floor Greater Less Log MatMul Mul Neg Pow Reciprocal Relu Sigmoid Sign Sin Sqrt"
_ELEMENTWISE: dict[str, Function] = {
    **{name: getattr(torch, name.lower()) for name in f"{_NAMED} Sub Tanh Where".split()},
    **{"And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor, "Not": torch.logical_not},
    **{"Equal": torch.eq, "GreaterOrEqual": torch.ge, "LessOrEqual": torch.le},
    **{"Max": torch.maximum, "Min": torch.minimum, "Identity": lambda x: x},
}
_REDUCED = {"ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin}


def operator(kind: str, attributes: Mapping[str, Any], inputs: Sequence[np.ndarray | None]) -> Function:
    """A node as a function of those of its inputs that are not constants, tensors.

    Kernels are made ready for maps stored channels last.

    Args:
      kind: of the node, such as "Conv".
      attributes: the node's, by name.
      inputs: those that are constants; None for one that depends on the images.

    Raises:
      UnknownOperatorError: the operator is not supported here.
    """
    constants = [None if one is None else torch.tensor(one) for one in inputs]
    if kind in _ELEMENTWISE:
        function = _ELEMENTWISE[kind]
    elif kind == "Concat":
        function = functools.partial(_concatenated, attributes["axis"])
    else:
        function, constants = _prepared(kind, attributes, constants[1:]), constants[:1]
    if all(one is None for one in constants):
        return function

    def completed(*given: Tensor) -> Tensor:
        rest = iter(given)
        return function(*(next(rest) if one is None else one for one in constants))

    return completed


def _concatenated(axis: int, *parts: Tensor) -> Tensor:
    return torch.cat(parts, axis)


def _prepared(kind: str, a: Mapping[str, Any], known: list[Any]) -> Function:
    """A node of whose inputs all but the first are constants, as a function of that first one."""
    match kind:
        case "Conv":
            return _convolution(a, *known)
        case "Gemm":
            weight, *bias = known[0].T.contiguous(), *known[1:]
            return lambda x: functional.linear(x, weight, *bias)
        case "MaxPool" | "AveragePool":
            return _pool(kind, a)
        case "Pad":
            pads, value = _pads(known[0].tolist()), float(known[1])
            return lambda x: functional.pad(x, pads, value=value)
        case "LayerNormalization":
            return lambda x: functional.layer_norm(x, known[0].shape, known[0], eps=a["epsilon"])
        case "Clip":
            bounds = [float(one) for one in known]
            return lambda x: torch.clamp(x, *bounds)
        case "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin":
            reduce: Any = _REDUCED[kind]
            axes, keepdim = (list(a["axes"]) if "axes" in a else known[0].tolist()), bool(a["keepdims"])
            return lambda x: reduce(x, axes, keepdim)
        case "ArgMax" | "ArgMin":
            place = torch.argmax if kind == "ArgMax" else torch.argmin
            return lambda x: place(x, a["axis"], bool(a["keepdims"]))
        case "Transpose":
            return lambda x: x.permute(a["perm"])
        case "Cast":
            dtype = torch.tensor(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(a["to"]))).dtype
            return lambda x: x.to(dtype)
        case "Gather":
            places = known[0]
            return lambda x: x.index_select(a["axis"], places) if places.ndim else x.select(a["axis"], int(places))
        case "Slice":
            starts, ends, axes, steps = (one.tolist() for one in known)
            cuts = dict(zip(axes, map(slice, starts, ends, steps), strict=True))
            return lambda x: x[tuple(cuts.get(axis, slice(None)) for axis in range(x.ndim))]
        case "Squeeze":
            return lambda x: x.squeeze(known[0].tolist())
        case "Unsqueeze":
            axes = sorted(known[0].tolist())
            return lambda x: functools.reduce(torch.unsqueeze, axes, x)
        case "Reshape":
            # 0 stands for the size that is there.
            sizes = known[0].tolist()
            return lambda x: x.reshape([size or x.shape[at] for at, size in enumerate(sizes)])
        case "Expand":
            sizes = known[0].tolist()
            return lambda x: x.expand(torch.broadcast_shapes(x.shape, sizes))
    raise UnknownOperatorError(f"the engine torch does not know the operator {kind}: leave the engine out")


def _pads(both: Sequence[int]) -> list[int]:
    """ONNX's pads, before all axes and then after them, as PyTorch wants them: by pairs, from the last axis on."""
    rank = len(both) // 2
    return [both[at] for axis in reversed(range(rank)) for at in (axis, rank + axis)]


def _convolution(a: Any, kernel: Tensor, bias: Tensor | None = None) -> Function:
    rank = len(a["strides"])
    convolve = getattr(torch, f"conv{rank}d")
    if rank == 2:
        kernel = kernel.contiguous(memory_format=torch.channels_last)
    outside, inside = _outside(a["pads"], a["pads"][:rank])
    more = (a["strides"], inside, a["dilations"], a["group"])
    if not outside:
        return lambda x: convolve(x, kernel, bias, *more)
    return lambda x: convolve(functional.pad(x, outside), kernel, bias, *more)


def _pool(kind: str, a: Any) -> Function:
    size, rank = a["kernel_shape"], len(a["kernel_shape"])
    outside, inside = _outside(a["pads"], [side // 2 for side in size])
    options = {"kernel_size": size, "stride": a["strides"], "padding": inside}
    if kind == "MaxPool":
        pool = functools.partial(getattr(functional, f"max_pool{rank}d"), **options)
        return (lambda x: pool(functional.pad(x, outside, value=-np.inf))) if outside else pool
    whole = bool(a["count_include_pad"])
    pool = functools.partial(getattr(functional, f"avg_pool{rank}d"), **options, count_include_pad=whole)
    if not outside:
        return pool
    if whole:
        return lambda x: pool(functional.pad(x, outside))
    # The zeros around the maps are not counted: shares of each window that lie inside.
    return lambda x: pool(functional.pad(x, outside)) / pool(functional.pad(torch.ones_like(x[:1, :1]), outside))


def _outside(pads: Sequence[int], most: Sequence[int]) -> tuple[list[int] | None, list[int]]:
    """What has to be padded first, None for nothing, and what the function of windows pads: both sides alike."""
    before, after = list(pads[: len(most)]), list(pads[len(most) :])
    if before == after and all(pad <= bound for pad, bound in zip(before, most, strict=True)):
        return None, before
    return _pads(pads), [0] * len(most)
