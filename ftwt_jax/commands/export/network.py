"""Which network of a workdir `export` writes as a program or as ONNX."""

import dataclasses
from typing import Any

from ftwt_jax.budget.trained import CALIBRATION, first_images, gated_variables
from ftwt_jax.errors import UserError
from ftwt_jax.inference.compact import CompactNetwork, compact, fold
from ftwt_jax.training.run import Run, load_run
from ftwt_jax.training.settings import BASELINE, GATED


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A network of a workdir that runs by itself.

    Attributes:
      network: of images that `run.normalize` has prepared.
      masked: the same with nothing left out.
      kind: "dense", "gated, masked", or "compact".
      compacted: whether filters are left out.
    """

    run: Run
    network: Any
    masked: CompactNetwork
    kind: str
    compacted: bool = False


def choose_network(
    folder: str,
    compacted: bool = False,
    baseline: bool = False,
    best: bool = False,
    budget: float | None = None,
    data: str | None = None,
) -> Chosen:
    """The network of a workdir that flags ask for.

    Args:
      compacted: leave out filters as `compact` does, calibrated on training images.
      baseline: the dense baseline even where there is a gated network.
      budget: MACs reduction to bring the gates to; None: as they were trained.
      data: name of a data set to calibrate on, in place of the config's; only `compacted` and `budget` need images.

    Raises:
      UserError: the workdir has no such network, or the flags contradict each other.
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
    return Chosen(run, compact(run.models[GATED], variables, calibration, portable=True), masked, "compact", True)
