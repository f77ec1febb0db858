"""Reads what workdirs record of their runs: config, figures, metrics. No network is run here."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from ftwt_jax import workdir
from ftwt_jax.errors import UserError, printable, unknown_name
from ftwt_jax.files import AnyPath
from ftwt_jax.workdir import BENCHMARK, BUDGETS, CORRUPTIONS, EVALUATION, METRICS
from ftwt_jax.workdir.environment import Environment, recorded_environments

Row = dict[str, Any]
# Fields that must be numbers, and fields that are null without a gated network.
FIGURES = ("accuracy", "dense_accuracy", "macs_reduction", "macs_reduction_published", "samples")
GATE_FIGURES = ("gate_accuracy", "static_gate_accuracy", "dynamic_filters")
# Of these groups, a row holds one at least.
CURVE_FIGURES = ("accuracy", "macs_reduction"), ("budget", "subnets_accuracy", "subnets_macs_reduction")
CORRUPTION_FIGURES = (("severity", "dense_accuracy"),)
# Said where figures of gates are missing.
NO_GATES = "there is no gated network yet, so these figures are for the baseline"
TIMES = ("batch", "macs_reduction", "dense_ms", "masked_ms", "compact_ms")


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """A run as its workdir records it.

    Attributes:
      number: its position among the reported runs, from 1.
      name: the end of its path, long enough to be unique.
      evaluation: `evaluation.json`; reductions and accuracies are fractions.
      curve: `budgets.json`; empty if it does not exist.
      sweep: `corruptions.json`; empty if it does not exist.
      timing: `benchmark.json`; empty if it does not exist.
      metrics: the lines of `metrics.jsonl`; empty for an imported network.
      environments: the environments that it was trained in, in order; empty if they were not recorded.
    """

    number: int
    name: str
    path: AnyPath
    config: ConfigDict
    evaluation: Row
    curve: Row
    sweep: Row
    timing: Row
    metrics: tuple[Row, ...]
    environments: Sequence[Environment]

    @property
    def label(self) -> str:
        """Its name in plots."""
        return f"{self.number} {self.name}"

    @property
    def gated(self) -> bool:
        """Whether it has a gated network."""
        return self.evaluation["gate_accuracy"] is not None

    @property
    def mode(self) -> str:
        """How its gates were trained."""
        gates = self.config.gates
        return f"{gates.mode}, then fixed" if gates.get("static") else gates.mode

    @property
    def budget(self) -> str:
        """The requested MACs reduction, or the range of it; empty if r was set directly."""
        gates = self.config.gates
        asked = gates.get("budgets") or ([] if gates.budget is None else [gates.budget])
        return " to ".join(f"{budget:.2f}" for budget in asked)

    @property
    def budgets(self) -> list[Row]:
        """The figures of the gated network at other budgets, a row for each."""
        return [row for row in self.curve.get("rows", []) if _has(row, CURVE_FIGURES[0])]

    @property
    def corruptions(self) -> list[Row]:
        """The figures of both networks on corrupted images, a row for each corruption and severity."""
        return self.sweep.get("rows", [])

    @property
    def units(self) -> tuple[str, ...]:
        """The names of its gated units."""
        return tuple(self.evaluation["units"]) if self.gated else ()


def read_runs(folders: Sequence[str]) -> list[RecordedRun]:
    """Reads workdirs; one that is named twice is read once.

    Raises:
      UserError: a folder is not a workdir, was not evaluated, or holds a file that cannot be read.
    """
    paths = list(dict.fromkeys(map(_place, folders)))
    return [
        _read(number, name, path)
        for number, (name, path) in enumerate(zip(_shorten(paths), paths, strict=True), start=1)
    ]


def _place(folder: str) -> AnyPath:
    path = workdir.absolute(folder)
    return pathlib.Path(os.path.normpath(path)) if isinstance(path, pathlib.Path) else path


def _read(number: int, name: str, path: AnyPath) -> RecordedRun:
    _, config = workdir.load(str(path))
    if not (path / EVALUATION).exists():
        raise UserError(f"{path} holds no evaluation; run `python -m ftwt_jax evaluate --workdir={path}` first")
    return RecordedRun(
        number=number,
        name=name,
        path=path,
        config=config,
        evaluation=_read_evaluation(path),
        curve=_read_table(path / BUDGETS, CURVE_FIGURES, "evaluate --budgets=0.3,0.5,0.7"),
        sweep=_read_table(path / CORRUPTIONS, CORRUPTION_FIGURES, "evaluate --corruptions"),
        timing=_read_timing(path / BENCHMARK),
        metrics=read_metrics(path / METRICS),
        environments=recorded_environments(path),
    )


def _shorten(paths: Sequence[AnyPath]) -> list[str]:
    """The last part of each path, or as many parts as make them unique; invisible characters are escaped."""
    depth = 1
    longest = max(len(path.parts) for path in paths)
    while depth < longest and len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [printable("/".join(path.parts[-depth:])) for path in paths]


def _read_evaluation(folder: AnyPath) -> Row:
    path = folder / EVALUATION
    found = workdir.read_json(path, "evaluation")
    missing = [name for name in FIGURES if not is_number(_get(found, name))]
    missing += [name for name in GATE_FIGURES if not (_get(found, name, "") is None or is_number(_get(found, name)))]
    units, density = _get(found, "units"), _get(found, "density")
    lists = isinstance(units, list) and isinstance(density, list) and len(units) == len(density)
    if not (lists and all(isinstance(unit, str) for unit in units) and all(map(is_number, density))):
        missing.append("units and density")
    if not _are_classes(found):
        missing.append("figures of the same classes")
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}, perhaps because an older version wrote it; run "
            f"`python -m ftwt_jax evaluate --workdir={folder}` again"
        )
    return found


def _are_classes(found: Any) -> bool:
    """Whether the figures of classes, which older versions do not write, are as many everywhere."""
    if _get(found, "class_accuracy") is None:
        return True
    accuracies = [_get(found, name) for name in ("class_accuracy", "dense_class_accuracy")]
    if not all(isinstance(row, list) and all(x is None or is_number(x) for x in row) for row in accuracies):
        return False
    number, matrix = len(accuracies[0]), _get(found, "confusion") or []
    if not (isinstance(matrix, list) and all(isinstance(row, list) and all(map(is_number, row)) for row in matrix)):
        return False
    rows = [accuracies[1], _get(found, "class_names") or accuracies[0], matrix or accuracies[0], *matrix]
    return all(isinstance(row, list) and len(row) == number for row in rows)


def _read_timing(path: AnyPath) -> Row:
    if not path.exists():
        return {}
    found = workdir.read_json(path, "times")
    missing = [name for name in TIMES if not is_number(_get(found, name))]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: write it again with `benchmark`, or delete it")
    return found


def _read_table(path: AnyPath, figures: Sequence[Sequence[str]], command: str) -> Row:
    if not path.exists():
        return {}
    found = workdir.read_json(path, "table")
    rows = _get(found, "rows")
    if not (isinstance(rows, list) and all(any(_has(row, group) for group in figures) for row in rows)):
        raise UserError(
            f"{path} must hold rows with the numbers {', '.join(figures[0])}; write it again with "
            f"`{command}`, or delete it"
        )
    return found


def _has(entry: Any, figures: Sequence[str]) -> bool:
    return all(is_number(_get(entry, name)) for name in figures)


def _get(entry: Any, name: str, default: Any = None) -> Any:
    return entry.get(name, default) if isinstance(entry, dict) else default


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_metrics(path: AnyPath) -> tuple[Row, ...]:
    """The complete lines of `metrics.jsonl`; a killed run may leave an incomplete one."""
    if not path.exists():
        return ()
    rows = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(_get(entry, "stage"), str) and is_number(_get(entry, "step")):
            rows.append(entry)
    return tuple(rows)


def check_unit(runs: Sequence[RecordedRun], unit: str | None) -> None:
    """Raises `UserError` if none of the gated networks has this unit."""
    known = list(dict.fromkeys(name for run in runs for name in run.units))
    if unit is not None and unit not in known:
        raise unknown_name("unit", unit, known)
