"""`export` to .stablehlo: a network as one file that runs wherever JAX does, without this package."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array
from rich.console import Console

from ftwt_jax.benchmark.inference import time_in_turns
from ftwt_jax.commands.export.network import Chosen
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.files import AnyPath, written_whole
from ftwt_jax.inference.compact import CompactNetwork
from ftwt_jax.printing import say
from ftwt_jax.training.run import Run

SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
# Held-out images that a compact program is timed on.
_TIMED = 32


def export_program(chosen: Chosen, target: AnyPath, console: Console) -> None:
    """Writes a workdir's network as StableHLO with its weights, for cpu, cuda and tpu.

    The program takes images uint8 [N, H, W, channels] as the data set gives them, normalises them itself, and returns
    logits float32 [N, classes]. N is open, or 1 if filters are left out; that program is timed against the masked one.

    Raises:
      UserError: the file cannot be written.
    """
    run, network = chosen.run, chosen.network
    network(run.example_images)
    written = _program(run, network, chosen.compacted)
    with written_whole(target) as temporary:
        temporary.write_bytes(written)
    kind = "compact, one image at a time" if chosen.compacted else chosen.kind
    say(console, f"{run.config.model.name}, {kind}, for {', '.join(PLATFORMS)}: written to {target}")
    if chosen.compacted:
        chosen.masked(run.example_images)
        say(console, _compared(written, _program(run, chosen.masked, single=True), run))


def _program(run: Run, network: CompactNetwork, single: bool) -> bytearray:
    """A network as StableHLO, for one image at a time or any number."""

    def program(images: Array) -> Array:
        return network(run.normalize(images)).logits

    samples: Any = 1 if single else export.symbolic_shape("samples")[0]
    images = jax.ShapeDtypeStruct((samples, *run.dataset.image_shape), jnp.uint8)
    return export.export(jax.jit(program), platforms=PLATFORMS)(images).serialize()


def _compared(compacted: bytearray, masked: bytearray, run: Run) -> str:
    """Median times of both programs on held-out images in turns, and their sizes."""
    programs = [jax.jit(export.deserialize(written).call) for written in (compacted, masked)]
    batch = next(iter(eval_batches(run.dataset, run.dataset.test, _TIMED, limit=_TIMED)))
    images = [jnp.asarray(image[None]) for image in batch["image"][batch["weight"] > 0]]
    quick, plain = time_in_turns(programs, images)
    sizes = " and ".join(f"{len(written) / 1e6:.3g}" for written in (compacted, masked))
    text = f"here on {jax.default_backend()}, one image takes {quick:.3g} ms, and {plain:.3g} ms in the masked program"
    text += f" ({sizes} MB)"
    return f"{text}, which is the better one here: leave out --compact" if quick >= plain else text
