"""The rows of the table that `benchmark --engines` prints."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ftwt_jax.budget.trained import Subject

Run = Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A network to time.

    Attributes:
      runs: images float32 [N, H, W, channels], prepared as the subject's are, to anything; by engine and dtype.
      macs: exact MACs of an image, on average.
      most: images that it takes at once; None: any number.
    """

    runs: Mapping[tuple[str, str], Run]
    macs: float
    most: int | None = None


def image_of(subject: Subject) -> tuple[int, ...]:
    """The shape of an image, [H, W, channels]."""
    return tuple(subject.held_out.shape[1:])


def wait(run: Callable) -> Run:
    """A function of JAX's as one of NumPy images."""
    return lambda images: run(jnp.asarray(images))
