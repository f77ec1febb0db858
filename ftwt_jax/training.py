"""One training step, and the state it carries."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array

from ftwt_jax.compiling import compiler_options
from ftwt_jax.data.augment import Augment
from ftwt_jax.data.source import Dataset
from ftwt_jax.gates import GateControl, GateOutput
from ftwt_jax.losses import gate_loss
from ftwt_jax.sharding import replicated, split

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


def create_state(variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; a copy, since steps donate it and `variables` may be wanted again."""
    params, batch_stats = (jax.tree.map(jnp.copy, variables[kind]) for kind in ("params", "batch_stats"))
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def normalizer(dataset: Dataset) -> Normalize:
    """uint8 pictures [N, H, W, channels] -> float32 of mean 0 and deviation 1 over the training set, per channel."""
    mean, std = jnp.asarray(dataset.mean), jnp.asarray(dataset.std)
    return lambda images: (images.astype(jnp.float32) / 255 - mean) / std


def gate_metrics(gates: tuple[GateOutput, ...]) -> Metrics:
    """Gate accuracy (mean over units) and density (share of all filters on) of one batch."""
    agreement = jnp.stack([jnp.mean(gate.mask == gate.target) for gate in gates])
    masks = jnp.concatenate([gate.mask for gate in gates], axis=-1)
    return {"gate_accuracy": jnp.mean(agreement), "density": jnp.mean(masks)}


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    normalize: Normalize,
    mesh: Mesh,
    gate_weight: optax.Schedule | None = None,
    gate_reduction: str = "mean",
    augment: Augment | None = None,
) -> Callable[[TrainState, dict[str, Array], Array], tuple[TrainState, Metrics]]:
    """Builds the jit-compiled step: (state, batch, r) -> (state, metrics of this batch).

    The state is donated; the batch is split over the mesh, batch norm and losses run over the whole of it.

    Args:
      gate_weight: weight of the gate loss at a step; None for a dense network.
      gate_reduction: see `gate_loss`.
      augment: what is done to the batch's pictures first, by the batch's positions.
    """

    def step(state: TrainState, batch: dict[str, Array], r: Array) -> tuple[TrainState, Metrics]:
        images = augment(batch["image"], batch["position"]) if augment else batch["image"]

        def loss_fn(params: Any) -> tuple[Array, tuple[Any, Metrics]]:
            outputs, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                normalize(images),
                train=True,
                control=GateControl(r=r),
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, batch["label"])
            loss = jnp.mean(losses)
            hits = jnp.mean(jnp.argmax(outputs.logits, axis=-1) == batch["label"])
            metrics = {"loss": loss, "accuracy": hits}
            if gate_weight is not None:
                gates = gate_loss(outputs.gates, gate_reduction)
                loss = loss + gate_weight(state.step) * gates
                metrics |= {"gate_loss": gates, **gate_metrics(outputs.gates)}
            return loss, (updates["batch_stats"], metrics)

        grads, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    whole, parts = replicated(mesh), split(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(whole, parts, whole),
        out_shardings=(whole, whole),
        compiler_options=compiler_options(),
    )
