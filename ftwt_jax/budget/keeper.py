"""Holds gates in training to the work that was predicted for them, or that the budget asks for."""

import time
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from rich.console import Console

from ftwt_jax import workdir
from ftwt_jax.budget.calibrate import CalibratedNetwork, Calibration
from ftwt_jax.errors import UserError
from ftwt_jax.gating.variables import fix_gates, shift_gates
from ftwt_jax.parallel.processes import barrier
from ftwt_jax.printing import say
from ftwt_jax.training.loop import Hook
from ftwt_jax.training.optim import cooldown_step
from ftwt_jax.training.settings import GATED, budget_range
from ftwt_jax.training.stage import Stage
from ftwt_jax.training.step import TrainState
from ftwt_jax.workdir import OFFSETS

# Budgets between the lowest and the highest whose offsets are measured; those between are interpolated.
POINTS = 6


class BudgetKeeper(Hook):
    """Calibrates the gates of a stage twice: when the heads freeze and, since the backbone goes on, at the end.

    Training in between fits the backbone to the masks that it will have: those at the budget or, where the config names
    `budgets`, those at one that is drawn for each batch. At the end batch statistics are measured as well, under the
    masks that are left.

    Args:
      r: mass threshold of the targets.
      budget: the exact MACs reduction to hold the gates to; one that saves nothing is left as it comes.

    Raises:
      UserError: the budget saves nothing, and the config asks for fixed masks or for a range of budgets.
    """

    def __init__(self, calibration: Calibration, stage: Stage, r: float, budget: float, console: Console):
        super().__init__(calibration.run, r)
        self._console, self._started, self._spent = console, time.perf_counter(), 0.0
        self._calibration, self._budget, self._seed = calibration, budget, stage.seed
        settings = self.run.settings(GATED)
        active = settings.calibrate and 0 < budget < 1
        if not active and (settings.static or settings.budgets):
            raise UserError(
                f"r = {r:g} is predicted to save nothing, so config.gates.static and config.gates.budgets have nothing "
                "to work with: set a smaller config.gates.r, or config.gates.budget"
            )
        self._static = active and settings.static
        self._range = budget_range(settings) if active else None
        self._frozen, self._last = (max(cooldown_step(settings, stage.total), 1), stage.total) if active else (0, 0)
        self._shift = jax.jit(_shifted, out_shardings=stage.shardings.params)
        self._table: dict[str, list[float]] | None = None

    def compile(self, variables: Any) -> None:
        """Compiles what `after` runs, for variables of these shapes and dtypes."""
        if self._last:
            self._calibration.compile(variables)

    def offset(self, step: int) -> float:
        """What is added to all gate logits in `step`, counted from 1."""
        if self._range is None or step <= self._frozen:
            return 0.0
        if self._table is None:
            self._table = workdir.read_json(self.run.workdir / OFFSETS, "offsets of the gates")
        budget = np.random.default_rng((self._seed, step)).uniform(*self._range)
        return float(np.interp(budget, self._table["budgets"], self._table["offsets"]))

    @property
    def stops(self) -> tuple[int, ...]:
        """The steps after which `after` has something to do."""
        return (self._frozen, self._last)

    def comparable(self, step: int) -> bool:
        """Whether the accuracy after this step is one at the budget, which it is not before the first calibration."""
        return step >= self._frozen

    def after(self, state: TrainState, step: int) -> TrainState:
        """The state to go on with after `step`; the same one unless it is time to calibrate."""
        if step not in self.stops:
            return state
        before = time.perf_counter()
        state = self._calibrated(state, step)
        now = time.perf_counter()
        self._spent += now - before
        share = f"{self._spent / (now - self._started):.0%} of gated training so far"
        say(self._console, f"gates calibrated after step {step} in {now - before:.1f} s; {share}")
        return state

    def _calibrated(self, state: TrainState, step: int) -> TrainState:
        network = CalibratedNetwork(self._calibration, state.variables, self.r, self._static)
        if self._static and step == self._frozen:
            rates = CalibratedNetwork(self._calibration, state.variables, self.r).rates()
            fixed = self.run.replicated(fix_gates(state.variables, rates))
            network = CalibratedNetwork(self._calibration, fixed, self.r, is_fixed=True)
        if step == self._last:
            return state.replace(**network.at(self._budget))
        offset = network.offset(self._budget)
        if self._range is not None:
            self._write_offsets(network, offset)
        added = self.run.replicated(np.float32(offset))
        variables = network.variables
        return state.replace(**{**variables, "params": self._shift(variables["params"], added)})

    def _write_offsets(self, network: CalibratedNetwork, offset: float) -> None:
        """Measures the offsets of budgets over the range, relative to `offset`, and keeps them for a resumed run."""
        assert self._range is not None
        budgets = np.linspace(*self._range, POINTS).tolist()
        self._table = {"budgets": budgets, "offsets": [network.offset(budget) - offset for budget in budgets]}
        workdir.write_json(self.run.workdir / OFFSETS, self._table)
        barrier("offsets written")


def _shifted(params: Any, offset: Array) -> Any:
    return shift_gates({"params": params}, offset)["params"]
