"""The weights of a network's layers as compact execution holds them: batch norm folded in, only some channels."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ftwt_jax.errors import UserError
from ftwt_jax.gating.convolutions import Convolution
from ftwt_jax.gating.gates import HEAD_NAME
from ftwt_jax.gating.norms import BATCH_NORM, OWN_NORM, batch_norm_of
from ftwt_jax.gating.units import GatedUnit, PlainConv
from ftwt_jax.inference.native import kernels
from ftwt_jax.inference.packed import Channels
from ftwt_jax.ops.batch_norm import EPSILON


class Folded:
    """Reads layers out of a network's variables.

    Args:
      variables: parameters and batch statistics, concrete.
    """

    def __init__(self, variables: Mapping[str, Any]):
        self._variables = {kind: flatten_dict(tree, sep="/") for kind, tree in variables.items()}

    def dtype(self, name: str) -> np.dtype:
        """What all that a layer holds is promoted to, at least float32."""
        layers = (tree.items() for tree in self._variables.values())
        held = [leaf.dtype for tree in layers for path, leaf in tree if not name or path.startswith(f"{name}/")]
        return np.dtype(jnp.result_type(jnp.float32, *held))

    def shapes(self, name: str, convolution: Convolution) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a layer's kernel and bias.

        Raises:
          UserError: the layer's parameters are those of several.
        """
        shape = self._variables["params"][_path(name, f"{convolution.name}/kernel")].shape
        if len(shape) != len(convolution.window) + 2:
            raise UserError(
                f"{name or 'the unit'} holds kernels of shape {shape}, those of several layers (nn.scan, nn.vmap): "
                "compact execution needs a module for each layer; make them in a loop"
            )
        return shape, shape[-1:]

    def convolution(self, name: str, layer: GatedUnit | PlainConv, inputs: Channels, kept: Channels) -> dict[str, Any]:
        """Convolution and norm as one: "kernel" [..., inputs, K] and "bias" [K], for these channels alone.

        Args:
          name: path of the layer, whose norm is one that folds.
          inputs: the input channels that are there, ascending; a convolution in groups takes all of its own.
          kept: the K filters to compute, ascending.
        """
        convolution, norm = layer.convolution, layer.norm
        kernel = self._array(name, f"{convolution.name}/kernel")
        factor, shift = np.ones(kernel.shape[-1], kernel.dtype), np.zeros(kernel.shape[-1], kernel.dtype)
        if self._has(name, f"{convolution.name}/bias"):
            shift = self._array(name, f"{convolution.name}/bias")
        if norm is not None:
            flaxs = batch_norm_of(norm)
            # A module may belong to the network that made it.
            place = _path(name, OWN_NORM if flaxs else BATCH_NORM)
            if isinstance(norm, nn.Module):
                place = "/".join(norm.path)
            mean, var = (self._array(place, leaf, "batch_stats") for leaf in ("mean", "var"))
            factor = factor / np.sqrt(var + np.float32(flaxs.epsilon if flaxs else EPSILON))
            if self._has(place, "scale"):
                factor = factor * self._array(place, "scale")
            shift = (shift - mean) * factor
            if self._has(place, "bias"):
                shift = shift + self._array(place, "bias")
        rows = list(inputs) if convolution.groups == 1 else slice(None)
        return {"kernel": (kernel * factor)[..., rows, :][..., list(kept)], "bias": shift[list(kept)]}

    def head(self, name: str, inputs: Channels, own: bool) -> dict[str, Any]:
        """The gate head of a unit for these input channels, and the sum of its rows over all channels.

        Args:
          own: whether each gate reads its own channel alone; "head_kernel" is then [inputs, 1], and "head_place" says
            which gates those are.
        """
        kernel, bias = (self._array(name, f"{HEAD_NAME}/dense/{leaf}") for leaf in ("kernel", "bias"))
        rows = kernel.T[list(inputs)] if own else kernel[list(inputs)]
        place = np.array(inputs if own else (), np.int32)
        return {"head_kernel": rows, "head_sum": kernel.sum(axis=0), "head_bias": bias, "head_place": place}

    def classifier(self, name: str, inputs: Channels) -> dict[str, Any]:
        """The classifier for these input channels: "kernel" [inputs, classes] and "bias" [classes]."""
        kernel, bias = (self._array(name, f"dense/{leaf}") for leaf in ("kernel", "bias"))
        return {"kernel": kernel[list(inputs)], "bias": bias}

    def _has(self, name: str, leaf: str) -> bool:
        return _path(name, leaf) in self._variables["params"]

    def _array(self, name: str, leaf: str, kind: str = "params") -> np.ndarray:
        found = np.asarray(self._variables[kind][_path(name, leaf)])
        # Folded in bfloat16, weights would lose what batch norm keeps in float32.
        return found.astype(jnp.promote_types(found.dtype, jnp.float32), copy=False)


def _path(name: str, leaf: str) -> str:
    """Of an array of a layer; the network itself has no name."""
    return f"{name}/{leaf}" if name else leaf


def native_weights(
    weights: dict[str, Any], window: Sequence[int], inputs: Channels, kept: Channels, depthwise: bool
) -> kernels.UnitWeights:
    """Convolution and head of a unit as our own kernel takes them."""
    kernel = weights["kernel"].reshape(*window, -1, len(kept))
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
