"""A network as an ONNX graph that every engine runs: channels first, batch norm folded in, any number of images."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ftwt_jax.engines import arithmetic, arrays, layers
from ftwt_jax.engines.nodes import CHANNELS_FIRST, IR_VERSION, OPSET, Graph, Node, Size, Tensor
from ftwt_jax.engines.packages import imported
from ftwt_jax.engines.tracing import OPEN, Translation, sizes, traced
from ftwt_jax.errors import UserError
from ftwt_jax.version import __version__

# Loaded for the rules that they register.
RULES_OF = (arithmetic, arrays, layers)
IMAGES, LOGITS = "images", "logits"


def onnx_model(function: Callable, images: jax.ShapeDtypeStruct, name: str, any_number: bool = True) -> Any:
    """A function of images as an ONNX model, for any number of images.

    Its input "images" is [N, H, W, C] as the function's, its output "logits" float32 [N, classes]. Weights are float32,
    whatever the function computes in.

    Args:
      function: images [N, H, W, C] to logits [N, classes], such as
        `lambda images: network(normalize(images)).logits` with a network of `fold`, or of `compact(portable=True)`.
      images: their shape, with any number of images, and dtype, uint8 or float32.
      name: of the graph, such as the network's.
      any_number: False: for as many images as `images` are, N, and no other number.

    Returns:
      An `onnx.ModelProto` that `onnx.checker` has checked.

    Raises:
      UserError: the package onnx is missing, or the function does something for which ONNX has no operator; the message
        names it and its layer.
    """
    onnx = imported("onnx", "a network as ONNX", "onnx")
    if len(images.shape) != 4 or images.dtype not in (np.uint8, np.float32):
        raise UserError(f"an ONNX network takes images [N, H, W, C], uint8 or float32; got {images}")
    program = traced(function, images) if any_number else jax.make_jaxpr(function)(images)
    shape = (OPEN, *sizes(images.shape[1:])) if any_number else sizes(images.shape)
    translation = Translation(Graph())
    first = Tensor(IMAGES, shape, (0, 1, 2, 3), shape, np.dtype(images.dtype))
    given = translation.graph.stored_as(first, CHANNELS_FIRST)
    (made,) = translation.run(program.jaxpr, program.consts, [given])
    (out,) = program.out_avals
    if not isinstance(made, Tensor) or len(made.shape) != 2:
        raise UserError(f"an ONNX network returns logits [N, classes] of its images; got {out.str_short()}")
    made = translation.graph.full(translation.graph.stored_as(made, (0, 1)))
    model = _model(onnx, translation.graph, shape, images.dtype, made, name)
    onnx.checker.check_model(model, full_check=True)
    return model


def _model(onnx: Any, graph: Graph, shape: tuple[Size, ...], dtype: Any, made: Tensor, name: str) -> Any:
    helper = onnx.helper
    nodes = used_nodes(graph.nodes, [made.name])
    renamed = {made.name: LOGITS}
    names = {name for node in nodes for name in needed_by(node)}
    constants = [
        onnx.numpy_helper.from_array(np.asarray(value, order="C"), held)
        for held, value in graph.constants.items()
        if held in names
    ]
    kinds = [helper.np_dtype_to_tensor_dtype(np.dtype(kind)) for kind in (dtype, made.dtype)]
    whole = helper.make_graph(
        [_node(onnx, node, renamed) for node in nodes],
        name,
        [helper.make_tensor_value_info(IMAGES, kinds[0], shape)],
        [helper.make_tensor_value_info(LOGITS, kinds[1], made.shape)],
        constants,
    )
    return helper.make_model(
        whole,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="ftwt_jax",
        producer_version=__version__,
    )


def _node(onnx: Any, node: Node, renamed: dict[str, str]) -> Any:
    helper = onnx.helper
    attributes = {}
    for key, value in node.attributes:
        if isinstance(value, np.dtype):
            value = helper.np_dtype_to_tensor_dtype(value)
        elif key in ("then_branch", "else_branch"):
            branch, outputs = value
            inner = [_node(onnx, one, renamed) for one in used_nodes(branch.nodes, outputs)]
            value = helper.make_graph(inner, key, [], [helper.make_empty_tensor_value_info(one) for one in outputs])
        attributes[key] = list(value) if isinstance(value, tuple) else value
    inputs, outputs = ([renamed.get(one, one) for one in names] for names in (node.inputs, node.outputs))
    return helper.make_node(node.kind, inputs, outputs, name=outputs[0], **attributes)


def needed_by(node: Node) -> set[str]:
    """What a node reads, its branches included."""
    names = set(node.inputs)
    for key in ("then_branch", "else_branch"):
        branch = node.get(key)
        if branch is not None:
            for one in used_nodes(branch[0].nodes, branch[1]):
                names |= needed_by(one)
    return names


def used_nodes(nodes: list[Node], outputs: Any) -> list[Node]:
    """The nodes that these outputs need, in order."""
    wanted, found = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            found.append(node)
            wanted |= needed_by(node)
    return found[::-1]
