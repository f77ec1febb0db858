"""`export` to .stablehlo: a network as one file that runs wherever JAX does, without this package."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array
from rich.console import Console

from ftwt_jax import workdir
from ftwt_jax.budget.trained import trained_subject
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath, written_whole
from ftwt_jax.inference.compact import compact, fold
from ftwt_jax.printing import say

SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def export_program(
    folder: str,
    out: str,
    console: Console,
    compacted: bool = False,
    baseline: bool = False,
    best: bool = False,
    budget: float | None = None,
) -> AnyPath:
    """Writes a workdir's network as StableHLO with its weights, for cpu, cuda and tpu.

    The program takes images uint8 [N, H, W, channels] as the data set gives them, normalises them itself, and returns
    logits float32 [N, classes]. N is open, or 1 if `compacted`.

    Args:
      compacted: leave out filters as `compact` does, calibrated on training images, for one image at a time.
      baseline: the dense baseline instead of the gated network.
      budget: MACs reduction to bring the gates to; None: as they were trained.

    Raises:
      UserError: there is no such network, or the file already exists or cannot be written.
    """
    target = workdir.absolute(out)
    if target.suffix != SUFFIX:
        raise UserError(f"--out takes a file that ends in {SUFFIX}; got {out}")
    if target.exists():
        raise UserError(f"{target} already exists: choose another file with --out")
    if compacted and baseline:
        raise UserError("--compact belongs to a gated network, and --baseline exports the dense one")
    if budget is not None and baseline:
        raise UserError("--budget moves gates, and --baseline exports the dense network, which has none")
    subject = trained_subject(folder, best, budget)
    if baseline:
        network = fold(subject.dense, subject.dense_variables)
    elif compacted:
        network = compact(subject.gated, subject.gated_variables, subject.calibration, portable=True)
    else:
        network = fold(subject.gated, subject.gated_variables)
    network(subject.held_out[:1])

    def program(images: Array) -> Array:
        return network(subject.normalize(images)).logits

    samples: Any = 1 if compacted else export.symbolic_shape("samples")[0]
    images = jax.ShapeDtypeStruct((samples, *subject.held_out.shape[1:]), jnp.uint8)
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(images)
    with written_whole(target) as temporary:
        temporary.write_bytes(exported.serialize())
    kind = "dense" if baseline else "compact, one image at a time" if compacted else "gated, masked"
    say(console, f"{subject.arch}, {kind}, for {', '.join(PLATFORMS)}: written to {target}")
    return target
