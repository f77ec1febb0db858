"""One convolution for every layer: XLA's own, but with another lowering on a CPU where XLA's is slow.

Measured on the shapes of the networks here, the other lowerings are faster than XLA's on a CPU by tens of times for
depthwise kernels and for maps of up to 2x2, and by up to 2 times for small maps at batch 1 and for the gradients of 1x1
kernels. GPU and TPU keep XLA's convolution.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ftwt_jax.ops import native
from ftwt_jax.ops.reductions import over_channels, shared_batch

_NHWC = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))
# Most output pixels at which patches and a matrix product are faster: per image, for any batch, and per batch.
_FEW_IN_IMAGE = 4
_FEW_IN_BATCH = 64
# Numbers in a kernel whose gradient is faster by our own kernel, which adds up 16 of them: 64 channels to 64 filters.
_SMALL_KERNEL = 3 * 3 * 64 * 64


def conv_general_dilated(
    lhs: Float[Array, "N H W C_in"],
    rhs: Float[Array, "k_h k_w C_group C"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> Float[Array, "N H_out W_out C"]:
    """`jax.lax.conv_general_dilated` with another lowering on a CPU; fits `nn.Conv(conv_general_dilated=…)`.

    Takes every argument of the original, and returns the same values and gradients up to rounding. XLA's own is used on
    every platform if the convolution is dilated, not two-dimensional NHWC, or of a shape for which it is fast.
    """

    def xla(lhs: Array, rhs: Array) -> Array:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **options,
        )

    dilated = any(step != 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    plain = not dilated and batch_group_count == 1 and preferred_element_type is None and lhs.dtype == rhs.dtype
    if not plain or lhs.ndim != 4 or lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) != _NHWC:
        return xla(lhs, rhs)
    strides = tuple(window_strides)
    fits = len(strides) == 2 and min(strides) > 0 and rhs.shape[2] * feature_group_count == lhs.shape[-1]
    # In an export, the sides of an image may be symbolic.
    if not fits or not all(isinstance(length, int) for length in lhs.shape[1:]):
        return xla(lhs, rhs)
    if isinstance(padding, str):
        pads = tuple(lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding))
    else:
        pads = tuple(padding)
    cpu = _cpu_lowering(lhs, rhs, strides, feature_group_count, pads, precision)
    return xla(lhs, rhs) if cpu is None else lax.platform_dependent(lhs, rhs, cpu=cpu, default=xla)


def training_convolution(
    lhs: Float[Array, "N H W C_in"],
    rhs: Float[Array, "k_h k_w C_group C"],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "N H_out W_out C"]:
    """`conv_general_dilated` for training alone: faster on a CPU, by kernels of our own; no forward derivatives.

    They compute float32 depthwise convolutions of 3x3 with both gradients, and the gradient of small kernels, without
    XLA's transposes. XLA does everything else, and everything where there is no C++ compiler or several devices share a
    batch. A program for several devices that is traced without their mesh is right but slow: see `traced_on`.
    """

    def plain(lhs: Array, rhs: Array) -> Array:
        return conv_general_dilated(lhs, rhs, window_strides, padding, **options)

    if lhs.ndim != 4:
        return plain(lhs, rhs)
    groups = options.get("feature_group_count", 1)
    depthwise = rhs.shape[:3] == (3, 3, 1) and groups == lhs.shape[-1] == rhs.shape[-1] > 1
    small = groups == 1 and rhs.shape[:2] != (1, 1) and rhs.size <= _SMALL_KERNEL
    float32 = lhs.dtype == rhs.dtype == jnp.float32
    dilated = any(step != 1 for name in ("lhs_dilation", "rhs_dilation") for step in options.get(name) or ())
    padded = not isinstance(padding, str) and all(pad >= 0 for pads in padding for pad in pads)
    ours = (depthwise or small) and float32 and padded and not dilated
    # If several devices share a batch, XLA would first bring the whole of it to each.
    if not ours or shared_batch() or jax.default_backend() != "cpu" or not native.available():
        return plain(lhs, rhs)

    sides = jax.eval_shape(plain, lhs, rhs).shape[1:3]

    def forward(lhs: Array, rhs: Array) -> Array:
        if not depthwise:
            return plain(lhs, rhs)
        kernel = functools.partial(native.depthwise, sides=sides, strides=window_strides, padding=padding)
        return lax.platform_dependent(lhs, rhs, cpu=kernel, default=plain)

    def by_maps(rhs: Array, cotangent: Array) -> Array:
        """The gradient by the maps: a convolution of cotangents as far apart as the strides, by the kernel reversed."""
        turned = tuple((k - 1 - before, 0) for k, (before, _) in zip(rhs.shape[:2], padding, strict=True))
        return native.depthwise(cotangent, rhs[::-1, ::-1], lhs.shape[1:3], (1, 1), turned, dilation=window_strides)

    def by_kernel(lhs: Array, cotangent: Array) -> Array:
        return native.weight_gradient(lhs, cotangent, rhs.shape, window_strides, padding)

    def backward(operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        lhs, rhs = operands

        def xla_by_maps(rhs: Array, cotangent: Array) -> Array:
            return jax.vjp(lambda lhs: plain(lhs, rhs), lhs)[1](cotangent)[0]

        def xla_by_kernel(lhs: Array, cotangent: Array) -> Array:
            return jax.vjp(lambda rhs: plain(lhs, rhs), rhs)[1](cotangent)[0]

        cpu = by_maps if depthwise else xla_by_maps
        return (
            lax.platform_dependent(rhs, cotangent, cpu=cpu, default=xla_by_maps),
            lax.platform_dependent(lhs, cotangent, cpu=by_kernel, default=xla_by_kernel),
        )

    convolution = jax.custom_vjp(forward)
    convolution.defvjp(lambda lhs, rhs: (forward(lhs, rhs), (lhs, rhs)), backward)
    return convolution(lhs, rhs)


def _cpu_lowering(
    lhs: Array, rhs: Array, strides: tuple[int, ...], groups: int, padding: tuple[tuple[int, int], ...], precision: Any
) -> Callable[[Array, Array], Array] | None:
    """The lowering that is faster than XLA's for these shapes; None if XLA's is fast."""
    batch, _, _, in_features = lhs.shape
    size = rhs.shape[:2]
    sides = [
        (length + sum(pad) - k) // step + 1
        for length, pad, k, step in zip(lhs.shape[1:3], padding, size, strides, strict=True)
    ]
    if min(sides) < 1 or any(pad < 0 for pads in padding for pad in pads):
        return None
    pixels = math.prod(sides)
    if groups == in_features == rhs.shape[-1] and groups > 1:
        return functools.partial(_depthwise, strides=strides, padding=padding)
    # A symbolic batch size cannot be compared.
    few = pixels <= _FEW_IN_IMAGE or (isinstance(batch, int) and batch * pixels <= _FEW_IN_BATCH)
    if groups == 1 and (few or size == (1, 1)):
        return functools.partial(_patches_product, strides=strides, padding=padding, precision=precision)
    return None


def _taps(lhs: Array, size: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> list[Array]:
    """For each pixel of the kernel, row by row, its input pixel at every output pixel: [N, H_out, W_out, C]."""
    if any(pad for pads in padding for pad in pads):
        lhs = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    batch, height, width, features = lhs.shape
    last_row, last_column = height - size[0], width - size[1]
    return [
        lax.slice(
            lhs,
            (0, row, column, 0),
            (batch, row + last_row + 1, column + last_column + 1, features),
            (1, *strides, 1),
        )
        for row in range(size[0])
        for column in range(size[1])
    ]


def _depthwise(lhs: Array, rhs: Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> Array:
    """Sums shifted inputs, each times one pixel of the kernel; XLA fuses this into one loop."""
    # XLA's convolution does not sum in half precision either.
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    taps = _taps(lhs, rhs.shape[:2], strides, padding)
    weights = rhs.reshape(-1, rhs.shape[-1]).astype(wide)
    terms = (tap.astype(wide) * over_channels(w, tap.shape) for tap, w in zip(taps, weights, strict=True))
    return functools.reduce(jnp.add, terms).astype(lhs.dtype)


def _patches_product(
    lhs: Array, rhs: Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]], precision: Any
) -> Array:
    """Multiplies patches [pixels, k_h * k_w * C_in] by the kernel as a matrix."""
    taps = _taps(lhs, rhs.shape[:2], strides, padding)
    patches = taps[0] if len(taps) == 1 else jnp.concatenate(taps, axis=-1)
    kernel = rhs.reshape(-1, rhs.shape[-1])
    # As a plain matrix: the kernel's gradient, a sum over three axes otherwise, is 3 times as fast.
    out = lax.dot(patches.reshape(-1, patches.shape[-1]), kernel, precision=precision)
    return out.reshape(*patches.shape[:3], kernel.shape[-1])
