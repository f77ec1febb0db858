"""Sums, means and maxima over maps and batches, in an order that is fast on a CPU.

XLA's CPU backend vectorises a reduction over leading axes, but not one that leaves only the last of four axes. In two
steps, with a barrier that keeps XLA from merging them, the same reduction is up to 14 times faster. If several devices
share a batch (a mesh is set while the program is traced), sums over images take one step: between two, the devices
would exchange whole maps.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def shared_batch() -> bool:
    """Whether several devices share the batch of the program that is being traced."""
    return jax.sharding.get_abstract_mesh().size > 1


def channel_sum(x: Float[Array, "N H W C"]) -> Float[Array, " C"]:
    """Sum over images and positions."""
    if shared_batch():
        return jnp.sum(x, axis=(0, 1, 2))
    return lax.platform_dependent(
        x,
        cpu=lambda x: lax.optimization_barrier(jnp.sum(x, axis=0)).sum((0, 1)),
        default=lambda x: jnp.sum(x, axis=(0, 1, 2)),
    )


def over_channels(values: Float[Array, " C"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Brings values [C] to a shape that broadcasts to `shape`, [N, H, W, C]; the gradient to [C] is the fast sum."""
    if shared_batch():
        return values.reshape((1,) * (len(shape) - 1) + values.shape)
    one_image = (1, *shape[1:])
    return lax.platform_dependent(
        values,
        cpu=lambda values: lax.optimization_barrier(jnp.broadcast_to(values, one_image)),
        default=lambda values: jnp.broadcast_to(values, one_image),
    )


def as_maps(x: Float[Array, "N ... C"]) -> Float[Array, "N H W C"]:
    """Values with any number of axes between images and channels, as maps in two of them."""
    return x if x.ndim == 4 else x.reshape(x.shape[0], math.prod(x.shape[1:-1]), 1, x.shape[-1])


def max_pool_all(x: Float[Array, "N ... C"]) -> Float[Array, "N C"]:
    """Largest value of each map; where several pixels hold it, their gradients add up to the map's."""
    return lax.platform_dependent(as_maps(x), cpu=_max_by_halves, default=lambda x: jnp.max(x, axis=(1, 2)))


def _max_by_halves(x: Float[Array, "N H W C"]) -> Float[Array, "N C"]:
    # A maximum of two halves is a vectorised loop without a reduction: the rest is up to 6 times as fast.
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    for _ in range(3):
        pixels = x.shape[1]
        if isinstance(pixels, int) and pixels % 2 == 0 and pixels > 0:
            x = jnp.maximum(x[:, : pixels // 2], x[:, pixels // 2 :])
    return jnp.max(x, axis=1)


def mean_pool_all(x: Float[Array, "N ... C"]) -> Float[Array, "N C"]:
    """Mean of each map."""
    return lax.platform_dependent(
        as_maps(x),
        cpu=lambda x: lax.optimization_barrier(lax.optimization_barrier(jnp.mean(x, axis=1)).mean(axis=1)),
        default=lambda x: jnp.mean(x, axis=(1, 2)),
    )
