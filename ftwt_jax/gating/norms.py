"""What follows the convolution of a layer: norm and activation, ours, Flax's or a user's own."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.ops.batch_norm import BatchNorm, BatchNormBySubnet

NORMS = ("batch", "layer", "group")
# Names of our batch norm, and of what a function makes.
BATCH_NORM = "bn"
OWN_NORM = "own_norm"
# Group norm has as many groups as the paper of it, or the largest divisor of that which divides the filters.
_GROUPS = 32
Act = Callable[[Array], Array]
Norm = str | Callable[..., Any] | None


def normalized_maps(norm: Norm, y: Array, train: bool, dtype: Any, control: GateControl) -> Array:
    """Maps after the norm of a unit; call it inside a method with `nn.compact`."""
    if norm is None:
        return y
    if norm == "batch":
        if control.masks == "subnets":
            count, choice = control.own_subnets()
            return BatchNormBySubnet(count, not train, dtype, name=BATCH_NORM)(y, choice)
        return BatchNorm(use_running_average=not train, dtype=dtype, name=BATCH_NORM)(y)
    if norm == "layer":
        return nn.LayerNorm(dtype=dtype, name="layer_norm")(y)
    if norm == "group":
        return nn.GroupNorm(math.gcd(_GROUPS, y.shape[-1]), dtype=dtype, name="group_norm")(y)
    if isinstance(norm, str) or not callable(norm):
        raise unknown_name("norm", str(norm), (*NORMS, "None, a Flax module, or a function that makes one"))
    module = norm if isinstance(norm, nn.Module) else norm(name=OWN_NORM)
    # Flax's own norms and users' modules call the same switch by different names.
    switches = {"use_running_average": not train, "train": train, "deterministic": not train}
    taken = inspect.signature(type(module).__call__).parameters
    out = module(y, **{name: value for name, value in switches.items() if name in taken})
    return as_shape(out, y.shape, "norm")


def as_shape(y: Any, shape: tuple[int, ...], what: str) -> Array:
    """What a unit's own function returned, if it has the shape it has to have; `UserError` otherwise."""
    if getattr(y, "shape", None) != shape:
        raise UserError(
            f"the {what} of a unit keeps the shape of its maps, {shape}; got {getattr(y, 'shape', type(y))}"
        )
    return y


def activated(act: Act | None, y: Array) -> Array:
    """Maps after the activation of a unit."""
    if act is None:
        return y
    if isinstance(act, type) or not callable(act):
        raise UserError(f"act is a function of maps or a Flax module, such as nn.relu or nn.PReLU(); got {act!r}")
    return as_shape(act(y), y.shape, "activation")


def batch_norm_of(norm: Norm) -> nn.BatchNorm | None:
    """Flax's batch norm over the last axis, if that is what a norm is, or what a function makes."""
    if norm is None or isinstance(norm, str):
        return None
    made = norm if isinstance(norm, nn.Module) else norm(parent=None)
    if not isinstance(made, nn.BatchNorm) or made.axis not in (-1, (-1,)) or made.axis_name is not None:
        return None
    return made


def folds(norm: Norm) -> bool:
    """Whether a norm is one number and one more for each filter in inference, or there is none."""
    return norm is None or norm == "batch" or batch_norm_of(norm) is not None
