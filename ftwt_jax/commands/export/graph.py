"""`export` to .onnx: a network as one file that ONNX Runtime, OpenVINO and TensorRT run, without JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console

from ftwt_jax.commands.export.network import Chosen
from ftwt_jax.engines.graph import onnx_model
from ftwt_jax.files import AnyPath, written_whole
from ftwt_jax.printing import say

SUFFIX = ".onnx"


def export_graph(chosen: Chosen, target: AnyPath, console: Console) -> None:
    """Writes a workdir's network as ONNX with its weights in float32.

    It takes "images" uint8 [N, H, W, channels] as the data set gives them, normalises them itself, and returns "logits"
    float32 [N, classes]; N is open. Where filters are left out, the file holds the masked network too, for images that
    want another filter.

    Raises:
      UserError: ONNX has no operator for something in the network, or the file cannot be written.
    """
    run = chosen.run
    chosen.network(run.example_images)

    def program(images: Array) -> Array:
        return chosen.network(run.normalize(images)).logits

    images = jax.ShapeDtypeStruct((1, *run.dataset.image_shape), jnp.uint8)
    model = onnx_model(program, images, run.config.model.name)
    with written_whole(target) as temporary:
        temporary.write_bytes(model.SerializeToString())
    count = sum(node.op_type == "Conv" for node in model.graph.node)
    say(console, f"{run.config.model.name}, {chosen.kind}, {count} convolutions, as ONNX: written to {target}")
