"""What workdirs tell of their runs: config, figures, and what was written on the way. No network is run here."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from ftwt_jax import workdir
from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.workdir import BUDGETS, CORRUPTIONS, EVALUATION, METRICS
from ftwt_jax.workdir.environment import Environment, recorded_environments

Row = dict[str, Any]
# Fields that must be numbers, and those that are null where there is no gated network.
FIGURES = ("accuracy", "dense_accuracy", "macs_reduction", "macs_reduction_published", "samples")
GATE_FIGURES = ("gate_accuracy", "static_gate_accuracy", "dynamic_filters")
CURVE_FIGURES = ("accuracy", "macs_reduction")
CORRUPTION_FIGURES = ("severity", "dense_accuracy")


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """A run as its workdir has it.

    Attributes:
      number: its place among those reported, from 1.
      name: the end of its path, as long as it takes to tell it from the others.
      evaluation: `evaluation.json`; reductions and accuracies are fractions.
      curve: `budgets.json`; empty where there is none.
      sweep: `corruptions.json`; empty where there is none.
      metrics: the lines of `metrics.jsonl`; empty for a network that was not trained here.
      environments: what it was trained on, first to last; empty where that was not recorded.
    """

    number: int
    name: str
    path: pathlib.Path
    config: ConfigDict
    evaluation: Row
    curve: Row
    sweep: Row
    metrics: tuple[Row, ...]
    environments: Sequence[Environment]

    @property
    def label(self) -> str:
        """What plots call it."""
        return f"{self.number} {self.name}"

    @property
    def gated(self) -> bool:
        """Whether its figures are of a gated network."""
        return self.evaluation["gate_accuracy"] is not None

    @property
    def mode(self) -> str:
        """How its gates were trained."""
        gates = self.config.gates
        return f"{gates.mode}, then fixed" if gates.get("static") else gates.mode

    @property
    def budget(self) -> str:
        """The MACs reduction that was asked for, or the range of them; empty if r was given."""
        gates = self.config.gates
        asked = gates.get("budgets") or ([] if gates.budget is None else [gates.budget])
        return " to ".join(f"{budget:.2f}" for budget in asked)

    @property
    def budgets(self) -> list[Row]:
        """The network at other budgets."""
        return self.curve.get("rows", [])

    @property
    def corruptions(self) -> list[Row]:
        """Both networks on corrupted images."""
        return self.sweep.get("rows", [])

    @property
    def units(self) -> tuple[str, ...]:
        """The names of its gated units."""
        return tuple(self.evaluation["units"]) if self.gated else ()


def read_runs(folders: Sequence[str]) -> list[RecordedRun]:
    """Reads workdirs, each once.

    Raises:
      UserError: a folder is no workdir, was not evaluated yet, or holds a file that is broken.
    """
    paths = list(dict.fromkeys(pathlib.Path(os.path.normpath(workdir.absolute(folder))) for folder in folders))
    return [
        _read(number, name, path) for number, (name, path) in enumerate(zip(_names(paths), paths, strict=True), start=1)
    ]


def _read(number: int, name: str, path: pathlib.Path) -> RecordedRun:
    _, config = workdir.load(str(path))
    if not (path / EVALUATION).exists():
        raise UserError(
            f"no evaluation in {path}: run `python -m ftwt_jax evaluate --workdir={path}` first, which writes it"
        )
    return RecordedRun(
        number=number,
        name=name,
        path=path,
        config=config,
        evaluation=_evaluation(path),
        curve=_table(path / BUDGETS, CURVE_FIGURES, "evaluate --budgets=0.3,0.5,0.7"),
        sweep=_table(path / CORRUPTIONS, CORRUPTION_FIGURES, "evaluate --corruptions"),
        metrics=read_metrics(path / METRICS),
        environments=recorded_environments(path),
    )


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The last part of each path, or as many more as it takes to tell them apart; signs that nobody sees are spelt."""
    depth = 1
    longest = max(len(path.parts) for path in paths)
    while depth < longest and len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [printable("/".join(path.parts[-depth:])) for path in paths]


def printable(text: str) -> str:
    """The text with signs that cannot be shown, nor stand in a page, spelt out."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


def _evaluation(folder: pathlib.Path) -> Row:
    path = folder / EVALUATION
    found = workdir.read_json(path, "evaluation")
    missing = [name for name in FIGURES if not is_number(_get(found, name))]
    missing += [name for name in GATE_FIGURES if not (_get(found, name, "") is None or is_number(_get(found, name)))]
    units, density = _get(found, "units"), _get(found, "density")
    lists = isinstance(units, list) and isinstance(density, list) and len(units) == len(density)
    if not (lists and all(isinstance(unit, str) for unit in units) and all(map(is_number, density))):
        missing.append("units and density")
    if missing:
        raise UserError(
            f"{path} is no evaluation, or an old one: it lacks {', '.join(missing)}; run "
            f"`python -m ftwt_jax evaluate --workdir={folder}` again"
        )
    return found


def _table(path: pathlib.Path, figures: Sequence[str], command: str) -> Row:
    if not path.exists():
        return {}
    found = workdir.read_json(path, "table")
    rows = _get(found, "rows")
    if not (isinstance(rows, list) and all(is_number(_get(row, name)) for row in rows for name in figures)):
        raise UserError(
            f"{path} must hold rows with the numbers {', '.join(figures)}: make it again by `{command}`, or delete it"
        )
    return found


def _get(entry: Any, name: str, default: Any = None) -> Any:
    return entry.get(name, default) if isinstance(entry, dict) else default


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_metrics(path: pathlib.Path) -> tuple[Row, ...]:
    """The lines of `metrics.jsonl` that are whole; the last one of a killed run may be cut off."""
    if not path.exists():
        return ()
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(_get(entry, "stage"), str) and is_number(_get(entry, "step")):
            rows.append(entry)
    return tuple(rows)


def check_unit(runs: Sequence[RecordedRun], unit: str | None) -> None:
    """Raises `UserError` for a unit that none of the gated networks has."""
    known = list(dict.fromkeys(name for run in runs for name in run.units))
    if unit is not None and unit not in known:
        raise unknown_name("unit", unit, known)
