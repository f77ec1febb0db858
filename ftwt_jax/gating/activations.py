"""Activations that know which of their channels can be non-zero, and which layers made them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from ftwt_jax.gating.gates import GateControl, GateOutput


@struct.dataclass
class LayerRecord:
    """One convolution or linear layer as it ran: enough to count its work without a table of layers elsewhere.

    Attributes:
      name: path of the module, such as "block1_0/conv1".
      positions: number of output pixels, H' * W' (1 for a linear layer).
      kernel_area: pixels under the kernel, k * k.
      in_features, out_features, groups: as the convolution has them.
      active_in: bool [N, C_in], input channels that can be non-zero; None: all.
      active_out: bool [N, C], filters that have to be computed; None: all.
      gate: what the layer's gate returned; None if the layer has no gate.
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
    _maxima: ClassVar[Float[Array, "N C"] | None] = None

    @property
    def maxima(self) -> Float[Array, "N C"] | None:
        """The largest value of each map where it is known, float32 [N, C], without gradients; None: not known."""
        return self._maxima

    def with_maxima(self, maxima: Float[Array, "N C"]) -> "Activations":
        """The same, with its maxima. Whatever is made from it, by `replace` too, or crosses `jax.jit` has none."""
        known = self.replace()
        # No field: fields are copied by `replace`, to values that may be others.
        object.__setattr__(known, "_maxima", maxima)
        return known

    def map(self, fn: Callable[[Array], Array]) -> "Activations":
        """Applies a function that treats each channel separately and keeps zero at zero: ReLU, pooling, resizing."""
        return self.replace(values=fn(self.values))

    def add(self, other: "Activations") -> "Activations":
        """The sum of two branches, with the control of the first; a channel can be non-zero where either's can."""
        active = None if self.active is None or other.active is None else self.active | other.active
        layers = merge_layers(self.layers, other.layers)
        return self.replace(values=self.values + other.values, active=active, layers=layers)

    def append_zeros(self, count: int) -> "Activations":
        """`count` more channels behind the others, zero in every image."""
        images, channels = self.values.shape[0], self.values.shape[-1]
        active = jnp.ones((images, channels), bool) if self.active is None else self.active
        return self.replace(
            values=jnp.pad(self.values, ((0, 0), (0, 0), (0, 0), (0, count))),
            active=jnp.pad(active, ((0, 0), (0, count))),
        )


def as_activations(inputs: "Activations | Array") -> Activations:
    """Wraps plain images or feature maps [N, H, W, C]; `Activations` pass through."""
    return inputs if isinstance(inputs, Activations) else Activations(jnp.asarray(inputs))


def merge_layers(first: Sequence[LayerRecord], second: Sequence[LayerRecord]) -> tuple[LayerRecord, ...]:
    """The layers of two branches that part somewhere: all of the first, then those of the second that it lacks.

    Layers are told apart by name, which survives `nn.remat`. So a module that both branches call, with its parameters
    used twice, counts as one call.
    """
    shared = Counter(layer.name for layer in first)
    rest = []
    for layer in second:
        if shared[layer.name]:
            shared[layer.name] -= 1
        else:
            rest.append(layer)
    return (*first, *rest)


def residual_add(branch: Activations | Array, shortcut: Activations | Array) -> Activations:
    """branch + shortcut; a channel can be non-zero where either's can.

    Args:
      branch, shortcut: [N, H, W, C] each, usually two paths from the same activations; at most one a plain array.
    """
    control = branch.control if isinstance(branch, Activations) else as_activations(shortcut).control
    return as_activations(branch).add(as_activations(shortcut)).replace(control=control)
