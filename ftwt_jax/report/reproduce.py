"""The commands that reproduce a run and its figures."""

import os
import shlex
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from ftwt_jax import config as configs
from ftwt_jax.data.corruptions import APPLIED
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath, is_utf8
from ftwt_jax.report.runs import RecordedRun
from ftwt_jax.workdir import as_dict

PROGRAM = ("python", "-m", "ftwt_jax")


def train_command(run: RecordedRun) -> str | None:
    """The shortest `train` command whose flags give exactly the run's config; None if flags cannot give it.

    A run does not record its config file, so all files are tried; each candidate is parsed and compared.
    """
    found = [flags for base in _list_bases(run.config.model.name) if (flags := _find_flags(base, run)) is not None]
    if not found:
        return None
    return in_lines([*PROGRAM, "train", *min(found, key=len), f"--workdir={run.path}"])


def _list_bases(arch: str) -> list[str]:
    files = sorted(path.name for path in configs.config_folder().glob("*.py"))
    return [f"--config=configs/{file}{end}" for file in files for end in ("", f":{arch}")]


def _find_flags(base: str, run: RecordedRun) -> list[str] | None:
    """`base`, and a flag for each field in which the run differs from it; None if flags cannot express that."""
    wanted = as_dict(run.config)
    try:
        usual = flatten_dict(_config([base]))
        changed = [(path, value) for path, value in flatten_dict(wanted).items() if usual.get(path, path) != value]
        flags = [base, *(f"--config.{'.'.join(path)}={_text(value)}" for path, value in changed)]
        return flags if _config(flags) == wanted else None
    except UserError:
        return None


def _config(flags: list[str]) -> dict[str, Any]:
    return as_dict(configs.read(flags))


def _text(value: Any) -> str:
    return repr(tuple(value)) if isinstance(value, list) else str(value)


def evaluate_commands(run: RecordedRun) -> list[str]:
    """The commands that wrote the figures in a workdir."""
    start = [*PROGRAM, "evaluate", f"--workdir={run.path}"]

    def best(table: dict[str, Any]) -> list[str]:
        return ["--best"] if table.get("checkpoint") == "best" else []

    commands = [[*start, *best(run.evaluation)]]
    if run.curve.get("rows"):
        budgets = ",".join(f"{row.get('budget', row.get('macs_reduction')):g}" for row in run.curve["rows"])
        commands.append([*start, *best(run.curve), f"--budgets={budgets}"])
    if run.corruptions:
        source = run.sweep.get("source", APPLIED)
        from_source = [] if source == APPLIED else [f"--corruptions_from={source}"]
        commands.append([*start, *best(run.sweep), "--corruptions", *from_source])
    return [in_lines(command) for command in commands]


def report_command(runs: Sequence[RecordedRun], out: AnyPath, unit: str | None) -> str:
    """The command that wrote this page."""
    chosen = [] if unit is None else [f"--unit={unit}"]
    return in_lines([*PROGRAM, "report", *(str(run.path) for run in runs), f"--out={out}", *chosen])


def in_lines(command: Sequence[str]) -> str:
    """A shell command with one argument per line after its name."""
    head, rest = shlex.join(command[:4]), [_quoted(argument) for argument in command[4:]]
    return " \\\n    ".join([head, *rest])


def _quoted(argument: str) -> str:
    """An argument for a shell; bytes that are not UTF-8 as in $'caf\\xe9'."""
    if is_utf8(argument):
        return shlex.quote(argument)
    escaped = argument.replace("\\", r"\\").replace("'", r"\'")
    return f"$'{os.fsencode(escaped).decode(errors='backslashreplace')}'"
