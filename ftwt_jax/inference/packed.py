"""Feature maps without the channels that are known to be zero, as compact execution hands them from layer to layer."""

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.errors import FlaxError
from jaxtyping import Array, Float

from ftwt_jax.gating.activations import Activations

Channels = tuple[int, ...]

# How many calls of modules there have been while networks ran packed; see `PackedActivations.map`.
module_calls: ContextVar[int] = ContextVar("module_calls", default=0)


@struct.dataclass
class Packed:
    """Feature maps without channels that are zero.

    Attributes:
      values: [N, H, W, K].
      channels: the K channels that can be non-zero in any image, ascending.
    """

    values: Float[Array, "N H W K"]
    channels: Channels = struct.field(pytree_node=False)

    def aligned(self, channels: Channels) -> Float[Array, "N H W L"]:
        """The values of these L channels, in their order; zero for those that are left out here."""
        values = self.values
        if channels == self.channels:
            return values
        place = {channel: index for index, channel in enumerate(self.channels)}
        missing = len(self.channels)
        source = np.array([place.get(channel, missing) for channel in channels], np.int32)
        if not set(channels) <= place.keys():
            values = jnp.pad(values, ((0, 0),) * (values.ndim - 1) + ((0, 1),))
        return jnp.take(values, source, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedActivations(Activations):  # type: ignore[misc]  # Flax's dataclasses are frozen, which mypy does not see.
    """Activations in two forms: `values`, with every channel, for whatever a user's network reads, and packed.

    Of the two, the form that nothing reads is never computed under jit. Whatever changes `values` in a way that the
    packed form cannot follow returns plain `Activations`.

    Attributes:
      packed: the same values without the channels that are known to be zero in every image.
    """

    packed: Packed = dataclasses.field(kw_only=True)

    def replace(self, **changes: Any) -> Activations:
        """A copy with other fields; new values alone, without their packed form, make it plain."""
        if "values" in changes and "packed" not in changes:
            return self.plain().replace(**changes)
        return dataclasses.replace(self, **changes)

    def plain(self) -> Activations:
        """The same without the packed form."""
        return Activations(self.values, self.active, self.layers, self.control)

    def map(self, fn: Callable[[Array], Array]) -> Activations:
        """As `Activations.map`, on the packed form too."""
        before = module_calls.get()
        values = fn(self.values)
        packed = None
        # A module that `fn` makes would get another name, and other parameters, the second time.
        if module_calls.get() == before:
            packed = _mapped(self.packed, fn)
        if packed is None:
            packed = Packed(values[..., list(self.packed.channels)], self.packed.channels)
        return self.replace(values=values, packed=packed)

    def add(self, other: Activations) -> Activations:
        """As `Activations.add`; packed if both are, to the channels that either has."""
        total = super().add(other)
        if not isinstance(other, PackedActivations):
            return total
        channels = tuple(sorted({*self.packed.channels, *other.packed.channels}))
        packed = Packed(self.packed.aligned(channels) + other.packed.aligned(channels), channels)
        return with_packed(total, packed)

    def append_zeros(self, count: int) -> Activations:
        """As `Activations.append_zeros`; the packed form stays as it is."""
        return with_packed(super().append_zeros(count), self.packed)


def with_packed(x: Activations, packed: Packed) -> PackedActivations:
    """Activations together with their packed form."""
    return PackedActivations(x.values, x.active, x.layers, x.control, packed=packed)


def packed_form(x: Activations) -> Packed:
    """The packed form of activations; with all channels if they have none."""
    return x.packed if isinstance(x, PackedActivations) else Packed(x.values, tuple(range(x.values.shape[-1])))


def _mapped(packed: Packed, fn: Callable[[Array], Array]) -> Packed | None:
    """`fn` on the channels that are left; None if it holds one number per channel and so needs all channels."""
    try:
        values = fn(packed.values)
    except (TypeError, ValueError, FlaxError):
        return None
    return packed.replace(values=values) if values.shape[-1] == packed.values.shape[-1] else None
