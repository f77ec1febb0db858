"""The folder of a run: its config, the names of its files, and JSON that is written whole or not at all."""

import json
import os
import pathlib
import re
from typing import Any

import ml_collections

from ftwt_jax.config import updated
from ftwt_jax.errors import UserError, one_line, os_reason, printable, storage_errors
from ftwt_jax.files import AnyPath, is_utf8, written_whole
from ftwt_jax.parallel.processes import barrier, is_first
from ftwt_jax.workdir.bucket import SCHEME, open_bucket

# Orbax and TFDS would otherwise open buckets with TensorFlow where it is installed. They look once, at first use.
os.environ.setdefault("EPATH_USE_TF", "false")

# What a workdir holds besides its checkpoints.
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
ESTIMATE, ESTIMATE_PLOT = "estimate.json", "estimate.png"
EVALUATION = "evaluation.json"
BUDGETS = "budgets.json"
CORRUPTIONS = "corruptions.json"
# Offsets of the budgets that training draws from, measured when the heads froze.
OFFSETS = "offsets.json"
SUBNETS = "subnets.safetensors"
BENCHMARK = "benchmark.json"
PLAN = "plan.json"
REPORT = "report"


def write_json(path: AnyPath, data: Any) -> None:
    """Writes `data` as JSON, from the first process alone; a reader sees the old file or the new one, never a part."""
    if not is_first():
        return
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def read_json(path: AnyPath, what: str) -> Any:
    """Reads JSON; raises `UserError`, naming the file, if it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: it would hold the {what}") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} in {path}: {os_reason(error)}") from None
    except ValueError as error:
        raise UserError(
            f"cannot read the {what} in {path}: it is damaged ({one_line(error)}); restore the file or write it again"
        ) from None


def as_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as plain JSON data (tuples become lists)."""
    return json.loads(config.to_json())


def differing_fields(old: Any, new: Any, prefix: str = "config") -> list[str]:
    """Where two configs differ, as "config.gates.r: 0.8 -> 0.9" with the first one's value before the arrow."""
    if isinstance(old, dict) and isinstance(new, dict):
        missing = object()
        found = []
        for key in sorted({*old, *new}):
            a, b = old.get(key, missing), new.get(key, missing)
            if a is missing or b is missing:
                state = "only in this run" if a is missing else "only in the folder"
                found.append(f"{prefix}.{key} is {state}")
            else:
                found += differing_fields(a, b, f"{prefix}.{key}")
        return found
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]


def absolute(folder: str) -> AnyPath:
    """The folder that a flag names, whatever the current directory is later; raises `UserError` if it names none."""
    if folder.startswith(SCHEME):
        return open_bucket(folder)
    if near := re.match(r"gs:/*", folder, re.IGNORECASE):
        raise UserError(f"{folder} is not a folder; for a bucket, write {SCHEME}{folder[near.end() :] or 'BUCKET/run'}")
    if "://" in folder:
        raise UserError(
            f"{folder} is neither a folder nor in a bucket of Google Cloud, {SCHEME}BUCKET/run: mount the storage, and "
            "name the folder where it is mounted"
        )
    try:
        return pathlib.Path(folder).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"{folder} is not a folder: {one_line(error)}") from None


def make(path: AnyPath) -> None:
    """Makes the folder, if it is missing; raises `UserError` if it cannot be made, or not be searched."""
    if not is_utf8(str(path)):  # Only TensorStore would notice, with a traceback.
        raise UserError(f"the name of the workdir {printable(str(path))} is not UTF-8: choose another --workdir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG).exists()
    except storage_errors() as error:
        raise UserError(f"cannot write to the workdir {path}: {os_reason(error)}; choose another --workdir") from None


def prepare(path: AnyPath, config: ml_collections.ConfigDict) -> None:
    """Makes the folder and writes `config.json`, or checks that the folder's own is the same config.

    The first process writes; all processes must see the same folder.

    Raises:
      UserError: the folder cannot be written, or was started with another config; the message names the fields.
    """
    wanted = as_dict(config)
    if is_first():
        make(path)
        if not (path / CONFIG).exists():
            write_json(path / CONFIG, wanted)
    barrier("workdir made")
    if not (path / CONFIG).exists():
        raise UserError(
            f"the first process made {path}, but this process cannot see it: put --workdir on a file system that all "
            "hosts share"
        )
    found = differing_fields(_kept(path), wanted)
    if found:
        raise UserError(
            f"{path} holds a run with another config: {'; '.join(found)} (folder -> this run); "
            "choose another --workdir, or use the folder's values"
        )


def load(folder: str) -> tuple[AnyPath, ml_collections.ConfigDict]:
    """The folder of an earlier run and its config; raises `UserError` if it holds none."""
    path = absolute(folder)
    if not path.is_dir():
        raise UserError(f"there is no workdir {path}: train there first, `ftwt train --config=... --workdir={folder}`")
    return path, ml_collections.ConfigDict(_kept(path))


def _kept(path: AnyPath) -> dict[str, Any]:
    """The config of a folder."""
    if not (path / CONFIG).exists():
        raise UserError(f"{path} holds no run: train there first, `ftwt train --config=... --workdir={path}`")
    config = read_json(path / CONFIG, "config")
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG} does not hold a config")
    return updated(config)
