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
from ftwt_jax.data.source import Source
from ftwt_jax.errors import UserError
from ftwt_jax.subnets.network import SubnetNetwork
from ftwt_jax.training.run import Run, load_run
from ftwt_jax.training.settings import BASELINE, GATED, SUBNETS

# Images that compact execution is calibrated with, and images to measure on; never the same.
CALIBRATION, HELD_OUT = 256, 128


@dataclasses.dataclass(frozen=True)
class Subject:
    """A dense and a gated network, with images to run them on.

    Attributes:
      gates: "trained", or "synthetic": random heads on random weights.
      calibration, held_out: images as the networks take them, float32 [S, H, W, channels].
      normalize: turns the data set's images, uint8, into such.
      subnets: the network with subnets and its variables; None without such.
      note: why the images are random ones, where they should be those of a workdir.
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
    note: str = ""
    subnets: tuple[SubnetNetwork, Any] | None = None


def trained_subject(folder: str, best: bool = False, budget: float | None = None, data: str | None = None) -> Subject:
    """The newest (or best) networks of a workdir, with training images to calibrate and held-out images to measure on.

    Where its images are not on this machine, random ones take their place.

    Args:
      budget: MACs reduction to bring the gates to; None: as they were trained.
      data: name of a data set to use in place of the config's.

    Raises:
      UserError: the run has no gated network, its gates cannot reach the budget, or the images that the budget needs
        are not on this machine.
    """
    run, note = _with_images_or_without(folder, data, must=budget is not None or data is not None)
    if not run.has(GATED):
        raise UserError(
            f"{run.workdir} has no trained gates: train them, or give --arch and --budget for synthetic ones"
        )
    if note:
        images = random_images(CALIBRATION + HELD_OUT, run.dataset.image_shape, jax.random.key(0))
        parts = images[:CALIBRATION], images[CALIBRATION:]
    else:
        parts = first_images(run, run.dataset.train, CALIBRATION), first_images(run, run.dataset.test, HELD_OUT)
    return Subject(
        run.config.model.name,
        "trained",
        run.models[BASELINE],
        run.models[GATED],
        run.trained(BASELINE, best),
        gated_variables(run, best, budget),
        *parts,
        run.normalize,
        note,
        _subnets(run, best),
    )


def _subnets(run: Run, best: bool) -> tuple[SubnetNetwork, Any] | None:
    if not run.has(SUBNETS):
        return None
    model = run.models[SUBNETS]
    assert isinstance(model, SubnetNetwork)
    return model, run.trained(SUBNETS, best)


def _with_images_or_without(folder: str, data: str | None, must: bool) -> tuple[Run, str]:
    try:
        return load_run(folder, data), ""
    except UserError as error:
        if must:
            raise
        # Whatever else is wrong is wrong again.
        return load_run(folder, images=False), f"random images, since its own cannot be loaded ({error})"


def gated_variables(run: Run, best: bool = False, budget: float | None = None) -> Any:
    """The newest (or best) gated network of a run, brought to a budget if one is given."""
    gated = run.trained(GATED, best)
    if budget is None:
        return gated
    return CalibratedNetwork(Calibration(run), gated, known_estimate(run)["r"]).at(budget)


def first_images(run: Run, split: Source, most: int) -> jax.Array:
    """The first images of a split as the networks take them, float32 [S, H, W, channels]."""
    batches = eval_batches(run.dataset, split, run.config.eval_batch_size, limit=most)
    found = [run.normalize(jnp.asarray(batch["image"][batch["weight"] > 0])) for batch in batches]
    return jnp.concatenate(found)[:most]


def random_images(count: int, shape: tuple[int, int, int], key: jax.Array) -> jax.Array:
    """Large blobs of colour, so that images differ by more than their noise: float32 [count, *shape], about N(0, 1)."""
    blobs, noise = jax.random.split(key)
    images = jax.random.normal(blobs, (count, 4, 4, shape[-1]))
    images = 2 * jax.image.resize(images, (count, *shape), "bilinear")
    return images + 0.3 * jax.random.normal(noise, images.shape)
