"""One convolution for every layer: XLA's own, but lowered otherwise on a CPU where XLA is slow.

What XLA's CPU convolution is slow at, measured on the shapes of the networks here: depthwise kernels (tens of times),
maps of 2x2 and smaller (tens of times), small maps at batch 1 (up to twice), 1x1 kernels (their gradients, up to
twice). GPU and TPU keep XLA's convolution untouched.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ftwt_jax.ops.reductions import over_channels

_NHWC = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))
# Output pixels up to which patches and a matrix product win: of one sample whatever the batch, and of a whole batch.
_FEW_IN_SAMPLE = 4
_FEW_IN_BATCH = 64


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

    Takes every argument of the original and returns its values, forward and backward, to rounding. Convolutions that
    are dilated, not two-dimensional NHWC, or that XLA is good at, are XLA's on every platform.
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
    # The sides of an image may be symbols in an export.
    if not fits or not all(isinstance(length, int) for length in lhs.shape[1:]):
        return xla(lhs, rhs)
    if isinstance(padding, str):
        pads = tuple(lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding))
    else:
        pads = tuple(padding)
    cpu = _cpu_lowering(lhs, rhs, strides, feature_group_count, pads, precision)
    return xla(lhs, rhs) if cpu is None else lax.platform_dependent(lhs, rhs, cpu=cpu, default=xla)


def _cpu_lowering(
    lhs: Array, rhs: Array, strides: tuple[int, ...], groups: int, padding: tuple[tuple[int, int], ...], precision: Any
) -> Callable[[Array, Array], Array] | None:
    """The lowering that beats XLA's for these shapes; None: XLA's is good."""
    samples, _, _, in_features = lhs.shape
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
    # A symbolic batch has no number to compare.
    few = pixels <= _FEW_IN_SAMPLE or (isinstance(samples, int) and samples * pixels <= _FEW_IN_BATCH)
    if groups == 1 and (few or size == (1, 1)):
        return functools.partial(_patches_product, strides=strides, padding=padding, precision=precision)
    return None


def _taps(lhs: Array, size: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> list[Array]:
    """For each pixel of the kernel, row by row, the input pixel that it meets at every output: [N, H_out, W_out, C]."""
    if any(pad for pads in padding for pad in pads):
        lhs = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    samples, height, width, features = lhs.shape
    last_row, last_column = height - size[0], width - size[1]
    return [
        lax.slice(
            lhs,
            (0, row, column, 0),
            (samples, row + last_row + 1, column + last_column + 1, features),
            (1, *strides, 1),
        )
        for row in range(size[0])
        for column in range(size[1])
    ]


def _depthwise(lhs: Array, rhs: Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> Array:
    """A sum of shifted inputs, each times one pixel of the kernel: one loop that XLA fuses."""
    # A sum in half precision would lose what XLA's convolution keeps.
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    taps = _taps(lhs, rhs.shape[:2], strides, padding)
    weights = rhs.reshape(-1, rhs.shape[-1]).astype(wide)
    terms = (tap.astype(wide) * over_channels(w, tap.shape) for tap, w in zip(taps, weights, strict=True))
    return functools.reduce(jnp.add, terms).astype(lhs.dtype)


def _patches_product(
    lhs: Array, rhs: Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]], precision: Any
) -> Array:
    """Patches [pixels, k_h * k_w * C_in] times the kernel as a matrix."""
    taps = _taps(lhs, rhs.shape[:2], strides, padding)
    patches = taps[0] if len(taps) == 1 else jnp.concatenate(taps, axis=-1)
    kernel = rhs.reshape(-1, rhs.shape[-1])
    return lax.dot_general(patches, kernel, (((3,), (0,)), ((), ())), precision=precision)
