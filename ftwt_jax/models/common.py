"""What several network definitions need."""

import functools
from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array

from ftwt_jax.errors import UserError
from ftwt_jax.gating.activations import Activations, as_activations
from ftwt_jax.gating.gates import GateControl

# The exact GELU, as PyTorch's.
GELU = functools.partial(nn.gelu, approximate=False)


def scaled(features: int, width: float) -> int:
    """Number of filters at a width multiplier, rounded down as the published networks do; at least 1."""
    return max(1, int(features * width))


def start(images: Array, control: GateControl | None, smallest: int) -> Activations:
    """Images [N, H, W, channels] as activations.

    Args:
      smallest: side in pixels below which nothing would be left of the images: the product of all strides, or more.

    Raises:
      UserError: the images do not have four axes, or the network would shrink them to nothing.
    """
    if images.ndim != 4:
        raise UserError(f"images must have the four axes [N, H, W, channels]; got shape {tuple(images.shape)}")
    height, width = images.shape[1:3]
    if min(height, width) < smallest:
        raise UserError(
            f"images of {height}x{width} are too small for this network: scale them to "
            f"{smallest}x{smallest} or more, or choose a network with fewer strides"
        )
    x = as_activations(images)
    return x if control is None else x.replace(control=control)


def normed(x: Activations, norm: Callable[[Array], Array], act: Callable[[Array], Array] | None = None) -> Activations:
    """A norm that stands alone, and an activation: it makes zeros non-zero, so that every channel is on after it."""
    values = norm(x.values)
    return x.made(values=values if act is None else act(values), active=None, trail=x.step("norm"))
