"""Batch statistics measured again, for masks other than those of training (Yu and Huang 2019, arXiv 1903.05134)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ftwt_jax.gating.gates import GateControl
from ftwt_jax.ops.batch_norm import of_batch_alone
from ftwt_jax.parallel.preemption import Preemption
from ftwt_jax.parallel.processes import all_gather
from ftwt_jax.parallel.sharding import each_batch, jit_on, put_batch, put_whole, replicated, shapes_of, split
from ftwt_jax.training.step import Normalize


class BatchStatistics:
    """Measures a gated network's batch statistics under the masks of its own heads; compiled once.

    Args:
      preemption: ends a measurement between two batches; None: one that nobody tells to stop.
    """

    def __init__(self, model: nn.Module, normalize: Normalize, mesh: Mesh, preemption: Preemption | None = None):
        def step(variables: Any, images: Array) -> Any:
            control = GateControl(targets=False)
            images = normalize(images)
            outputs, updates = model.apply(variables, images, train=True, control=control, mutable=["batch_stats"])
            routes = getattr(outputs, "routes", None)
            counts = None if routes is None else jax.nn.one_hot(routes.choice, routes.logits.shape[-1]).sum(axis=0)
            return of_batch_alone(variables.get("batch_stats", {}), updates.get("batch_stats", {})), counts

        whole = replicated(mesh)
        self._mesh, self._preemption = mesh, preemption or Preemption()
        self._step = jit_on(mesh, step, in_shardings=(whole, split(mesh)), out_shardings=whole)

    def compile(self, variables: Any, images: jax.ShapeDtypeStruct) -> None:
        """Compiles what `renewed` needs, for variables and images of these shapes and dtypes."""
        self._step.lower(shapes_of(variables, replicated(self._mesh)), images).compile()

    def renewed(self, variables: dict[str, Any], batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The variables with mean and variance averaged over these batches; if any is full, over the full ones alone.

        Args:
          batches: training images, as `eval_batches` gives them.

        Raises:
          Preempted: the run was told to stop.
        """
        # A batch that is full here may be partial on another process, and all processes must leave out the same ones.
        partial = all_gather([str(index) for index, batch in enumerate(batches) if not np.all(batch["weight"] > 0)])
        full = [batch for index, batch in enumerate(batches) if str(index) not in partial] or list(batches)

        def step(batch: dict[str, Any]) -> Any:
            return self._step(variables, put_batch({"image": batch["image"]}, self._mesh)["image"])

        found = each_batch(self._mesh, step, self._preemption.between(full))
        parts, counts = zip(*jax.device_get(found), strict=True)
        mean = jax.tree.map(lambda *leaves: _mean(np.stack(leaves), counts), *parts)
        return {**variables, "batch_stats": put_whole(mean, replicated(self._mesh))}


def _mean(statistics: Float[np.ndarray, "B ..."], counts: Sequence[Float[np.ndarray, " K"] | None]) -> np.ndarray:
    """The mean over batches; of statistics [B, K, C] of subnets, weighted by the images that each has in a batch."""
    if statistics.ndim < 3:
        return np.mean(statistics, axis=0)
    images = np.stack([one for one in counts if one is not None])[..., None]
    # One without any images has kept its statistics in every batch.
    weights = np.where(images.sum(axis=0) > 0, images, 1)
    return np.sum(statistics * weights, axis=0) / np.sum(weights, axis=0)
