"""Our ONNX graphs run by PyTorch on the CPU, eagerly, node by node. Importing this needs PyTorch and onnx."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from ftwt_jax.engines.torch_operators import operator

# Nodes whose results are arrays of their own, which a ReLU may overwrite.
_FRESH = ("Conv", "Add", "Sub", "Mul")


def open_torch(source: str | bytes, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """An ONNX network of ours as a function of images [N, H, W, C] to logits float32 [N, classes].

    Maps and kernels are stored channels last, as the images are.

    Args:
      source: the path of a file, or what is in one.
      threads: cores that a call uses; outside of calls, PyTorch keeps the number that it had.

    Raises:
      UnknownOperatorError: there is a node of a kind that is not known here.
    """
    graph = (onnx.load(source) if isinstance(source, str) else onnx.load_from_string(source)).graph
    program, images_name = _Program(graph, {}), graph.input[0].name

    def run(images: np.ndarray) -> np.ndarray:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                # PyTorch warns of arrays that cannot be written.
                given = torch.from_numpy(np.require(images, requirements=["C", "W"]))
                return program({images_name: given})[0].numpy()
        finally:
            torch.set_num_threads(before)

    return run


class _Program:
    """A graph, or a branch of one, which reads what the graph around it has made."""

    def __init__(self, graph: Any, outer: Mapping[str, np.ndarray]):
        held = {**outer, **{one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}}
        reads = [_reads(node) for node in graph.node]
        makers = {name: node.op_type for node in graph.node for name in node.output}
        self._outputs = [one.name for one in graph.output]
        uses = Counter([*self._outputs, *(name for names in reads for name in names)])
        last = {name: at for at, names in enumerate(reads) for name in names if name in makers}
        self._steps: list[tuple[Any, list[str], list[str], list[str]]] = []
        for at, node in enumerate(graph.node):
            first = node.input[0]
            attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            if node.op_type == "If":
                function: Any = [_Program(attributes[f"{which}_branch"], held) for which in ("else", "then")]
            elif node.op_type == "Relu" and uses[first] == 1 and makers.get(first) in _FRESH:
                function = torch.relu_
            else:
                function = operator(node.op_type, attributes, [held.get(name) for name in node.input])
            inputs = [name for name in node.input if name not in held]
            gone = [name for name in reads[at] if last.get(name) == at and name not in self._outputs]
            self._steps.append((function, inputs, list(node.output), gone))

    def __call__(self, values: dict[str, Tensor]) -> list[Tensor]:
        """Adds what its nodes make to `values`, arrays by name; what no later node reads is taken out again."""
        for function, inputs, outputs, gone in self._steps:
            given = [values[name] for name in inputs]
            if isinstance(function, list):
                values.update(zip(outputs, function[bool(given[0])](values), strict=True))
            else:
                values[outputs[0]] = function(*given)
            for name in gone:
                del values[name]
        return [values[name] for name in self._outputs]


def _reads(node: Any) -> set[str]:
    """What a node reads, its branches included."""
    inner = [one for attribute in node.attribute for one in attribute.g.node]
    return set(node.input).union(*map(_reads, inner))
