"""Every array of a network with its name in PyTorch."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ftwt_jax.gating.gates import HEAD_NAME
from ftwt_jax.weights.names import Layout

Path = tuple[str, ...]
Shape = tuple[int, ...]
Shapes = Mapping[Path, Shape]

# Large enough for any network's strides; the shapes of parameters do not depend on it.
SIDE = 1024


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our arrays and its names in PyTorch.

    Attributes:
      path: collection, modules and leaf of our array.
      shape: of our array.
      name: of the tensor.
      copy: the name under which a published gated network has the tensor once more, or "".
      factor: our array is the tensor divided by it.
      ones: axes of size 1 that the tensor has behind ours.
    """

    path: Path
    shape: tuple[int, ...]
    name: str
    copy: str = ""
    factor: int = 1
    ones: int = 0

    @property
    def is_head(self) -> bool:
        """Whether it belongs to a gate head."""
        return HEAD_NAME in self.path

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Converts our array to the tensor."""
        return self._transposed(array) * np.float32(self.factor)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Converts the tensor to our array."""
        if self.path[-1] != "kernel":
            return tensor.reshape(tensor.shape[: tensor.ndim - self.ones])
        tensor = tensor[:, :, 0, 0] if self.is_head else tensor
        return (tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T) / np.float32(self.factor)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self._transposed(np.broadcast_to(np.float32(0), self.shape)).shape

    def _transposed(self, array: np.ndarray) -> np.ndarray:
        """Our array in PyTorch's order of axes."""
        if self.path[-1] != "kernel":
            return array.reshape(*array.shape, *(1,) * self.ones)
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        return array[:, :, None, None] if self.is_head else array


_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_LINEAR = {"kernel": "weight", "bias": "bias"}
# The two parts of a layer. Any other module with a scale is a norm that stands alone.
_LINEAR_MODULES, _NORM_MODULES = ("conv", "dense"), ("bn", "norm", "layer_norm")


@functools.lru_cache(maxsize=16)
def parameter_shapes(model: nn.Module, channels: int = 3) -> Shapes:
    """Shape of every array of a network for images with this many channels."""
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, channels), jnp.float32)
    leaves = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images))
    return MappingProxyType({path: tuple(leaf.shape) for path, leaf in leaves.items()})


def entries(model: nn.Module, layout: Layout, shapes: Shapes) -> list[Entry]:
    """Every array of a network with its name in a layout."""
    scaled = model.gates is not None and model.gates.norm == "softmax"
    return [_entry(path, shape, layout, scaled) for path, shape in shapes.items()]


def _entry(path: Path, shape: tuple[int, ...], layout: Layout, scaled: bool) -> Entry:
    leaf = path[-1]
    if HEAD_NAME in path:
        head = layout.place("/".join(path[1 : path.index(HEAD_NAME)])).head
        factor = shape[0] if scaled and leaf == "kernel" else 1
        return Entry(path, shape, f"{head}.{_LINEAR[leaf]}", factor=factor)
    module = path[-2]
    if leaf not in {*_LINEAR, *_NORM}:
        place = layout.place("/".join(path[1:]))
        return Entry(path, shape, place.conv, ones=place.ones)
    place = layout.place("/".join(path[1:-2] if module in (*_LINEAR_MODULES, *_NORM_MODULES) else path[1:-1]))
    owner, names = (place.conv, _LINEAR) if module in _LINEAR_MODULES else (place.bn, _NORM)
    copy = f"{place.copy}.{module}.{names[leaf]}" if place.copy else ""
    return Entry(path, shape, f"{owner}.{names[leaf]}", copy)
