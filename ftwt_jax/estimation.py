"""What gating will save, known before any gate is trained (the paper's second contribution, section 3.3).

The targets depend on the dense network alone. So the dense network is run with its own targets as masks, unit after
unit, each ranking maps whose input is already masked, and the work is counted. That is the reduction that heads which
learnt their targets perfectly would reach.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ftwt_jax.errors import UserError
from ftwt_jax.evaluation import Evaluation, Evaluator
from ftwt_jax.gates import check_r

SMALLEST_R = 1e-3


class Estimator:
    """Predicts the MACs reduction for any r from a dense network's variables and some training data.

    Args:
      evaluator: of the gated network, with `masks="targets"`.
      variables: of the dense network.
      batches: training pictures without augmentation, as `eval_batches` gives them.
    """

    def __init__(self, evaluator: Evaluator, variables: Any, batches: Sequence[dict[str, Any]]):
        self._evaluator = evaluator
        self._variables = variables
        self._batches = batches

    def predict(self, r: float) -> Evaluation:
        """The figures at mass threshold `r`, in (0, 1]; accuracy is that of the dense network under the targets."""
        return self._evaluator.run(self._variables, self._batches, check_r(r))

    def solve(self, budget: float) -> tuple[float, Evaluation]:
        """The r whose predicted exact MACs reduction is `budget`, and the prediction there.

        Raises:
          UserError: no r reaches this reduction; the message gives the range that can be had.
        """
        if not 0 < budget < 1:
            raise UserError(f"the budget is a MACs reduction and must lie between 0 and 1; got {budget!r}")
        return bisect(self.predict, budget)


def bisect(
    predict: Callable[[float], Evaluation], budget: float, tolerance: float = 1e-3, rounds: int = 14
) -> tuple[float, Evaluation]:
    """Halves (0, 1] until the predicted reduction is within `tolerance` of `budget`; it falls as r grows.

    Where it falls in steps (few filters, or some that no sample lights, which r = 1 alone drops) the nearest is taken.
    """
    low, high = SMALLEST_R, 1.0
    tried = {r: predict(r) for r in (low, high)}
    most, least = tried[low].macs_reduction, tried[high].macs_reduction
    if not least <= budget <= most:
        raise UserError(
            f"no r gives a MACs reduction of {budget:g}: this network can be cut by {max(least, 0):.2f} to {most:.2f}; "
            "the baseline can serve a run with another budget, in a new workdir: --config.init_from=DIR"
        )
    for _ in range(rounds):
        r = (low + high) / 2
        tried[r] = predict(r)
        if abs(tried[r].macs_reduction - budget) <= tolerance:
            break
        low, high = (r, high) if tried[r].macs_reduction > budget else (low, r)
    return min(tried.items(), key=lambda item: abs(item[1].macs_reduction - budget))
