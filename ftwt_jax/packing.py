"""The layers of a network as compact execution runs them: batch norm folded in, only the channels that matter."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import lax
from jaxtyping import Array, Int

from ftwt_jax.activations import Activations, LayerRecord, Packed, as_activations, merge_layers, module_calls
from ftwt_jax.batch_norm import EPSILON
from ftwt_jax.convolution import conv_general_dilated
from ftwt_jax.gates import HEAD_NAME, GateConfig, GateOutput, gate_pool
from ftwt_jax.reductions import mean_pool_all
from ftwt_jax.units import Classifier, GatedUnit, Outputs, PlainConv

Weights = dict[str, dict[str, Any]]
Channels = tuple[int, ...]
# The collection into which units write what their gates did: "gate_logits" float32 [N, C] and, of a unit that leaves
# filters out, "outside" bool [N], whether its gate wanted one of those, or too many.
SEEN = "compact_execution"


class PackedLayers:
    """Runs the layers of a network packed, in place of their own `__call__` (see `flax.linen.intercept_methods`).

    Which channels a layer is given follows from the layers before it, so the weights that it needs are known only once
    the network is traced. A first, abstract trace packs them; later ones are handed them as an argument of the
    compiled function.

    Args:
      variables: of the network, concrete.
      kept: for each gated unit by name, the filters to hold ready, ascending; a unit that is missing keeps all.
      sizes: how many of those to compute for a sample, by its mask, when it comes alone; a unit that is missing
        computes all that it keeps.
      weights: what an earlier trace packed; None: pack now.

    Attributes:
      weights: of every layer in the form in which it is run.
      calls: of every layer, how many positions it has and how many MACs it takes here.
    """

    def __init__(
        self,
        variables: Any,
        kept: Mapping[str, Channels],
        sizes: Mapping[str, int],
        weights: Weights | None = None,
    ):
        self._variables = {kind: flatten_dict(tree, sep="/") for kind, tree in variables.items()}
        self._kept = kept
        self._sizes = sizes
        self._packing = weights is None
        self._times: dict[str, int] = {}
        self.weights: Weights = {} if weights is None else weights
        self.calls: dict[str, tuple[int, int]] = {}
        self._runs: tuple[tuple[type[nn.Module], Callable], ...] = (
            (GatedUnit, self._unit),
            (PlainConv, self._plain),
            (Classifier, self._classify),
        )

    def __call__(self, call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        """Runs one method of a module: packed if it is one of our layers, otherwise as it is."""
        module_calls.get().append(context.method_name)
        # By the method, not the class alone: a subclass may do more, and then calls the one below it.
        method = getattr(context.orig_method.func, "__qualname__", "")
        for kind, run in self._runs:
            if isinstance(context.module, kind) and method == f"{kind.__name__}.__call__":
                return run(context.module, *args, **kwargs)
        return call(*args, **kwargs)

    def _unit(self, unit: GatedUnit, inputs: Any, train: bool = False, shortcut: Any = None) -> Activations:
        x = as_activations(inputs)
        packed = _packed(x)
        name, key = self._called(unit)
        everything = tuple(range(unit.features))
        depthwise = unit.groups == x.values.shape[-1] == unit.features
        # Filters of a group share their inputs, so groups of several channels stay whole.
        free = unit.gates is not None and (unit.groups == 1 or depthwise)
        kept = self._kept.get(key, everything) if free else everything
        weights = self._layer(key, lambda: self._folded(name, packed.channels, kept, unit.groups, unit.gates))

        gate = chosen = on = None
        if unit.gates is not None:
            logits = _gate_logits(packed, x.values.shape[-1], weights, unit.gates)
            gate = GateOutput(logits, logits > 0, None)
            unit.sow(SEEN, "gate_logits", logits)
            on = gate.mask[:, kept] if len(kept) < unit.features else gate.mask
            dropped = np.setdiff1d(everything, kept)
            if len(dropped):
                unit.sow(SEEN, "outside", jnp.any(gate.mask[:, dropped], axis=-1))
            size = self._sizes.get(key, len(kept)) if logits.shape[0] == 1 and unit.groups == 1 else len(kept)
            if size < len(kept):
                # Filters that are on come first, in ascending order.
                chosen = lax.top_k(on[0].astype(jnp.float32), size)[1]
                unit.sow(SEEN, "outside", jnp.sum(on, axis=-1) > size)
                on = on[:, chosen]

        if unit.groups == 1:
            y = self._convolve(key, packed, unit.strides, unit.rows_added, unit.dtype, chosen)
        else:
            source = packed.aligned(kept if depthwise else tuple(range(x.values.shape[-1])))
            groups = len(kept) if depthwise else unit.groups
            y = self._convolve(key, Packed(source, ()), unit.strides, unit.rows_added, unit.dtype, groups=groups)
        layers = x.layers
        if shortcut is not None:
            shortcut = as_activations(shortcut)
            added = _packed(shortcut).aligned(kept)
            y = y + (added if chosen is None else added[..., chosen])
            layers = merge_layers(layers, shortcut.layers)
        if unit.act is not None:
            y = unit.act(y)
        if on is not None:
            y = jnp.where(on[:, None, None, :], y, 0)
        record = unit.record(x, y.shape, gate)
        return _unpacked(x, Packed(y, kept, chosen), unit.features, (*layers, record))

    def _plain(self, layer: PlainConv, inputs: Any, train: bool = False) -> Activations:
        x = as_activations(inputs)
        packed = _packed(x)
        name, key = self._called(layer)
        everything = tuple(range(layer.features))
        self._layer(key, lambda: self._folded(name, packed.channels, everything))
        y = self._convolve(key, packed, layer.strides, 0, layer.dtype)
        return _unpacked(x, Packed(y, everything), layer.features, (*x.layers, layer.record(x, y.shape)))

    def _classify(self, layer: Classifier, inputs: Any) -> Outputs:
        x = as_activations(inputs)
        packed = _packed(x).complete()
        name, key = self._called(layer)

        def pack() -> dict[str, Any]:
            kernel, bias = (self._param(name, f"dense/{leaf}") for leaf in ("kernel", "bias"))
            return {"kernel": kernel[list(packed.channels)], "bias": bias}

        weights = self._layer(key, pack)
        dtype = layer.dtype or jnp.result_type(packed.values, weights["kernel"])
        pooled = mean_pool_all(packed.values).astype(dtype)
        logits = pooled @ weights["kernel"].astype(dtype) + weights["bias"].astype(dtype)
        return Outputs(logits.astype(jnp.float32), (*x.layers, layer.record(x)))

    @property
    def work(self) -> int:
        """MACs that a sample takes in convolutions, with every filter that is held ready."""
        return sum(macs for _, macs in self.calls.values())

    def _called(self, layer: nn.Module) -> tuple[str, str]:
        """Name of a layer, and of this call of it: called twice, it may be given other channels each time."""
        name = "/".join(layer.path)
        call = self._times[name] = self._times.get(name, 0) + 1
        return name, name if call == 1 else f"{name}#{call}"

    def _layer(self, key: str, pack: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self._packing:
            self.weights[key] = pack()
        return self.weights[key]

    def _param(self, name: str, leaf: str, kind: str = "params") -> np.ndarray:
        return np.asarray(self._variables[kind][f"{name}/{leaf}" if name else leaf])

    def _folded(
        self, name: str, inputs: Channels, kept: Channels, groups: int = 1, gates: GateConfig | None = None
    ) -> dict[str, Any]:
        """Kernel and bias of convolution and batch norm as one, and the gate head, for these channels alone."""
        scale, bias = (self._param(name, f"bn/{leaf}") for leaf in ("scale", "bias"))
        mean, var = (self._param(name, f"bn/{leaf}", "batch_stats") for leaf in ("mean", "var"))
        factor = scale / np.sqrt(var + np.float32(EPSILON))
        shift = bias - mean * factor
        if f"{name}/conv/bias".lstrip("/") in self._variables["params"]:
            shift = shift + self._param(name, "conv/bias") * factor
        kernel = self._param(name, "conv/kernel") * factor
        rows = list(inputs) if groups == 1 else slice(None)
        weights = {"kernel": kernel[:, :, rows][..., list(kept)], "bias": shift[list(kept)]}
        if gates is not None:
            head = self._param(name, f"{HEAD_NAME}/dense/kernel")
            weights["head_kernel"] = head[list(inputs)]
            weights["head_bias"] = self._param(name, f"{HEAD_NAME}/dense/bias")
            weights["head_rest"] = np.delete(head, list(inputs), axis=0).sum(axis=0)
        return weights

    def _convolve(
        self,
        key: str,
        x: Packed,
        strides: int,
        pad: int,
        dtype: Any,
        chosen: Int[Array, " K"] | None = None,
        groups: int = 1,
    ) -> Array:
        """Convolution and bias; `chosen`: of which filters, by their place among those held ready."""
        kernel, bias = (jnp.asarray(self.weights[key][name]) for name in ("kernel", "bias"))
        if chosen is not None:
            bias = bias[chosen]
        if x.index is not None and chosen is not None:
            kernel = kernel.at[:, :, x.index[:, None], chosen].get(mode="promise_in_bounds", unique_indices=True)
        elif x.index is not None:
            kernel = kernel.at[:, :, x.index].get(mode="promise_in_bounds", unique_indices=True)
        elif chosen is not None:
            kernel = kernel.at[..., chosen].get(mode="promise_in_bounds", unique_indices=True)
        dtype = dtype or jnp.result_type(x.values, kernel)
        y = conv_general_dilated(
            x.values.astype(dtype),
            kernel.astype(dtype),
            (strides, strides),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        positions = y.shape[1] * y.shape[2]
        self.calls[key] = (positions, positions * kernel.size)
        return y + bias.astype(dtype)


def _packed(x: Activations) -> Packed:
    return x.packed or Packed(x.values, tuple(range(x.values.shape[-1])))


def _unpacked(x: Activations, packed: Packed, features: int, layers: tuple[LayerRecord, ...]) -> Activations:
    """Activations with a packed form; `values` has every channel, for whatever else reads it."""
    return x.replace(
        values=packed.aligned(tuple(range(features))), packed=packed, active=layers[-1].active_out, layers=layers
    )


def _gate_logits(x: Packed, features: int, weights: dict[str, Any], gates: GateConfig) -> Array:
    """`GateHead` on packed maps: what is left out is zero in every map, so one number stands for all of it."""
    summary = gate_pool(gates.pool)(x.values.astype(jnp.float32))
    if x.index is not None:
        summary = jnp.zeros((1, len(x.channels))).at[:, x.index].set(summary)
    rest = jnp.zeros((summary.shape[0], 1))
    left_out = features - summary.shape[-1]
    if gates.softmax:
        top = jnp.max(summary, axis=-1, keepdims=True)
        if left_out:
            top = jnp.maximum(top, 0)
        summary, rest = jnp.exp(summary - top), jnp.exp(rest - top)
        total = jnp.sum(summary, axis=-1, keepdims=True) + left_out * rest
        summary, rest = summary * (features / total), rest * (features / total)
    logits = summary @ weights["head_kernel"] + weights["head_bias"]
    return logits + rest * weights["head_rest"] if left_out and gates.softmax else logits
