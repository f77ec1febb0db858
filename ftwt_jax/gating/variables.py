"""The variables of gated networks: made from a dense network's, and all gates changed at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from ftwt_jax.errors import UserError, listed
from ftwt_jax.gating.gates import HEAD_NAME
from ftwt_jax.gating.naming import COLLECTIONS, LISTED, renamed, suggest_names

_KERNEL, _BIAS = ((HEAD_NAME, "dense", leaf) for leaf in ("kernel", "bias"))


def init_from_dense(
    model: nn.Module,
    dense_variables: Mapping[str, Any],
    images: Float[Array, "N H W C"],
    rng: Array,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Variables of a gated network: the dense network's where it has them, fresh gate heads elsewhere.

    Args:
      model: the gated network.
      dense_variables: `params` and `batch_stats` of the same network without gates.
      images: any batch of the right shape.
      rng: key from which the heads are made.
      names: where layers have other names in the dense network: how their paths begin there, and here, such as
        {"Conv_0": "GatedUnit_0/conv"}. `suggest_names` finds them.

    Raises:
      UserError: the two networks are not the same; every missing, unexpected or wrongly shaped array is counted and the
        first ones are named. If other names would do, it suggests them.
    """
    fresh = flatten_dict(jax.eval_shape(model.init, rng, images), sep="/")
    dense = flatten_dict({kind: dict(dense_variables.get(kind, {})) for kind in COLLECTIONS}, sep="/")
    dense = renamed(dense, names or {})
    problems = [f"{name} is not in this network" for name in dense if name not in fresh]
    for name, value in fresh.items():
        if name not in dense:
            if f"/{HEAD_NAME}/" not in name:
                problems.append(f"{name} is missing")
        elif dense[name].shape != value.shape:
            problems.append(f"{name} has shape {dense[name].shape}, needs {value.shape}")
    if problems:
        found = listed(problems, LISTED, "; ")
        raise UserError(f"the dense variables do not fit: {found}{_suggestion(model, dense_variables, images)}")

    def made(rng: Array, images: Array) -> dict[str, Array]:
        found = flatten_dict(model.init(rng, images), sep="/")
        return {name: value for name, value in found.items() if name not in dense}

    # Without what the dense network has, there is little left to compile.
    return unflatten_dict({**fresh, **dense, **jax.jit(made)(rng, images)}, sep="/")


def _suggestion(model: nn.Module, dense_variables: Mapping[str, Any], images: Array) -> str:
    """What to do about names that do not fit, for the end of a message; empty if other names would not help."""
    try:
        pairs = [f"{old!r}: {new!r}" for old, new in suggest_names(model, dense_variables, images).items()]
    except UserError:
        return ""
    whole = "; ftwt.suggest_names(model, variables, images) gives them all" if len(pairs) > LISTED else ""
    return f"; by order and shape, names={{{listed(pairs, LISTED, rest=', ...')}}} would do{whole}"


def shift_gates(variables: dict[str, Any], offset: Float[Array, ""] | float) -> dict[str, Any]:
    """Variables whose gate logits are all larger by `offset`: the larger it is, the more filters are on.

    Makes permanent what `GateControl(offset=…)` does for one call: for compact execution, export and further training.

    Raises:
      UserError: there is no gate head.
    """
    return _change(variables, lambda unit, kernel, bias: (kernel, bias + offset))


def fix_gates(variables: dict[str, Any], rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Variables whose masks are the same for every image: the static alternative to dynamic gates, in one network.

    Each unit keeps the filters that were on most often, as many as were on in the mean (at least one). The plain
    majority would switch off whole units, whose filters are each on for less than half of the images. The gate logits
    become ranks in that order, as shares of the unit's filters: `shift_gates` by 0.1 turns on a tenth more.

    Args:
      rates: for each gated unit by its name in `Outputs.gate_names`, the share of images for which each filter was on.

    Raises:
      UserError: there is no gate head, or a unit lacks a rate for each of its filters.
    """

    def fixed(unit: str, kernel: Array, bias: Array) -> tuple[Array, Array]:
        if len(rates.get(unit, ())) != len(bias):
            wanted = f"give the share of images for which each of its {len(bias)} filters was on"
            raise UserError(f"no rates for {unit}: {wanted}")
        share = np.asarray(rates[unit], np.float32)
        rank = np.argsort(np.argsort(-share, kind="stable"))
        logits = (max(round(float(share.sum())), 1) - 0.5 - rank) / len(share)
        return jnp.zeros_like(kernel), jnp.asarray(logits, bias.dtype)

    return _change(variables, fixed)


def _change(variables: dict[str, Any], change: Callable[[str, Array, Array], tuple[Array, Array]]) -> dict[str, Any]:
    """Variables with `change(unit, kernel, bias)` as the kernel and bias of every gate head."""
    params = flatten_dict(variables["params"])
    units = [path[: -len(_BIAS)] for path in params if path[-len(_BIAS) :] == _BIAS]
    if not units:
        raise UserError("these variables hold no gate head: they belong to a dense network")
    for unit in units:
        kernel, bias = (*unit, *_KERNEL), (*unit, *_BIAS)
        params[kernel], params[bias] = change("/".join(unit), params[kernel], params[bias])
    return {**variables, "params": unflatten_dict(params)}
