"""Optimizers and schedules: one for the backbone, one for the gate heads (section 4.1 of the paper)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.gating.gates import HEAD_NAME
from ftwt_jax.gating.losses import REDUCTIONS
from ftwt_jax.subnets.network import ROUTER_NAME

SCHEDULES = ("step", "cosine")
BACKBONE, HEADS = "backbone", "heads"


def learning_rate(stage: ConfigDict, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    """The backbone's learning rate at a step.

    Args:
      stage: `lr`; `schedule`: "step" (times `lr_factor` at each epoch of `lr_boundaries`) or "cosine" (to 0 at the
        end).
      steps_per_epoch: may be a fraction.
      total_steps: length of the stage.
    """
    if stage.schedule == "cosine":
        return optax.cosine_decay_schedule(stage.lr, max(total_steps, 1))
    if stage.schedule == "step":
        drops = {round(epoch * steps_per_epoch): stage.lr_factor for epoch in stage.lr_boundaries}
        return optax.piecewise_constant_schedule(stage.lr, drops)
    raise unknown_name("schedule", stage.schedule, SCHEDULES)


def cooldown_step(gates: ConfigDict, total_steps: int) -> int:
    """First step at which the gate loss no longer counts and the heads are frozen."""
    return round(gates.cooldown * total_steps)


def check_stage(stage: ConfigDict) -> None:
    """Raises `UserError` for a setting that `make_optimizer` or the gate loss would refuse."""
    if not all(isinstance(epoch, (int, float)) and epoch > 0 for epoch in stage.lr_boundaries):
        raise UserError(f"lr_boundaries takes epochs above 0, such as (81,122,151); got {stage.lr_boundaries}")
    make_optimizer(stage, steps_per_epoch=1, total_steps=1)
    if "loss_reduction" in stage and stage.loss_reduction not in REDUCTIONS:
        raise unknown_name("loss_reduction", stage.loss_reduction, REDUCTIONS)


def _sgd(rate: optax.ScalarOrSchedule, stage: ConfigDict, weight_decay: float) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(weight_decay, mask=_kernels) if weight_decay else optax.identity()
    return optax.chain(decay, optax.sgd(rate, momentum=stage.momentum))


def _kernels(params: Any) -> Any:
    """Marks convolution and linear kernels: what weight decay works on."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def parameter_groups(params: Any) -> Any:
    """A tree like `params` with "heads" at every parameter of a gate head or the router and "backbone" elsewhere."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: HEADS if path[0].key == ROUTER_NAME or any(key.key == HEAD_NAME for key in path) else BACKBONE,
        params,
    )


def make_optimizer(
    stage: ConfigDict, steps_per_epoch: float, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a stage, and the backbone's learning rate for the log.

    SGD with momentum for both groups: the backbone on its schedule with weight decay on its kernels, the heads (or the
    router) at the constant `head_lr` without decay until the cooldown, at 0 after it.
    """
    rate = learning_rate(stage, steps_per_epoch, total_steps)
    transforms = {BACKBONE: _sgd(rate, stage, stage.weight_decay)}
    if "head_lr" in stage:
        frozen = cooldown_step(stage, total_steps)
        head_rate = optax.piecewise_constant_schedule(stage.head_lr, {frozen: 0.0})
        transforms[HEADS] = _sgd(head_rate, stage, 0.0)
    return optax.multi_transform(transforms, parameter_groups), rate


def gate_weight(stage: ConfigDict, total_steps: int) -> optax.Schedule:
    """Weight of the gate loss at a step: lambda, then 0 after the cooldown."""
    frozen = cooldown_step(stage, total_steps)
    return lambda step: jnp.where(step < frozen, stage.loss_weight, 0.0)
