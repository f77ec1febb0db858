"""A run's network, ready to tell the classes of image files."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftwt_jax.budget.trained import gated_variables
from ftwt_jax.data.single import Place, file_batches, file_reader
from ftwt_jax.errors import UserError
from ftwt_jax.gating.macs import dense_macs, macs
from ftwt_jax.gating.units import Outputs
from ftwt_jax.inference.compact import compact, fold
from ftwt_jax.training.run import Run, load_run
from ftwt_jax.training.settings import BASELINE, GATED, SUBNETS

# What is told of one file, see `Predictor.predict`.
Answer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A run's network, ready to tell the classes of image files.

    Attributes:
      stage: "subnets", "gated" or "baseline".
      network: from images as the run normalises them to `Outputs`.
    """

    run: Run
    stage: str
    network: Callable[[jax.Array], Any]

    def predict(self, files: Sequence[Place], top: int = 1, batch: int | None = None) -> list[Answer]:
        """An answer for each file, in order.

        Args:
          top: how many of the most probable classes to tell.
          batch: most images at once; None: the config's `eval_batch_size`.

        Returns:
          {file, class, label, probability, top, macs, density, subnet}: `top` is a list of {class, label, probability},
          `macs` are exact, `density` is the share of filters on, and `subnet` is only there where the network has some.
          Or {file, error}.
        """
        run, shape = self.run, self.run.dataset.image_shape
        named = [file.path for file in files if not file.error]
        # One size for all batches, so that one program is compiled; a power of two, so that it is often in the cache.
        size = min(batch or run.config.eval_batch_size, 1 << (max(len(named), 1) - 1).bit_length())
        answers: list[Answer] = []
        for images, errors in file_batches(named, file_reader(run.config.data, shape), shape, size):
            rows: list[Answer] = [{}] * len(errors)
            if not all(errors):
                outputs = jax.device_get(self.network(run.normalize(jnp.asarray(images))))
                rows = to_rows(outputs, run.dataset.class_names, top)
            answers += [{"error": error} if error else row for error, row in zip(errors, rows, strict=False)]
        waiting = iter(answers)
        return [{"file": file.path, **({"error": file.error} if file.error else next(waiting))} for file in files]

    @property
    def dense_macs(self) -> float:
        """Exact MACs of an image in the dense network."""
        variables = self.run.abstract_variables(BASELINE)
        return dense_macs(jax.eval_shape(self.run.models[BASELINE].apply, variables, self.run.example_images))


def load_predictor(
    folder: str, best: bool = False, baseline: bool = False, budget: float | None = None, data: str | None = None
) -> Predictor:
    """The newest (or best) network of a workdir by compact execution: with subnets, else with gates, else dense.

    Args:
      baseline: the dense baseline even where there is another network.
      budget: MACs reduction to bring the gates to; None: as they were trained, which takes no images.
      data: name of a data set to do that on, in place of the config's.

    Raises:
      UserError: the workdir has no such network, or it takes images that are not on this machine.
    """
    run = load_run(folder, data, images=budget is not None)
    if run.has(SUBNETS) and not baseline and budget is None:
        return Predictor(run, SUBNETS, compact(run.models[SUBNETS], run.trained(SUBNETS, best)))
    if baseline or not run.has(GATED):
        if budget is not None:
            raise UserError(f"{run.workdir} holds no gated network yet, and --budget belongs to one")
        return Predictor(run, BASELINE, fold(run.models[BASELINE], run.trained(BASELINE, best)))
    return Predictor(run, GATED, compact(run.models[GATED], gated_variables(run, best, budget)))


def to_rows(outputs: Outputs, names: Sequence[str], top: int) -> list[Answer]:
    """What is told of each image of a batch, without its file; `outputs` on the host."""
    logits = np.asarray(outputs.logits, np.float64)
    finite = np.all(np.isfinite(logits), axis=-1, keepdims=True)
    logits = np.where(finite, logits, 0)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    ranked = np.argsort(-shares, axis=-1, kind="stable")[:, :top]
    masks = [np.asarray(gate.mask) for gate in outputs.gates]
    density = np.concatenate(masks, axis=-1).mean(axis=-1) if masks else np.ones(len(logits))
    routes = outputs.routes
    rows: list[Answer] = []
    for image, cost in enumerate(macs(outputs)):
        if not finite[image, 0]:
            rows.append({"error": "the network's outputs are not finite: has its training diverged?"})
            continue
        classes = [
            {
                "class": names[label] if names else str(label),
                "label": int(label),
                "probability": round(float(shares[image, label]), 6),
            }
            for label in ranked[image]
        ]
        rows.append(
            {**classes[0], "top": classes, "macs": round(float(cost)), "density": round(float(density[image]), 6)}
            | ({} if routes is None else {"subnet": int(routes.choice[image])})
        )
    return rows
