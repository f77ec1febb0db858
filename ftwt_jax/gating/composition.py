"""Sums, joins and rearrangements of activations that keep masks, records and control: what networks do between units.

Each takes plain arrays as well; with none but plain arrays, there is nothing to keep.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ftwt_jax.errors import UserError
from ftwt_jax.gating.activations import Activations, as_activations
from ftwt_jax.gating.gates import GateControl


def _lead(parts: Sequence[Activations]) -> Activations:
    """The part that makes the result: one in packed form if there is one, since the others cannot make such."""
    return next((part for part in parts if type(part) is not Activations), parts[0])


def _control(given: Sequence[Activations | Array]) -> GateControl:
    """The control of the first activations; plain arrays have none of their own."""
    return next((part.control for part in given if isinstance(part, Activations)), GateControl())


def residual_add(branch: Activations | Array, shortcut: Activations | Array) -> Activations:
    """branch + shortcut; a channel can be non-zero where either's can.

    Args:
      branch, shortcut: [N, H, W, C] each, usually two paths from the same activations. One may be a plain array, such
        as an embedding of positions, or have one image, pixel or channel, which is then added to each.

    Raises:
      UserError: their shapes do not fit.
    """
    parts = [as_activations(part) for part in (branch, shortcut)]
    try:
        shape = jnp.broadcast_shapes(*(part.shape for part in parts))
    except ValueError:
        shape = ()
    # A sum larger than both is not what anyone means by a residual.
    if shape not in [part.shape for part in parts] or len({part.ndim for part in parts}) > 1:
        raise UserError(
            f"a residual sum needs two of one shape; got {parts[0].shape} and {parts[1].shape}: make them fit by "
            "strides, a ftwt.PlainConv or .append_zeros"
        )
    first, second = (part if part.shape[-1] == shape[-1] else permute_channels(part, [0] * shape[-1]) for part in parts)
    if _lead([first, second]) is second:
        first, second = second, first
    return first.add(second).replace(control=_control((branch, shortcut)))


def concatenate(parts: Sequence[Activations | Array]) -> Activations:
    """The channels of all parts side by side, as dense blocks, inception modules and the skips of a U-Net need them.

    Masks, layer records and packed channels of every part are kept; control is that of the first activations.

    Args:
      parts: [N, ..., C_i] each, the same but for the channels; plain arrays among them have every channel on.

    Raises:
      UserError: there is none, or shapes differ in more than channels.
    """
    if isinstance(parts, Activations) or hasattr(parts, "shape") or not len(parts):
        raise UserError("ftwt.concatenate takes a list of activations: ftwt.concatenate([a, b])")
    wrapped = [as_activations(part) for part in parts]
    if len({part.shape[:-1] for part in wrapped}) > 1:
        shapes = ", ".join(str(part.shape) for part in wrapped)
        raise UserError(f"channels can be concatenated where images and pixels are as many; got {shapes}")
    return _lead(wrapped).join(wrapped).replace(control=_control(parts))


def flatten(x: Activations | Array) -> Activations:
    """Maps [N, H, W, C] as rows [N, H * W * C], in the order of `reshape`: a channel stands for H * W of their numbers.

    What a classifier or a `ftwt.GatedDense` after it reads of a channel that is off is zero, and known to be.
    """
    x = as_activations(x)
    pixels, channels = int(np.prod(x.shape[1:-1])), x.shape[-1]
    sources = [[channel] for channel in list(range(channels)) * pixels]
    return x.rearrange(lambda v: v.reshape(v.shape[0], -1), sources)


def permute_channels(x: Activations | Array, order: Sequence[int]) -> Activations:
    """Channels in another order, or some of them: shuffles and splits.

    Args:
      order: for each channel of the result the channel that it is; any of them, any number of times.

    Raises:
      UserError: `order` holds a number that is not a channel.
    """
    x = as_activations(x)
    places = np.asarray(order)
    if places.ndim != 1 or places.dtype.kind not in "iu" or not np.all((places >= 0) & (places < x.shape[-1])):
        raise UserError(f"an order of channels holds numbers from 0 to {x.shape[-1] - 1}; got {order!r}")
    return x.rearrange(lambda v: jnp.take(v, places, axis=-1), places[:, None].tolist())


def pixel_unshuffle(x: Activations | Array, block: int) -> Activations:
    """Blocks of pixels as channels, [N, H, W, C] to [N, H / block, W / block, C * block²]: space to depth.

    Channel c becomes the channels c * block² + row * block + column, as in PyTorch.

    Raises:
      UserError: a side is not a multiple of `block`.
    """
    x = as_activations(x)
    if x.ndim != 4 or block < 1 or any(side % block for side in x.shape[1:3]):
        raise UserError(f"blocks of {block}x{block} pixels do not fit maps of shape {x.shape}")
    _, height, width, channels = x.shape

    def fn(v: Array) -> Array:
        v = v.reshape(v.shape[0], height // block, block, width // block, block, channels)
        return v.transpose(0, 1, 3, 5, 2, 4).reshape(v.shape[0], height // block, width // block, channels * block**2)

    return x.rearrange(fn, [[channel] for channel in np.repeat(np.arange(channels), block**2).tolist()])


def pixel_shuffle(x: Activations | Array, block: int) -> Activations:
    """The inverse of `pixel_unshuffle`, depth to space: a channel can be non-zero where any that it is made of can.

    Raises:
      UserError: the number of channels is not a multiple of block².
    """
    x = as_activations(x)
    if x.ndim != 4 or block < 1 or x.shape[-1] % block**2:
        raise UserError(f"{x.shape[-1]} channels cannot become blocks of {block}x{block} pixels: shape {x.shape}")
    _, height, width, channels = x.shape

    def fn(v: Array) -> Array:
        v = v.reshape(v.shape[0], height, width, channels // block**2, block, block)
        return v.transpose(0, 1, 4, 2, 5, 3).reshape(v.shape[0], height * block, width * block, channels // block**2)

    return x.rearrange(fn, np.arange(channels).reshape(-1, block**2).tolist())
