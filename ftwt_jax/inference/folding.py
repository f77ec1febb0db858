"""The weights of a network's layers as compact execution holds them: batch norm folded in, only some channels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from ftwt_jax.gating.gates import HEAD_NAME
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

    def convolution(self, name: str, inputs: Channels, kept: Channels, groups: int = 1) -> dict[str, Any]:
        """Convolution and batch norm as one: "kernel" [kh, kw, inputs, K] and "bias" [K], for these channels alone.

        Args:
          name: path of the layer.
          inputs: the input channels that are there, ascending; a convolution in groups takes all of its own.
          kept: the K filters to compute, ascending.
        """
        scale, bias = (self._array(name, f"bn/{leaf}") for leaf in ("scale", "bias"))
        mean, var = (self._array(name, f"bn/{leaf}", "batch_stats") for leaf in ("mean", "var"))
        factor = scale / np.sqrt(var + np.float32(EPSILON))
        shift = bias - mean * factor
        if f"{name}/conv/bias".lstrip("/") in self._variables["params"]:
            shift = shift + self._array(name, "conv/bias") * factor
        kernel = self._array(name, "conv/kernel") * factor
        rows = list(inputs) if groups == 1 else slice(None)
        return {"kernel": kernel[:, :, rows][..., list(kept)], "bias": shift[list(kept)]}

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

    def _array(self, name: str, leaf: str, kind: str = "params") -> np.ndarray:
        return np.asarray(self._variables[kind][f"{name}/{leaf}" if name else leaf])


def native_weights(weights: dict[str, Any], inputs: Channels, kept: Channels, depthwise: bool) -> kernels.UnitWeights:
    """Convolution and head of a unit as our own kernel takes them."""
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
