"""The layers of a network as compact execution runs them: on packed activations, with folded weights."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ftwt_jax.gating.activations import Activations, LayerRecord, Layers, as_activations, merge_layers
from ftwt_jax.gating.contract import effect
from ftwt_jax.gating.convolutions import Convolution, Plane
from ftwt_jax.gating.gates import GateConfig, GateOutput, normalized, pooled
from ftwt_jax.gating.macs import layer_dense_macs
from ftwt_jax.gating.norms import activated
from ftwt_jax.gating.units import Classifier, GatedUnit, Outputs, PlainConv, check_shortcut, over_pixels
from ftwt_jax.inference.folding import Folded, native_weights
from ftwt_jax.inference.native import kernels
from ftwt_jax.inference.packed import (
    Channels,
    Packed,
    PackedActivations,
    mapped,
    packed_form,
    plain,
    selected,
    with_packed,
)
from ftwt_jax.ops.reductions import as_maps, mean_pool_all

# Of each layer, by name.
Weights = dict[str, Any]
# The collection into which units write what their gates did: "gate_logits" float32 [N, C] and, for a unit that leaves
# filters out, "outside" bool [N], whether its gate wanted one of those.
SEEN = "compact_execution"


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a unit.

    Attributes:
      name: path of the unit.
      key: name of this call, under which its weights are held.
      inputs: what the unit is given.
      channels: number of input channels, also of those that `inputs` leaves out.
      kept: the filters to compute, ascending.
      shortcut: what is added before the activation, for these filters; None: nothing.
      shape: of the maps of these filters.
    """

    unit: GatedUnit
    name: str
    key: str
    inputs: Packed
    channels: int
    kept: Channels
    shortcut: Array | None
    shape: tuple[int, ...]

    @property
    def left_out(self) -> int:
        """How many input channels are not there."""
        return self.channels - len(self.inputs.channels)

    @property
    def depthwise(self) -> bool:
        """Whether each filter reads one channel, its own."""
        return _is_depthwise(self.unit, self.channels)

    def masked(self, maps: Array, logits: Float[Array, "N C"] | None) -> Array:
        """Maps of the kept filters, zero where a gate turns its filter off."""
        if logits is None:
            return maps
        on = logits > 0
        on = on[:, self.kept] if len(self.kept) < self.unit.features else on
        return jnp.where(over_pixels(on, maps.ndim), maps, 0)

    def activated(self, maps: Array) -> Array:
        """Maps of the kept filters after the activation."""
        act, features = self.unit.act, self.unit.features
        if act is None or act is nn.relu or len(self.kept) == features:
            return activated(act, maps)
        whole = activated(act, Packed(maps, self.kept).aligned(tuple(range(features))))
        return mapped(Packed(maps, self.kept), act, effect(act, whole), whole).values


