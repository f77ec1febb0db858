"""Counting work in multiply-accumulates (MACs), from the records that the activations carried through the network.

Two conventions. `exact` is what a compact execution computes: every convolution, shortcut, classifier and gate head,
with only the input channels that can be non-zero and the filters that are on. `published` is how the authors count, for
comparison with their tables: units only, each with the mask count of the gated unit before it as its input channels.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.gating.activations import LayerRecord
from ftwt_jax.gating.units import Outputs

Convention = Literal["exact", "published"]
CONVENTIONS = ("exact", "published")


def _check(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise unknown_name("convention", convention, CONVENTIONS)


def layer_dense_macs(layer: LayerRecord) -> int:
    """MACs of one layer with every input channel and every filter on, without a gate head; 0 for a router's."""
    if layer.extra:
        return 0
    pairs = layer.in_features * layer.out_features // layer.groups
    return layer.positions * layer.kernel_area * pairs


def _active_per_group(active: Any, features: int, groups: int, xp: Any) -> Any:
    """[N, groups] int32 counts of active channels; a plain int where all of them are."""
    if active is None:
        return features // groups
    return xp.sum(xp.asarray(active).reshape(active.shape[0], groups, -1), axis=-1, dtype=np.int32)


def _layer_exact(layer: LayerRecord, xp: Any) -> Any:
    """MACs per image of one layer, [N] or a plain int; a filter pays for the non-zero channels of its own group."""
    inputs = _active_per_group(layer.active_in, layer.in_features, layer.groups, xp)
    outputs = _active_per_group(layer.active_out, layer.out_features, layer.groups, xp)
    pairs = inputs * outputs
    pairs = pairs * layer.groups if isinstance(pairs, int) else xp.sum(pairs, axis=-1)
    head_inputs = layer.in_features if layer.head_inputs is None else layer.head_inputs
    head = head_inputs * layer.out_features if layer.gate is not None else 0
    return _as_float(pairs, xp) * (layer.positions * layer.kernel_area) + head


def _as_float(counts: Any, xp: Any) -> Any:
    # Sums over a network exceed 2^31; float64 holds them exactly outside jit, float32 to 1e-7 inside.
    if isinstance(counts, int):
        return float(counts)
    return counts.astype(np.float64 if xp is np else np.float32)


def layer_macs(layers: Sequence[LayerRecord], convention: Convention = "exact") -> list[Float[Array, " N"] | float]:
    """MACs of each layer per image, in the order of `layers`: [N], or one number where no mask matters.

    Under `published`, layers that are not gated units cost nothing. Gate heads are part of their unit under `exact`.
    """
    _check(convention)
    masks = (mask for layer in layers for mask in (layer.active_in, layer.active_out) if mask is not None)
    if any(mask.ndim != 2 for mask in masks):
        raise UserError("these records are of several calls at once (vmap, nn.vmap, nn.scan): count within the call")
    concrete = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(layers))
    xp = np if concrete else jnp
    if concrete:
        layers = jax.tree.map(np.asarray, layers)
    if convention == "exact":
        return [_layer_exact(layer, xp) for layer in layers]

    costs: list[Any] = []
    previous: Any = None
    for layer in layers:
        if layer.gate is None:
            costs.append(0.0)
            continue
        inputs = layer.in_features if previous is None else previous
        on = xp.sum(layer.gate.mask, axis=-1, dtype=np.int32)
        # The floor division is theirs: a depthwise unit costs something only when no input channel is off.
        pairs = on * (inputs // layer.groups)
        costs.append(_as_float(pairs, xp) * (layer.positions * layer.kernel_area))
        previous = on
    return costs


def macs(outputs: Outputs, convention: Convention = "exact") -> Float[Array, " N"] | Float[np.ndarray, " N"]:
    """MACs that each image of a batch took.

    Args:
      outputs: what a network returned; for a dense one every image costs `dense_macs`.
      convention: `exact` or `published`.

    Returns:
      [N]: float64 and exact outside jit (NumPy); float32, to one part in 10^7, inside.
    """
    _check(convention)
    images = outputs.logits.shape[0]
    if not outputs.gates:
        return np.full(images, dense_macs(outputs, convention))
    total: Any = sum(layer_macs(outputs.layers, convention))
    return total if np.ndim(total) else np.full(images, total)


def dense_macs(outputs: Outputs, convention: Convention = "exact") -> float:
    """MACs of the same network with every filter on, without heads or a router; one number, known without running it.

    Under `published` these are the authors' own dense totals, which count a little more than their gated ones do:
    the classifier, projection shortcuts, biases of convolutions and, in some networks, the outputs of the last pool.
    """
    _check(convention)
    total = sum(layer_dense_macs(layer) for layer in outputs.layers)
    if convention == "published":
        total += sum(layer.positions * layer.bias_terms for layer in outputs.layers if not layer.extra)
    return np.float64(total)
