"""Activations that know which of their channels can be non-zero, and which layers made them."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.errors import FlaxError
from jaxtyping import Array, Bool, Float

from ftwt_jax.gating.gates import GateControl, GateOutput

# How many modules were called so far while networks ran packed; see `Activations.map`.
module_calls: ContextVar[int] = ContextVar("module_calls", default=0)


@struct.dataclass
class LayerRecord:
    """One convolution or linear layer as it was run: enough to count its work, with no table of layers kept anywhere.

    Attributes:
      name: path of the module, such as "block1_0/conv1".
      positions: number of output pixels, H' * W' (1 for a linear layer).
      kernel_area: pixels under the kernel, k * k.
      in_features, out_features, groups: as the convolution has them.
      active_in: bool [N, C_in], input channels that can be non-zero; None: all.
      active_out: bool [N, C], filters that have to be computed; None: all.
      gate: what the layer's gate said; None where there is none.
      unit: whether this is a unit (a place where a gate may sit).
      head_inputs: channels that each gate reads; None: all of them.
      bias_terms: bias additions at one position, and other work that only the published dense totals contain.
    """

    name: str = struct.field(pytree_node=False)
    positions: int = struct.field(pytree_node=False)
    kernel_area: int = struct.field(pytree_node=False)
    in_features: int = struct.field(pytree_node=False)
    out_features: int = struct.field(pytree_node=False)
    groups: int = struct.field(pytree_node=False, default=1)
    unit: bool = struct.field(pytree_node=False, default=False)
    bias_terms: int = struct.field(pytree_node=False, default=0)
    active_in: Bool[Array, "N C_in"] | None = None
    active_out: Bool[Array, "N C"] | None = None
    gate: GateOutput | None = None
    head_inputs: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Packed:
    """Feature maps without channels that are zero.

    Attributes:
      values: [N, H, W, K].
      channels: the K channels that can be non-zero in any sample, ascending.
    """

    values: Float[Array, "N H W K"]
    channels: tuple[int, ...] = struct.field(pytree_node=False)

    def aligned(self, channels: tuple[int, ...]) -> Float[Array, "N H W L"]:
        """The values of other channels, in their order; zero for those that are not here."""
        values = self.values
        if channels == self.channels:
            return values
        place = {channel: index for index, channel in enumerate(self.channels)}
        missing = len(self.channels)
        source = np.array([place.get(channel, missing) for channel in channels], np.int32)
        if not set(channels) <= place.keys():
            values = jnp.pad(values, ((0, 0),) * (values.ndim - 1) + ((0, 1),))
        return jnp.take(values, source, axis=-1)


@struct.dataclass
class Activations:
    """Feature maps on their way through a network.

    Attributes:
      values: [N, H, W, C].
      active: bool [N, C], the channels that can be non-zero; None: all of them.
      layers: records of every layer that these values came through, in forward order.
      control: settings of this call, which every gated unit obeys.
      packed: the same values without the channels that are known to be zero throughout, as compact execution hands
        them on; None elsewhere. Of the two, the one that nothing reads is never computed under jit.
    """

    values: Float[Array, "N H W C"]
    active: Bool[Array, "N C"] | None = None
    layers: tuple[LayerRecord, ...] = ()
    control: GateControl = struct.field(default_factory=GateControl)
    packed: Packed | None = None

    def map(self, fn: Callable[[Array], Array]) -> "Activations":
        """Applies a function that works on each channel by itself and keeps zero at zero: ReLU, pooling, resizing."""
        before = module_calls.get()
        values = fn(self.values)
        if self.packed is None:
            return self.replace(values=values)
        packed = None
        # A module that `fn` makes would get another name, and other parameters, the second time.
        if module_calls.get() == before:
            packed = _map_packed(self.packed, fn)
        if packed is None:
            packed = Packed(values[..., list(self.packed.channels)], self.packed.channels)
        return self.replace(values=values, packed=packed)


def _replace(x: Activations, **changes: Any) -> Activations:
    """A copy with other fields; new values without a packed form of their own lose the old one."""
    if "values" in changes:
        changes.setdefault("packed", None)
    return dataclasses.replace(x, **changes)


# Flax's decorator writes its own method over one of the class body.
setattr(Activations, "replace", _replace)  # noqa: B010


def _map_packed(packed: Packed, fn: Callable[[Array], Array]) -> Packed | None:
    """`fn` on the channels that are left; None where it holds something of every channel and so needs them all."""
    try:
        values = fn(packed.values)
    except (TypeError, ValueError, FlaxError):
        return None
    return packed.replace(values=values) if values.shape[-1] == packed.values.shape[-1] else None


def as_activations(inputs: "Activations | Array") -> Activations:
    """Wraps plain images or feature maps [N, H, W, C]; `Activations` pass through."""
    return inputs if isinstance(inputs, Activations) else Activations(jnp.asarray(inputs))


def merge_layers(first: Sequence[LayerRecord], second: Sequence[LayerRecord]) -> tuple[LayerRecord, ...]:
    """The layers of two branches that part somewhere: what they share once, then the first's own, then the second's.

    Layers are told apart by name, which survives `nn.remat`. So a module that both branches call, with its parameters
    used twice, is taken for one call.
    """
    shared = Counter(layer.name for layer in first)
    own = []
    for layer in second:
        if shared[layer.name]:
            shared[layer.name] -= 1
        else:
            own.append(layer)
    return (*first, *own)


def residual_add(branch: Activations | Array, shortcut: Activations | Array) -> Activations:
    """branch + shortcut; a channel can be non-zero where either's can.

    Args:
      branch, shortcut: [N, H, W, C] each, usually two ways from the same activations; at most one a plain array.
    """
    control = branch.control if isinstance(branch, Activations) else as_activations(shortcut).control
    branch, shortcut = as_activations(branch), as_activations(shortcut)
    active = None
    if branch.active is not None and shortcut.active is not None:
        active = branch.active | shortcut.active
    packed = None
    if branch.packed is not None and shortcut.packed is not None:
        channels = tuple(sorted({*branch.packed.channels, *shortcut.packed.channels}))
        packed = Packed(branch.packed.aligned(channels) + shortcut.packed.aligned(channels), channels)
    return branch.replace(
        values=branch.values + shortcut.values,
        active=active,
        layers=merge_layers(branch.layers, shortcut.layers),
        control=control,
        packed=packed,
    )
