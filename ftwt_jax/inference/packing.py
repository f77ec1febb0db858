"""The layers of a network as compact execution runs them: batch norm folded in, only the channels that matter."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import lax
from jaxtyping import Array

from ftwt_jax.gating.activations import Activations, LayerRecord, Packed, as_activations, merge_layers, module_calls
from ftwt_jax.gating.gates import HEAD_NAME, NORM_EPSILON, GateConfig, GateOutput, gate_pool
from ftwt_jax.gating.units import Classifier, GatedUnit, Outputs, PlainConv
from ftwt_jax.inference.native import kernels
from ftwt_jax.ops.batch_norm import EPSILON
from ftwt_jax.ops.convolution import conv_general_dilated
from ftwt_jax.ops.reductions import mean_pool_all

# Of each layer, by name.
Weights = dict[str, Any]
Channels = tuple[int, ...]
# The collection into which units write what their gates did: "gate_logits" float32 [N, C] and, of a unit that leaves
# filters out, "outside" bool [N], whether its gate wanted one of those.
SEEN = "compact_execution"


class PackedLayers:
    """Runs the layers of a network packed, in place of their own `__call__` (see `flax.linen.intercept_methods`).

    Which channels a layer is given follows from the layers before it, so the weights that it needs are known only once
    the network is traced. A first, abstract trace packs them; later ones are handed them as an argument of the
    compiled function.

    Args:
      variables: of the network, concrete.
      kept: for each gated unit by name, the filters to hold ready, ascending; a unit that is missing keeps all.
      per_sample: on a CPU, compute of those only the ones that a sample's own mask turns on.
      weights: what an earlier trace packed; None: pack now.

    Attributes:
      weights: of every layer in the form in which it is run.
      macs: of every layer, as it is run here with all that is kept.
    """

    def __init__(
        self,
        variables: Any,
        kept: Mapping[str, Channels],
        per_sample: bool,
        weights: Weights | None = None,
    ):
        self._variables = {kind: flatten_dict(tree, sep="/") for kind, tree in variables.items()}
        self._kept = kept
        self._per_sample = per_sample
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
        module_calls.set(module_calls.get() + 1)
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
        float32 = x.values.dtype == jnp.float32 and unit.dtype in (None, jnp.float32)
        own_channel = unit.gates is not None and unit.gates.reads_own(x.values.shape[-1], unit.features, unit.groups)
        # The gates, where a kernel of our own runs this unit.
        own = unit.gates if self._per_sample and free and float32 else None

        def pack() -> Any:
            weights = self._folded(name, packed.channels, kept, unit.groups)
            if unit.gates is not None:
                weights |= self._head(name, packed.channels, own_channel)
            return _unit_weights(weights, packed.channels, kept, depthwise) if own is not None else weights

        weights = self._layer(key, pack)
        layers, added = x.layers, None
        if shortcut is not None:
            shortcut = as_activations(shortcut)
            added = _packed(shortcut).aligned(kept)
            layers = merge_layers(layers, shortcut.layers)
        left_out = x.values.shape[-1] - packed.values.shape[-1]
        complete = own is not None and unit.act in (None, nn.relu)
        logits = gate = on = None
        if own is not None:
            window, relu = (unit.kernel_size, unit.kernel_size), unit.act is nn.relu
            y, logits = kernels.gated_unit(
                packed.values, weights, window, own, unit.strides, unit.rows_added, added, relu, left_out
            )
        else:
            source, groups = packed.values, unit.groups
            if groups > 1:
                source = packed.aligned(kept if depthwise else tuple(range(x.values.shape[-1])))
                groups = len(kept) if depthwise else groups
            y = self._convolve(key, source, unit.strides, unit.rows_added, unit.dtype, groups)
            y = y if added is None else y + added
            if unit.gates is not None:
                logits = _gate_logits(packed.values.astype(jnp.float32), left_out, weights, unit.gates)
        if logits is not None:
            gate = GateOutput(logits, logits > 0, None)
            unit.sow(SEEN, "gate_logits", logits)
            on = gate.mask[:, kept] if len(kept) < unit.features else gate.mask
            dropped = np.setdiff1d(everything, kept)
            if len(dropped):
                unit.sow(SEEN, "outside", jnp.any(gate.mask[:, dropped], axis=-1))
        if not complete:
            y = y if unit.act is None else unit.act(y)
            y = y if on is None else jnp.where(on[:, None, None, :], y, 0)
        return _unpacked(x, Packed(y, kept), unit.features, (*layers, unit.record(x, y.shape, gate)))

    def _plain(self, layer: PlainConv, inputs: Any, train: bool = False) -> Activations:
        x = as_activations(inputs)
        packed = _packed(x)
        name, key = self._called(layer)
        everything = tuple(range(layer.features))
        self._layer(key, lambda: self._folded(name, packed.channels, everything))
        y = self._convolve(key, packed.values, layer.strides, 0, layer.dtype)
        return _unpacked(x, Packed(y, everything), layer.features, (*x.layers, layer.record(x, y.shape)))

    def _classify(self, layer: Classifier, inputs: Any) -> Outputs:
        x = as_activations(inputs)
        packed = _packed(x)
        name, key = self._called(layer)

        def pack() -> dict[str, Any]:
            kernel, bias = (self._param(name, f"dense/{leaf}") for leaf in ("kernel", "bias"))
            return {"kernel": kernel[list(packed.channels)], "bias": bias}

        weights = self._layer(key, pack)
        dtype = layer.dtype or jnp.result_type(packed.values, weights["kernel"])
        pooled = mean_pool_all(packed.values).astype(dtype)
        logits = pooled @ weights["kernel"].astype(dtype) + weights["bias"].astype(dtype)
        return Outputs(logits.astype(jnp.float32), (*x.layers, layer.record(x)))

    def _called(self, layer: nn.Module) -> tuple[str, str]:
        """Name of a layer, and of this call of it: called twice, it may be given other channels each time."""
        name = "/".join(layer.path)
        call = self._times[name] = self._times.get(name, 0) + 1
        return name, name if call == 1 else f"{name}#{call}"

    def _layer(self, key: str, pack: Callable[[], Any]) -> Any:
        if self._packing:
            self.weights[key] = pack()
        return self.weights[key]

    def _param(self, name: str, leaf: str, kind: str = "params") -> np.ndarray:
        return np.asarray(self._variables[kind][f"{name}/{leaf}" if name else leaf])

    def _folded(self, name: str, inputs: Channels, kept: Channels, groups: int = 1) -> dict[str, Any]:
        """Kernel and bias of convolution and batch norm as one, for these channels alone."""
        scale, bias = (self._param(name, f"bn/{leaf}") for leaf in ("scale", "bias"))
        mean, var = (self._param(name, f"bn/{leaf}", "batch_stats") for leaf in ("mean", "var"))
        factor = scale / np.sqrt(var + np.float32(EPSILON))
        shift = bias - mean * factor
        if f"{name}/conv/bias".lstrip("/") in self._variables["params"]:
            shift = shift + self._param(name, "conv/bias") * factor
        kernel = self._param(name, "conv/kernel") * factor
        rows = list(inputs) if groups == 1 else slice(None)
        return {"kernel": kernel[:, :, rows][..., list(kept)], "bias": shift[list(kept)]}

    def _head(self, name: str, inputs: Channels, own: bool) -> dict[str, Any]:
        """The gate head for these input channels, and the sum of its rows over all of them.

        Of a head that is a diagonal, what stands on it for these channels, and which gates those are.
        """
        kernel, bias = (self._param(name, f"{HEAD_NAME}/dense/{leaf}") for leaf in ("kernel", "bias"))
        rows = kernel.T[list(inputs)] if own else kernel[list(inputs)]
        place = np.array(inputs if own else (), np.int32)
        return {"head_kernel": rows, "head_sum": kernel.sum(axis=0), "head_bias": bias, "head_place": place}

    def _convolve(self, key: str, x: Array, strides: int, pad: int, dtype: Any, groups: int = 1) -> Array:
        """Convolution and bias."""
        kernel, bias = (jnp.asarray(self.weights[key][name]) for name in ("kernel", "bias"))
        dtype = dtype or jnp.result_type(x, kernel)
        y = conv_general_dilated(
            x.astype(dtype),
            kernel.astype(dtype),
            (strides, strides),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        self.macs[key] = y.shape[1] * y.shape[2] * kernel.size
        return y + bias.astype(dtype)


def _packed(x: Activations) -> Packed:
    return x.packed or Packed(x.values, tuple(range(x.values.shape[-1])))


def _unpacked(x: Activations, packed: Packed, features: int, layers: tuple[LayerRecord, ...]) -> Activations:
    """Activations with a packed form; `values` has every channel, for whatever else reads it."""
    return x.replace(
        values=packed.aligned(tuple(range(features))), packed=packed, active=layers[-1].active_out, layers=layers
    )


def _unit_weights(weights: dict[str, Any], inputs: Channels, kept: Channels, depthwise: bool) -> kernels.UnitWeights:
    """The weights of a unit as our own kernel takes them."""
    kernel = weights["kernel"]
    place = {channel: index for index, channel in enumerate(inputs)}
    return kernels.UnitWeights(
        kernel.reshape(-1, kernel.shape[-1]) if depthwise else kernels.blocked(kernel),
        weights["bias"],
        weights["head_kernel"],
        weights["head_sum"],
        weights["head_bias"],
        weights["head_place"],
        np.array(kept, np.int32),
        np.array([place.get(channel, -1) if depthwise else -1 for channel in kept], np.int32),
    )


def _gate_logits(x: Array, left_out: int, weights: dict[str, Any], gates: GateConfig) -> Array:
    """`GateHead` on packed maps: what is left out is zero in every map, so one number stands for all of it."""
    factors, rest = _head_factors(gate_pool(gates.pool)(x), left_out, gates.normalization)
    kernel, place = (jnp.asarray(weights[name]) for name in ("head_kernel", "head_place"))
    logits = weights["head_bias"] if rest is None else weights["head_bias"] + rest * weights["head_sum"]
    if not place.size:
        return factors @ kernel + logits
    logits = jnp.broadcast_to(logits, (len(x), logits.shape[-1]))
    return logits.at[:, place].add(factors * kernel[:, 0])


def _head_factors(pooled: Array, left_out: int, norm: str) -> tuple[Array, Array | None]:
    """What a head's rows are multiplied by: those that are here [N, C], and besides the sum of them all [N, 1]."""
    channels = pooled.shape[-1] + left_out
    if norm == "none":
        return pooled, None
    if norm == "layer":
        mean = jnp.sum(pooled, axis=-1, keepdims=True) / channels
        squares = jnp.sum(jnp.square(pooled - mean), axis=-1, keepdims=True) + left_out * jnp.square(mean)
        scale = lax.rsqrt(squares / channels + NORM_EPSILON)
        return pooled * scale, -mean * scale
    top = jnp.max(pooled, axis=-1, keepdims=True)
    if left_out:
        top = jnp.maximum(top, 0)
    powers, zero = jnp.exp(pooled - top), jnp.exp(-top)
    scale = channels / (jnp.sum(powers, axis=-1, keepdims=True) + left_out * zero)
    return (powers * scale, None) if not left_out else ((powers - zero) * scale, zero * scale)
