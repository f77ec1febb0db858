"""Activations that know which of their channels can be non-zero, and which layers made them."""

from collections import Counter
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from ftwt_jax.gates import GateControl, GateOutput


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


@struct.dataclass
class Activations:
    """Feature maps on their way through a network.

    Attributes:
      values: [N, H, W, C].
      active: bool [N, C], the channels that can be non-zero; None: all of them.
      layers: records of every layer that these values came through, in forward order.
      control: settings of this call, which every gated unit obeys.
    """

    values: Float[Array, "N H W C"]
    active: Bool[Array, "N C"] | None = None
    layers: tuple[LayerRecord, ...] = ()
    control: GateControl = struct.field(default_factory=GateControl)

    def map(self, fn: Callable[[Array], Array]) -> "Activations":
        """Applies a function that works on each channel by itself and keeps zero at zero: ReLU, pooling, resizing."""
        return self.replace(values=fn(self.values))


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
    return branch.replace(
        values=branch.values + shortcut.values,
        active=active,
        layers=merge_layers(branch.layers, shortcut.layers),
        control=control,
    )
