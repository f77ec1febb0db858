"""The command `report`: reads workdirs, runs their networks over the held-out split once, and writes the page."""

import dataclasses
import datetime
import json
import tempfile
import time
from collections.abc import Sequence

from absl import flags
from rich.console import Console

from ftwt_jax import workdir
from ftwt_jax.commands.command import WORKDIR, Arguments, Command, define_data, define_workdir
from ftwt_jax.errors import UserError, os_reason, storage_errors
from ftwt_jax.files import AnyPath, in_bucket
from ftwt_jax.printing import say
from ftwt_jax.report import mask_plots as images
from ftwt_jax.report import run_plots as figures
from ftwt_jax.report.classes import class_figures, confusion_plot
from ftwt_jax.report.co_activation import measure_co_activation
from ftwt_jax.report.images import find_extremes, find_routed, measure_images
from ftwt_jax.report.page import Section, Seen, render, write
from ftwt_jax.report.reproduce import evaluate_commands, report_command, train_command
from ftwt_jax.report.runs import NO_GATES, RecordedRun, check_unit, read_runs
from ftwt_jax.report.subnets import subnet_plots
from ftwt_jax.training.run import Run, load_run
from ftwt_jax.training.settings import GATED, SUBNETS
from ftwt_jax.workdir import REPORT, as_dict
from ftwt_jax.workdir.checkpoints import has_checkpoint
from ftwt_jax.workdir.environment import environment

# Written into a bucket and removed, to see whether that is allowed.
PROBE = ".writable"
# So many runs are looked at image by image; of more, the first.
MOST_SEEN = 6
# Images shown of each kind, and of each subnet.
SHOWN, SHOWN_ROUTED = 6, 8
# How far what is measured may lie from `evaluation.json`: gates within rounding of zero fall on either side.
CLOSE = 0.005


def _define(values: flags.FlagValues) -> None:
    define_workdir(values)
    define_data(values)
    flags.DEFINE_string("out", None, "folder to write, if not report/ in the first DIR", flag_values=values)
    flags.DEFINE_string(
        "unit",
        None,
        "whose filters are shown firing together, if not the one with most dynamic ones",
        flag_values=values,
    )


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    values = arguments.flags
    report(arguments.words, values.out, values.unit, console, values.data)


COMMAND = Command(_define, run, dataclasses.replace(WORKDIR, several=True))


def report(
    folders: Sequence[str], out: str | None, unit: str | None, console: Console, data: str | None = None
) -> AnyPath:
    """Writes the report of these workdirs; returns the path of its page.

    Args:
      out: folder to write; None: `report/` in the first workdir.
      unit: whose filters are shown firing together; None, and for networks without it: the one with most dynamic
        filters.

      data: name of the data set whose images are examined, in place of that of the runs' configs.

    Raises:
      UserError: a folder is not a workdir or was not evaluated, no network has such a unit, or `out` cannot be written.
    """
    runs = read_runs(folders)
    check_unit(runs, unit)
    folder = workdir.absolute(out) if out else runs[0].path / REPORT
    _make(folder)
    sections = []
    for run in runs:
        start = time.perf_counter()
        seen = _see(run, unit, data)
        sections.append(_section(run, seen))
        what = seen.note or f"looked at its held-out images in {time.perf_counter() - start:.0f} s"
        say(console, f"{run.label}: {what}")
    shared = [figures.accuracy_plot(runs), *figures.density_plots(runs)]
    page = render(
        sections,
        accuracy=shared[0],
        densities=shared[1:],
        environment=environment(),
        report_command=report_command(runs, folder, unit),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = write(folder, page, [*shared, *(plot for section in sections for plot in section.plots)])
    say(console, f"wrote {path}, {len(page.encode()) / 1e6:.1f} MB, and its plots as PNG beside it")
    return path


def _make(folder: AnyPath) -> None:
    """Makes the folder, and sees whether it can be written, before the long part."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if in_bucket(folder):
            (folder / PROBE).write_text("")
            (folder / PROBE).unlink()
        else:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except storage_errors() as error:
        reason = os_reason(error)
        raise UserError(f"cannot write the report to {folder}: {reason}; choose another with --out") from None


def _section(run: RecordedRun, seen: Seen) -> Section:
    return Section(
        run=run,
        seen=seen,
        training=figures.training_plots(run),
        corruptions=figures.corruption_plot(run) if run.corruptions else None,
        confusion=confusion_plot(run),
        classes=class_figures(run),
        subnets=subnet_plots(run),
        train_command=train_command(run),
        evaluate_commands=evaluate_commands(run),
        config=json.dumps(as_dict(run.config), indent=2),
    )


def _see(run: RecordedRun, unit: str | None, data: str | None) -> Seen:
    """Runs the gated network of a run, and its subnets; where they, data or checkpoint are not here, a note says so."""
    has_subnets = bool(run.evaluation.get("subnets"))
    if not (run.gated or has_subnets):
        return Seen(note=NO_GATES)
    if run.number > MOST_SEEN:
        return Seen(note=f"only the first {MOST_SEEN} runs are looked at image by image")
    if run.gated and not has_checkpoint(run.path, GATED):
        return Seen(note=f"its images were not examined: there is no {GATED} checkpoint in {run.path}")
    best = run.evaluation.get("checkpoint") == "best"
    try:
        made = load_run(str(run.path), data)
        seen = _see_gates(run, made, best, unit) if run.gated else Seen(note=NO_GATES)
        if has_subnets and made.has(SUBNETS):
            routed = find_routed(measure_images(made, best, SUBNETS), made.dataset, SHOWN_ROUTED)
            seen = dataclasses.replace(seen, routed=routed)
    except (UserError, ModuleNotFoundError) as error:
        return Seen(note=f"its images were not examined: {error}")
    return seen


def _see_gates(run: RecordedRun, made: Run, best: bool, unit: str | None) -> Seen:
    """Runs the gated network over the held-out images."""
    samples, note = measure_images(made, best), ""
    reduction = 1 - samples.macs.mean() / samples.dense_macs
    if abs(reduction - run.evaluation["macs_reduction"]) > CLOSE:
        note = (
            f"evaluation.json gives a MACs reduction of {run.evaluation['macs_reduction']:.3f}, and the network that "
            f"is here now {reduction:.3f}: run `python -m ftwt_jax evaluate --workdir={run.path}` again"
        )
    chosen = unit if unit in samples.units else samples.most_dynamic
    found = measure_co_activation(samples.masks(chosen), samples.labels, len(samples.class_names), images.MOST_CLASSES)
    cheapest, most_expensive = find_extremes(samples, made.dataset, SHOWN)
    return Seen(
        macs=images.macs_plot(run, samples),
        cheapest=cheapest,
        most_expensive=most_expensive,
        dense_macs=samples.dense_macs,
        unit=chosen,
        units=[(name, width, samples.dynamic(name)) for name, width in zip(samples.units, samples.widths, strict=True)],
        co_activation=images.unit_plots(run, samples, chosen, found),
        note=note,
    )
