"""The search for a budget: where a MACs reduction that falls as a number grows takes a wanted value."""

import itertools
from collections.abc import Callable

from scipy.optimize import brentq

from ftwt_jax.errors import UserError
from ftwt_jax.training.evaluator import Evaluation

TOLERANCE = 1e-3
ROUNDS = 18
# A rough curve is searched more finely, so that the tolerance is left to what the two curves differ by.
FINE = 2e-4
# Values that are tried on all images, each corrected by what the one before was off; two are usually enough.
CORRECTIONS = 3

Measure = Callable[[float], Evaluation]


class BudgetSearch:
    """Evaluations for values of one number, each made once; their MACs reduction falls as the number grows.

    Args:
      measure: evaluates one value.
      low, high: ends of the range that is searched.
      unreachable: the message where no value reaches a budget, with {budget}, {least} and {most}.
      rough: evaluates one value on few images, for a fraction of the work. The search is then made there, and `measure`
        only tells what the two differ by, which hardly changes from one value to the next.
      tolerance: how close to a budget is close enough.
      rounds: values that `measure` is given between two others, at most.
    """

    def __init__(
        self,
        measure: Measure,
        low: float,
        high: float,
        unreachable: str,
        rough: Measure | None = None,
        tolerance: float = TOLERANCE,
        rounds: int = ROUNDS,
    ):
        self._curve = _Curve(measure, low, high, rounds)
        self._rough = _Curve(rough, low, high, ROUNDS) if rough else None
        self._unreachable, self._tolerance = unreachable, tolerance
        self._solved: dict[float, float] = {}

    def at(self, value: float) -> Evaluation:
        """The evaluation at this value."""
        return self._curve.at(value)

    def solve(self, budget: float, near: float | None = None) -> tuple[float, Evaluation]:
        """The value whose exact MACs reduction is within the tolerance of `budget`, and the evaluation there.

        Where the reduction falls in steps (few filters, or some that no image activates) the nearest value is taken.

        Args:
          near: a value that the answer is probably close to; doubling steps from there are tried before the ends.

        Raises:
          UserError: the budget is not in (0, 1), or no value reaches it; the message gives the range of reductions.
        """
        if not 0 < budget < 1:
            raise UserError(f"a budget is a MACs reduction between 0 and 1; got {budget!r}")
        if budget not in self._solved:
            found = self._find(budget, near)
            if found is None:
                least, most = self._curve.range()
                range_ = {"least": f"{max(least, 0):.2f}", "most": f"{most:.2f}"}
                raise UserError(self._unreachable.format(budget=f"{budget:g}", **range_))
            self._solved[budget] = found
        value = self._solved[budget]
        return value, self.at(value)

    def _find(self, budget: float, near: float | None) -> float | None:
        if self._rough is None:
            return self._curve.find(budget, self._tolerance, near)
        rough, wanted = self._rough, budget
        for _ in range(CORRECTIONS):
            value = rough.find(wanted, FINE, near)
            if value is None:
                return self._curve.find(budget, self._tolerance)
            self.at(value)
            # Where the rough curve jumps past the budget, so does the other one.
            if self._curve.has(budget, self._tolerance) or not rough.has(wanted, FINE):
                return self._curve.nearest(budget)
            wanted, near = budget - (self._curve.reduction(value) - rough.reduction(value)), value
        return self._curve.find(budget, self._tolerance, near)


class _Curve:
    """A MACs reduction as a function of one number; every value is evaluated once."""

    def __init__(self, measure: Measure, low: float, high: float, rounds: int):
        self._measure, self._low, self._high, self._rounds = measure, low, high, rounds
        self._known: dict[float, Evaluation] = {}

    def at(self, value: float) -> Evaluation:
        """The evaluation at this value."""
        if value not in self._known:
            self._known[value] = self._measure(value)
        return self._known[value]

    def reduction(self, value: float) -> float:
        """The exact MACs reduction at this value."""
        return self.at(value).macs_reduction

    def range(self) -> tuple[float, float]:
        """The least and the most that is reached."""
        return self.reduction(self._high), self.reduction(self._low)

    def has(self, budget: float, tolerance: float) -> bool:
        """Whether one of the evaluations so far is within the tolerance of a budget."""
        return bool(self._known) and self._error(self.nearest(budget), budget) <= tolerance

    def nearest(self, budget: float) -> float:
        """The value, of those evaluated, whose reduction is closest to the budget."""
        return min(self._known, key=lambda value: self._error(value, budget))

    def find(self, budget: float, tolerance: float, near: float | None = None) -> float | None:
        """Evaluates values until one is within the tolerance, and returns the nearest; None if the range lacks it."""
        if near is not None:
            self._step_from(near, budget, tolerance)
        if not self.has(budget, tolerance) and self._bracket(budget) is None:
            least, most = self.range()
            if not least - TOLERANCE <= budget <= most + TOLERANCE:
                return None
        bracket = self._bracket(budget)
        if bracket is not None and not self.has(budget, tolerance):

            def error(value: float) -> float:
                found = self.reduction(value) - budget
                return found if abs(found) > tolerance else 0.0  # At which the search ends.

            brentq(error, *bracket, maxiter=self._rounds, disp=False)
        return self.nearest(budget)

    def _step_from(self, start: float, budget: float, tolerance: float) -> None:
        step = 1.0 if self.reduction(start) > budget else -1.0
        while (
            not self.has(budget, tolerance)
            and self._low < start + step < self._high
            and (self.reduction(start + step) > budget) == (step > 0)
        ):
            step *= 2

    def _bracket(self, budget: float) -> tuple[float, float] | None:
        """The last two neighbours between which the reduction falls past the budget; None if there are none.

        The last, since masks of one unit change the next one's input, so that the reduction may rise for a moment.
        """
        pairs = itertools.pairwise(sorted(self._known))
        falling = [(a, b) for a, b in pairs if self.reduction(a) >= budget > self.reduction(b)]
        return falling[-1] if falling else None

    def _error(self, value: float, budget: float) -> float:
        return abs(self.reduction(value) - budget)
