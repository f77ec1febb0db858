"""`evaluate --budgets`: one trained network at many budgets, and fixed masks of the same work beside it."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftwt_jax.budget.calibrate import CalibratedNetwork, Calibration
from ftwt_jax.budget.estimate import known_estimate
from ftwt_jax.commands.evaluate.held_out import save_figures
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath
from ftwt_jax.printing import say_compiling, shorten_data
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import BASELINE, GATED
from ftwt_jax.workdir import BUDGETS


def evaluate_budgets(
    run: Run, budgets: list[float], best: bool, console: Console, out: AnyPath | None = None
) -> dict[str, Any]:
    """Evaluates the gated network of a run at each budget; prints a table and writes `budgets.json`, or `out`.

    Raises:
      UserError: there is no gated network, or no offset to its gates reaches one of the budgets.
    """
    if not run.has(GATED):
        raise UserError(f"{run.workdir} holds no gated network yet: train its gates first")
    r = known_estimate(run)["r"]
    say_compiling(console, f"the evaluation of {run.config.model.name}")
    gated = CalibratedNetwork(Calibration(run), run.trained(GATED, best), r)
    fixed = gated.fixed()
    # All offsets first: a budget out of reach is refused before the long part.
    offsets = [gated.offset(budget) for budget in budgets]
    dense = run.evaluator(BASELINE).run(run.trained(BASELINE, best), run.test_batches(), r)
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
    console.print(_table(result, run))
    save_figures(result, run, BUDGETS, out, console)
    return result


def _table(result: dict[str, Any], run: Run) -> Table:
    title = f"{run.config.model.name} on {shorten_data(run.config.data.name)}, {result['samples']} held-out images; "
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
