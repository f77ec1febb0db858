"""Activations that know which of their channels can be non-zero, and which layers made them."""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import yaml
from flax import struct
from flax.linen import module as flax_module
from jaxtyping import Array, Bool, Float

from ftwt_jax.errors import CompositionWarning, UserError, warn_user
from ftwt_jax.gating.contract import Effect, effect
from ftwt_jax.gating.gates import GateControl, GateOutput


@struct.dataclass
class LayerRecord:
    """One convolution or linear layer as it ran: enough to count its work without a table of layers elsewhere.

    Attributes:
      name: path of the module, such as "block1_0/conv1".
      positions: number of output pixels, H' * W' (1 for a linear layer); of a transposed convolution, of input pixels.
      kernel_area: pixels under the kernel, k * k.
      in_features, out_features, groups: as the convolution has them.
      active_in: bool [N, C_in], input channels that can be non-zero; None: all.
      active_out: bool [N, C], filters that have to be computed; None: all.
      gate: what the layer's gate returned; None if the layer has no gate.
      unit: whether this is a unit (a place where a gate may sit).
      head_inputs: channels that each gate reads; None: all of them.
      bias_terms: bias additions at one position, and other work that only the published dense totals contain.
      call: tells this call of the module from its others.
      extra: whether the dense network does not have this layer: a router's.
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
    call: str = struct.field(pytree_node=False, default="")
    extra: bool = struct.field(pytree_node=False, default=False)


@jax.tree_util.register_pytree_node_class
class Layers(Sequence[LayerRecord]):
    """The records of layers, in forward order. No tuple, so that `model.tabulate` prints it on one line."""

    def __init__(self, records: Iterable[LayerRecord] = ()):
        self._records = tuple(records)

    @overload
    def __getitem__(self, index: int) -> LayerRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerRecord, ...]: ...
    def __getitem__(self, index):
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[LayerRecord]:
        return iter(self._records)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Layers, tuple)) and self._records == tuple(other)

    def __repr__(self) -> str:
        return f"Layers({list(self._records)})"

    def tree_flatten(self) -> tuple[tuple[LayerRecord, ...], None]:
        """The records, as children."""
        return self._records, None

    @classmethod
    def tree_unflatten(cls, _: None, records: Iterable[LayerRecord]) -> "Layers":
        """The inverse."""
        return cls(records)


def _described(dumper: yaml.SafeDumper, layers: Layers) -> yaml.Node:
    return dumper.represent_str(f"{len(layers)} layers")


yaml.SafeDumper.add_representer(Layers, _described)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """Feature maps on their way through a network; compared by identity, so that lists of branches can be searched.

    Within a network, take them through units and the functions that follow their channels: `map`, `ftwt.residual_add`,
    `ftwt.concatenate`, `ftwt.flatten`, `ftwt.permute_channels`. Whatever is made from `values` by other means has lost
    masks, records and control, which a `CompositionWarning` says.

    Attributes:
      values: [N, H, W, C]; any number of axes between the first and the last.
      active: bool [N, C], the channels that can be non-zero; None: all of them.
      layers: records of every layer that these values came through, in forward order.
      control: settings of this call, which every gated unit obeys.
      trail: tells these activations from others of the same layers.
    """

    values: Float[Array, "N ... C"]
    active: Bool[Array, "N C"] | None = None
    layers: Sequence[LayerRecord] = dataclasses.field(default_factory=Layers)
    control: GateControl = dataclasses.field(default_factory=GateControl)
    trail: str = dataclasses.field(default="", metadata={"static": True})
    _maxima: ClassVar[Float[Array, "N C"] | None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `values`."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The number of axes of `values`."""
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of `values`."""
        return self.values.dtype

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

    def replace(self, **changes: Any) -> "Activations":
        """A copy with other fields. New `values` without `active` can be non-zero in every channel."""
        if "values" in changes and "active" not in changes:
            changes["active"] = None
            if self.active is not None:
                warn_user(
                    "new values by replace(values=…) count as non-zero in every channel, and layers of other branches "
                    "are not counted: use .map(fn), ftwt.concatenate, ftwt.flatten or ftwt.permute_channels",
                    CompositionWarning,
                )
        return self.made(**changes)

    def made(self, **changes: Any) -> "Activations":
        """A plain copy with other fields, as they are."""
        fields = {name: self.__dict__[name] for name in ("values", "active", "layers", "control", "trail")}
        return Activations(**{**fields, **changes})

    def step(self, what: str, *others: "Activations") -> str:
        """The trail of what is made of these activations, another one each time."""
        count = self.__dict__["_steps"] = self.__dict__.get("_steps", 0) + 1
        return fingerprint(what, count, self.trail, *(other.trail for other in others))

    def map(self, fn: Callable[[Array], Array]) -> "Activations":
        """Applies a function to the values: an activation, pooling, resizing, a norm, any other.

        If it acts on each channel by itself and keeps zero at zero, channels that are off remain off. Whether it does
        is found out while tracing; if not, all channels count as non-zero from here on, and a `CompositionWarning` says
        so where masks are lost. It may not change the number of images.

        Raises:
          UserError: the result has other images, or no channels.
        """
        return self.mapped(fn)[0]

    def mapped(self, fn: Callable[[Array], Array]) -> tuple["Activations", Effect | None]:
        """`map`, and what the function does where that is known: not if it calls modules of its own."""
        calls = 0

        def count(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
            nonlocal calls
            calls += 1
            return call(*args, **kwargs)

        with nn.intercept_methods(count):
            values = fn(self.values)
        if not hasattr(values, "shape") or values.ndim < 2 or values.shape[0] != self.shape[0]:
            got = getattr(values, "shape", type(values).__name__)
            raise UserError(f"a function under map returns maps of the same {self.shape[0]} images; got {got}")
        # A module that `fn` makes would get another name, and other parameters, a second time.
        known = None if calls and not isinstance(fn, nn.Module) else effect(fn, self.values)
        keeps = known is not None and known.in_place and known.zero
        if not keeps and self.active is not None:
            warn_user(_lost(known, self.shape, values.shape), CompositionWarning)
        return self.made(values=values, active=self.active if keeps else None, trail=self.step("map")), known

    def add(self, other: "Activations") -> "Activations":
        """The sum of two branches, with the control of the first; a channel can be non-zero where either's can."""
        active = None if self.active is None or other.active is None else self.active | other.active
        layers = merge_layers(self.layers, other.layers)
        return self.made(values=self.values + other.values, active=active, layers=layers, trail=self.step("add", other))

    def join(self, parts: Sequence["Activations"]) -> "Activations":
        """The channels of all parts side by side; one of them is this one. See `ftwt.concatenate`."""
        active = None
        if any(part.active is not None for part in parts):
            active = jnp.concatenate([all_active(part) for part in parts], axis=-1)
        layers = functools.reduce(merge_layers, (part.layers for part in parts))
        values = jnp.concatenate([part.values for part in parts], axis=-1)
        return self.made(values=values, active=active, layers=layers, trail=self.step("join", *parts))

    def rearrange(self, fn: Callable[[Array], Array], sources: Sequence[Sequence[int]]) -> "Activations":
        """A function that moves values between channels.

        Args:
          fn: from values to values.
          sources: for each channel of the result, the channels that its values come from.
        """
        active = None
        if self.active is not None:
            active = jnp.any(self.active[:, jnp.asarray(sources)], axis=-1)
        return self.made(values=fn(self.values), active=active, trail=self.step("rearrange"))

    def append_zeros(self, count: int) -> "Activations":
        """`count` more channels behind the others, zero in every image."""
        return self.made(
            values=jnp.pad(self.values, ((0, 0),) * (self.ndim - 1) + ((0, count),)),
            active=jnp.pad(all_active(self), ((0, 0), (0, count))),
            trail=self.step("append"),
        )


