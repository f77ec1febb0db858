"""A PyTorch state dict, taken out of its checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ftwt_jax.errors import UserError, one_line
from ftwt_jax.weights.names import is_head

Arrays = dict[str, np.ndarray]

# What training wrappers put before every name.
PREFIXES = ("module.", "_orig_mod.")
# Keys under which checkpoints keep the state dict beside other things.
WRAPPERS = ("state_dict", "model", "model_state_dict")
# Batch norm's count of batches, which PyTorch needs only if the momentum is None.
COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class Source:
    """A state dict: its arrays by name without the common `prefix`, and batch norm's counters."""

    arrays: Arrays
    prefix: str
    counters: Arrays

    @property
    def is_gated(self) -> bool:
        """Whether it holds gate heads."""
        return any(map(is_head, self.arrays))


def read_state(state: Mapping[str, Any]) -> Source:
    """Takes a state dict out of its checkpoint; raises `UserError` if there is none."""
    if not isinstance(state, Mapping):
        raise UserError(f"a state_dict maps names to arrays; got {type(state).__name__}")
    for key in WRAPPERS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    tensors = {str(name): value for name, value in state.items() if hasattr(value, "shape")}
    if not tensors:
        contents = f"only {', '.join(map(str, state))}" if state else "and nothing else"
        raise UserError(f"it contains no tensors, {contents}: a state_dict is needed")
    prefix = ""
    while found := next((p for p in PREFIXES if all(name.startswith(prefix + p) for name in tensors)), ""):
        prefix += found
    arrays = {name.removeprefix(prefix): _array(name, value) for name, value in tensors.items()}
    counters = {name: array for name, array in arrays.items() if name.endswith(COUNTER)}
    return Source({name: array for name, array in arrays.items() if name not in counters}, prefix, counters)


def _array(name: str, tensor: Any) -> np.ndarray:
    """A tensor of PyTorch, NumPy or JAX as a NumPy array; floats become float32."""
    try:
        if hasattr(tensor, "detach"):
            tensor = tensor.detach().cpu()
            tensor = tensor.float() if tensor.is_floating_point() else tensor
        array = np.asarray(tensor)
    except (TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"tensor {name} is not a dense array: {one_line(error)}") from None
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
