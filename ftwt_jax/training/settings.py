"""What the fields of a config mean, and which of their values cannot work."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftwt_jax.config import missing_fields
from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.parallel.sharding import check_batch_size
from ftwt_jax.training import optim

BASELINE, GATED = STAGES = "baseline", "gated"
# The section of the config that each stage follows.
SECTIONS = {BASELINE: "baseline", GATED: "gates"}
DTYPES = ("float32", "bfloat16")
SEED_LIMIT = 2**31


def check_settings(config: ConfigDict, mesh: Mesh) -> None:
    """Raises `UserError` for a missing field, or a value that cannot work with any data or network."""
    missing = missing_fields(config)
    if missing:
        raise UserError(f"the config lacks {', '.join(missing)}: compare it with configs/digits.py")
    if config.accumulate < 1:
        raise UserError(f"config.accumulate is the number of parts of a batch, at least 1; got {config.accumulate}")
    check_batch_size(config.batch_size, mesh, "config.batch_size", config.accumulate)
    if config.eval_batch_size < 1:
        raise UserError(f"config.eval_batch_size is a number of images, at least 1; got {config.eval_batch_size}")
    if not 0 <= config.seed < SEED_LIMIT:
        raise UserError(f"config.seed must lie between 0 and {SEED_LIMIT - 1}; got {config.seed}")
    for field in ("log_every", "checkpoint_every"):
        if config[field] < 1:
            raise UserError(f"config.{field} is a number of steps, at least 1; got {config[field]}")
    if config.steps_per_call is not None and config.steps_per_call < 1:
        raise UserError(f"config.steps_per_call is a number of steps, at least 1; got {config.steps_per_call}")
    for section in SECTIONS.values():
        optim.check_stage(config[section])
    budget_range(config.gates)
    if config.gates.static and not config.gates.calibrate:
        raise UserError("config.gates.static needs the masks that calibration chooses: leave config.gates.calibrate on")


def total_steps(config: ConfigDict, stage: str, images: int) -> int:
    """Number of steps of a stage on this many training images."""
    return math.ceil(config[SECTIONS[stage]].epochs * images / config.batch_size)


def arch_options(model: ConfigDict) -> dict[str, Any]:
    """Arguments of `create_model`; what the config leaves at None stays at the network's own default."""
    options = {key: value for key, value in model.items() if value is not None}
    if "plan" in options and options["name"] != "vgg_bn":
        raise UserError(f"config.model.plan belongs to vgg_bn: choose the network by --config=FILE:{options['name']}")
    if "dtype" in options:
        if options["dtype"] not in DTYPES:
            raise unknown_name("config.model.dtype", options["dtype"], DTYPES)
        options["dtype"] = jnp.dtype(options["dtype"])
    return options


def gate_config(gates: ConfigDict) -> GateConfig:
    """The gates' settings; r is checked even where a budget takes its place."""
    fields = {field.name for field in dataclasses.fields(GateConfig)}
    if gates.budget is not None and not 0 < gates.budget < 1:
        raise UserError(f"config.gates.budget is a MACs reduction between 0 and 1; got {gates.budget}")
    return GateConfig(**{key: value for key, value in gates.items() if key in fields})


def budget_range(gates: ConfigDict) -> tuple[float, float] | None:
    """The lowest and the highest MACs reduction of `config.gates.budgets`; None where it is not set.

    Raises:
      UserError: it is not two MACs reductions in order, or gates are not to be calibrated.
    """
    if gates.budgets is None:
        return None
    budgets = tuple(gates.budgets)
    numbers = all(isinstance(budget, (int, float)) for budget in budgets)
    if len(budgets) != 2 or not numbers or not 0 < budgets[0] < budgets[1] < 1:
        raise UserError(
            f"config.gates.budgets is the lowest and the highest MACs reduction, such as (0.3, 0.8); got {budgets}"
        )
    if not gates.calibrate:
        raise UserError("config.gates.budgets needs calibrated gates: leave config.gates.calibrate on")
    return budgets
