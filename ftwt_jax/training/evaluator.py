"""Accuracy, work and gates of a network over a data set."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from ftwt_jax.gating.activations import LayerRecord
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.gating.macs import Convention, dense_macs, layer_dense_macs, layer_macs
from ftwt_jax.gating.summary import GateReport, count_gates, summarize_gates
from ftwt_jax.parallel.preemption import Preemption
from ftwt_jax.parallel.sharding import each_batch, jit_on, put_batch, put_whole, replicated, shapes_of, split
from ftwt_jax.training.step import Normalize

Sums = dict[str, Any]
# With more classes than this, the confusion matrix is not kept.
MOST_CONFUSED = 100


@dataclasses.dataclass(frozen=True)
class LayerWork:
    """Exact MACs of one layer per image: of the dense network, and as measured."""

    layer: LayerRecord
    dense: float
    measured: float


@dataclasses.dataclass(frozen=True)
class RouteReport:
    """What each subnet of a network was given.

    Attributes:
      images: number of images, by subnet.
      accuracy: on these; None without images.
      classes: of up to `MOST_CONFUSED` classes, the number of images of each, by subnet; None of more.
    """

    images: tuple[int, ...]
    accuracy: tuple[float | None, ...]
    classes: list[list[int]] | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of a network over a data set; reductions and accuracies are fractions.

    Attributes:
      macs_reduction, macs_reduction_published: 1 - (mean MACs of an image) / (dense MACs), under either convention.
      gates: None for a dense network.
      layers: the work of every layer.
      samples: number of images.
      class_accuracy: of each class, by label; None without images of it.
      confusion: of up to `MOST_CONFUSED` classes, the number of images of a class (first) classified as another
        (second); None of more.
      routes: None for a network without subnets.
    """

    samples: int
    accuracy: float
    macs_reduction: float
    macs_reduction_published: float
    gates: GateReport | None
    gate_names: tuple[str, ...]
    layers: tuple[LayerWork, ...]
    class_accuracy: tuple[float | None, ...] = ()
    confusion: list[list[int]] | None = None
    routes: RouteReport | None = None


class Evaluator:
    """Evaluates a network; compiled once for any variables, r and data of one image size.

    Args:
      masks: `heads`, or `targets` for the estimate.
      preemption: ends an evaluation between two batches; None: one that nobody tells to stop.
    """

    def __init__(
        self,
        model: nn.Module,
        normalize: Normalize,
        mesh: Mesh,
        masks: str = "heads",
        preemption: Preemption | None = None,
    ):
        self._mesh, self._preemption = mesh, preemption or Preemption()

        def step(variables: Any, batch: dict[str, Array], r: Array, offset: Array) -> Sums:
            control = GateControl(r=r, masks=masks, offset=offset)
            outputs: Any = model.apply(variables, normalize(batch["image"]), train=False, control=control)
            weight = batch["weight"]
            classes, predicted = outputs.logits.shape[-1], jnp.argmax(outputs.logits, axis=-1)
            hits = predicted == batch["label"]
            # Matrix products of zeros and ones are exact, and a batch may be divided over devices.
            true = jax.nn.one_hot(batch["label"], classes) * weight[:, None]
            confusion = true.T @ jax.nn.one_hot(predicted, classes) if classes <= MOST_CONFUSED else None

            routes = None
            if outputs.routes is not None:
                taken = jax.nn.one_hot(outputs.routes.choice, outputs.routes.logits.shape[-1]) * weight[:, None]
                by_class = taken.T @ true if classes <= MOST_CONFUSED else None
                routes = jnp.sum(taken, axis=0), hits.astype(taken.dtype) @ taken, by_class

            def work(convention: Convention) -> list[Array]:
                # As shares of the dense total: sums of numbers below 1 stay exact enough in float32.
                total = dense_macs(outputs, convention)
                costs = layer_macs(outputs.layers, convention)
                return [jnp.sum(jnp.broadcast_to(cost / total, weight.shape) * weight) for cost in costs]

            return {
                "samples": jnp.sum(weight),
                "correct": jnp.sum(hits * weight),
                "classes": (jnp.sum(true, axis=0), hits.astype(true.dtype) @ true),
                "confusion": confusion,
                "routes": routes,
                "exact": work("exact"),
                "published": work("published"),
                "gates": count_gates(outputs.gates, weight),
                # Records without their arrays hold no leaf: jit hands them back as part of the result's structure.
                "layers": tuple(_without_arrays(layer) for layer in outputs.layers),
            }

        whole = replicated(mesh)
        shardings = whole, split(mesh), whole, whole
        self._step = jit_on(mesh, step, in_shardings=shardings, out_shardings=whole)

    def compile(self, variables: Any, batch: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Compiles what `run` needs.

        Args:
          variables: arrays, or shapes and dtypes.
          batch: shapes, dtypes and shardings of a batch of all processes.
        """
        whole = replicated(self._mesh)
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        self._step.lower(shapes_of(variables, whole), batch, scalar, scalar).compile()

    def run(self, variables: Any, batches: Iterable[dict[str, Any]], r: float, offset: float = 0.0) -> Evaluation:
        """Evaluates `variables` on batches as `eval_batches` gives them, against the targets at `r`.

        Args:
          offset: added to all gate logits.

        Raises:
          Preempted: the run was told to stop.
        """
        controls = (put_whole(np.float32(value), replicated(self._mesh)) for value in (r, offset))
        threshold, added = controls

        def step(batch: dict[str, Any]) -> Sums:
            return self._step(variables, put_batch(batch, self._mesh), threshold, added)

        parts = each_batch(self._mesh, step, self._preemption.between(batches))
        sums = jax.tree.map(lambda *xs: np.sum(xs, axis=0, dtype=np.float64), *jax.device_get(parts))
        samples = round(float(sums["samples"]))
        exact, published = (np.asarray(sums[convention]) / samples for convention in ("exact", "published"))
        layers: tuple[LayerRecord, ...] = sums["layers"]
        gate_names = tuple(layer.name for layer in layers if layer.gate is not None)
        dense = [layer_dense_macs(layer) for layer in layers]
        gated = bool(gate_names)
        confusion = sums["confusion"]
        return Evaluation(
            samples=samples,
            accuracy=float(sums["correct"] / samples),
            macs_reduction=float(1 - exact.sum()) if gated else 0.0,
            macs_reduction_published=float(1 - published.sum()) if gated else 0.0,
            gates=summarize_gates(sums["gates"], samples) if gated else None,
            gate_names=gate_names,
            layers=tuple(
                LayerWork(layer, float(before), float(part * sum(dense)))
                for layer, before, part in zip(layers, dense, exact, strict=True)
            ),
            class_accuracy=tuple(
                float(right / count) if count else None for count, right in zip(*sums["classes"], strict=True)
            ),
            confusion=None if confusion is None else np.rint(confusion).astype(int).tolist(),
            routes=None if sums["routes"] is None else _route_report(*sums["routes"]),
        )


def _route_report(images: np.ndarray, right: np.ndarray, classes: np.ndarray | None) -> RouteReport:
    return RouteReport(
        tuple(round(float(count)) for count in images),
        tuple(float(hits / count) if count else None for hits, count in zip(right, images, strict=True)),
        None if classes is None else np.rint(classes).astype(int).tolist(),
    )


def _without_arrays(layer: LayerRecord) -> LayerRecord:
    return layer.replace(active_in=None, active_out=None, gate=jax.tree.map(lambda _: None, layer.gate))
