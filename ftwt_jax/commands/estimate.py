"""The command `estimate`, and the choice of r between the two stages of training."""

import pathlib
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftwt_jax import workdir
from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import check_r
from ftwt_jax.parallel.processes import barrier, broadcast, is_first
from ftwt_jax.printing import say
from ftwt_jax.training.evaluator import Evaluation
from ftwt_jax.training.run import BASELINE, GATED, Run, make_run
from ftwt_jax.workdir.checkpoints import has_checkpoint

ESTIMATE = "estimate.json"
PLOT = "estimate.png"
# Drawn besides what is asked for.
SWEEP = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
# Of these, what the table shows beside one r alone.
SHOWN = (0.5, 0.7, 0.8, 0.9, 1.0)
# Networks of more units get a legend for the first and the last alone.
LABELLED = 12
ALL = "all"
KEYS = ("r", "macs_reduction", "macs_reduction_published")


def _entry(r: float, found: Evaluation) -> dict[str, float]:
    return dict(zip(KEYS, (r, found.macs_reduction, found.macs_reduction_published), strict=True))


def choose_r(run: Run, baseline: Any, console: Console) -> dict[str, float]:
    """The r to train gates for: the config's, or the one that its budget asks for; printed with its prediction.

    The choice is kept in `estimate.json`, so that a resumed run trains for the same r.
    """
    path = run.workdir / ESTIMATE
    budget, r = run.config.gates.budget, run.config.gates.r
    if broadcast(path.exists()):
        entry = read_estimate(run.workdir)
    else:
        estimator = run.estimator(baseline)
        entry = _entry(r, estimator.predict(r)) if budget is None else _entry(*estimator.solve(budget))
        workdir.write_json(path, entry)
        barrier("estimate written")
    asked = "" if budget is None else f" for a budget of {budget:g}"
    say(
        console,
        f"estimate: r = {entry['r']:.4f}{asked}, predicted MACs reduction {entry['macs_reduction']:.3f} exact, "
        f"{entry['macs_reduction_published']:.3f} published",
    )
    return entry


def read_estimate(folder: pathlib.Path) -> dict[str, float]:
    """What `choose_r` settled on in a workdir; raises `UserError` if the file is missing or is no estimate."""
    entry = workdir.read_json(folder / ESTIMATE, "estimate")
    if not isinstance(entry, dict) or not entry.keys() >= set(KEYS):
        raise UserError(f"{folder / ESTIMATE} is no estimate: it must hold {', '.join(KEYS)}")
    return entry


def known_estimate(run: Run) -> dict[str, Any]:
    """What `choose_r` settled on; where no gates were trained here, the config's r and no prediction."""
    trained_here = has_checkpoint(run.workdir, GATED) and run.steps_of(GATED) > 0
    if not trained_here and not (run.workdir / ESTIMATE).exists():
        return {"r": run.config.gates.r, **dict.fromkeys(KEYS[1:])}
    return read_estimate(run.workdir)


def parse_rs(text: str) -> list[float]:
    """Reads "0.8,0.9,1"; raises `UserError` for anything that is no list of thresholds."""
    try:
        return [check_r(float(part)) for part in text.split(",")]
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--r is a list of numbers in (0, 1], such as 0.8,0.9,1; got {text!r}") from None


def estimate(folder: str, rs: list[float] | None, budget: float | None, console: Console) -> list[dict[str, float]]:
    """Prints r and predicted reduction for each r, or for the r that a budget asks for, from a trained baseline.

    With neither, for what the run's own config says. Then the reduction of every unit at these and other r, as a table
    and, in `estimate.png` of the workdir, as a plot.
    """
    path, config = workdir.load(folder)
    run = make_run(config, path)
    estimator = run.estimator(run.trained(BASELINE))
    if rs is None and budget is None:
        budget = config.gates.budget
    if budget is not None:
        rows = [_entry(*estimator.solve(budget))]
    else:
        rows = [_entry(r, estimator.predict(r)) for r in rs or [config.gates.r]]
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
        _plot(swept, chosen, path / PLOT)
        say(console, f"r against the reduction of each unit: {path / PLOT}")
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


def _plot(swept: dict[float, Evaluation], chosen: list[float], path: pathlib.Path) -> None:
    from matplotlib import colormaps

    from ftwt_jax.report.plotting import new_plot, save_png

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
