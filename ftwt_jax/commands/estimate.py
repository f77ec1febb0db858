"""The command `estimate`: the MACs reduction that each r would give, in all and in each layer."""

from absl import flags
from matplotlib import colormaps
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftwt_jax.budget.calibrate import Calibration
from ftwt_jax.budget.estimate import Estimator, estimate_entry
from ftwt_jax.commands.command import (
    WORKDIR,
    Arguments,
    Command,
    define_data,
    define_distributed,
    define_workdir,
    join_processes,
    parse_numbers,
)
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath
from ftwt_jax.parallel.processes import is_first
from ftwt_jax.printing import say, say_compiling
from ftwt_jax.report.plotting import new_plot, save_png
from ftwt_jax.training.evaluator import Evaluation
from ftwt_jax.training.run import load_run
from ftwt_jax.training.settings import BASELINE
from ftwt_jax.workdir import ESTIMATE_PLOT

# Values of r in the plot, besides those asked for.
SWEEP = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
# Those of them that the table shows beside a single r.
SHOWN = (0.5, 0.7, 0.8, 0.9, 1.0)
# With more units than this, the legend names the first and the last alone.
LABELLED = 12
ALL = "all"


def _define(values: flags.FlagValues) -> None:
    define_workdir(values)
    flags.DEFINE_string("r", None, "mass thresholds to predict for, such as 0.8,0.9,1", flag_values=values)
    flags.DEFINE_float("budget", None, "MACs reduction to find r for, such as 0.5", flag_values=values)
    define_data(values)
    define_distributed(values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    values, folder = arguments.flags, arguments.workdir()
    if values.r is not None and values.budget is not None:
        raise UserError("give --r or --budget, not both")
    rs = (
        parse_numbers(values.r, "r", "numbers in (0, 1], such as 0.8,0.9,1", lambda r: 0 < r <= 1) if values.r else None
    )
    estimate(folder, rs, values.budget, join_processes(arguments, console), values.data)


COMMAND = Command(_define, run, WORKDIR)


def estimate(
    folder: str, rs: list[float] | None, budget: float | None, console: Console, data: str | None = None
) -> list[dict[str, float]]:
    """Prints r and predicted reduction for each r, or for the r that a budget asks for, from a trained baseline.

    With neither, for what the run's own config says. Then the reduction of every unit at these and other r, as a table
    and, in `estimate.png` of the workdir, as a plot.
    """
    run = load_run(folder, data)
    path, config = run.workdir, run.config
    say_compiling(console, f"the prediction for {config.model.name}")
    estimator = Estimator.of(Calibration.of_training(run), run.trained(BASELINE))
    if rs is None and budget is None:
        budget = config.gates.budget
    if budget is not None:
        rows = [estimate_entry(*estimator.solve(budget))]
    else:
        rows = [estimate_entry(r, estimator.predict(r)) for r in rs or [config.gates.r]]
    table = Table(title=escape(f"predicted from the dense baseline in {path}"))
    for heading in ("r", "MACs reduction (exact)", "MACs reduction (published)"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(f"{row['r']:.4f}", f"{row['macs_reduction']:.3f}", f"{row['macs_reduction_published']:.3f}")
    console.print(table)
    chosen = [row["r"] for row in rows]
    swept = {r: estimator.predict(r) for r in sorted({*chosen, *SWEEP})}
    shown = {*chosen, *SHOWN} if len(chosen) == 1 else set(chosen)
    console.print(_unit_table({r: found for r, found in swept.items() if r in shown}))
    if is_first():
        _plot(swept, chosen, path / ESTIMATE_PLOT)
        say(console, f"wrote {path / ESTIMATE_PLOT}: the reduction of each unit, by r")
    return rows


def _reductions(found: Evaluation) -> dict[str, float]:
    """The MACs reduction of each layer, and of them all."""
    parts = {work.layer.name: 1 - work.measured / work.dense for work in found.layers}
    return parts | {ALL: found.macs_reduction}


def _unit_table(swept: dict[float, Evaluation]) -> Table:
    table = Table(title="predicted MACs reduction of each layer (exact), by r")
    table.add_column("layer", overflow="fold")
    columns = [_reductions(found) for found in swept.values()]
    for r in swept:
        table.add_column(f"{r:.3g}", justify="right", no_wrap=True)
    for name in columns[0]:
        if name == ALL:
            table.add_section()
        table.add_row(name, *(f"{round(column[name], 2) + 0.0:.2f}" for column in columns))
    return table


def _plot(swept: dict[float, Evaluation], chosen: list[float], path: AnyPath) -> None:
    figure, axes = new_plot("r, mass threshold", "predicted MACs reduction (exact)", height=5)
    columns = [_reductions(found) for found in swept.values()]
    gated = set(next(iter(swept.values())).gate_names)
    units = [work.layer.name for work in next(iter(swept.values())).layers if work.layer.name in gated]
    for index, name in enumerate(units):
        color = colormaps["viridis"](index / max(len(units) - 1, 1))
        label = name if len(units) <= LABELLED or index in (0, len(units) - 1) else None
        axes.plot(list(swept), [column[name] for column in columns], color=color, lw=1, label=label)
    axes.plot(list(swept), [column[ALL] for column in columns], color="black", lw=2.5, label="all layers")
    for r in chosen:
        axes.axvline(r, color="gray", ls=":", lw=1)
    axes.legend(fontsize=8, title="first to last unit: dark to light" if len(units) > LABELLED else None)
    save_png(figure, path)
