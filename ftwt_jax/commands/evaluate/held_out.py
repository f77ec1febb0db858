"""`evaluate`: accuracy, work and gates on the held-out split, as a table and as `evaluation.json`."""

import contextlib
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftwt_jax import workdir
from ftwt_jax.budget.calibrate import CalibratedNetwork, Calibration
from ftwt_jax.budget.estimate import known_estimate
from ftwt_jax.commands.evaluate.subnets import evaluate_subnets, subnet_table
from ftwt_jax.files import AnyPath
from ftwt_jax.parallel.processes import all_gather
from ftwt_jax.printing import say, say_compiling, shorten_data
from ftwt_jax.report.runs import NO_GATES, is_number, read_metrics
from ftwt_jax.training.evaluator import Evaluation
from ftwt_jax.training.run import Run, is_gated_backbone
from ftwt_jax.training.settings import BASELINE, GATED, STAGES
from ftwt_jax.workdir import EVALUATION, METRICS


def evaluate_run(
    run: Run, console: Console, best: bool = False, out: AnyPath | None = None, write: bool = True
) -> dict[str, Any]:
    """Evaluates a run's newest (or best) networks; prints the tables, then writes the figures.

    Without a gated network, the figures of gates are null, and the accuracy is that of the baseline.

    Args:
      out: file to write, if not `evaluation.json` of the workdir.
      write: whether anything is written.
    """
    say_compiling(console, f"the evaluation of {run.config.model.name}")
    estimate = known_estimate(run)
    gated = run.trained(GATED, best) if run.has(GATED) else None
    dense = run.evaluator(BASELINE).run(run.trained(BASELINE, best), run.test_batches(), estimate["r"])
    found = dense if gated is None else run.evaluator(GATED).run(gated, run.test_batches(), estimate["r"])
    subnets = evaluate_subnets(run, estimate["r"], best)
    count_skipped(run)
    gates = found.gates
    static = None
    if gated is not None and 0 < found.macs_reduction < 1:
        static = CalibratedNetwork(Calibration(run), gated, estimate["r"]).fixed().evaluate(found.macs_reduction)
    steps = {stage: _step(run, stage, best) for stage in STAGES if run.has(stage)}
    result = {
        "accuracy": found.accuracy,
        "dense_accuracy": dense.accuracy,
        # Whose weights the dense network has: its own, or those of a converted gated network.
        "dense_weights": GATED if is_gated_backbone(run.workdir) else BASELINE,
        "macs_reduction": found.macs_reduction,
        "macs_reduction_published": found.macs_reduction_published,
        "predicted_macs_reduction": None if gates is None else estimate["macs_reduction"],
        "gate_accuracy": gates and gates.gate_accuracy,
        "static_gate_accuracy": gates and gates.static_gate_accuracy,
        "dynamic_filters": gates and gates.dynamic_filters,
        "static_accuracy": static and static.accuracy,
        "static_macs_reduction": static and static.macs_reduction,
        "units": list(found.gate_names),
        "density": list(gates.density) if gates else [],
        "samples": found.samples,
        "skipped": list(run.dataset.skipped.names),
        "r": estimate["r"] if gates else None,
        "checkpoint": "best" if best else "newest",
        "steps": steps,
        "data": run.config.data.name,
        "class_names": list(run.dataset.class_names),
        "class_accuracy": found.class_accuracy,
        "dense_class_accuracy": dense.class_accuracy,
        "confusion": found.confusion,
        "dense_confusion": dense.confusion,
        "subnets": subnets,
    }
    # The figures first: what took long to compute must not be lost to a disk that is full.
    if gated is None:
        say(console, NO_GATES)
    console.print(unit_table(found))
    console.print(summary_table(result, run))
    if subnets is not None:
        console.print(subnet_table(subnets, result["class_names"]))
    if run.dataset.skipped.names:
        say(console, run.dataset.skipped.summary())
    if best:
        for stage, step in steps.items():
            say(console, _chosen(run, stage, step))
    if write:
        save_figures(result, run, EVALUATION, out, console)
    return result


