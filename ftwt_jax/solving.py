"""Where a reduction that falls as something grows takes a wanted value, with as few evaluations as that takes."""

from collections.abc import Callable

from ftwt_jax.errors import UserError
from ftwt_jax.evaluation import Evaluation

TOLERANCE = 1e-3
ROUNDS = 14


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

    def at(self, value: float) -> Evaluation:
        """The evaluation at this value."""
        if value not in self._known:
            self._known[value] = self._measure(value)
        return self._known[value]

    def solve(self, budget: float) -> tuple[float, Evaluation]:
        """The value whose exact MACs reduction is within 0.001 of `budget`, and the evaluation there.

        Where the reduction falls in steps (few filters, or some that no sample lights) the nearest is taken.

        Raises:
          UserError: the budget is none, or no value reaches it; the message gives the range that can be had.
        """
        if not 0 < budget < 1:
            raise UserError(f"the budget is a MACs reduction and must lie between 0 and 1; got {budget!r}")
        if not self._is_between(budget):
            most, least = self.at(self._low).macs_reduction, self.at(self._high).macs_reduction
            if not least <= budget <= most:
                range_ = {"least": f"{max(least, 0):.2f}", "most": f"{most:.2f}"}
                raise UserError(self._says.format(budget=f"{budget:g}", **range_))
        for turn in range(ROUNDS):
            low = max(value for value, found in self._known.items() if found.macs_reduction >= budget)
            high = min(value for value, found in self._known.items() if value > low)
            above, below = (self._known[value].macs_reduction - budget for value in (low, high))
            if min(abs(above), abs(below)) <= TOLERANCE:
                break
            # A straight line between the ends is nearly right; every second time the middle, so that it ends.
            share = above / (above - below) if turn % 2 == 0 else 0.5
            middle = low + (high - low) * min(max(share, 0.05), 0.95)
            if not low < middle < high:
                break
            self.at(middle)
        return min(self._known.items(), key=lambda item: abs(item[1].macs_reduction - budget))

    def _is_between(self, budget: float) -> bool:
        reductions = [found.macs_reduction for found in self._known.values()]
        return bool(reductions) and min(reductions) <= budget <= max(reductions)
