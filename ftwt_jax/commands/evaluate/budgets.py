"""`evaluate --budgets`: one trained network at many budgets, beside fixed masks of the same work, and its subnets."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftwt_jax.budget.calibrate import CalibratedNetwork, Calibration
from ftwt_jax.budget.estimate import known_estimate
from ftwt_jax.budget.subnets import cut_to_budgets, evaluate_cut
from ftwt_jax.commands.evaluate.held_out import save_figures
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath
from ftwt_jax.printing import say_compiling, shorten_data
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import BASELINE, GATED, SUBNETS
from ftwt_jax.workdir import BUDGETS

# Key of a row, heading and format of its column.
_COLUMNS = (
    ("budget", "budget", "g"),
    ("accuracy", "accuracy", ".4f"),
    ("macs_reduction", "MACs reduction", ".3f"),
    ("macs_reduction_published", "published", ".3f"),
    ("static_accuracy", "fixed masks", ".4f"),
    ("static_macs_reduction", "MACs reduction", ".3f"),
    ("offset", "offset", "+.3f"),
    ("subnets_accuracy", "subnets", ".4f"),
    ("subnets_macs_reduction", "MACs reduction", ".3f"),
)


def evaluate_budgets(
    run: Run, budgets: list[float], best: bool, console: Console, out: AnyPath | None = None
) -> dict[str, Any]:
    """Evaluates a run's gated network and its subnets, those that it has, at each budget, without further training.

    Prints a table and writes `budgets.json`, or `out`.

    Raises:
      UserError: there are neither gates nor subnets, or one of the budgets is out of their reach.
    """
    if not (run.has(GATED) or run.has(SUBNETS)):
        raise UserError(f"{run.workdir} holds no gated network yet: train its gates first")
    r, calibration = known_estimate(run)["r"], Calibration(run)
    say_compiling(console, f"the evaluation of {run.config.model.name}")
    gated = CalibratedNetwork(calibration, run.trained(GATED, best), r) if run.has(GATED) else None
    subnets = run.trained(SUBNETS, best) if run.has(SUBNETS) else None
    # All masks and offsets first: a budget out of reach is refused before the long part.
    networks = [] if subnets is None else cut_to_budgets(run, subnets, budgets)
    offsets = [] if gated is None else [gated.offset(budget) for budget in budgets]
    dense = run.evaluator(BASELINE).run(run.trained(BASELINE, best), run.test_batches(), r)
    rows: list[dict[str, Any]] = [{"budget": budget} for budget in budgets]
    if gated is not None:
        fixed = gated.fixed()
        for row, offset in zip(rows, offsets, strict=True):
            found, static = gated.evaluate(row["budget"]), fixed.evaluate(row["budget"])
            row |= {
                "offset": offset,
                "accuracy": found.accuracy,
                "macs_reduction": found.macs_reduction,
                "macs_reduction_published": found.macs_reduction_published,
                "static_accuracy": static.accuracy,
                "static_macs_reduction": static.macs_reduction,
            }
    if subnets is not None:
        for row, network in zip(rows, networks, strict=True):
            found = evaluate_cut(network, subnets, calibration, r)
            row |= {"subnets_accuracy": found.accuracy, "subnets_macs_reduction": found.macs_reduction}
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
    rows = result["rows"]
    columns = [column for column in _COLUMNS if column[0] in rows[0]]
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(format(row[key], form) for key, _, form in columns))
    return table
