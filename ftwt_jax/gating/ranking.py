"""Which filters matter for an image: the ranking by heatmap mass that gives the gate heads their targets.

This is the only place where a target is computed (section 3.2 of the paper, "self-supervised mask prediction"). To try
another ranking rule, change `filter_mass` (what a filter is worth) or `topk_mass_mask` (how many are kept).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ftwt_jax.ops.reductions import max_pool_all

TOLERANCE = 1e-5


def filter_mass(feature_maps: Float[Array, "N H W C"]) -> Float[Array, "N C"]:
    """The heatmap mass of each filter: its largest absolute activation over all pixels, in float32."""
    return max_pool_all(jnp.abs(feature_maps)).astype(jnp.float32)


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

    limit = jnp.float32(r) + TOLERANCE
    lit = (r >= 1) & (mass > TOLERANCE * safe_total)
    strongest = lax.platform_dependent(
        mass,
        safe_total,
        jnp.where(r >= 1, -jnp.inf, limit),
        cpu=functools.partial(_by_bisection, min_filters=min_filters),
        default=functools.partial(_by_sorting, min_filters=min_filters),
    )
    return (lit | strongest) & (total > 0)


def _by_sorting(
    mass: Float[Array, "N C"], total: Float[Array, "N 1"], limit: Float[Array, ""], *, min_filters: int
) -> Bool[Array, "N C"]:
    """The strongest filters whose shares of the total sum up to at most `limit`, or the strongest `min_filters`."""
    # One sort of plain values; a comparison with the weakest value kept leads back to filters, so that no indices are
    # sorted and nothing is scattered.
    descending = jnp.sort(mass, axis=-1, descending=True)
    kept = jnp.cumsum(descending / total, axis=-1) <= limit
    kept |= jnp.arange(mass.shape[-1]) < min_filters
    count = jnp.sum(kept, axis=-1, keepdims=True)
    weakest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return _strongest(mass, weakest, count - jnp.sum(mass > weakest, axis=-1, keepdims=True))


def _by_bisection(
    mass: Float[Array, "N C"], total: Float[Array, "N 1"], limit: Float[Array, ""], *, min_filters: int
) -> Bool[Array, "N C"]:
    """The same without a sort, which on a CPU takes 6 times as long for 1,024 filters."""
    share = mass / total
    # Numbers that are not negative are in the same order as their bits.
    bits = lax.bitcast_convert_type(mass, jnp.int32)

    def above(bound: Array) -> tuple[Array, Array]:
        """What the filters above `bound` hold together, and how many they are."""
        stronger = bits > bound
        held = jnp.sum(jnp.where(stronger, share, 0), axis=-1, keepdims=True)
        return held, jnp.sum(stronger, axis=-1, keepdims=True)

    def halve(step: Array, bound: Array) -> Array:
        # The largest bound such that the filters of `bound` and above are too many.
        higher = bound | (1 << (30 - step))
        held, count = above(higher - 1)
        return jnp.where((held <= limit) | (count <= min_filters), bound, higher)

    # 31 bits: all but the sign.
    bound = lax.fori_loop(0, 31, halve, jnp.zeros((len(mass), 1), jnp.int32))
    held, count = above(bound)
    weakest = lax.bitcast_convert_type(bound, jnp.float32)
    ranks = jnp.cumsum(mass == weakest, axis=-1)
    fits = held + ranks * (weakest / total) <= limit
    room = jnp.maximum(jnp.sum(fits & (mass == weakest), axis=-1, keepdims=True), min_filters - count)
    return _strongest(mass, weakest, room)


def _strongest(mass: Float[Array, "N C"], weakest: Float[Array, "N 1"], room: Int[Array, "N 1"]) -> Bool[Array, "N C"]:
    """The filters above `weakest` and the first `room` of those that equal it."""
    tied = mass == weakest
    return (mass > weakest) | (tied & (jnp.cumsum(tied, axis=-1) <= room))
