"""A gated unit run by a kernel of our own: float32, on a CPU, for inference; see `native.available`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from ftwt_jax.gating.gates import NORMS, GateConfig
from ftwt_jax.gating.units import check_shortcut

# The name under which XLA knows the kernel.
TARGET = "ftwt_gated_unit"
# Filters of a block of a kernel, and what they are a multiple of: the widest vectors.
_BLOCK, _LEAST = 64, 16


@struct.dataclass
class BlockedKernel:
    """The kernel of a convolution in blocks of filters, each of which is read from start to end.

    Attributes:
      blocks: [blocks, kh * kw, C, filters of a block]; the last one is padded with zeros.
    """

    blocks: Float[Array | np.ndarray, "B T C F"]


def blocked(kernel: Float[np.ndarray, "kh kw C K"]) -> BlockedKernel:
    """A kernel as `gated_unit` takes it."""
    height, width, channels, filters = kernel.shape
    block = min(_BLOCK, -(-filters // _LEAST) * _LEAST)
    filled = np.pad(kernel.reshape(height * width, channels, filters), ((0, 0), (0, 0), (0, -filters % block)))
    blocks = filled.reshape(height * width, channels, -1, block).transpose(2, 0, 1, 3)
    return BlockedKernel(np.ascontiguousarray(blocks))


@struct.dataclass
class UnitWeights:
    """What a gated unit computes with.

    Attributes:
      kernel: in blocks for an ordinary convolution, [kh * kw, K] for a depthwise one.
      bias: [K].
      head_kernel: the gate head's rows for the input channels that are there, [C, F].
      head_sum: the sum of all its rows, including those of channels that are left out, [F].
      head_bias: [F].
      head_place: int32 [C], the one gate that reads each input channel, where each gate reads only its own channel
        (head_kernel is [C, 1] then); otherwise empty.
      kept: int32 [K], ascending: which of the F filters are held ready, to be computed where they are on.
      source: int32 [K], the input channel of each filter of a depthwise convolution; -1 where it is left out.
    """

    kernel: BlockedKernel | Float[Array | np.ndarray, "T K"]
    bias: Float[Array | np.ndarray, " K"]
    head_kernel: Float[Array | np.ndarray, "C F"]
    head_sum: Float[Array | np.ndarray, " F"]
    head_bias: Float[Array | np.ndarray, " F"]
    head_place: Int[Array | np.ndarray, " P"]
    kept: Int[Array | np.ndarray, " K"]
    source: Int[Array | np.ndarray, " K"]


def gated_unit(
    x: Float[Array, "N H W C"],
    weights: UnitWeights,
    window: Sequence[int],
    gates: GateConfig,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
    shortcut: Float[Array, "N H2 W2 K"] | None = None,
    relu: bool = False,
    left_out: int = 0,
) -> tuple[Float[Array, "N H2 W2 K"], Float[Array, "N F"]]:
    """[relu](conv(x) + bias [+ shortcut]) where a filter's gate logit is above zero, zero elsewhere; and the logits.

    Each image computes only its own filters, from only those input channels that are not zero in its whole map.
    Nothing is prepared and nothing is gathered: rows and columns of kernel and head are skipped as they are read.

    Args:
      strides: of rows and of columns.
      pads: rows of zeros above and below, columns of zeros to the left and to the right.
      left_out: number of input channels that are not in `x`, since they are zero in every map.
    """
    height, width = (
        (before + side + after - length) // step + 1
        for side, length, step, (before, after) in zip(x.shape[1:3], window, strides, pads, strict=True)
    )
    depthwise = not isinstance(weights.kernel, BlockedKernel)
    shapes = ((x.shape[0], height, width, weights.bias.shape[0]), (x.shape[0], weights.head_bias.shape[0]))
    call = jax.ffi.ffi_call(
        TARGET, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes], vmap_method="sequential"
    )
    added: tuple[Array, ...] = ()
    if shortcut is not None:
        added = (jnp.broadcast_to(check_shortcut(shortcut, shapes[0]).astype(jnp.float32), shapes[0]),)
    y, logits = call(
        x,
        *jax.tree.leaves(weights),
        *added,
        kernel_height=window[0],
        kernel_width=window[1],
        row_stride=strides[0],
        column_stride=strides[1],
        top=pads[0][0],
        bottom=pads[0][1],
        left=pads[1][0],
        right=pads[1][1],
        relu=relu,
        depthwise=depthwise,
        left_out=left_out,
        max_pool=gates.pool == "max",
        norm=NORMS.index(gates.norm),
    )
    return y, logits
