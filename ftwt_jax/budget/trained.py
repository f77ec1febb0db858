"""The trained networks of a workdir, ready for inference: at the budget they were trained for, or at another."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftwt_jax.budget.calibrate import CalibratedNetwork, Calibration
from ftwt_jax.budget.estimate import known_estimate
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.errors import UserError
from ftwt_jax.training.run import load_run
from ftwt_jax.training.settings import BASELINE, GATED

# Images that compact execution is calibrated with, and images to measure on; never the same.
CALIBRATION, HELD_OUT = 256, 128


@dataclasses.dataclass(frozen=True)
class Subject:
    """A dense and a gated network, with images to run them on.

    Attributes:
      gates: "trained", or "synthetic": random heads on random weights.
      calibration, held_out: images as the networks take them, float32 [S, H, W, channels].
      normalize: turns the data set's images, uint8, into such.
    """

    arch: str
    gates: str
    dense: nn.Module
    gated: nn.Module
    dense_variables: Any
    gated_variables: Any
    calibration: jax.Array
    held_out: jax.Array
    normalize: Callable[[jax.Array], jax.Array]


def trained_subject(folder: str, best: bool = False, budget: float | None = None) -> Subject:
    """The newest (or best) networks of a workdir, with training images to calibrate and held-out images to measure on.

    Args:
      budget: MACs reduction to bring the gates to; None: as they were trained.

    Raises:
      UserError: there is no gated network, or no offset to its gates reaches the budget.
    """
    run = load_run(folder)
    if not run.has(GATED):
        raise UserError(
            f"{run.workdir} has no trained gates: train them, or give --arch and --budget for synthetic ones"
        )
    gated = run.trained(GATED, best)
    if budget is not None:
        gated = CalibratedNetwork(Calibration(run), gated, known_estimate(run)["r"]).at(budget)

    def first_images(split: Any, most: int) -> jax.Array:
        batches = eval_batches(run.dataset, split, run.config.eval_batch_size, limit=most)
        found = [run.normalize(jnp.asarray(batch["image"][batch["weight"] > 0])) for batch in batches]
        return jnp.concatenate(found)[:most]

    return Subject(
        run.config.model.name,
        "trained",
        run.models[BASELINE],
        run.models[GATED],
        run.trained(BASELINE),
        gated,
        first_images(run.dataset.train, CALIBRATION),
        first_images(run.dataset.test, HELD_OUT),
        run.normalize,
    )
