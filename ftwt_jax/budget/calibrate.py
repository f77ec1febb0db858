"""A gated network at any budget: one offset to all gate logits, and batch statistics under the masks that this gives.

Each depends on the other. Moved gates need statistics of their own, under which the heads' inputs differ, so that the
reduction moves a little. So the offset is searched with the statistics that it leads to. One more move without new
statistics will not do: where a filter goes off for every image that was on for every image, all later statistics are
those of another network (ResNet-20 on Fashion-MNIST: 0.882 instead of 0.912).
"""

import functools
from typing import Any

import numpy as np

from ftwt_jax.budget.batch_statistics import BatchStatistics
from ftwt_jax.budget.search import BudgetSearch, Measure
from ftwt_jax.data.build import Selection
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.data.source import ArraySource, Source
from ftwt_jax.gating.variables import fix_gates, shift_gates
from ftwt_jax.training.evaluator import Evaluation
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import GATED

# Training images that gates are calibrated on and work is predicted from; more of them change the third digit.
CALIBRATION_IMAGES = 2048
# Of more than twice as many images, this many are the part that is searched on; it is the least that are calibrated on.
ROUGH_IMAGES = 256
# While it trains, a short training is calibrated on fewer images, or this would cost more than a tenth of it: an image
# for this many that gates are trained on, counted in every epoch.
TRAINED_PER_IMAGE = 32
# Gate logits in training stay within some tens; with a larger offset everything is off, or everything on.
LARGEST_OFFSET = 1e3
# With new statistics: closer to the budget than one set of images is to another, and the most values that are tried.
CLOSE, ROUNDS = 3e-3, 6
UNREACHABLE = "no offset of the gates gives a MACs reduction of {budget}: this network can be cut by {least} to {most}"

Batches = list[dict[str, Any]]


class Calibration:
    """The calibration images of a run, and the programs that are compiled for them once.

    Args:
      images: how many images; as many as there are if these are fewer, and a multiple of the batch size if not.
    """

    def __init__(self, run: Run, images: int = CALIBRATION_IMAGES):
        self.run, self._images = run, images

    @classmethod
    def of_training(cls, run: Run) -> "Calibration":
        """That of a run that trains gates."""
        trained = run.settings(GATED).epochs * len(run.dataset.train)
        return cls(run, min(max(trained // TRAINED_PER_IMAGE, ROUGH_IMAGES), CALIBRATION_IMAGES))

    @functools.cached_property
    def batches(self) -> Batches:
        """Training images without augmentation, as `eval_batches` gives them; each batch is spread over all images."""
        run, size = self.run, self.run.eval_batch_size
        source = spread(run.dataset.train, max(self._images // size, 1) * size, size)
        return list(run.preemption.between(eval_batches(run.dataset, source, size)))

    @property
    def rough(self) -> Batches | None:
        """The first of them, enough to search roughly; None if they are not much fewer than all."""
        enough = -(-ROUGH_IMAGES // self.run.eval_batch_size)
        return self.batches[:enough] if 2 * enough < len(self.batches) else None

    def compile(self, variables: Any) -> None:
        """Compiles what the gated network's calibration runs, for variables of these shapes and dtypes."""
        self.run.evaluator(GATED).compile(variables, self.run.eval_batch)
        self.statistics.compile(variables, self.run.eval_batch["image"])

    @functools.cached_property
    def statistics(self) -> BatchStatistics:
        """Measures batch statistics of the gated network."""
        return BatchStatistics(self.run.models[GATED], self.run.normalize, self.run.mesh, self.run.preemption)


class CalibratedNetwork:
    """A gated network that can be brought to any budget.

    Args:
      variables: of the gated network.
      r: mass threshold of the targets that its gates are compared with.
      is_fixed: whether its masks are the same for every image, so that a few images tell the work.
    """

    def __init__(self, calibration: Calibration, variables: dict[str, Any], r: float, is_fixed: bool = False):
        self._calibration, self._run, self._r, self.is_fixed = calibration, calibration.run, r, is_fixed
        self.variables = variables
        batches, part = (calibration.batches[:1], None) if is_fixed else (calibration.batches, calibration.rough)

        def on(images: Batches) -> Measure:
            return lambda offset: self._measured(variables, images, offset)

        rough = on(part) if part else None
        self._search = BudgetSearch(on(batches), -LARGEST_OFFSET, LARGEST_OFFSET, UNREACHABLE, rough)

    def _measured(self, variables: dict[str, Any], images: Batches, offset: float = 0.0) -> Evaluation:
        return self._run.evaluator(GATED).run(variables, images, self._r, offset)

    def measure(self, offset: float = 0.0) -> Evaluation:
        """The figures on the calibration images with this offset to all gate logits."""
        return self._search.at(offset)

    def rates(self) -> dict[str, tuple[float, ...]]:
        """For each gated unit by name, the share of the calibration images for which each filter is on."""
        found = self.measure()
        assert found.gates is not None
        return dict(zip(found.gate_names, found.gates.rates, strict=True))

    def offset(self, budget: float) -> float:
        """The offset whose exact MACs reduction is `budget`; raises `UserError` if none reaches it."""
        return self._search.solve(budget, near=0.0)[0]

    def at(self, budget: float) -> dict[str, Any]:
        """The variables at a budget, with the batch statistics of their own masks.

        Where statistics and masks move each other too much to meet the budget, they are as close to it as they come.

        Raises:
          UserError: no offset reaches the budget.
        """
        calibration, statistics = self._calibration, {}

        def settled(offset: float, images: Batches) -> dict[str, Any]:
            shifted = self._run.replicated(shift_gates(self.variables, offset))
            return calibration.statistics.renewed(shifted, images)

        if self.is_fixed:
            # No statistics move fixed masks.
            return settled(self.offset(budget), calibration.batches)

        def measure(offset: float) -> Evaluation:
            variables = settled(offset, calibration.batches)
            statistics[offset] = variables.get("batch_stats", {})
            return self._measured(variables, calibration.batches)

        def on(part: Batches) -> Measure:
            return lambda offset: self._measured(settled(offset, part), part)

        rough = on(calibration.rough) if calibration.rough else None
        search = BudgetSearch(measure, -LARGEST_OFFSET, LARGEST_OFFSET, UNREACHABLE, rough, CLOSE, ROUNDS)
        offset, _ = search.solve(budget, near=0.0)
        shifted = self._run.replicated(shift_gates(self.variables, offset))
        return {**shifted, "batch_stats": statistics[offset]}

    def evaluate(self, budget: float) -> Evaluation:
        """The figures on the held-out split at a budget."""
        return self._run.evaluator(GATED).run(self.at(budget), self._run.test_batches(), self._r)

    def fixed(self) -> "CalibratedNetwork":
        """The same network with fixed masks, the filters that are on most often: static pruning."""
        variables = self._run.replicated(fix_gates(self.variables, self.rates()))
        return CalibratedNetwork(self._calibration, variables, self._r, is_fixed=True)


def spread(source: Source, count: int, size: int) -> Source:
    """At most `count` images, spread evenly over a source, and so is each batch of this size."""
    count = min(count, len(source))
    number = -(-count // size)
    places = np.concatenate([np.arange(first, count, number) for first in range(number)])
    indices = places * len(source) // count
    if isinstance(source, ArraySource):
        return ArraySource(source.images[indices], source.labels[indices])
    return Selection(source, indices)
