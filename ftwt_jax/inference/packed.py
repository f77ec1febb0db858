"""Feature maps without the channels that are known to be zero, as compact execution hands them from layer to layer."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from ftwt_jax.gating.activations import Activations
from ftwt_jax.gating.contract import Effect, effect

Channels = tuple[int, ...]


@struct.dataclass
class Packed:
    """Feature maps without channels that are zero.

    Attributes:
      values: [N, ..., K].
      channels: the K channels that can be non-zero in any image, ascending.
    """

    values: Float[Array, "N ... K"]
    channels: Channels = struct.field(pytree_node=False)

    def aligned(self, channels: Channels) -> Float[Array, "N ... L"]:
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
@dataclasses.dataclass(frozen=True, eq=False)
class PackedActivations(Activations):
    """Activations in two forms: `values`, with every channel, for whatever a user's network reads, and packed.

    Of the two, the form that nothing reads is never computed under jit. Whatever changes `values` in a way that the
    packed form cannot follow returns plain `Activations`.

    Attributes:
      packed: the same values without the channels that are known to be zero in every image.
    """

    packed: Packed = dataclasses.field(kw_only=True)

    def replace(self, **changes: Any) -> Activations:
        """A copy with other fields; new values make it plain."""
        changed = super().replace(**changes)
        return changed if "values" in changes else with_packed(changed, self.packed)

    def mapped(self, fn: Callable[[Array], Array]) -> tuple[Activations, Effect | None]:
        """As `Activations.mapped`, on the packed form too."""
        result, known = super().mapped(fn)
        if known is None or not known.in_place or not known.zero:
            return result, known
        return with_packed(result, mapped(self.packed, fn, known, result.values)), known

    def add(self, other: Activations) -> Activations:
        """As `Activations.add`; packed to the channels that either has."""
        packed = packed_form(other)
        channels = tuple(sorted({*self.packed.channels, *packed.channels}))
        return with_packed(
            super().add(other), Packed(self.packed.aligned(channels) + packed.aligned(channels), channels)
        )

    def join(self, parts: Sequence[Activations]) -> Activations:
        """As `Activations.join`."""
        starts = itertools.accumulate((part.shape[-1] for part in parts), initial=0)
        forms = [packed_form(part) for part in parts]
        channels = [start + channel for start, form in zip(starts, forms, strict=False) for channel in form.channels]
        values = jnp.concatenate([form.values for form in forms], axis=-1)
        return with_packed(super().join(parts), Packed(values, tuple(channels)))

    def rearrange(self, fn: Callable[[Array], Array], sources: Sequence[Sequence[int]]) -> Activations:
        """As `Activations.rearrange`."""
        result = super().rearrange(fn, sources)
        here = set(self.packed.channels)
        channels = tuple(channel for channel, given in enumerate(sources) if not here.isdisjoint(given))
        # If nothing is left, a channel of zeros is: layers without inputs cannot be built.
        channels = channels or (0,)
        return with_packed(result, selected(result.values, channels))

    def append_zeros(self, count: int) -> Activations:
        """As `Activations.append_zeros`; the packed form stays as it is."""
        return with_packed(super().append_zeros(count), self.packed)


def with_packed(x: Activations, packed: Packed) -> PackedActivations:
    """Activations together with their packed form."""
    return PackedActivations(x.values, x.active, x.layers, x.control, x.trail, packed=packed)


def plain(x: Any) -> Any:
    """Activations without their packed form; anything else as it is."""
    return x.made() if isinstance(x, PackedActivations) else x


def packed_form(x: Activations) -> Packed:
    """The packed form of activations; with all channels if they have none."""
    return x.packed if isinstance(x, PackedActivations) else Packed(x.values, tuple(range(x.shape[-1])))


def selected(values: Float[Array, "N ... C"], channels: Channels) -> Packed:
    """Some channels of values that have them all."""
    whole = len(channels) == values.shape[-1]
    return Packed(values if whole else values[..., np.array(channels, np.int32)], channels)


def mapped(packed: Packed, fn: Callable[[Array], Array], known: Effect, whole: Float[Array, "N ... C"]) -> Packed:
    """A function on the channels that are left: by itself if it treats all channels alike, out of the whole otherwise.

    Args:
      known: what the function does; it keeps channels in their places.
      whole: what it makes of all channels.
    """
    # A function of how many channels there are holds other numbers then.
    alike = known.uniform and effect(fn, packed.values) == known
    return packed.replace(values=fn(packed.values)) if alike else selected(whole, packed.channels)
