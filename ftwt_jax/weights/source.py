"""A PyTorch state dict, taken out of its checkpoint."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ftwt_jax.errors import UserError, listed, one_line, unknown_name
from ftwt_jax.weights.names import CLASSIFIERS, is_head

Arrays = dict[str, np.ndarray]

# What training wrappers put before every name; others are known by the classifier behind them.
PREFIXES = ("module.", "_orig_mod.")
# Keys under which checkpoints keep the state dict beside other things.
WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
# Names of weights that are means over the steps of a training, which are taken only if they are asked for: "model_ema".
AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averag)", re.IGNORECASE)
# Mappings within each other that are searched for networks; files from strangers may hold themselves.
DEPTH = 4
# Names that a note lists before it counts the rest.
LISTED = 3
# Batch norm's count of batches, which PyTorch needs only if the momentum is None.
COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class Source:
    """A state dict: its arrays by name without the common `prefix`, and batch norm's counters.

    Attributes:
      notes: a sentence for each choice that was made among what the checkpoint holds.
    """

    arrays: Arrays
    prefix: str
    counters: Arrays
    notes: tuple[str, ...] = ()

    @property
    def is_gated(self) -> bool:
        """Whether it holds gate heads."""
        return any(map(is_head, self.arrays))


@dataclasses.dataclass(frozen=True)
class _Network:
    """One network of a checkpoint: the tensors whose names begin with `prefix`, and names beside them that do not."""

    label: str
    prefix: str
    tensors: dict[str, Any]
    others: tuple[str, ...] = ()


def read_state(state: Mapping[str, Any], weights: str | None = None) -> Source:
    """Takes a state dict out of its checkpoint.

    Args:
      weights: which network, where there are several, such as "state_dict_ema"; None: the one that was trained, not
        its mean over steps.

    Raises:
      UserError: there is none, or none of this name.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"a state_dict maps names to arrays; got {type(state).__name__}")
    found = {network.label: network for network in _networks(state)} or {"": _only(state)}
    if weights is not None and weights not in found:
        raise unknown_name("weights", weights, filter(None, found))
    chosen = found[min(found, key=_averaged) if weights is None else weights]
    notes = []
    if len(found) > 1 and weights is None:
        notes.append(f"it holds {' and '.join(found)}: {chosen.label} is taken; weights=NAME takes another")
    if chosen.others:
        beside = listed(chosen.others, LISTED)
        notes.append(f"left out: {beside}; the network is what begins with {chosen.prefix!r}")
    cut = len(chosen.prefix)
    arrays = {name[cut:]: _array(name, value) for name, value in chosen.tensors.items()}
    counters = {name: array for name, array in arrays.items() if name.endswith(COUNTER)}
    rest = {name: array for name, array in arrays.items() if name not in counters}
    return Source(rest, chosen.prefix, counters, tuple(notes))


def _averaged(label: str) -> bool:
    return AVERAGED.search(label) is not None


def _tensors(state: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in state.items() if hasattr(value, "shape")}


def _networks(state: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[_Network]:
    """The networks of a checkpoint: whatever holds a classifier and convolutions; those of usual keys first."""
    for key in sorted(state, key=lambda key: WRAPPERS.index(key) if key in WRAPPERS else len(WRAPPERS)):
        if isinstance(state[key], Mapping) and len(path) < DEPTH:
            yield from _networks(state[key], (*path, str(key)))
    tensors = _tensors(state)
    parts = _parts(tensors)
    beside = tuple(name for name in tensors if not any(name in part for part in parts.values()))
    for prefix, part in parts.items():
        label = "/".join([*path, prefix.rstrip(".") or "plain"] if len(parts) > 1 else path)
        yield _Network(label, prefix, part, beside)


def _parts(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tensors of each network, by the prefix of their names: where `ema.fc.weight` is, "ema." is one."""
    ends = [f"{name}.weight" for name in CLASSIFIERS]
    matrices = [name for name, value in tensors.items() if len(value.shape) == 2]
    found = {name.removesuffix(end) for name in matrices for end in ends if f".{name}".endswith(f".{end}")}
    parts = _split(tensors, found)
    most = max(map(len, parts.values()), default=0)
    # Less than half of the largest is a part of a network, such as a second classifier half-way.
    whole = {
        prefix
        for prefix, part in parts.items()
        if 2 * len(part) >= most and any(len(value.shape) == 4 for value in part.values())
    }
    return _split(tensors, whole)


def _split(tensors: dict[str, Any], prefixes: set[str]) -> dict[str, dict[str, Any]]:
    """The tensors under each prefix, the longest that fits."""
    parts: dict[str, dict[str, Any]] = {prefix: {} for prefix in sorted(prefixes)}
    for name, value in tensors.items():
        fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
        if fitting:
            parts[max(fitting, key=len)][name] = value
    return parts


def _only(state: Mapping[Any, Any]) -> _Network:
    """The tensors of a checkpoint in which no network was found, for messages of what is missing."""
    inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), state)
    tensors = _tensors(inner)
    if not tensors:
        contents = f"only {', '.join(map(str, inner))}" if inner else "and nothing else"
        raise UserError(f"it contains no tensors, {contents}: a state_dict is needed")
    prefix = ""
    while more := next((p for p in PREFIXES if all(name.startswith(prefix + p) for name in tensors)), ""):
        prefix += more
    return _Network("", prefix, tensors)


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
