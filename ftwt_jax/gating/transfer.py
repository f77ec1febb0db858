"""A gated network from a dense one's weights."""

from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import HEAD_NAME

LISTED = 5


def init_from_dense(
    model: nn.Module, dense_variables: dict[str, Any], images: Float[Array, "N H W C"], rng: Array
) -> dict[str, Any]:
    """Variables of a gated network: the dense network's where it has them, fresh gate heads elsewhere.

    Args:
      model: the gated network.
      dense_variables: `params` and `batch_stats` of the same network without gates.
      images: any batch of the right shape.
      rng: key from which the heads are made.

    Raises:
      UserError: the two networks are not the same; every missing, unexpected or wrongly shaped array is counted and the
        first ones are named.
    """
    fresh = flatten_dict(jax.jit(model.init)(rng, images), sep="/")
    dense = flatten_dict({k: dense_variables.get(k, {}) for k in ("params", "batch_stats")}, sep="/")
    problems = [f"{name} is not in this network" for name in dense if name not in fresh]
    for name, value in fresh.items():
        if name not in dense:
            if f"/{HEAD_NAME}/" not in name:
                problems.append(f"{name} is missing")
        elif dense[name].shape != value.shape:
            problems.append(f"{name} has shape {dense[name].shape}, needs {value.shape}")
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise UserError(f"the dense variables do not fit: {'; '.join(problems[:LISTED])}{more}")
    return unflatten_dict({**fresh, **dense}, sep="/")