class PackedLayers:
    """Runs the layers of a network packed, in place of their own `__call__` (see `flax.linen.intercept_methods`).

    Which channels a layer is given follows from the layers before it, so the weights that it needs are known only once
    the network is traced. A first, abstract trace packs them; later ones receive them as an argument of the compiled
    function.

    Args:
      variables: of the network, concrete.
      kept: for each gated unit by name, the filters to hold ready, ascending; a unit that is missing keeps all.
      per_image: on a CPU, compute of those only the ones that an image's own mask turns on.
      fixed: whether `kept` is all that there is, for every image, of plain convolutions too: a subnet, without gates.
      weights: what an earlier trace packed; None: pack now.

    Attributes:
      weights: of every layer, in the form in which it is run.
      macs: of every layer, as it is run here with all that is kept.
    """

    def __init__(
        self,
        variables: Any,
        kept: Mapping[str, Channels],
        per_image: bool,
        weights: Weights | None = None,
        fixed: bool = False,
    ):
        self._folded = Folded(variables)
        self._kept = kept
        self._per_image, self._fixed = per_image and not fixed, fixed
        self._packing = weights is None
        self._times: dict[str, int] = {}
        self.weights: Weights = {} if weights is None else weights
        self.macs: dict[str, int] = {}
        self._runs: tuple[tuple[type[nn.Module], Callable], ...] = (
            (GatedUnit, self._unit),
            (PlainConv, self._plain),
            (Classifier, self._classify),
        )

    def __call__(self, call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        """Runs one method of a module: packed if it is one of our layers, otherwise as it is."""
        # By the method, not the class alone: a subclass may do more, and then calls the one below it.
        method = getattr(context.orig_method.func, "__qualname__", "")
        for kind, run in self._runs:
            if isinstance(context.module, kind) and method == f"{kind.__name__}.__call__":
                return run(call, context.module, *args, **kwargs)
        return call(*args, **kwargs)

    def _unit(
        self, whole: Callable, unit: GatedUnit, inputs: Any, train: bool = False, shortcut: Any = None
    ) -> Activations:
        x = as_activations(inputs)
        unit.convolution.check(x.values)
        channels = x.shape[-1]
        name, key = self._called(unit)
        everything = tuple(range(unit.features))
        added = None if shortcut is None else as_activations(shortcut)
        after = self._maps_after(name, unit, x)
        if train or not unit.folds() or unit.computes_all(after):
            return self._unpacked_call(key, whole, x, train, *([] if added is None else [plain(added)]))
        # Filters of a group share their inputs, so groups of several channels stay whole.
        separable = unit.gates is not None and (unit.convolution.groups == 1 or _is_depthwise(unit, channels))
        wanted = self._kept.get(name if self._fixed else key, everything)
        kept = wanted if separable else everything
        layers: Sequence[LayerRecord] = x.layers
        values: Array | None = None
        if added is not None:
            one = added.shape[-1] == 1 != unit.features
            values = added.values if one else packed_form(added).aligned(kept)
            layers = merge_layers(layers, added.layers)
        call = _Call(unit, name, key, packed_form(x), channels, kept, values, (*after.shape[:-1], len(kept)))
        plane = unit.convolution.in_a_plane(x.shape[1:-1]) if self._per_image and separable else None
        if unit.gates and plane and self._in_float32(call):
            y, logits = self._by_kernel(call, unit.gates, plane)
        else:
            y, logits = self._by_xla(call)
        gate = None
        if self._fixed and kept != wanted:
            y, kept = selected(y, wanted).values, wanted
        if logits is not None:
            gate = GateOutput(logits, logits > 0, None)
            unit.sow(SEEN, "gate_logits", logits)
            dropped = np.setdiff1d(everything, kept)
            if len(dropped):
                unit.sow(SEEN, "outside", jnp.any(gate.mask[:, dropped], axis=-1))
        record = unit.record(x, y, gate, False, added)
        return _unpacked(x, Packed(y, kept), unit.features, layers, record)

    def _maps_after(self, name: str, layer: GatedUnit | PlainConv, x: Activations) -> jax.ShapeDtypeStruct:
        """What the maps after a layer look like."""
        kernel, bias = (jax.ShapeDtypeStruct(shape, x.dtype) for shape in self._folded.shapes(name, layer.convolution))
        return jax.eval_shape(layer.convolution.run, x.values, kernel, bias)

    def _unpacked_call(self, key: str, call: Callable, x: Activations, *args: Any) -> Activations:
        """A layer as it is: its norm or activation needs every filter of it."""
        self._layer(key, dict)
        out = call(x.made(control=x.control.replace(targets=False)), *args)
        self.macs[key] = layer_dense_macs(out.layers[-1])
        return out.made(control=x.control)

    def _in_float32(self, call: _Call) -> bool:
        """Whether a unit computes in float32 alone, which is all that our own kernel knows."""
        maps = [call.inputs.values] if call.shortcut is None else [call.inputs.values, call.shortcut]
        dtypes = [call.unit.dtype or jnp.float32, self._folded.dtype(call.name), call.inputs.values.dtype]
        return all(jnp.dtype(dtype) == jnp.float32 for dtype in (*dtypes, jnp.result_type(*maps)))

    def _by_kernel(self, call: _Call, gates: GateConfig, plane: Plane) -> tuple[Array, Array | None]:
        """A gated unit by our own kernel for CPUs: each image computes the filters that its own mask turns on.

        Returns:
          Maps [N, ..., K] of the kept filters, masked; gate logits [N, C].
        """
        unit, values = call.unit, call.inputs.values
        window, strides, pads = plane

        def pack() -> kernels.UnitWeights:
            return native_weights(self._unit_weights(call), window, call.inputs.channels, call.kept, call.depthwise)

        added = call.shortcut
        if added is not None:
            added = as_maps(jnp.broadcast_to(check_shortcut(added, call.shape), call.shape))
        y, logits = kernels.gated_unit(
            as_maps(values),
            self._layer(call.key, pack),
            window,
            gates,
            strides,
            pads,
            added,
            relu=unit.act is nn.relu,
            left_out=call.left_out,
        )
        y = y.reshape(call.shape)
        if unit.act not in (None, nn.relu):
            # Other activations need not keep zero at zero.
            y = call.masked(call.activated(y), logits)
        return y, logits

    def _by_xla(self, call: _Call) -> tuple[Array, Array | None]:
        """A unit by XLA's operations: every kept filter is computed, then masked.

        Returns:
          Maps [N, ..., K] of the kept filters, masked; gate logits [N, C], or None for a dense unit.
        """
        unit, values, groups = call.unit, call.inputs.values, call.unit.convolution.groups
        weights = self._layer(call.key, lambda: self._unit_weights(call))
        if call.depthwise and groups > 1:
            values, groups = call.inputs.aligned(call.kept), len(call.kept)
        elif groups > 1:
            values = call.inputs.aligned(tuple(range(call.channels)))
        y = self._convolve(call.key, unit.convolution, values, groups)
        y = y if call.shortcut is None else y + check_shortcut(call.shortcut, y.shape)
        y = call.activated(y)
        if unit.gates is None or self._fixed:
            return y, None
        logits = gate_logits(call.inputs.values, call.left_out, weights, unit.gates)
        return call.masked(y, logits), logits

    def _unit_weights(self, call: _Call) -> dict[str, Any]:
        """Convolution of a unit, and its gate head if it has one, for the channels of this call."""
        unit, inputs = call.unit, call.inputs.channels
        weights = self._folded.convolution(call.name, unit, inputs, call.kept)
        if unit.gates is None or self._fixed:
            return weights
        own = unit.gates.reads_own(call.channels, unit.features, unit.convolution.groups)
        return weights | self._folded.head(call.name, inputs, own)

    def _plain(self, whole: Callable, layer: PlainConv, inputs: Any, train: bool = False) -> Activations:
        x = as_activations(inputs)
        layer.convolution.check(x.values)
        name, key = self._called(layer)
        if train or not layer.folds():
            return self._unpacked_call(key, whole, x, train)
        packed, everything = packed_form(x), tuple(range(layer.features))
        kept = self._kept.get(name, everything) if self._fixed else everything
        self._layer(key, lambda: self._folded.convolution(name, layer, packed.channels, kept))
        groups = layer.convolution.groups
        values = packed.values if groups == 1 else packed.aligned(tuple(range(x.shape[-1])))
        y = activated(layer.act, self._convolve(key, layer.convolution, values, groups))
        return _unpacked(x, Packed(y, kept), layer.features, x.layers, layer.record(x, y))

    def _classify(self, _: Callable, layer: Classifier, inputs: Any) -> Outputs:
        x = as_activations(inputs)
        packed = packed_form(x)
        name, key = self._called(layer)
        weights = self._layer(key, lambda: self._folded.classifier(name, packed.channels))
        dtype = layer.dtype or jnp.result_type(packed.values, weights["kernel"])
        features = mean_pool_all(packed.values).astype(dtype)
        logits = features @ weights["kernel"].astype(dtype) + weights["bias"].astype(dtype)[None]
        return Outputs(logits.astype(jnp.float32), Layers((*x.layers, layer.record(x))))

    def _called(self, layer: nn.Module) -> tuple[str, str]:
        """Name of a layer, and of this call of it: called twice, it may receive other channels each time."""
        name = "/".join(layer.path)
        call = self._times[name] = self._times.get(name, 0) + 1
        return name, name if call == 1 else f"{name}#{call}"

    def _layer(self, key: str, pack: Callable[[], Any]) -> Any:
        if self._packing:
            self.weights[key] = pack()
        return self.weights[key]

    def _convolve(self, key: str, convolution: Convolution, x: Array, groups: int) -> Array:
        """Convolution and bias."""
        kernel, bias = (jnp.asarray(self.weights[key][name]) for name in ("kernel", "bias"))
        y = convolution.run(x, kernel, bias, groups)
        self.macs[key] = convolution.positions(x.shape, y.shape) * kernel.size
        return y


def _is_depthwise(unit: GatedUnit, channels: int) -> bool:
    return unit.convolution.groups == channels == unit.features


def _unpacked(
    x: Activations, packed: Packed, features: int, layers: Sequence[LayerRecord], record: LayerRecord
) -> PackedActivations:
    """The outputs of a layer that read `x`; `values` has every channel, for whatever else reads it."""
    values = packed.aligned(tuple(range(features)))
    active = None if record.gate is None else record.gate.mask
    return with_packed(Activations(values, active, Layers((*layers, record)), x.control, record.call), packed)


def gate_logits(
    maps: Float[Array, "N H W K"], left_out: int, weights: Mapping[str, Any], gates: GateConfig
) -> Float[Array, "N C"]:
    """`GateHead` on packed maps.

    A channel that is left out is zero in every map, so after the norm all such channels have one value z. With e the
    other channels and W their rows, the product over all channels is (e - z) W + z * (the sum of all rows), which does
    not read the rows of what is left out.

    Args:
      maps: the input channels that are there.
      left_out: how many are not.
      weights: as `Folded.head` packs them.
    """
    channels = normalized(jnp.pad(pooled(maps, gates.pool), ((0, 0), (0, left_out))), gates.norm)
    here, kernel = channels[:, : maps.shape[-1]], jnp.asarray(weights["head_kernel"])
    rest = jnp.broadcast_to(jnp.asarray(weights["head_bias"])[None], (maps.shape[0], weights["head_bias"].shape[-1]))
    if left_out and gates.norm != "none":
        zero = channels[:, -1:]
        here, rest = here - zero, rest + zero * jnp.asarray(weights["head_sum"])[None]
    place = jnp.asarray(weights["head_place"])
    return rest.at[:, place].add(here * kernel[None, :, 0]) if place.size else here @ kernel + rest
