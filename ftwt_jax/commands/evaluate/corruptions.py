"""`evaluate --corruptions`: what noise, blur, contrast, brightness and JPEG do to accuracy and density."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftwt_jax import workdir
from ftwt_jax.budget.estimate import known_estimate
from ftwt_jax.commands.evaluate.held_out import evaluate_run, save_figures
from ftwt_jax.data.corrupted_sets import CorruptedSet, open_corrupted
from ftwt_jax.data.corruptions import ALL, APPLIED, CLEAN, CORRUPTIONS, SEVERITIES, corrupt_batch
from ftwt_jax.data.pipeline import Batch, eval_batches
from ftwt_jax.data.source import ArraySource
from ftwt_jax.files import AnyPath
from ftwt_jax.printing import say, shorten_data
from ftwt_jax.training.evaluator import Evaluation
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import BASELINE, GATED, SUBNETS

FIGURES = ("dense_accuracy", "accuracy", "density", "macs_reduction", "macs_reduction_published")
# Only where there are subnets.
SUBNETS_FIGURES = ("subnets_accuracy", "subnets_macs_reduction")

Row = dict[str, Any]


class Setting(NamedTuple):
    """A corruption at one severity, and how to get its batches, as `eval_batches` gives them."""

    corruption: str
    severity: int
    batches: Callable[[], Iterable[Batch]]


def evaluate_corruptions(
    run: Run, best: bool, source: str | None, console: Console, out: AnyPath | None = None
) -> dict[str, Any]:
    """The ordinary evaluation of a run, then that on corrupted images.

    Args:
      best: the checkpoint of highest accuracy, not the newest.
      source: None: the held-out split is corrupted here; else a set of TFDS's that is, such as
        `tfds:cifar10_corrupted`.
      out: file for the figures on corrupted images; the ordinary ones are then only printed.

    Raises:
      UserError: `source` is no such set, or its images or classes are not the network's.
    """
    settings = applied(run) if source is None else prepared(run, source)
    evaluate_run(run, console, best, write=out is None)
    return sweep(run, settings, source or APPLIED, console, best, out)


def applied(run: Run) -> list[Setting]:
    """Every corruption at every severity, applied to the held-out split."""

    def setting(corruption: str, severity: int) -> Setting:
        return Setting(corruption, severity, lambda: corrupted_batches(run, corruption, severity))

    return list(itertools.starmap(setting, itertools.product(CORRUPTIONS, SEVERITIES)))


def prepared(run: Run, source: str) -> list[Setting]:
    """What is prepared of a TFDS set of corrupted images."""
    # They are of the network's size already, and nothing is cut off them.
    whole = dataclasses.replace(run.dataset, resized_crop=False)

    def setting(one: CorruptedSet) -> Setting:
        return Setting(*one[:2], lambda: eval_batches(whole, one.load(whole), run.eval_batch_size))

    return [setting(one) for one in open_corrupted(source, run.config.data.get("data_dir"), run.dataset)]


def corrupted_batches(run: Run, corruption: str, severity: int) -> Iterator[Batch]:
    """The held-out split, this process's share of it, corrupted; see `eval_batches`."""
    for number, batch in enumerate(run.test_batches()):
        share = len(batch["label"])
        # An image's place in the whole split, whoever reads it.
        places = (number * jax.process_count() + jax.process_index()) * share + np.arange(share)
        yield batch | {"image": corrupt_batch(batch["image"], corruption, severity, run.config.seed, places)}


