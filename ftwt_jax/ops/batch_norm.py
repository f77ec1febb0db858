"""Batch norm whose sums over a batch are fast on a CPU."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ftwt_jax.ops.reductions import channel_sum, over_channels

MOMENTUM = 0.9
EPSILON = 1e-5


def of_batch_alone(before: Any, after: Any) -> Any:
    """The statistics of a batch itself, out of running statistics before and after it: trees of arrays."""
    return jax.tree.map(lambda old, new: (new - MOMENTUM * old) / (1 - MOMENTUM), before, after)


class BatchNorm(nn.Module):
    """`flax.linen.BatchNorm` over the last axis, same variables and values, with PyTorch's epsilon and momentum.

    Attributes:
      use_running_average: normalise by the running statistics instead of the batch's, and do not update them.
      dtype: of the result; statistics and the normalisation itself are float32.
    """

    use_running_average: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        if x.ndim != 4:
            raise ValueError(f"batch norm takes maps [N, H, W, C]; got shape {x.shape}")
        features = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        dtype = self.dtype or jnp.result_type(x, scale, bias)
        if self.use_running_average:
            factor = scale * lax.rsqrt(running_var.value + EPSILON)
            mean, factor, bias = (values[None, None, None] for values in (running_mean.value, factor, bias))
            return ((x - mean) * factor + bias).astype(dtype)

        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        count = x.size / x.shape[-1]
        mean = channel_sum(x) / count
        # Rounding can make the difference negative.
        var = jnp.maximum(channel_sum(jnp.square(x)) / count - jnp.square(mean), 0)
        if not self.is_initializing():
            running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
            running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * var
        factor = scale * lax.rsqrt(var + EPSILON)
        shape = x.shape
        y = (x - over_channels(mean, shape)) * over_channels(factor, shape) + over_channels(bias, shape)
        return y.astype(dtype)