def _read_values(self: Activations) -> Array:
    """`Activations.values`: a user's module that reads them is told what it loses."""
    caller = sys._getframe(1).f_globals.get("__name__", "").split(".")[0]
    if caller not in ("ftwt_jax", "flax", "jax", "dataclasses", "copy") and _within_a_module():
        warn_user(
            "reading .values inside a network leaves masks, layer records and GateControl behind: use .map(fn), "
            "ftwt.residual_add, ftwt.concatenate, ftwt.flatten, ftwt.permute_channels, ftwt.PlainConv or "
            "ftwt.GatedDense (.shape, .ndim and .dtype lose nothing)",
            CompositionWarning,
        )
    return self.__dict__["values"]


def _within_a_module() -> bool:
    return flax_module._context.module_stack[-1] is not None


# A field for those who make activations, a property for those who read them: a dataclass cannot declare both at once.
Activations.values = property(_read_values, lambda self, values: self.__dict__.__setitem__("values", values))  # type: ignore[assignment]


def _lost(known: Effect | None, before: tuple[int, ...], after: tuple[int, ...]) -> str:
    """Why masks are lost after a function."""
    if known is None:
        return (
            "a function under map calls modules, so all channels count as non-zero from here on: pass the "
            "module itself if it acts on each channel alone, or call it outside of the function"
        )
    if before[-1] != after[-1]:
        return (
            f"a function under map turns {before[-1]} channels into {after[-1]}, so all of them count as non-zero from "
            "here on: ftwt.flatten, ftwt.concatenate, ftwt.permute_channels, ftwt.pixel_shuffle and "
            "ftwt.pixel_unshuffle keep track of them"
        )
    if not known.in_place:
        return (
            "a function under map may move values between channels or images (it cannot be followed), so all channels "
            "count as non-zero from here on: ftwt.permute_channels keeps track of them"
        )
    return (
        "a function under map makes zeros non-zero, so all channels count as non-zero from here on: give a unit its "
        "norm and activation as norm= and act=, before its mask"
    )


def fingerprint(*parts: Any) -> str:
    """A short text that differs where any part does."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def all_active(x: Activations) -> Bool[Array, "N C"]:
    """`active`, with None written out."""
    return jnp.ones((x.shape[0], x.shape[-1]), bool) if x.active is None else x.active


def as_activations(inputs: "Activations | Array") -> Activations:
    """Wraps plain images or feature maps [N, H, W, C]; `Activations` pass through."""
    return inputs if isinstance(inputs, Activations) else Activations(jnp.asarray(inputs))


def merge_layers(first: Sequence[LayerRecord], second: Sequence[LayerRecord]) -> Layers:
    """The layers of two branches that part somewhere: all of the first, then those of the second that it lacks.

    Layers are told apart by name and call, which survive `nn.remat` and `nn.jit`, as Python's own identity does not.
    """
    known = {(layer.name, layer.call) for layer in first}
    return Layers((*first, *(layer for layer in second if (layer.name, layer.call) not in known)))
