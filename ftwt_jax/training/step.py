"""One training step, and the state it carries."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array

from ftwt_jax.data.source import Dataset
from ftwt_jax.gating.gates import GateControl, GateOutput
from ftwt_jax.gating.losses import gate_loss
from ftwt_jax.gating.units import Outputs
from ftwt_jax.parallel.sharding import jit_on, replicated, split, split_largest

Normalize = Callable[[Array], Array]
Metrics = dict[str, Array]


@struct.dataclass
class TrainState:
    """Everything that a step changes; restored from a checkpoint, training goes on exactly where it stopped."""

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


Step = Callable[[TrainState, dict[str, Array], GateControl | Array], tuple[TrainState, Metrics]]


def create_state(variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step: a copy, since steps donate it and `variables` may be used again."""
    # Networks without batch norm have no statistics.
    params, batch_stats = (jax.tree.map(jnp.copy, variables.get(kind, {})) for kind in ("params", "batch_stats"))
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def state_shardings(state: TrainState, mesh: Mesh, shard_optimizer: bool = False) -> TrainState:
    """Where each array of a state lives: whole on every device, except the optimizer's where it is sharded.

    Args:
      state: arrays, or shapes and dtypes.
      shard_optimizer: shard each array of the optimizer (momenta) over the devices. A step then gathers the changes
        that each device makes to its shard of the parameters.
    """
    whole = replicated(mesh)
    shardings = jax.tree.map(lambda _: whole, state)
    if not shard_optimizer:
        return shardings
    return shardings.replace(opt_state=jax.tree.map(lambda x: split_largest(x.shape, mesh), state.opt_state))


def normalizer(dataset: Dataset) -> Normalize:
    """uint8 images [N, H, W, channels] -> float32 of mean 0 and deviation 1 over the training set, per channel."""
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (dataset.mean, dataset.std))
    return lambda images: (images.astype(jnp.float32) / 255 - mean) / std


def gate_metrics(gates: tuple[GateOutput, ...]) -> Metrics:
    """Gate accuracy (mean over units) and density (share of all filters on) of one batch."""
    agreement = jnp.stack([jnp.mean(gate.mask == gate.target) for gate in gates])
    masks = jnp.concatenate([gate.mask for gate in gates], axis=-1)
    return {"gate_accuracy": jnp.mean(agreement), "density": jnp.mean(masks)}


@dataclasses.dataclass(frozen=True)
class GateTraining:
    """How the gate loss counts: its weight at a step, and its reduction over units (see `gate_loss`)."""

    weight: optax.Schedule
    reduction: str = "mean"

    def control(self, control: GateControl, step: Array, batch: dict[str, Array]) -> GateControl:
        """What the network is run with in a step."""
        return control

    def loss(self, outputs: Outputs, batch: dict[str, Array]) -> tuple[Array, Metrics]:
        """The loss of a batch without its weight, and its figures."""
        loss = gate_loss(outputs.gates, self.reduction)
        return loss, {"gate_loss": loss, **gate_metrics(outputs.gates)}


@dataclasses.dataclass(frozen=True)
class RouterTraining:
    """How a router is trained: cross-entropy against the subnet that each training image was assigned to.

    Attributes:
      weight: of the loss at a step.
      assignment: int32 [S], of each training image.
      frozen: the first step in which images run in the subnet that the router chooses; until then, in their own.
    """

    weight: optax.Schedule
    assignment: np.ndarray
    frozen: int

    def control(self, control: GateControl, step: Array, batch: dict[str, Array]) -> GateControl:
        """What the network is run with in a step."""
        own = jnp.asarray(self.assignment)[batch["index"]]
        return control.replace(targets=False, choice=jnp.where(step < self.frozen, own, -1))

    def loss(self, outputs: Outputs, batch: dict[str, Array]) -> tuple[Array, Metrics]:
        """The loss of a batch without its weight, and its figures."""
        routes, own = outputs.routes, jnp.asarray(self.assignment)[batch["index"]]
        assert routes is not None
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(routes.logits, own))
        hits = jnp.mean(jnp.argmax(routes.logits, axis=-1) == own)
        return loss, {"router_loss": loss, "router_accuracy": hits}


