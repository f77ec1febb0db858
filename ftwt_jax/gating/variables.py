"""Moving all gates of a trained network at once: to another budget, or to masks that no longer follow the image."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import HEAD_NAME

_KERNEL, _BIAS = ((HEAD_NAME, "dense", leaf) for leaf in ("kernel", "bias"))


def shift_gates(variables: dict[str, Any], offset: Float[Array, ""] | float) -> dict[str, Any]:
    """Variables whose gate logits are all larger by `offset`: the more, the more filters are on.

    What `GateControl(offset=…)` does for one call, for good: for compact execution, export and further training.

    Raises:
      UserError: there is no gate head.
    """
    return _change(variables, lambda unit, kernel, bias: (kernel, bias + offset))


def fix_gates(variables: dict[str, Any], rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Variables whose masks are the same for every sample: the static alternative to dynamic gates, in one network.

    Of each unit those filters stay on that were on most often, as many as were on in the mean (at least one). The
    plain majority would switch off whole units, whose filters are each on in less than half of the samples. Gate
    logits become places in that order, as shares of the unit's filters: `shift_gates` by 0.1 turns on a tenth more.

    Args:
      rates: for each gated unit by its name in `Outputs.gate_names`, the share of samples for which each filter was on.

    Raises:
      UserError: there is no gate head, or a unit without a rate for each of its filters.
    """

    def fixed(unit: str, kernel: Array, bias: Array) -> tuple[Array, Array]:
        if len(rates.get(unit, ())) != len(bias):
            wanted = f"give the share of samples for which each of its {len(bias)} filters was on"
            raise UserError(f"no rates for {unit}: {wanted}")
        share = np.asarray(rates[unit], np.float32)
        place = np.argsort(np.argsort(-share, kind="stable"))
        logits = (max(round(float(share.sum())), 1) - 0.5 - place) / len(share)
        return jnp.zeros_like(kernel), jnp.asarray(logits, bias.dtype)

    return _change(variables, fixed)


def _change(variables: dict[str, Any], change: Any) -> dict[str, Any]:
    params = flatten_dict(variables["params"])
    units = [path[: -len(_BIAS)] for path in params if path[-len(_BIAS) :] == _BIAS]
    if not units:
        raise UserError("these variables hold no gate head: they belong to a dense network")
    for unit in units:
        kernel, bias = (*unit, *_KERNEL), (*unit, *_BIAS)
        params[kernel], params[bias] = change("/".join(unit), params[kernel], params[bias])
    return {**variables, "params": unflatten_dict(params)}
