"""`evaluate --budgets`: one trained network at many budgets, and fixed masks of the same work beside it."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftwt_jax import workdir
from ftwt_jax.budget.calibrate import settle
from ftwt_jax.budget.estimate import Calibrator
from ftwt_jax.commands.estimate import known_estimate
from ftwt_jax.errors import UserError
from ftwt_jax.gating.variables import fix_gates
from ftwt_jax.parallel.sharding import put_whole, replicated
from ftwt_jax.training.evaluator import Evaluation
from ftwt_jax.training.run import BASELINE, GATED, Run, make_run
from ftwt_jax.workdir.checkpoints import has_checkpoint

CURVE = "budgets.json"


@dataclasses.dataclass(frozen=True)
class AnyBudget:
    """A gated network of a run, to be had at any budget.

    Attributes:
      variables: as they were trained.
      r: mass threshold of the targets that its gates are compared with.
      is_fixed: whether its masks do not depend on the image.
    """

    run: Run
    variables: dict[str, Any]
    r: float
    calibrator: Calibrator
    is_fixed: bool = False

    def offset(self, budget: float) -> float:
        """What to add to the gate logits for a MACs reduction; raises `UserError` if there is no such offset."""
        return self.calibrator.solve(budget)[0]

    def at(self, budget: float) -> dict[str, Any]:
        """The network at this MACs reduction: gates shifted, batch statistics measured anew under its masks."""
        return settle(self.run, self.variables, self.r, budget, self.is_fixed)

    def evaluate(self, budget: float) -> Evaluation:
        """The figures on the held-out split at this MACs reduction."""
        return self.run.evaluator(GATED).run(self.at(budget), self.run.test_batches(), self.r)

    def fixed(self) -> "AnyBudget":
        """The same with every mask fixed to the filters that are on most often: static pruning."""
        # As every other program of the run is given them, so that none is compiled again.
        variables = put_whole(fix_gates(self.variables, self.calibrator.rates()), replicated(self.run.mesh))
        return any_budget(self.run, variables, self.r, fixed=True)


def any_budget(run: Run, gated: dict[str, Any], r: float, fixed: bool = False) -> AnyBudget:
    """Prepares a gated network of a run; `fixed`: its masks do not depend on the image."""
    return AnyBudget(run, gated, r, run.calibrator(gated, r, fixed), fixed)


def parse_budgets(text: str) -> list[float]:
    """Reads "0.3,0.5"; raises `UserError` for anything that is no list of MACs reductions."""
    try:
        budgets = [float(part) for part in text.split(",")]
    except ValueError:
        budgets = []
    if not budgets or not all(0 < budget < 1 for budget in budgets):
        raise UserError(f"--budgets is a list of MACs reductions between 0 and 1, such as 0.3,0.5,0.7; got {text!r}")
    return budgets


def evaluate_budgets(folder: str, budgets: list[float], best: bool, console: Console) -> dict[str, Any]:
    """Evaluates the gated network of a workdir at each budget; prints a table and writes `budgets.json`.

    Raises:
      UserError: no gated network is there, or no offset to its gates reaches one of the budgets.
    """
    path, config = workdir.load(folder)
    run = make_run(config, path)
    if not has_checkpoint(run.workdir, GATED):
        raise UserError(f"{path} holds no gated network yet: train its gates first")
    gated = any_budget(run, run.trained(GATED, best), known_estimate(run)["r"])
    fixed = gated.fixed()
    # All offsets first: a budget that cannot be had is refused before the long part.
    offsets = [gated.offset(budget) for budget in budgets]
    dense = run.evaluator(BASELINE).run(run.trained(BASELINE), run.test_batches(), gated.r)
    rows = []
    for budget, offset in zip(budgets, offsets, strict=True):
        found, static = gated.evaluate(budget), fixed.evaluate(budget)
        rows.append(
            {
                "budget": budget,
                "offset": offset,
                "accuracy": found.accuracy,
                "macs_reduction": found.macs_reduction,
                "macs_reduction_published": found.macs_reduction_published,
                "static_accuracy": static.accuracy,
                "static_macs_reduction": static.macs_reduction,
            }
        )
    result = {
        "dense_accuracy": dense.accuracy,
        "samples": dense.samples,
        "checkpoint": "best" if best else "newest",
        "rows": rows,
    }
    workdir.write_json(run.workdir / CURVE, result)
    console.print(_table(result, run))
    return result


def _table(result: dict[str, Any], run: Run) -> Table:
    title = f"{run.config.model.name} on {run.config.data.name}, {result['samples']} held-out images; "
    table = Table(title=escape(f"{title}dense accuracy {result['dense_accuracy']:.4f}"))
    for heading in ("budget", "accuracy", "MACs reduction", "published", "fixed masks", "MACs reduction", "offset"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['budget']:g}",
            f"{row['accuracy']:.4f}",
            f"{row['macs_reduction']:.3f}",
            f"{row['macs_reduction_published']:.3f}",
            f"{row['static_accuracy']:.4f}",
            f"{row['static_macs_reduction']:.3f}",
            f"{row['offset']:+.3f}",
        )
    return table