def sweep(
    run: Run,
    settings: Sequence[Setting],
    source: str,
    console: Console,
    best: bool = False,
    out: AnyPath | None = None,
) -> dict[str, Any]:
    """Evaluates the dense and the gated network, and subnets, on clean images and in every setting.

    Prints a table and writes `corruptions.json`, or `out`. Without a gated network, `accuracy` is the baseline's and
    `density` null, as in `evaluation.json`; without subnets, their figures are left out. In a mean, every corruption
    counts the same.
    """
    r = known_estimate(run)["r"]
    gated, subnets = (run.trained(stage, best) if run.has(stage) else None for stage in (GATED, SUBNETS))
    baseline = run.trained(BASELINE, best)
    in_memory = source != APPLIED or isinstance(run.dataset.test, ArraySource)

    def row(setting: Setting) -> Row:
        # All networks are given the same images, which are corrupted only once where they are few and small.
        kept = list(setting.batches()) if in_memory else None

        def evaluation(stage: str, variables: Any) -> Evaluation:
            return run.evaluator(stage).run(variables, setting.batches() if kept is None else kept, r)

        dense = evaluation(BASELINE, baseline)
        found = dense if gated is None else evaluation(GATED, gated)
        routed = None if subnets is None else evaluation(SUBNETS, subnets)
        return {"corruption": setting.corruption, "severity": setting.severity, **figures(dense, found, routed)}

    clean = row(Setting(CLEAN, 0, run.test_batches))
    rows = []
    for number, setting in enumerate(settings, 1):
        rows.append(row(setting))
        say(console, f"corruption {number} of {len(settings)}: {_told(rows[-1])}")
    means = {name: _mean(list(part)) for name, part in itertools.groupby(rows, lambda one: one["corruption"])}
    result = {
        "source": source,
        "samples": clean["samples"],
        "checkpoint": "best" if best else "newest",
        "rows": [clean, *rows],
        "mean": _mean(list(means.values())),
        "mean_by_corruption": means,
    }
    console.print(table(result, run))
    save_figures(result, run, workdir.CORRUPTIONS, out, console)
    return result


def figures(dense: Evaluation, found: Evaluation, routed: Evaluation | None = None) -> Row:
    """What is said of one setting; `density` is the share of filters on, over all filters.

    Args:
      found: of the gated network, or of the dense one.
      routed: of the network with subnets, each image in the one that its router chooses.
    """
    density = None
    if found.gates is not None:
        channels = {work.layer.name: work.layer.out_features for work in found.layers}
        weights = [channels[name] for name in found.gate_names]
        density = float(np.average(found.gates.density, weights=weights))
    row = {
        "samples": found.samples,
        "dense_accuracy": dense.accuracy,
        "accuracy": found.accuracy,
        "density": density,
        "macs_reduction": found.macs_reduction,
        "macs_reduction_published": found.macs_reduction_published,
    }
    if routed is not None:
        row |= {"subnets_accuracy": routed.accuracy, "subnets_macs_reduction": routed.macs_reduction}
    return row


def _mean(rows: Sequence[Row]) -> Row:
    keys = [key for key in (*FIGURES, *SUBNETS_FIGURES) if key in rows[0]]
    return {key: None if rows[0][key] is None else float(np.mean([row[key] for row in rows])) for key in keys}


def _told(row: Row) -> str:
    gated = "" if row["density"] is None else f", {row['accuracy']:.4f} gated"
    routed = f", {row['subnets_accuracy']:.4f} subnets" if "subnets_accuracy" in row else ""
    return f"{row['corruption']}, severity {row['severity']}: accuracy {row['dense_accuracy']:.4f} dense{gated}{routed}"


def table(result: dict[str, Any], run: Run) -> Table:
    """A row per corruption and severity, and their means."""
    what = shorten_data(run.config.data.name) if result["source"] == APPLIED else result["source"]
    best = ", best checkpoint" if result["checkpoint"] == "best" else ""
    title = f"{run.config.model.name} on corrupted images, {what}, {result['samples']} held-out images{best}"
    found = Table(title=escape(title))
    is_gated, has_subnets = result["rows"][0]["density"] is not None, "subnets_accuracy" in result["rows"][0]
    gates = ("accuracy\ngated", "density", "MACs\nreduction") if is_gated else ()
    subnets = ("accuracy\nsubnets", "MACs\nreduction") if has_subnets else ()
    found.add_column("corruption", overflow="fold")
    for heading in ("severity", "accuracy\ndense", *gates, *subnets):
        found.add_column(heading, justify="right")

    def add(name: str, severity: str, row: Row) -> None:
        shown = [f"{row['dense_accuracy']:.4f}"]
        if is_gated:
            shown += [f"{row['accuracy']:.4f}", f"{row['density']:.3f}", f"{row['macs_reduction']:.3f}"]
        if has_subnets:
            shown += [f"{row['subnets_accuracy']:.4f}", f"{row['subnets_macs_reduction']:.3f}"]
        found.add_row(escape(name), severity, *shown)

    for name, rows in itertools.groupby(result["rows"], lambda one: one["corruption"]):
        for row in rows:
            add(name, str(row["severity"]), row)
        if name != CLEAN:
            add(name, "mean", result["mean_by_corruption"][name])
        found.add_section()
    add(ALL, "mean", result["mean"])
    return found
