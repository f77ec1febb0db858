"""Holds gates in training to the work that was predicted for them, or that the budget asks for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ftwt_jax import workdir
from ftwt_jax.distributed import meet
from ftwt_jax.errors import UserError
from ftwt_jax.gates import GateControl
from ftwt_jax.offsets import fix_gates, shift_gates
from ftwt_jax.optim import cooldown_step
from ftwt_jax.run import GATED, Run
from ftwt_jax.sharding import put_whole, replicated
from ftwt_jax.stages import Stage
from ftwt_jax.training import TrainState

# Offsets of the budgets that are drawn from, measured when the heads froze.
OFFSETS = "offsets.json"
# So many budgets between the least and the most are measured; those between them are interpolated.
POINTS = 6


class BudgetKeeper:
    """Calibrates the gates of a stage twice: when the heads freeze, and, since the backbone goes on, at the end.

    What is left of training in between fits the backbone to the masks that it will have to do with: those at the
    budget, or, where the config names `budgets`, those at one that is drawn for each batch.

    Args:
      r: mass threshold of the targets.
      budget: the exact MACs reduction to hold the gates to; one that is no saving is left as it comes.
    """

    def __init__(self, run: Run, stage: Stage, r: float, budget: float):
        self._run, self._r, self._budget = run, r, budget
        settings = run.settings(stage.name)
        gated = stage.name == GATED
        self._active = gated and settings.calibrate and 0 < budget < 1
        self._static = self._active and settings.static
        self._range = check_range(settings.budgets) if self._active and settings.budgets else None
        self._frozen = cooldown_step(settings, stage.total) if self._active else 0
        self._steps = {self._frozen, stage.total} if self._active else set()
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
            variables = fix_gates(variables, self._run.calibrator(variables, self._r).rates())
        calibrator = self._run.calibrator(variables, self._r)
        offset, _ = calibrator.solve(self._budget)
        if self._range is not None and step == self._frozen:
            budgets = np.linspace(*self._range, POINTS).tolist()
            # From what the shift below makes zero.
            offsets = [calibrator.solve(budget)[0] - offset for budget in budgets]
            self._table = {"budgets": budgets, "offsets": offsets}
            workdir.write_json(self._run.workdir / OFFSETS, self._table)
            meet("offsets written")
        added = put_whole(np.float32(offset), replicated(self._run.mesh))
        variables["params"] = self._shift(variables["params"], added)
        if self._range is not None and step != self._frozen:
            # Those of training are a mixture of all budgets.
            variables = self._run.batch_statistics.renewed(variables, self._run.calibration_batches)
        return state.replace(**variables)

    def _control(self, offset: float) -> GateControl:
        control = GateControl(r=jnp.float32(self._r), offset=jnp.float32(offset))
        return put_whole(control, replicated(self._run.mesh))


def check_range(budgets: Any) -> tuple[float, float]:
    """The least and the most of `config.gates.budgets`; raises `UserError` if it is not two reductions in order."""
    numbers = all(isinstance(budget, (int, float)) for budget in budgets)
    if len(budgets) != 2 or not numbers or not 0 < budgets[0] < budgets[1] < 1:
        raise UserError(f"config.gates.budgets is the least and the most MACs reduction, (0.3, 0.8); got {budgets}")
    return budgets[0], budgets[1]


def _shifted(params: Any, offset: Array) -> Any:
    return shift_gates({"params": params}, offset)["params"]
