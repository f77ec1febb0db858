"""What gating will save, known before any gate is trained (the paper's second contribution, section 3.3).

Targets depend on the dense network alone. So the dense network runs with its own targets as masks, unit after unit,
each ranking maps whose input is already masked, and the work is counted. That is the reduction that heads would reach
if they learnt their targets perfectly. Real heads err more on one side than on the other, and the backbone moves while
they learn; so trained gates are calibrated to the prediction (`calibrate`).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console

from ftwt_jax import workdir
from ftwt_jax.budget.calibrate import Calibration
from ftwt_jax.budget.search import TOLERANCE, BudgetSearch, Measure
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath
from ftwt_jax.gating.activations import LayerRecord
from ftwt_jax.gating.gates import GateOutput, check_r
from ftwt_jax.gating.macs import dense_macs, layer_macs
from ftwt_jax.parallel.processes import barrier, broadcast
from ftwt_jax.printing import say, say_compiling
from ftwt_jax.training.evaluator import Evaluation, Evaluator
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import GATED
from ftwt_jax.workdir import ESTIMATE

SMALLEST_R = 1e-3
KEYS = ("r", "macs_reduction", "macs_reduction_published")
_UNREACHABLE = (
    "no r gives a MACs reduction of {budget}: this network can be cut by {least} to {most}; "
    "the baseline can serve a run with another budget, in a new workdir: --config.init_from=DIR"
)


class Estimator:
    """Predicts the MACs reduction for any r.

    Args:
      evaluator: of the gated network, with `masks="targets"`.
      variables: of the dense network.
      batches: training images without augmentation, as `eval_batches` gives them.
      part: some of them, to search roughly; None: the search is made on all.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        variables: Any,
        batches: Sequence[dict[str, Any]],
        part: Sequence[dict[str, Any]] | None = None,
    ):
        def on(images: Sequence[dict[str, Any]]) -> Measure:
            return lambda r: evaluator.run(variables, images, r)

        self._search = BudgetSearch(on(batches), SMALLEST_R, 1.0, _UNREACHABLE, on(part) if part else None)

    @classmethod
    def of(cls, calibration: Calibration, variables: Any) -> "Estimator":
        """The estimator of a run's dense network with these variables."""
        return cls(calibration.run.evaluator(GATED, masks="targets"), variables, calibration.batches, calibration.rough)

    def predict(self, r: float) -> Evaluation:
        """The figures at mass threshold `r`, in (0, 1]; accuracy is that of the dense network under the targets."""
        return self._search.at(check_r(r))

    def solve(self, budget: float) -> tuple[float, Evaluation]:
        """The r whose predicted exact MACs reduction is `budget`, and the prediction there.

        Raises:
          UserError: no r reaches this reduction; the message gives the range of reductions.
        """
        return self._search.solve(budget)


def check_budgets(run: Run) -> None:
    """Raises `UserError` for a budget that no training can reach: with the fewest filters, more MACs are left.

    It is known from shapes alone: each unit keeps `min_filters` (a target's fewest) of each image or, where budgets are
    reached by moving gates, none. A depthwise filter may read a channel that is off and is taken to cost nothing.
    """
    gates = run.config.gates
    limits = [("budget", gates.budget, gates.min_filters), ("budgets", gates.budgets and gates.budgets[1], 0)]
    for name, wanted, filters in limits:
        if wanted is None:
            continue
        model, images = run.models[GATED], run.example_images
        outputs, _ = jax.eval_shape(model.init_with_output, run.key(GATED), images)
        left = layer_macs([_least(layer, filters) for layer in outputs.layers])
        most = 1 - sum(float(np.squeeze(cost)) for cost in left) / dense_macs(outputs)
        if wanted > most + TOLERANCE:
            kept = f"{filters} filter{'s' * (filters != 1)} left in every unit" if filters else "every gate closed"
            raise UserError(
                f"config.gates.{name} asks for a MACs reduction of {wanted:g}, and this network can be cut by "
                f"{most:.3f} at most, with {kept}: choose less"
            )


def _least(layer: LayerRecord, filters: int) -> LayerRecord:
    """A layer with so many filters on, in one image, and as many input channels where its input has masks."""

    def on(channels: int) -> Array:
        return jnp.arange(channels)[None] < filters

    inputs = None if layer.active_in is None else on(layer.in_features)
    if layer.gate is None:
        return layer.replace(active_in=inputs)
    mask = on(layer.out_features) & (layer.groups == 1 or inputs is None)
    return layer.replace(active_in=inputs, active_out=mask, gate=GateOutput(None, mask, None))


def choose_r(
    calibration: Calibration, baseline: Any, console: Console, solve: Callable[[], float] | None = None
) -> dict[str, float]:
    """The r to train gates for: the config's, or the one that its budget asks for; printed with its prediction.

    The choice is kept in `estimate.json`, so that a resumed run trains for the same r.

    Args:
      baseline: variables of the dense network.
      solve: finds the budget, if it is not the config's.
    """
    run, started = calibration.run, time.perf_counter()
    path, gates = run.workdir / ESTIMATE, run.config.gates
    if broadcast(path.exists()):
        entry = read_estimate(run.workdir)
    else:
        say_compiling(console, f"the prediction for {run.config.model.name}")
        estimator, budget = Estimator.of(calibration, baseline), solve() if solve else gates.budget
        found = (gates.r, estimator.predict(gates.r)) if budget is None else estimator.solve(budget)
        entry = estimate_entry(*found)
        workdir.write_json(path, entry)
        barrier("estimate written")
        say(console, f"estimate: made in {time.perf_counter() - started:.1f} s")
    asked = "" if gates.budget is None else f" for a budget of {gates.budget:g}"
    say(
        console,
        f"estimate: r = {entry['r']:.4f}{asked}, predicted MACs reduction {entry['macs_reduction']:.3f} exact, "
        f"{entry['macs_reduction_published']:.3f} published",
    )
    return entry


def estimate_entry(r: float, found: Evaluation) -> dict[str, float]:
    """What `estimate.json` holds."""
    return dict(zip(KEYS, (r, found.macs_reduction, found.macs_reduction_published), strict=True))


def read_estimate(folder: AnyPath) -> dict[str, float]:
    """What `choose_r` settled on in a workdir; raises `UserError` if the file is missing or broken."""
    entry = workdir.read_json(folder / ESTIMATE, "estimate")
    if not isinstance(entry, dict) or not entry.keys() >= set(KEYS):
        raise UserError(f"{folder / ESTIMATE} is not an estimate: it must hold {', '.join(KEYS)}")
    return entry


def known_estimate(run: Run) -> dict[str, Any]:
    """What `choose_r` settled on; where no gates were trained here, the config's r and no prediction."""
    trained_here = run.has(GATED) and run.steps_of(GATED) > 0
    if not trained_here and not (run.workdir / ESTIMATE).exists():
        return {"r": run.config.gates.r, **dict.fromkeys(KEYS[1:])}
    return read_estimate(run.workdir)
