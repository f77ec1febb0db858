"""`export` to .stablehlo: a network as one file that runs wherever JAX does, without this package."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array
from rich.console import Console

from ftwt_jax.benchmark.inference import time_in_turns
from ftwt_jax.budget.trained import CALIBRATION, first_images, gated_variables
from ftwt_jax.commands.command import file_to_write
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath, written_whole
from ftwt_jax.inference.compact import CompactNetwork, compact, fold
from ftwt_jax.printing import say
from ftwt_jax.training.run import Run, load_run
from ftwt_jax.training.settings import BASELINE, GATED

SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
# Held-out images that a compact program is timed on.
_TIMED = 32


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A network of a workdir that runs by itself.

    Attributes:
      network: of images that `run.normalize` has prepared.
      masked: the same with nothing left out.
      kind: "dense", "gated, masked", or "compact".
    """

    run: Run
    network: Any
    masked: CompactNetwork
    kind: str


def choose_network(
    folder: str,
    compacted: bool = False,
    baseline: bool = False,
    best: bool = False,
    budget: float | None = None,
    data: str | None = None,
) -> Chosen:
    """The network of a workdir that flags ask for, which `export_program` explains.

    Raises:
      UserError: there is no such network, or the flags do not go together.
    """
    if compacted and baseline:
        raise UserError("--compact belongs to a gated network, and --baseline exports the dense one")
    if budget is not None and baseline:
        raise UserError("--budget moves gates, and --baseline exports the dense network, which has none")
    needs_images = compacted or budget is not None
    if data is not None and not needs_images:
        raise UserError("--data names images to calibrate on, which only --compact and --budget do: leave it out")
    run = load_run(folder, data, images=needs_images)
    dense = baseline or not run.has(GATED)
    if dense and needs_images:
        raise UserError(f"{run.workdir} holds no gated network yet, and --compact and --budget belong to one")
    if dense:
        network = fold(run.models[BASELINE], run.trained(BASELINE, best))
        return Chosen(run, network, network, "dense")
    variables = gated_variables(run, best, budget)
    masked = fold(run.models[GATED], variables)
    if not compacted:
        return Chosen(run, masked, masked, "gated, masked")
    calibration = first_images(run, run.dataset.train, CALIBRATION)
    return Chosen(run, compact(run.models[GATED], variables, calibration, portable=True), masked, "compact")


def export_program(
    folder: str,
    out: str,
    console: Console,
    compacted: bool = False,
    baseline: bool = False,
    best: bool = False,
    budget: float | None = None,
    data: str | None = None,
) -> AnyPath:
    """Writes a workdir's network as StableHLO with its weights, for cpu, cuda and tpu.

    The program takes images uint8 [N, H, W, channels] as the data set gives them, normalises them itself, and returns
    logits float32 [N, classes]. N is open, or 1 if `compacted`. A compact program is timed against the masked one.

    Args:
      compacted: leave out filters as `compact` does, calibrated on training images, for one image at a time.
      baseline: the dense baseline even where there is a gated network.
      budget: MACs reduction to bring the gates to; None: as they were trained.
      data: name of a data set to calibrate on, in place of the config's; only `compacted` and `budget` need images.

    Raises:
      UserError: there is no such network, or the file already exists or cannot be written.
    """
    target = file_to_write(out, new=True)
    chosen = choose_network(folder, compacted, baseline, best, budget, data)
    run, network = chosen.run, chosen.network
    network(run.example_images)
    written = _program(run, network, compacted)
    with written_whole(target) as temporary:
        temporary.write_bytes(written)
    kind = "compact, one image at a time" if compacted else chosen.kind
    say(console, f"{run.config.model.name}, {kind}, for {', '.join(PLATFORMS)}: written to {target}")
    if compacted:
        chosen.masked(run.example_images)
        say(console, _compared(written, _program(run, chosen.masked, single=True), run))
    return target


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
