"""What the fields of a config mean, and which of their values cannot work."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftwt_jax.config.fields import check_ranges, missing_fields
from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.gating.gates import GateConfig
from ftwt_jax.parallel.sharding import check_batch_size
from ftwt_jax.training import optim

BASELINE, GATED, SUBNETS = STAGES = "baseline", "gated", "subnets"
# The section of the config that each stage follows.
SECTIONS = {BASELINE: "baseline", GATED: "gates", SUBNETS: "gates"}
DTYPES = ("float32", "bfloat16")


def check_settings(config: ConfigDict, mesh: Mesh) -> None:
    """Raises `UserError` for a missing field, or a value that cannot work with any data or network."""
    missing = missing_fields(config)
    if missing:
        raise UserError(f"the config lacks {', '.join(missing)}: compare it with configs/digits.py")
    check_ranges(config)
    check_batch_size(config.batch_size, mesh, "config.batch_size", config.accumulate)
    for stage in STAGES:
        optim.check_stage(stage_settings(config, stage))
    if config.subnets.count and stage_settings(config, SUBNETS).epochs <= 0:
        raise UserError("config.gates.epochs=0 leaves subnets untrained: set config.subnets.epochs")
    budget_range(config.gates)
    if config.gates.static and not config.gates.calibrate:
        raise UserError("config.gates.static needs the masks that calibration chooses: leave config.gates.calibrate on")


def stage_settings(config: ConfigDict, stage: str) -> ConfigDict:
    """The settings of one stage; subnets are trained as gates are, but for the length of it."""
    settings = config[SECTIONS[stage]]
    if stage == SUBNETS and config.subnets.epochs is not None:
        settings = ConfigDict(settings)
        with settings.unlocked(), settings.ignore_type():
            settings.epochs = config.subnets.epochs
    return settings


def total_steps(config: ConfigDict, stage: str, images: int) -> int:
    """Number of steps of a stage on this many training images."""
    return math.ceil(stage_settings(config, stage).epochs * images / config.batch_size)


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
    """The gates' settings."""
    fields = {field.name for field in dataclasses.fields(GateConfig)}
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
