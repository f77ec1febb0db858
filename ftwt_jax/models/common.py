"""What every network definition starts with."""

from jaxtyping import Array

from ftwt_jax.errors import UserError
from ftwt_jax.gating.activations import Activations, as_activations
from ftwt_jax.gating.gates import GateControl


def scaled(features: int, width: float) -> int:
    """Number of filters at a width multiplier, rounded down as the published networks do; at least 1."""
    return max(1, int(features * width))


def start(images: Array, control: GateControl | None, shrinks: int) -> Activations:
    """Images [N, H, W, channels] as activations.

    Args:
      shrinks: the product of all strides of the network.

    Raises:
      UserError: the images do not have four axes, or the network would shrink them to nothing.
    """
    if images.ndim != 4:
        raise UserError(f"images must have the four axes [N, H, W, channels]; got shape {tuple(images.shape)}")
    height, width = images.shape[1:3]
    if min(height, width) < shrinks:
        raise UserError(
            f"images of {height}x{width} are too small: this network shrinks them {shrinks} times; "
            f"scale them to {shrinks}x{shrinks} or more, or choose a network with fewer strides"
        )
    x = as_activations(images)
    return x if control is None else x.replace(control=control)
