"""Where a reduction that falls as something grows takes a wanted value, with as few evaluations as that takes."""

import itertools
from collections.abc import Callable

from ftwt_jax.errors import UserError
from ftwt_jax.training.evaluator import Evaluation

TOLERANCE = 1e-3
ROUNDS = 18


class Falling:
    """An evaluation for each value of one number, remembered; its MACs reduction falls as the number grows.

    Args:
      measure: what is evaluated.
      low, high: ends of the range that is searched.
      says: the error where no value will do, with {budget}, {least} and {most}.
    """

    def __init__(self, measure: Callable[[float], Evaluation], low: float, high: float, says: str):
        self._measure, self._low, self._high, self._says = measure, low, high, says
        self._known: dict[float, Evaluation] = {}
        self._solved: dict[float, float] = {}

    def at(self, value: float) -> Evaluation:
        """The evaluation at this value."""
        if value not in self._known:
            self._known[value] = self._measure(value)
        return self._known[value]

    def has(self, budget: float) -> bool:
        """Whether one of the evaluations so far is near enough to a budget."""
        return bool(self._known) and self._error(self._nearest(budget), budget) <= TOLERANCE

    def solve(self, budget: float) -> tuple[float, Evaluation]:
        """The value whose exact MACs reduction is within 0.001 of `budget`, and the evaluation there.

        Where the reduction falls in steps (few filters, or some that no sample lights) the nearest is taken.

        Raises:
          UserError: the budget is none, or no value reaches it; the message gives the range that can be had.
        """
        if budget not in self._solved:
            self._solved[budget] = self._solve(budget)
        value = self._solved[budget]
        return value, self._known[value]

    def _solve(self, budget: float) -> float:
        if not 0 < budget < 1:
            raise UserError(f"the budget is a MACs reduction and must lie between 0 and 1; got {budget!r}")
        if not self.has(budget) and self._bracket(budget) is None:
            most, least = self.at(self._low).macs_reduction, self.at(self._high).macs_reduction
            if not least - TOLERANCE <= budget <= most + TOLERANCE:
                range_ = {"least": f"{max(least, 0):.2f}", "most": f"{most:.2f}"}
                raise UserError(self._says.format(budget=f"{budget:g}", **range_))
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
        """The last two neighbours between which the reduction falls past the budget; None if it does so nowhere.

        The last, since masks of one unit change what the next one is given, and the reduction may rise for a moment.
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
