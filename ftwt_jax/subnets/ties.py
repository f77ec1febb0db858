"""Which filters of a network must be kept or left out together, so that what is left is an ordinary dense network.

Filter 3 of a residual block's last unit is added to channel 3 of its shortcut. If a subnet left out one of them, their
sum would have to be scattered into a wider map at run time. So both are one *group*, and so is whatever else is added
to that channel, stage by stage. A depthwise filter is in the group of the channel that it reads.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ftwt_jax.errors import UserError
from ftwt_jax.gating.activations import Activations, LayerRecord, as_activations
from ftwt_jax.gating.contract import Effect
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.gating.macs import layer_dense_macs
from ftwt_jax.gating.units import Classifier, GatedUnit, PlainConv

# Channels that are no filter's: always there, or zero in every image.
_ALWAYS, _ZERO = -1, -2


@dataclasses.dataclass(frozen=True, eq=False)
class TiedLayer:
    """One call of a layer: the groups behind its channels and filters, and what a pair of these costs.

    Attributes:
      record: of the whole layer.
      inputs, outputs: the group of each input channel and filter; -1: always there, -2: zero in every image.
    """

    record: LayerRecord
    inputs: Int[np.ndarray, " C_in"]
    outputs: Int[np.ndarray, " C"]

    def macs(self, kept: Bool[np.ndarray, "K G"]) -> Float[np.ndarray, " K"]:
        """Exact MACs with only these groups kept."""
        ends = np.ones((len(kept), 1), bool), np.zeros((len(kept), 1), bool)
        # At -1 stands True, at -2 False.
        padded, groups = np.concatenate([kept, *ends[::-1]], axis=1), self.record.groups
        inputs, outputs = (
            padded[:, each].reshape(len(kept), groups, -1).sum(axis=-1) for each in (self.inputs, self.outputs)
        )
        return (inputs * outputs).sum(axis=-1) * float(self.record.positions * self.record.kernel_area)


@dataclasses.dataclass(frozen=True, eq=False)
class Ties:
    """The groups of filters of a network.

    Attributes:
      groups: for each layer whose filters can be left out, the group of each filter; -1: it is always kept.
      units: the names of those of these layers that are units, whose masks tell which groups an image needs.
      count: number of groups.
      layers: every call of a layer, in forward order.
    """

    groups: dict[str, Int[np.ndarray, " C"]]
    units: tuple[str, ...]
    count: int
    layers: tuple[TiedLayer, ...]

    @property
    def dense_macs(self) -> float:
        """Exact MACs of the whole network, without gate heads."""
        return float(sum(layer_dense_macs(layer.record) for layer in self.layers))

    def macs(self, kept: Bool[np.ndarray, "K G"]) -> Float[np.ndarray, " K"]:
        """Exact MACs of the networks that keep these groups, float64."""
        return np.sum([layer.macs(kept) for layer in self.layers], axis=0)

    def costs(self) -> Float[np.ndarray, " G"]:
        """The share of the dense MACs that each group costs by itself, float32; their sum is 1."""
        found = np.zeros(self.count)
        for block in self.blocks():
            # The groups of a block cost the same.
            kept = np.ones((1, self.count), bool)
            kept[0, block[0]] = False
            found[block] = self.dense_macs - self.macs(kept)[0]
        return (found / found.sum()).astype(np.float32)

    def masks(self, kept: np.ndarray) -> dict[str, np.ndarray]:
        """The masks bool [K, C] of every layer for the groups bool [K, G] that each subnet keeps."""
        always = np.ones((len(kept), 1), bool)
        padded = np.concatenate([kept, always], axis=1)
        return {name: padded[:, groups] for name, groups in self.groups.items()}

    def blocks(self) -> list[np.ndarray]:
        """The groups in blocks: those whose filters are in the same layers, and so can take each other's place."""
        layers: list[list[str]] = [[] for _ in range(self.count)]
        for name, groups in self.groups.items():
            for group in np.unique(groups[groups >= 0]):
                layers[group].append(name)
        found: dict[tuple[str, ...], list[int]] = {}
        for group, names in enumerate(layers):
            found.setdefault(tuple(names), []).append(group)
        return [np.array(block) for block in found.values()]


