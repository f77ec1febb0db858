"""Batch norm whose sums over a batch are fast on a CPU."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ftwt_jax.ops import native
from ftwt_jax.ops.reductions import as_maps, channel_sum, over_channels, shared_batch

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
    def __call__(self, maps: Float[Array, "N ... C"]) -> Float[Array, "N ... C"]:
        x = as_maps(maps)
        features = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        dtype = self.dtype or jnp.result_type(x, scale, bias)
        if self.use_running_average:
            factor = scale * lax.rsqrt(running_var.value + EPSILON)
            y = (x - _over(running_mean.value)) * _over(factor) + _over(bias)
            return y.astype(dtype).reshape(maps.shape)

        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y, mean, var = (_by_kernel if _kernel_fits(x) else _by_xla)(x, scale, bias)
        if not self.is_initializing():
            running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
            running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * var
        return y.astype(dtype).reshape(maps.shape)


class BatchNormBySubnet(nn.Module):
    """Batch norm with statistics, scale and bias for each subnet (after Yu et al. 2019, arXiv 1812.08928).

    What a layer sums up depends on which of its inputs are there, so the images of each subnet have statistics of their
    own. Folded into a subnet's convolutions they cost nothing.

    Attributes:
      count: number of subnets, K; all arrays are [K, C].
      Others as of `BatchNorm`. A subnet without images in a batch keeps its running statistics.
    """

    count: int
    use_running_average: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, maps: Float[Array, "N ... C"], choice: Int[Array, " N"]) -> Float[Array, "N ... C"]:
        x = as_maps(maps)
        shape = (self.count, x.shape[-1])
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        dtype = self.dtype or jnp.result_type(x, scale, bias)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = running_mean.value, running_var.value
        if not self.use_running_average:
            own = jax.nn.one_hot(choice, self.count, dtype=jnp.float32)
            images = jnp.sum(own, axis=0)[:, None]
            numbers = jnp.maximum(images, 1) * (x.shape[1] * x.shape[2])
            mean = own.T @ jnp.sum(x, axis=(1, 2)) / numbers
            # Rounding can make the difference negative.
            var = jnp.maximum(own.T @ jnp.sum(jnp.square(x), axis=(1, 2)) / numbers - jnp.square(mean), 0)
            if not self.is_initializing():
                momentum = jnp.where(images > 0, MOMENTUM, 1.0)
                running_mean.value = momentum * running_mean.value + (1 - momentum) * mean
                running_var.value = momentum * running_var.value + (1 - momentum) * var
        factor = scale * lax.rsqrt(var + EPSILON)
        shift = bias - mean * factor
        y = x * factor[choice][:, None, None] + shift[choice][:, None, None]
        return y.astype(dtype).reshape(maps.shape)


def _by_xla(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Maps normalised by their own statistics, and these: mean and variance."""
    count = x.size / x.shape[-1]
    mean = channel_sum(x) / count
    # Rounding can make the difference negative.
    var = jnp.maximum(channel_sum(jnp.square(x)) / count - jnp.square(mean), 0)
    factor = scale * lax.rsqrt(var + EPSILON)
    shape = x.shape
    y = (x - over_channels(mean, shape)) * over_channels(factor, shape) + over_channels(bias, shape)
    return y, mean, var


def _kernel_fits(x: Array) -> bool:
    # If several devices share a batch, XLA would first bring the whole of it to each.
    return x.dtype == jnp.float32 and not shared_batch() and jax.default_backend() == "cpu" and native.available()


def _by_kernel(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """The same, faster on a CPU: both sums in one pass, forward and backward. No gradient flows through statistics."""
    y, mean, var = _normalized(x, scale, bias)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


def _over(values: Array) -> Array:
    """Values [C] as they broadcast to maps: JAX's strict rank promotion asks for the other axes."""
    return values[None, None, None]


def _sums(a: Array, b: Array, shift: Array) -> tuple[Array, Array]:
    def xla(a: Array, b: Array, shift: Array) -> tuple[Array, Array]:
        return jnp.sum(a, axis=(0, 1, 2)), jnp.sum(a * (b - _over(shift)), axis=(0, 1, 2))

    return lax.platform_dependent(a, b, shift, cpu=native.channel_sums, default=xla)


@jax.custom_vjp
def _normalized(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    return _normalized_forward(x, scale, bias)[0]


def _normalized_forward(x: Array, scale: Array, bias: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    count = x.size / x.shape[-1]
    total, squares = _sums(x, x, jnp.zeros_like(scale))
    mean = total / count
    var = jnp.maximum(squares / count - jnp.square(mean), 0)
    inverse = lax.rsqrt(var + EPSILON)
    y = (x - _over(mean)) * _over(scale * inverse) + _over(bias)
    return (y, mean, var), (x, scale, mean, inverse)


def _normalized_backward(residuals: tuple[Array, ...], cotangents: tuple[Array, Array, Array]) -> tuple[Array, ...]:
    x, scale, mean, inverse = residuals
    cotangent = cotangents[0]
    count = x.size / x.shape[-1]
    total, products = _sums(cotangent, x, mean)
    slope = jnp.square(inverse) * products / count
    centred = cotangent - _over(total / count) - (x - _over(mean)) * _over(slope)
    return _over(scale * inverse) * centred, products * inverse, total


_normalized.defvjp(_normalized_forward, _normalized_backward)
