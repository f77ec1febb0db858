"""Which filters matter for an image: the ranking by heatmap mass that gives the gate heads their targets.

This is the only place where a target is computed (section 3.2 of the paper, "self-supervised mask prediction"). To try
another ranking rule, change `filter_mass` (what a filter is worth) or `topk_mass_mask` (how many are kept).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

TOLERANCE = 1e-5


def filter_mass(feature_maps: Float[Array, "N H W C"]) -> Float[Array, "N C"]:
    """The heatmap mass of each filter: its largest absolute activation over all pixels, in float32."""
    return jnp.max(jnp.abs(feature_maps), axis=(1, 2)).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="min_filters")
def topk_mass_mask(
    feature_maps: Float[Array, "N H W C"], r: Float[Array, ""] | float, min_filters: int = 1
) -> Bool[Array, "N C"]:
    """Marks, per image, the strongest filters that together hold at most the share `r` of the heatmap mass.

    With p the mass of each filter over the sum of all, sorted descending, and c its cumulative sum, the filters with
    c <= r + 1e-5 are kept; at r = 1 those with p > 1e-5, that is, those that respond at one pixel at least. Among
    filters of equal mass the one with the lower index comes first, so exactly as many are kept as the cumulative sum
    allows.

    Args:
      feature_maps: a layer's own output before masking, [N, H, W, C], any float dtype; the ranking runs in float32.
      r: mass threshold in (0, 1]. A traced scalar: another value does not recompile. Below the range it acts as "only
        `min_filters`", above it as 1.
      min_filters: at least this many of the strongest filters are kept. The published rule is 0: it drops every filter
        where the strongest alone holds more than `r`.

    Returns:
      bool [N, C]. An image whose maps are all zero keeps no filter, whatever `min_filters` says.
    """
    mass = filter_mass(feature_maps)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    safe_total = jnp.where(total > 0, total, 1)

    # One sort of plain values; a comparison with the weakest value kept leads back to filters, so that no indices are
    # sorted and nothing is scattered.
    descending = jnp.sort(mass, axis=-1, descending=True)
    share = descending / safe_total
    kept = jnp.where(r >= 1, share > TOLERANCE, jnp.cumsum(share, axis=-1) <= r + TOLERANCE)
    kept |= jnp.arange(mass.shape[-1])[None] < min_filters
    count = jnp.sum(kept, axis=-1, keepdims=True)
    weakest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)

    stronger = mass > weakest
    tied = mass == weakest
    room = count - jnp.sum(stronger, axis=-1, keepdims=True)
    chosen = stronger | (tied & (jnp.cumsum(tied, axis=-1) <= room))
    return chosen & (total > 0)