SideTraining = GateTraining | RouterTraining


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    prepare: Callable[[dict[str, Array]], Array],
    mesh: Mesh,
    gates: SideTraining | None = None,
    accumulate: int = 1,
    shardings: TrainState | None = None,
) -> Step:
    """`step_function` as a compiled program that donates the state.

    Args:
      shardings: see `state_shardings`; None: everything on every device.
    """
    kept = replicated(mesh) if shardings is None else shardings
    return compiled_step(step_function(model, optimizer, prepare, mesh, gates, accumulate), mesh, kept)


def compiled_step(step: Step, mesh: Mesh, shardings: Any) -> Step:
    """A step as a program that is compiled when first called; it donates the state."""
    whole = replicated(mesh)
    return jit_on(
        mesh,
        step,
        donate_argnums=0,
        in_shardings=(shardings, split(mesh), whole),
        out_shardings=(shardings, whole),
    )


def step_function(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    prepare: Callable[[dict[str, Array]], Array],
    mesh: Mesh,
    gates: SideTraining | None = None,
    accumulate: int = 1,
) -> Step:
    """The step: (state, batch, control) -> (state, metrics of this batch).

    `control` is a `GateControl` with r and offset, or r alone; both are traced. The batch is split over the mesh; batch
    norm and losses run over the whole of it, or over each of its parts.

    Args:
      prepare: turns a batch into the network's input: augmentation and normalisation.
      gates: how gates, or a router, are trained beside the backbone; None for a dense network.
      accumulate: parts of a batch that run one after the other, where the whole does not fit. Gradients and metrics are
        means over the parts; each part has its own batch statistics. Image i is in part i % accumulate, on however many
        devices.
    """

    def loss_and_grads(state: TrainState, batch: dict[str, Array], control: GateControl) -> tuple[Any, Any, Metrics]:
        images = prepare(batch)
        if gates is not None:
            control = gates.control(control, state.step, batch)

        def loss_fn(params: Any) -> tuple[Array, tuple[Any, Metrics]]:
            outputs, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                control=control,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
            loss = jnp.mean(losses)
            hits = jnp.mean(jnp.argmax(outputs.logits, axis=-1) == batch["label"])
            metrics = {"loss": loss, "accuracy": hits}
            if gates is not None:
                side_loss, figures = gates.loss(outputs, batch)
                loss = loss + gates.weight(state.step) * side_loss
                metrics |= figures
            return loss, (updates.get("batch_stats", {}), metrics)

        grads, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
        return grads, batch_stats, metrics

    def in_parts(state: TrainState, batch: dict[str, Array], control: GateControl) -> tuple[Any, Any, Metrics]:
        def part(x: Array) -> Array:
            # The parts are the minor axis, so that every device finds its share of each among its own images.
            x = jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)
            return lax.with_sharding_constraint(x, split(mesh, axis=1))

        def body(carry: tuple[Any, Any], batch: dict[str, Array]) -> tuple[tuple[Any, Any], Metrics]:
            sums, batch_stats = carry
            grads, batch_stats, metrics = loss_and_grads(state.replace(batch_stats=batch_stats), batch, control)
            return (jax.tree.map(jnp.add, sums, grads), batch_stats), metrics

        start = (jax.tree.map(jnp.zeros_like, state.params), state.batch_stats)
        (sums, batch_stats), metrics = lax.scan(body, start, jax.tree.map(part, batch))
        means = jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)
        return jax.tree.map(lambda x: x / accumulate, sums), batch_stats, means

    whole = replicated(mesh)

    def step(state: TrainState, batch: dict[str, Array], control: GateControl | Array) -> tuple[TrainState, Metrics]:
        control = control if isinstance(control, GateControl) else GateControl(r=control)
        grads, batch_stats, metrics = (loss_and_grads if accumulate == 1 else in_parts)(state, batch, control)
        # However the optimizer's state is sharded, gradients are whole on every device.
        grads, batch_stats = lax.with_sharding_constraint((grads, batch_stats), whole)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return step
