"""The names of a dense network's layers in its gated form, where the two were not written from one definition."""

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from ftwt_jax.errors import UserError, listed
from ftwt_jax.gating.gates import HEAD_NAME

COLLECTIONS = ("params", "batch_stats")
# Problems, and layers, that a message names before it counts the rest.
LISTED = 5
# The shapes of a layer's arrays, by their names.
Signature = frozenset[tuple[str, tuple[int, ...]]]


def suggest_names(
    model: nn.Module, dense_variables: Mapping[str, Any], images: Float[Array, "N H W C"]
) -> dict[str, str]:
    """The `names` with which `init_from_dense` takes a network of your own, found by order and shape.

    Layers whose arrays have the same shapes are paired in their order: that of the numbers in names such as `Conv_10`,
    or of the calls where the variables still have it. Layers of equal shapes that were called in another order than
    they are numbered are paired wrongly, so read what it suggests.

    Args:
      model: the gated network.
      dense_variables: `params` and `batch_stats` of the dense one.
      images: any batch of the right shape; nothing is computed.

    Returns:
      The path of each layer in the gated network by its path in the dense one; layers that keep their name are left
      out.

    Raises:
      UserError: they do not have the same layers; names those that are left over.
    """
    made: dict[str, Any] = {}

    def init(batch: Array) -> None:
        made.update(_tree(model.init(jax.random.key(0), batch)))  # In the order of the calls, which JAX sorts later.

    jax.eval_shape(init, images)
    dense, gated = (_by_signature(tree, made) for tree in (_tree(dense_variables), made))
    odd = [
        f"with {_described(each)} the dense one has {_named(dense[each])}, the gated one {_named(gated[each])}"
        for each in {**dense, **gated}
        if len(dense[each]) != len(gated[each])
    ]
    if odd:
        raise UserError(f"the two networks do not have the same layers; {listed(odd, LISTED, '; ')}")
    pairs = [pair for signature in dense for pair in zip(dense[signature], gated[signature], strict=True)]
    return {old: new for old, new in pairs if old != new}


def renamed(arrays: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Arrays by path with the beginnings of their paths, behind the collection, replaced as `names` say.

    Raises:
      UserError: a name begins no path, or two arrays would get the same.
    """
    used, found = set(), {}
    for path, value in arrays.items():
        collection, _, rest = path.partition("/")
        old = max((name for name in names if f"{rest}/".startswith(f"{name}/")), key=len, default=None)
        if old is not None:
            used.add(old)
            rest = names[old] + rest[len(old) :]
        if f"{collection}/{rest}" in found:
            raise UserError(f"names: two arrays of the dense variables would be {collection}/{rest}")
        found[f"{collection}/{rest}"] = value
    unused = [name for name in names if name not in used]
    if unused:
        raise UserError(f"names: the dense variables have no {', '.join(map(repr, unused))}")
    return found


def _tree(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The layers of all collections in one tree: name to sub-layers and shapes of arrays, without gate heads."""
    merged: dict[str, Any] = {}
    for collection in COLLECTIONS:
        for path, leaf in flatten_dict(dict(variables.get(collection, {}))).items():
            if HEAD_NAME in path:
                continue
            node = merged
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = tuple(leaf.shape)
    return merged


def _by_signature(tree: Mapping[str, Any], order: Mapping[str, Any]) -> dict[Signature, list[str]]:
    found: dict[Signature, list[str]] = collections.defaultdict(list)
    for path, signature in _layers(tree, order, ()):
        found[signature].append("/".join(path))
    return found


def _layers(
    tree: Mapping[str, Any], order: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Signature]]:
    """Every layer with arrays of its own, in order; `order` is the tree of another network that may tell it."""
    arrays = {name: value for name, value in tree.items() if not isinstance(value, Mapping)}
    if arrays:
        yield path, frozenset(arrays.items())
    names = [name for name in tree if name not in arrays]
    if names == sorted(names):  # As JAX leaves them, which says nothing of the calls.
        names.sort(key=list(order).index if set(names) <= set(order) else _numbered)
    for name in names:
        yield from _layers(tree[name], order.get(name, {}), (*path, name))


def _numbered(name: str) -> list[Any]:
    """Sorts Conv_2 before Conv_10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _named(layers: list[str]) -> str:
    return listed(layers, LISTED) or "none"


def _described(signature: Signature) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in sorted(signature))
