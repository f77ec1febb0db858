"""`export` to .onnx: a network as one file that ONNX Runtime, OpenVINO and TensorRT run, without JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console

from ftwt_jax.commands.command import file_to_write
from ftwt_jax.commands.export.program import choose_network
from ftwt_jax.engines.graph import onnx_model
from ftwt_jax.engines.packages import imported
from ftwt_jax.files import AnyPath, written_whole
from ftwt_jax.printing import say

SUFFIX = ".onnx"


def export_graph(
    folder: str,
    out: str,
    console: Console,
    compacted: bool = False,
    baseline: bool = False,
    best: bool = False,
    budget: float | None = None,
    data: str | None = None,
) -> AnyPath:
    """Writes a workdir's network as ONNX with its weights in float32.

    It takes "images" uint8 [N, H, W, channels] as the data set gives them, normalises them itself, and returns "logits"
    float32 [N, classes]; N is open.

    Args:
      compacted: leave out filters as `compact` does, calibrated on training images; the file then holds the masked
        network too, for images that want another filter.
      baseline: the dense baseline even where there is a gated network.
      budget: MACs reduction to bring the gates to; None: as they were trained.
      data: name of a data set to calibrate on, in place of the config's; only `compacted` and `budget` need images.

    Raises:
      UserError: the package onnx is missing, there is no such network, ONNX has no operator for something in it, or the
        file already exists or cannot be written.
    """
    target = file_to_write(out, new=True)
    # Before anything is loaded.
    imported("onnx", "--format=onnx", "onnx")
    chosen = choose_network(folder, compacted, baseline, best, budget, data)
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
    return target
