"""What gating will save, known before any gate is trained (the paper's second contribution, section 3.3).

The targets depend on the dense network alone. So the dense network is run with its own targets as masks, unit after
unit, each ranking maps whose input is already masked, and the work is counted. That is the reduction that heads which
learnt their targets perfectly would reach. Heads err on one side more than on the other, and the backbone moves while
they learn; so trained gates are calibrated: one offset, added to all gate logits, brings them to what was predicted.
"""

from collections.abc import Sequence
from typing import Any

from ftwt_jax.budget.search import Falling
from ftwt_jax.gating.gates import check_r
from ftwt_jax.training.evaluator import Evaluation, Evaluator

SMALLEST_R = 1e-3
# Gate logits of heads in training stay within some tens; beyond this everything is off or on.
MOST_OFFSET = 1e3

Batches = Sequence[dict[str, Any]]


class Estimator:
    """Predicts the MACs reduction for any r from a dense network's variables and some training data.

    Args:
      evaluator: of the gated network, with `masks="targets"`.
      variables: of the dense network.
      batches: training images without augmentation, as `eval_batches` gives them.
    """

    def __init__(self, evaluator: Evaluator, variables: Any, batches: Batches):
        says = (
            "no r gives a MACs reduction of {budget}: this network can be cut by {least} to {most}; "
            "the baseline can serve a run with another budget, in a new workdir: --config.init_from=DIR"
        )
        self._curve = Falling(lambda r: evaluator.run(variables, batches, r), SMALLEST_R, 1.0, says)

    def predict(self, r: float) -> Evaluation:
        """The figures at mass threshold `r`, in (0, 1]; accuracy is that of the dense network under the targets."""
        return self._curve.at(check_r(r))

    def solve(self, budget: float) -> tuple[float, Evaluation]:
        """The r whose predicted exact MACs reduction is `budget`, and the prediction there.

        Raises:
          UserError: no r reaches this reduction; the message gives the range that can be had.
        """
        return self._curve.solve(budget)


class Calibrator:
    """Finds the offset to all gate logits with which a trained gated network meets a budget.

    Args:
      evaluator: of the gated network, with the masks of its heads.
      variables: of the gated network.
      batches: training images without augmentation, as `eval_batches` gives them.
      r: mass threshold of the targets that gates are compared with.
    """

    def __init__(self, evaluator: Evaluator, variables: Any, batches: Batches, r: float):
        says = "no offset of the gates gives a MACs reduction of {budget}: this network can be cut by {least} to {most}"
        self._curve = Falling(
            lambda offset: evaluator.run(variables, batches, r, offset), -MOST_OFFSET, MOST_OFFSET, says
        )

    def measure(self, offset: float = 0.0) -> Evaluation:
        """The figures with this offset, on the calibration images."""
        return self._curve.at(offset)

    def rates(self) -> dict[str, tuple[float, ...]]:
        """For each gated unit by name, the share of the calibration images for which each filter is on."""
        found = self.measure()
        assert found.gates is not None
        return dict(zip(found.gate_names, found.gates.rates, strict=True))

    def solve(self, budget: float) -> tuple[float, Evaluation]:
        """The offset whose exact MACs reduction is `budget`, and the figures there.

        Raises:
          UserError: no offset reaches this reduction.
        """
        step = 1.0 if self.measure().macs_reduction > budget else -1.0
        while (
            not self._curve.has(budget)
            and abs(step) < MOST_OFFSET
            and (self.measure(step).macs_reduction > budget) == (step > 0)
        ):
            step *= 2
        return self._curve.solve(budget)
