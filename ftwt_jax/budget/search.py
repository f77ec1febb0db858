"""The search for a budget: where a MACs reduction that falls as a number grows takes a wanted value."""

import itertools
from collections.abc import Callable

from ftwt_jax.errors import UserError
from ftwt_jax.training.evaluator import Evaluation

TOLERANCE = 1e-3
ROUNDS = 18


class BudgetSearch:
    """Evaluations for values of one number, each made once; their MACs reduction falls as the number grows.

    Args:
      measure: evaluates one value.
      low, high: ends of the range that is searched.
      unreachable: the message where no value reaches a budget, with {budget}, {least} and {most}.
    """

    def __init__(self, measure: Callable[[float], Evaluation], low: float, high: float, unreachable: str):
        self._measure, self._low, self._high, self._unreachable = measure, low, high, unreachable
        self._known: dict[float, Evaluation] = {}
        self._solved: dict[float, float] = {}

    def at(self, value: float) -> Evaluation:
        """The evaluation at this value."""
        if value not in self._known:
            self._known[value] = self._measure(value)
        return self._known[value]

    def has(self, budget: float) -> bool:
        """Whether one of the evaluations so far is within the tolerance of a budget."""
        return bool(self._known) and self._error(self._nearest(budget), budget) <= TOLERANCE

    def solve(self, budget: float, near: float | None = None) -> tuple[float, Evaluation]:
        """The value whose exact MACs reduction is within 0.001 of `budget`, and the evaluation there.

        Where the reduction falls in steps (few filters, or some that no image activates) the nearest value is taken.

        Args:
          near: a value that the answer is probably close to; doubling steps from there are tried before the ends.

        Raises:
          UserError: the budget is not in (0, 1), or no value reaches it; the message gives the range of reductions.
        """
        if budget not in self._solved and near is not None:
            self._step_from(near, budget)
        if budget not in self._solved:
            self._solved[budget] = self._solve(budget)
        value = self._solved[budget]
        return value, self._known[value]

    def _step_from(self, start: float, budget: float) -> None:
        step = 1.0 if self.at(start).macs_reduction > budget else -1.0
        while (
            not self.has(budget)
            and self._low < start + step < self._high
            and (self.at(start + step).macs_reduction > budget) == (step > 0)
        ):
            step *= 2

    def _solve(self, budget: float) -> float:
        if not 0 < budget < 1:
            raise UserError(f"a budget is a MACs reduction between 0 and 1; got {budget!r}")
        if not self.has(budget) and self._bracket(budget) is None:
            most, least = self.at(self._low).macs_reduction, self.at(self._high).macs_reduction
            if not least - TOLERANCE <= budget <= most + TOLERANCE:
                range_ = {"least": f"{max(least, 0):.2f}", "most": f"{most:.2f}"}
                raise UserError(self._unreachable.format(budget=f"{budget:g}", **range_))
        for turn in range(ROUNDS):
            bracket = self._bracket(budget)
            if bracket is None or self.has(budget):
                break
            low, high = bracket
            above, below = (self._reduction(value) - budget for value in bracket)
            # A straight line between the ends is nearly right; every second time the middle, so that it ends.
            share = above / (above - below) if turn % 2 == 0 else 0.5
            middle = low + (high - low) * min(max(share, 0.05), 0.95)
            if not low < middle < high:
                break
            self.at(middle)
        return self._nearest(budget)

    def _bracket(self, budget: float) -> tuple[float, float] | None:
        """The last two neighbours between which the reduction falls past the budget; None if there are none.

        The last, since masks of one unit change the next one's input, so that the reduction may rise for a moment.
        """
        pairs = itertools.pairwise(sorted(self._known))
        falling = [(a, b) for a, b in pairs if self._reduction(a) >= budget > self._reduction(b)]
        return falling[-1] if falling else None

    def _nearest(self, budget: float) -> float:
        return min(self._known, key=lambda value: self._error(value, budget))

    def _error(self, value: float, budget: float) -> float:
        return abs(self._reduction(value) - budget)

    def _reduction(self, value: float) -> float:
        return self._known[value].macs_reduction
