"""The folder of a run: its config, its checkpoints, its results."""

import json
import pathlib
from typing import Any

import ml_collections

from ftwt_jax.errors import UserError, os_reason
from ftwt_jax.files import written_whole
from ftwt_jax.parallel.processes import barrier, is_first

CONFIG = "config.json"
# Fields that folders may be older than, and what they meant before.
_GATES = {"calibrate": False, "static": False, "budgets": None, "norm": "softmax", "depthwise": "full"}
NEWER = {"accumulate": 1, "shard_optimizer": False, "gates": _GATES}


def write_json(path: pathlib.Path, data: Any) -> None:
    """Writes `data` as JSON so that a reader sees the old file or the new one, never half of one.

    Of several processes the first one does.
    """
    if not is_first():
        return
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def read_json(path: pathlib.Path, what: str) -> Any:
    """Reads JSON; raises `UserError` naming the file if it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what} at {path} cannot be read: {os_reason(error)}") from None


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
                found.append(f"{prefix}.{key}: {state}")
            else:
                found += differing_fields(a, b, f"{prefix}.{key}")
        return found
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]


def absolute(folder: str) -> pathlib.Path:
    """The folder that a flag names, whatever the current directory is later."""
    try:
        return pathlib.Path(folder).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"{folder} is no folder: {error}") from None


def prepare(path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes the folder and writes `config.json`, or checks that the one there is of the same config.

    The first process does so; all of them have to see the same folder.

    Raises:
      UserError: the folder cannot be written, or was started with another config; the message names the fields.
    """
    wanted = as_dict(config)
    if is_first():
        try:
            path.mkdir(parents=True, exist_ok=True)
            exists = (path / CONFIG).exists()
        except OSError as error:
            reason = os_reason(error)
            raise UserError(f"cannot write to the workdir {path}: {reason}; choose another with --workdir") from None
        if not exists:
            write_json(path / CONFIG, wanted)
    barrier("workdir made")
    if not (path / CONFIG).exists():
        raise UserError(
            f"the first process has made {path}, and this one does not see it: --workdir must be a folder on a file "
            "system that all hosts share"
        )
    found = differing_fields(_kept(path), wanted)
    if found:
        raise UserError(
            f"{path} was started with another config: {'; '.join(found)} (folder -> this run); "
            "choose another --workdir, or use the folder's values"
        )


def load(folder: str) -> tuple[pathlib.Path, ml_collections.ConfigDict]:
    """The folder of an earlier run and its config; raises `UserError` if it is none."""
    path = absolute(folder)
    if not path.is_dir():
        raise UserError(f"no such workdir: {path}; run `train --workdir={folder}` first")
    return path, ml_collections.ConfigDict(_kept(path))


def _kept(path: pathlib.Path) -> dict[str, Any]:
    """The config of a folder."""
    config = read_json(path / CONFIG, "run's config")
    if not isinstance(config, dict):
        raise UserError(f"run's config at {path / CONFIG} is not a config")
    return _filled(config, NEWER)


def _filled(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The config with what it lacks, section by section."""
    sections = {
        key: _filled(config[key], value) for key, value in defaults.items() if isinstance(config.get(key), dict)
    }
    return {**defaults, **config, **sections}