def find_ties(model: nn.Module, variables: Any, images: Any, **options: Any) -> Ties:
    """Traces a network and finds which of its filters go together; nothing is computed.

    Filters that are added to channels that are always there are always kept. So are those whose channels a function
    moves or mixes in a way that cannot be followed, and the inputs of convolutions in groups. A `PlainConv` may lose
    filters only where they are added to a unit's.

    Args:
      model: a network of `GatedUnit`s with gates.
      images: shape and dtype of a batch.

    Raises:
      UserError: the network has no unit with gates.
    """
    finder = _Finder()

    def trace(variables: Any, images: Array) -> None:
        with nn.intercept_methods(finder):
            call_network(model, variables, images, GateControl(masks="targets"), **options)

    jax.eval_shape(trace, variables, images)
    return finder.ties()


def call_network(model: nn.Module, variables: Any, images: Array, control: GateControl, **options: Any) -> Any:
    """Runs a network under a control, which is handed to its first layer together with the images."""
    return model.apply(variables, Activations(images, control=control), **options)


class _Finder:
    """Runs the layers of a network on activations that know the filter behind each channel."""

    def __init__(self):
        self._parent: list[int] = []
        self._first: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._units: list[str] = []
        self._pinned: list[int] = []
        self._calls: list[tuple[LayerRecord, Sequence[int], Sequence[int]]] = []

    def __call__(self, call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        layer, method = context.module, getattr(context.orig_method.func, "__qualname__", "")
        if isinstance(layer, GatedUnit) and method == "GatedUnit.__call__" and layer.gates is not None:
            return self._unit(call, layer, *args, **kwargs)
        if isinstance(layer, PlainConv) and method == "PlainConv.__call__":
            return self._layer(call, layer, layer.folds() and layer.act is None, *args, **kwargs)
        if isinstance(layer, GatedUnit) and method == "GatedUnit.__call__":
            return self._layer(call, layer, False, *args, **kwargs)
        if isinstance(layer, Classifier) and method == "Classifier.__call__":
            outputs, x = call(*args, **kwargs), as_activations(args[0])
            self._called(outputs.layers[-1], slots_of(x, x.shape[-1]), (_ALWAYS,) * layer.num_classes)
            return outputs
        return call(*args, **kwargs)

    def _unit(
        self, call: Callable, unit: GatedUnit, inputs: Any, train: bool = False, shortcut: Any = None
    ) -> Activations:
        args = () if shortcut is None else (shortcut,)
        out = self._layer(call, unit, True, inputs, train, *args)
        if "/".join(unit.path) not in self._units:
            self._units.append("/".join(unit.path))
        if unit.computes_all(jax.ShapeDtypeStruct(out.shape, out.dtype)):
            self.pin(out.slots)
        if shortcut is not None:
            self.tie(out.slots, slots_of(as_activations(shortcut), len(out.slots)))
        return out

    def _layer(self, call: Callable, layer: Any, cut: bool, inputs: Any, train: bool = False, *args: Any) -> Any:
        x = as_activations(inputs)
        given, convolution = slots_of(x, x.shape[-1]), layer.convolution
        out = call(x, train, *args)
        slots = self._slots("/".join(layer.path), layer.features) if cut else (_ALWAYS,) * layer.features
        if convolution.groups == x.shape[-1] == layer.features and cut:
            self.tie(slots, [slot if slot >= 0 else _ZERO for slot in given])
        elif convolution.groups > 1:
            self.pin(given)
            self.pin(slots)
        self._called(out.layers[-1], given, slots)
        return with_slots(out, slots, self)

    def _called(self, record: LayerRecord, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        self._calls.append((record.replace(active_in=None, active_out=None, gate=None), inputs, outputs))

    def _slots(self, name: str, features: int) -> tuple[int, ...]:
        """The numbers of a layer's filters; called again, it has the same."""
        if name not in self._first:
            self._first[name], self._sizes[name] = len(self._parent), features
            self._parent += range(len(self._parent), len(self._parent) + features)
        return tuple(range(self._first[name], self._first[name] + features))

    def _root(self, slot: int) -> int:
        while self._parent[slot] != slot:
            self._parent[slot] = slot = self._parent[self._parent[slot]]
        return slot

    def pin(self, slots: Sequence[int]) -> None:
        """These filters are always kept."""
        self._pinned += [slot for slot in slots if slot >= 0]

    def tie(self, first: Sequence[int], second: Sequence[int]) -> list[int]:
        """Channel by channel, what stands behind the sum of two maps; filters that are added go together."""
        result = []
        for one, other in zip(first, second, strict=True):
            if one >= 0 and other >= 0:
                low, high = sorted((self._root(one), self._root(other)))
                self._parent[high] = low
            elif _ALWAYS in (one, other):
                self.pin([one, other])
            result.append(max(one, other) if _ALWAYS not in (one, other) else _ALWAYS)
        return result

    def ties(self) -> Ties:
        """What was found."""
        if not self._units:
            raise UserError("this network has no units with gates: create it with gates=ftwt.GateConfig()")
        free = {self._root(slot) for name in self._units for slot in self._slots(name, self._sizes[name])}
        free -= {self._root(slot) for slot in self._pinned}
        number = {root: index for index, root in enumerate(sorted(free))}

        def numbers(slots: Sequence[int]) -> np.ndarray:
            return np.array([slot if slot < 0 else number.get(self._root(slot), _ALWAYS) for slot in slots])

        groups = {name: numbers(self._slots(name, self._sizes[name])) for name in self._first}
        cut = {name: each for name, each in groups.items() if np.any(each >= 0)}
        if not number:
            raise UserError(
                "no filter of this network can be left out: all are added to channels that are always there"
            )
        layers = tuple(TiedLayer(record, numbers(given), numbers(made)) for record, given, made in self._calls)
        return Ties(cut, tuple(name for name in self._units if name in cut), len(number), layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SlotActivations(Activations):
    """Activations that know the filter behind each channel.

    Attributes:
      slots: [C] numbers of filters, or one of the two marks above.
      finder: what ties them.
    """

    slots: tuple[int, ...] = dataclasses.field(default=(), kw_only=True, metadata={"static": True})
    finder: Any = dataclasses.field(default=None, kw_only=True, metadata={"static": True})

    def replace(self, **changes: Any) -> Activations:
        """A copy with other fields; new values make it plain."""
        changed = super().replace(**changes)
        if "values" not in changes:
            return with_slots(changed, self.slots, self.finder)
        self.finder.pin(self.slots)
        return changed

    def mapped(self, fn: Callable[[Array], Array]) -> tuple[Activations, Effect | None]:
        """As `Activations.mapped`."""
        result, known = super().mapped(fn)
        if known is None or not known.in_place or not known.zero:
            self.finder.pin(self.slots)
            return result, known
        return with_slots(result, self.slots, self.finder), known

    def add(self, other: Activations) -> Activations:
        """As `Activations.add`; ties the filters of both."""
        slots = self.finder.tie(self.slots, slots_of(other, len(self.slots)))
        return with_slots(super().add(other), slots, self.finder)

    def join(self, parts: Sequence[Activations]) -> Activations:
        """As `Activations.join`."""
        slots = [slot for part in parts for slot in slots_of(part, part.shape[-1])]
        return with_slots(super().join(parts), slots, self.finder)

    def rearrange(self, fn: Callable[[Array], Array], sources: Sequence[Sequence[int]]) -> Activations:
        """As `Activations.rearrange`; ties filters whose values share a channel of the result."""
        result, slots = super().rearrange(fn, sources), []
        for given in sources:
            first = self.slots[given[0]]
            for source in given[1:]:
                (first,) = self.finder.tie([first], [self.slots[source]])
            slots.append(first)
        return with_slots(result, slots, self.finder)

    def append_zeros(self, count: int) -> Activations:
        """As `Activations.append_zeros`."""
        return with_slots(super().append_zeros(count), (*self.slots, *[_ZERO] * count), self.finder)


def slots_of(x: Activations, channels: int) -> tuple[int, ...]:
    """The filters behind the channels of activations; where nothing is known, they are always there."""
    slots = x.slots if isinstance(x, SlotActivations) else (_ALWAYS,) * x.shape[-1]
    return slots * channels if len(slots) == 1 != channels else slots


def with_slots(x: Activations, slots: Sequence[int], finder: _Finder) -> SlotActivations:
    """Activations together with the filters behind their channels."""
    return SlotActivations(x.values, x.active, x.layers, x.control, x.trail, slots=tuple(slots), finder=finder)
