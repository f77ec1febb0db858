"""The search for a budget: near enough, in few evaluations, whatever the curve that falls."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ftwt_jax as ftwt
from ftwt_jax.budget.calibrate import LARGEST_OFFSET, UNREACHABLE
from ftwt_jax.budget.search import ROUNDS, TOLERANCE, BudgetSearch
from ftwt_jax.training.evaluator import Evaluation

LOW, HIGH = -20.0, 20.0
SAYS = "no value gives {budget}: between {least} and {most}"
any_time = settings(deadline=None)
BUDGETS = st.floats(0.02, 0.98)
# Of filters that turn on around one offset: where, and how far apart; and how much of the work they are.
GROUPS = st.lists(st.tuples(st.floats(-8, 8), st.floats(0.5, 5), st.floats(0.1, 1)), min_size=1, max_size=4)


class Curve:
    """A reduction as a function of one number, which counts how often it is asked."""

    def __init__(self, reduction):
        self._reduction, self.asked = reduction, []

    def __call__(self, value: float) -> Evaluation:
        self.asked.append(value)
        reduction = self._reduction(value)
        return Evaluation(1, 0.5, reduction, reduction, None, (), ())

    def search(self) -> BudgetSearch:
        return BudgetSearch(self, LOW, HIGH, SAYS)


def smooth(groups):
    """From nearly 1 to nearly 0, as filters turn on."""
    total = sum(weight for *_, weight in groups)
    return lambda x: (
        sum(weight / (1 + math.exp(min((x - place) / width, 500))) for place, width, weight in groups) / total
    )


@any_time
@given(GROUPS, BUDGETS)
def test_a_budget_is_met_on_any_smooth_curve(groups, budget):
    curve = Curve(smooth(groups))
    assume(curve(HIGH).macs_reduction <= budget <= curve(LOW).macs_reduction)
    curve.asked.clear()
    value, found = curve.search().solve(budget)
    assert abs(found.macs_reduction - budget) <= TOLERANCE
    assert found.macs_reduction == smooth(groups)(value)
    assert len(curve.asked) <= 2 + ROUNDS


@any_time
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20, unique=True), st.floats(0.01, 0.99))
def test_of_steps_the_nearest_is_taken(levels, budget):
    levels = sorted(levels, reverse=True)
    assume(levels[-1] <= budget <= levels[0])

    def steps(x):
        return levels[min(int((x - LOW) / (HIGH - LOW) * len(levels)), len(levels) - 1)]

    _, found = Curve(steps).search().solve(budget)
    error = abs(found.macs_reduction - budget)
    assert error <= max(TOLERANCE, min(abs(level - budget) for level in levels))


@pytest.mark.parametrize("budget", [0.9, 0.9 + 1e-7, 0.1, 0.1 - 1e-7])
def test_the_ends_of_the_range_can_be_had_and_so_can_what_rounding_makes_of_them(budget):
    curve = Curve(lambda x: 0.9 - 0.8 * (x - LOW) / (HIGH - LOW))
    value, _ = curve.search().solve(budget)
    assert value == (LOW if budget > 0.5 else HIGH)
    assert len(curve.asked) == 2


@pytest.mark.parametrize("budget", [0.95, 0.05])
def test_what_no_value_gives_is_refused_with_the_range_after_a_look_at_both_ends(budget):
    curve = Curve(lambda x: 0.9 - 0.8 * (x - LOW) / (HIGH - LOW))
    with pytest.raises(ftwt.UserError, match=rf"^no value gives {budget}: between 0.10 and 0.90$"):
        curve.search().solve(budget)
    assert sorted(curve.asked) == [LOW, HIGH]


@pytest.mark.parametrize("budget", [0, 1, -0.5, 1.5, float("nan"), float("inf")])
def test_what_is_no_reduction_is_refused_without_an_evaluation(budget):
    curve = Curve(lambda x: 0.5)
    with pytest.raises(ftwt.UserError, match="a MACs reduction between 0 and 1; got"):
        curve.search().solve(budget)
    assert not curve.asked


def test_nothing_is_evaluated_twice():
    curve = Curve(smooth([(0, 1, 1)]))
    search = curve.search()
    first = search.solve(0.6)
    before = len(curve.asked)
    assert search.solve(0.6) == first
    assert search.at(first[0]) is first[1]
    assert len(curve.asked) == before
    search.solve(0.62)
    search.at(LOW)
    assert len(set(curve.asked)) == len(curve.asked)
    assert len(curve.asked) - before < before


def test_a_step_that_no_value_hits_is_looked_for_once():
    curve = Curve(lambda x: 0.7 if x < 1.3 else 0.2)
    search = curve.search()
    assert search.solve(0.5)[1].macs_reduction == 0.7
    before = len(curve.asked)
    search.solve(0.5)
    assert len(curve.asked) == before <= 2 + ROUNDS


@any_time
@given(st.lists(st.tuples(st.floats(LOW, HIGH), st.floats(0, 1)), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_a_curve_that_rises_for_a_moment_still_gives_an_answer(bumps, budget):
    """Masks of one unit are the input of the next one, so that more filters here may be fewer there."""

    def jagged(x):
        return min(max(0.5 - x / (HIGH - LOW) + 0.1 * sum(size for place, size in bumps if x > place), 0), 1)

    curve = Curve(jagged)
    search = curve.search()
    for place, _ in bumps:
        search.at(place)
    try:
        value, found = search.solve(budget)
    except ftwt.UserError:
        ends = jagged(HIGH), jagged(LOW)
        assert not ends[0] <= budget <= ends[1]
    else:
        assert found.macs_reduction == jagged(value)
        assert abs(found.macs_reduction - budget) <= min(abs(jagged(x) - budget) for x in curve.asked)


class Gates:
    """Stands for a network whose filters turn on around some offsets."""

    def __init__(self, reduction):
        self.curve = Curve(reduction)

    def solve(self, budget):
        return BudgetSearch(self.curve, -LARGEST_OFFSET, LARGEST_OFFSET, UNREACHABLE).solve(budget, near=0.0)


@any_time
@given(GROUPS, BUDGETS)
def test_an_offset_is_found_for_any_budget_near_where_the_gates_are(groups, budget):
    gates = Gates(smooth(groups))
    offset, found = gates.solve(budget)
    assert abs(found.macs_reduction - budget) <= TOLERANCE
    assert abs(offset) < 64
    assert max(map(abs, gates.curve.asked)) <= 64, "far ends are not looked at where that is not needed"
    assert len(gates.curve.asked) <= 8 + ROUNDS


def test_gates_that_meet_the_budget_already_are_asked_once():
    gates = Gates(smooth([(0, 1, 1)]))
    assert gates.solve(0.5)[0] == 0
    assert gates.curve.asked == [0]


def test_all_gates_shut_is_as_good_an_answer_as_any():
    """Gates may be so by themselves; the reduction they have is then the most that there is."""
    gates = Gates(lambda offset: 0.97 if offset < 500 else -0.03)
    assert gates.solve(0.97)[1].macs_reduction == 0.97
    assert gates.solve(0.97 + 1e-8)[1].macs_reduction == 0.97


@pytest.mark.parametrize("budget", [0.98, 0.05])
def test_a_budget_that_no_offset_reaches_is_refused_with_the_range(budget):
    gates = Gates(lambda offset: 0.1 + 0.8 / (1 + math.exp(min(offset, 50))))
    with pytest.raises(ftwt.UserError, match=rf"no offset .* of {budget}: .* cut by 0.10 to 0.90"):
        gates.solve(budget)
