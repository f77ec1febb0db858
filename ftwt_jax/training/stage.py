"""One stage of training, baseline, gated or subnets, made for its config and devices; nothing of it has run yet."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ftwt_jax.data.augment import make_augment
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.parallel.sharding import replicated, split
from ftwt_jax.subnets.network import SubnetNetwork
from ftwt_jax.training import optim
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import GATED, STAGES, SUBNETS, total_steps
from ftwt_jax.training.step import (
    GateTraining,
    RouterTraining,
    SideTraining,
    Step,
    TrainState,
    compiled_step,
    create_state,
    state_shardings,
    step_function,
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What it takes to train one stage.

    Attributes:
      name: "baseline", "gated" or "subnets".
      total: number of steps.
      seed: of the order of the images and of their augmentation.
      rate: the backbone's learning rate at a step.
      function: the step, (state, batch, control) -> (state, metrics), to be traced.
      step: the same as a program, compiled when first called.
      state, batch, control: shapes, dtypes and shardings of what the step takes; `batch` is that of all processes.
    """

    name: str
    total: int
    seed: int
    optimizer: optax.GradientTransformation
    rate: Callable[[int], Any]
    function: Step
    step: Step
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    control: GateControl

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def make_stage(run: Run, name: str) -> Stage:
    """Builds a stage of a run for the devices of its mesh."""
    config, settings, mesh = run.config, run.settings(name), run.mesh
    epoch = len(run.dataset.train) / config.batch_size
    total = total_steps(config, name, len(run.dataset.train))
    optimizer, rate = optim.make_optimizer(settings, epoch, total)
    seed = config.seed + STAGES.index(name)

    shapes = jax.eval_shape(lambda v: create_state(v, optimizer), run.abstract_variables(name))
    shardings = state_shardings(shapes, mesh, config.shard_optimizer)
    augment = make_augment(run.dataset, seed)

    def prepare(batch: dict[str, Array]) -> Array:
        return run.normalize(augment(batch["image"], batch["position"]) if augment else batch["image"])

    gates: SideTraining | None = None
    if name == GATED:
        gates = GateTraining(optim.gate_weight(settings, total), settings.loss_reduction)
    elif name == SUBNETS:
        frozen, model = optim.cooldown_step(settings, total), run.models[SUBNETS]
        assert isinstance(model, SubnetNetwork)
        gates = RouterTraining(optim.gate_weight(settings, total), model.subnets.assignment, frozen)
    function = step_function(run.models[name], optimizer, prepare, mesh, gates, config.accumulate)

    def example(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=split(mesh))

    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    return Stage(
        name=name,
        total=total,
        seed=seed,
        optimizer=optimizer,
        rate=rate,
        function=function,
        step=compiled_step(function, mesh, shardings),
        state=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings),
        batch={
            "image": example(run.dataset.image_shape, jnp.uint8),
            "label": example((), jnp.int32),
            "index": example((), jnp.int32),
            "position": example((), jnp.uint32),
        },
        control=GateControl(r=scalar, offset=scalar),
    )
