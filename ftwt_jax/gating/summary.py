"""Are the gates right, and are they dynamic at all? Counts over a data set, and the figures computed from them."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import GateOutput


@struct.dataclass
class GateCounts:
    """Counts for one unit over all images seen; int32 [C] each.

    Attributes:
      on: images for which each filter was on.
      wanted: images whose target holds the filter.
      agreed: images for which mask and target say the same of the filter.
    """

    on: Int[Array, " C"]
    wanted: Int[Array, " C"]
    agreed: Int[Array, " C"]


def count_gates(gates: Sequence[GateOutput], weight: Float[Array, " N"] | None = None) -> tuple[GateCounts, ...]:
    """Counts one batch; batches add up with `jax.tree.map(jnp.add, a, b)`.

    Args:
      gates: `outputs.gates` with targets.
      weight: 1 for an image that counts, 0 for one that pads the batch; None: all count.
    """

    def total(marks: Array) -> Array:
        keep = marks if weight is None else marks & (weight[:, None] > 0)
        return jnp.sum(keep, axis=0, dtype=jnp.int32)

    return tuple(
        GateCounts(total(gate.mask), total(gate.target), total(gate.mask == gate.target))
        for gate in gates
        if gate.target is not None
    )


@struct.dataclass
class GateReport:
    """The figures of a gated network, each a fraction in [0, 1].

    Attributes:
      gate_accuracy: share of (image, filter) pairs where the mask equals the target, averaged over units (as the
        published code does).
      static_gate_accuracy: what the best fixed mask (each filter's majority) would score on the same targets.
      dynamic_filters: share of filters that are neither on for every image nor off for every image.
      density: share of filters on, per unit.
      rates: for each unit, the share of images for which each filter was on.
    """

    gate_accuracy: float
    static_gate_accuracy: float
    dynamic_filters: float
    density: tuple[float, ...]
    rates: tuple[tuple[float, ...], ...]


def summarize_gates(counts: Sequence[GateCounts], samples: int) -> GateReport:
    """The figures over `samples` images.

    Raises:
      UserError: there are no gates, or no images.
    """
    if not counts or samples < 1:
        raise UserError(f"gate figures need gates with targets and images; got {len(counts)} gates, {samples} images")
    host = jax.device_get(tuple(counts))
    on = np.concatenate([c.on for c in host])
    return GateReport(
        gate_accuracy=_unit_mean(c.agreed / samples for c in host),
        static_gate_accuracy=_unit_mean(np.maximum(c.wanted, samples - c.wanted) / samples for c in host),
        dynamic_filters=float(np.mean((on > 0) & (on < samples))),
        density=tuple(float(np.mean(c.on / samples)) for c in host),
        rates=tuple(tuple(map(float, c.on / samples)) for c in host),
    )


def _unit_mean(per_filter: Iterable[np.ndarray]) -> float:
    return float(np.mean([np.mean(values) for values in per_filter]))
