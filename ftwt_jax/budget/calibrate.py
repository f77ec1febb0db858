"""A gated network at any budget: one offset to all gate logits, and batch statistics under the masks that this gives.

Each depends on the other. Moved gates need statistics of their own, under which the heads' inputs differ, so that the
reduction moves a little. One more move without new statistics will not do: where a filter goes off for every image that
was on for every image, all later statistics are those of another network (ResNet-20 on Fashion-MNIST: 0.882 instead of
0.912).
"""

import functools
from typing import Any

from ftwt_jax.budget.batch_statistics import BatchStatistics
from ftwt_jax.budget.search import BudgetSearch
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.gating.variables import fix_gates, shift_gates
from ftwt_jax.training.evaluator import Evaluation
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import GATED

# Training images that gates are calibrated on and work is predicted from; more of them change the third digit.
CALIBRATION_IMAGES = 2048
# Gate logits in training stay within some tens; with a larger offset everything is off, or everything on.
LARGEST_OFFSET = 1e3
ROUNDS = 3
# Closer to the budget than one set of images is to another.
CLOSE = 3e-3
UNREACHABLE = "no offset of the gates gives a MACs reduction of {budget}: this network can be cut by {least} to {most}"


class Calibration:
    """The calibration images of a run, and the programs that are compiled for them once."""

    def __init__(self, run: Run):
        self.run = run

    @functools.cached_property
    def batches(self) -> list[dict[str, Any]]:
        """Training images without augmentation, as `eval_batches` gives them."""
        run = self.run
        return list(eval_batches(run.dataset, run.dataset.train, run.eval_batch_size, limit=CALIBRATION_IMAGES))

    @functools.cached_property
    def statistics(self) -> BatchStatistics:
        """Measures batch statistics of the gated network."""
        return BatchStatistics(self.run.models[GATED], self.run.normalize, self.run.mesh)


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
        batches = calibration.batches[: 1 if is_fixed else None]
        evaluator = self._run.evaluator(GATED)
        self._search = BudgetSearch(
            lambda offset: evaluator.run(variables, batches, r, offset), -LARGEST_OFFSET, LARGEST_OFFSET, UNREACHABLE
        )

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
        """The variables at a budget: gates shifted and batch statistics measured in turns, until both agree.

        Of several rounds the one closest to the budget is returned; its statistics are always those of its own masks.

        Raises:
          UserError: no offset reaches the budget.
        """
        network, found = self, []
        for _ in range(ROUNDS):
            shifted = self._run.replicated(shift_gates(network.variables, network.offset(budget)))
            variables = self._calibration.statistics.renewed(shifted, self._calibration.batches)
            network = CalibratedNetwork(self._calibration, variables, self._r, self.is_fixed)
            error = abs(network.measure().macs_reduction - budget)
            found.append((error, variables))
            if error <= CLOSE:
                break
        return min(found, key=lambda pair: pair[0])[1]

    def evaluate(self, budget: float) -> Evaluation:
        """The figures on the held-out split at a budget."""
        return self._run.evaluator(GATED).run(self.at(budget), self._run.test_batches(), self._r)

    def fixed(self) -> "CalibratedNetwork":
        """The same network with fixed masks, the filters that are on most often: static pruning."""
        variables = self._run.replicated(fix_gates(self.variables, self.rates()))
        return CalibratedNetwork(self._calibration, variables, self._r, is_fixed=True)
