"""Holds gates in training to the work that was predicted for them, or that the budget asks for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ftwt_jax import workdir
from ftwt_jax.budget.calibrate import settle
from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.gating.variables import fix_gates, shift_gates
from ftwt_jax.parallel.processes import barrier
from ftwt_jax.parallel.sharding import put_whole, replicated
from ftwt_jax.training.optim import cooldown_step
from ftwt_jax.training.run import GATED, Run, budget_range
from ftwt_jax.training.stage import Stage
from ftwt_jax.training.step import TrainState

# Offsets of the budgets that are drawn from, measured when the heads froze.
OFFSETS = "offsets.json"
# So many budgets between the least and the most are measured; those between them are interpolated.
POINTS = 6


class BudgetKeeper:
    """Calibrates the gates of a stage twice: when the heads freeze, and, since the backbone goes on, at the end.

    What is left of training in between fits the backbone to the masks that it will have to do with: those at the
    budget, or, where the config names `budgets`, those at one that is drawn for each batch. At the end batch statistics
    are measured as well, under the masks that are left.

    Args:
      r: mass threshold of the targets.
      budget: the exact MACs reduction to hold the gates to; one that is no saving is left as it comes.

    Raises:
      UserError: it is no saving, and the config asks for fixed masks or for a range of budgets.
    """

    def __init__(self, run: Run, stage: Stage, r: float, budget: float):
        self._run, self._r, self._budget = run, r, budget
        settings = run.settings(stage.name)
        gated = stage.name == GATED
        self._active = gated and settings.calibrate and 0 < budget < 1
        if gated and not self._active and (settings.static or settings.budgets):
            raise UserError(
                f"r = {r:g} is predicted to save nothing, of which config.gates.static and config.gates.budgets "
                "have nothing to divide: set a smaller config.gates.r, or config.gates.budget"
            )
        self._static = self._active and settings.static
        self._range = budget_range(settings) if self._active else None
        self._frozen = max(cooldown_step(settings, stage.total), 1) if self._active else 0
        self._last = stage.total
        self._steps = {self._frozen, self._last} if self._active else set()
        self._shift = jax.jit(_shifted, out_shardings=stage.shardings.params)
        self._seed = stage.seed
        self._fixed = self._control(0.0)
        self._table: dict[str, list[float]] | None = None

    def control(self, step: int) -> GateControl:
        """What `step`, counted from 1, is trained with."""
        if self._range is None or step <= self._frozen:
            return self._fixed
        if self._table is None:
            self._table = workdir.read_json(self._run.workdir / OFFSETS, "offsets of the gates")
        budget = np.random.default_rng((self._seed, step)).uniform(*self._range)
        return self._control(np.interp(budget, self._table["budgets"], self._table["offsets"]))

    def comparable(self, step: int) -> bool:
        """Whether the accuracy after this step is one at the budget, and not only before the first calibration."""
        return step >= self._frozen

    def after(self, state: TrainState, step: int) -> TrainState:
        """The state to go on with after `step`; the same one if it is no time to calibrate."""
        if step not in self._steps:
            return state
        variables: dict[str, Any] = state.variables
        if self._static and step == self._frozen:
            fixed = fix_gates(variables, self._run.calibrator(variables, self._r).rates())
            variables = put_whole(fixed, replicated(self._run.mesh))
        if step == self._last:
            return state.replace(**settle(self._run, variables, self._r, self._budget, self._static))
        calibrator = self._run.calibrator(variables, self._r, self._static)
        offset, _ = calibrator.solve(self._budget)
        if self._range is not None:
            budgets = np.linspace(*self._range, POINTS).tolist()
            # From what the shift has made zero.
            offsets = [calibrator.solve(budget)[0] - offset for budget in budgets]
            self._table = {"budgets": budgets, "offsets": offsets}
            workdir.write_json(self._run.workdir / OFFSETS, self._table)
            barrier("offsets written")
        added = put_whole(np.float32(offset), replicated(self._run.mesh))
        return state.replace(**{**variables, "params": self._shift(variables["params"], added)})

    def _control(self, offset: float) -> GateControl:
        control = GateControl(r=jnp.float32(self._r), offset=jnp.float32(offset))
        return put_whole(control, replicated(self._run.mesh))


def _shifted(params: Any, offset: Array) -> Any:
    return shift_gates({"params": params}, offset)["params"]