def save_figures(result: dict[str, Any], run: Run, name: str, out: AnyPath | None, console: Console) -> None:
    """Writes figures as JSON to `out`, or else to the workdir's file of this name unless they are of other data."""
    if out is None and workdir.load(str(run.workdir))[1].data.name != run.config.data.name:
        say(console, f"not written, since they are of other data than {run.workdir / name}: name a file with --out")
        return
    workdir.write_json(out or run.workdir / name, result)
    if out is not None:
        say(console, f"wrote {out}")


def _step(run: Run, stage: str, best: bool) -> int:
    with contextlib.closing(run.checkpoints(stage)) as checkpoints:
        return checkpoints.step(best) or 0


def _chosen(run: Run, stage: str, step: int) -> str:
    """Which checkpoint is the best, and why a higher accuracy of the log is not that of one."""
    scores = {
        row["step"]: row["eval_accuracy"]
        for row in read_metrics(run.workdir / METRICS)
        if row["stage"] == stage and is_number(row.get("eval_accuracy"))
    }
    text = f"best {stage} checkpoint: step {step}"
    if step not in scores:
        return f"{text}, whose accuracy in training was not recorded"
    highest = max(scores, key=lambda one: scores[one])
    text += f", accuracy {scores[step]:.4f}"
    if scores[highest] > scores[step]:
        why = "before the gates were brought to their budget" if stage == GATED else "and has no checkpoint any more"
        text += f"; the log's {scores[highest]:.4f} is of step {highest}, {why}"
    return text


def count_skipped(run: Run) -> None:
    """Tells every process which images the others skipped."""
    run.dataset.skipped.merge(all_gather(run.dataset.skipped.names))


def _count(macs: float) -> str:
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if macs >= size:
            return f"{macs / size:.2f} {sign}"
    return f"{macs:.0f}"


def unit_table(found: Evaluation) -> Table:
    """A row per layer: name, channels, density, MACs before and after, reduction."""
    table = Table(title="MACs per image, exact convention")
    table.add_column("unit", overflow="fold")
    for heading in ("channels", "density", "MACs\nbefore", "MACs\nafter", "reduction"):
        table.add_column(heading, justify="right", no_wrap=True)
    density = dict(zip(found.gate_names, found.gates.density if found.gates else (), strict=True))
    for work in found.layers:
        name = work.layer.name
        share = f"{density[name]:.2f}" if name in density else ""
        cut = f"{round(1 - work.measured / work.dense, 2) + 0.0:.2f}"  # No "-0.00" where only a head was added.
        table.add_row(name, str(work.layer.out_features), share, _count(work.dense), _count(work.measured), cut)
    before, after = (sum(getattr(work, kind) for work in found.layers) for kind in ("dense", "measured"))
    table.add_section()
    table.add_row("all", "", "", _count(before), _count(after), f"{1 - after / before:.2f}")
    return table


def summary_table(result: dict[str, Any], run: Run) -> Table:
    """What was saved, and what it cost."""
    best = ", best checkpoint" if result["checkpoint"] == "best" else ""
    title = (
        f"{run.config.model.name} on {shorten_data(run.config.data.name)}, {result['samples']} held-out images{best}"
    )
    table = Table(title=escape(title))
    is_gated = result["gate_accuracy"] is not None
    dense = "all filters on" if result["dense_weights"] == GATED else "dense"
    for heading in ("", dense, "gated") if is_gated else ("", dense):
        table.add_column(heading, justify="left" if not heading else "right")
    if not is_gated:
        table.add_row("accuracy", f"{result['dense_accuracy']:.4f}")
        return table
    predicted = result["predicted_macs_reduction"]
    table.add_row("accuracy", f"{result['dense_accuracy']:.4f}", f"{result['accuracy']:.4f}")
    if result["static_accuracy"] is not None:
        table.add_row("  of fixed masks with the same MACs", "", f"{result['static_accuracy']:.4f}")
    table.add_row("MACs reduction, exact", "", f"{result['macs_reduction']:.3f}")
    table.add_row("  predicted before gate training", "", "unknown" if predicted is None else f"{predicted:.3f}")
    table.add_row("MACs reduction, published", "", f"{result['macs_reduction_published']:.3f}")
    table.add_row("gate accuracy", "", f"{result['gate_accuracy']:.3f}")
    table.add_row("  of the best fixed mask", "", f"{result['static_gate_accuracy']:.3f}")
    table.add_row("dynamic filters", "", f"{result['dynamic_filters']:.2f}")
    return table
