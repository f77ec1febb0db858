"""Networks under names like those known here that compute something else: each is refused by its reason."""

import re

import flax.linen as nn

from ftwt_jax.errors import UserError
from ftwt_jax.models.resnet import ResNet
from ftwt_jax.models.vgg import VGG
from ftwt_jax.weights.source import Source


class Misfit(UserError):
    """A state dict is not of the network that it is to be read as.

    Attributes:
      looks_like: the name of the network that it fits; "" if none is known.
    """

    def __init__(self, message: str, looks_like: str = ""):
        super().__init__(message)
        self.looks_like = looks_like


class Foreign(Misfit):
    """A state dict is of a network that this library does not have."""


def refuse_foreign(model: nn.Module, source: Source) -> None:
    """Raises `Foreign` if a state dict under names of `model`'s kind is known to be of a different network."""
    names = source.arrays
    if isinstance(model, VGG):
        linear = [name for name in names if re.fullmatch(r"classifier\.\d+\.weight", name)]
        if len(linear) > 1:
            sizes = ", ".join(f"{name} {'x'.join(map(str, names[name].shape))}" for name in linear)
            raise Foreign(
                f"its classifier has hidden layers ({sizes}), as torchvision's VGG has; that of the VGGs here is one "
                "linear layer behind a mean over the map"
            )
    if isinstance(model, ResNet) and not model.projection:
        shortcut = next((name for name in names if re.search(r"\.(shortcut|downsample)\.", name)), None)
        if shortcut is not None:
            raise Foreign(
                f"its shortcuts are convolutions ({shortcut.rpartition('.')[0]}); those of CIFAR ResNets here have no "
                "weights: they average pixels and add zero channels"
            )
        if "linear.weight" in names:
            raise Foreign(
                "its classifier is called linear, as in akamaster's CIFAR ResNets, whose shortcuts take every second "
                "pixel and add zero channels on both sides; those here average pixels and add zeros behind: it would "
                "compute something else, also with the layer renamed"
            )
