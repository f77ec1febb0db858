"""The software and hardware that a process runs on, and the record of those that a run was trained on."""

import importlib.metadata
import pathlib
import platform
import subprocess

import jax

from ftwt_jax.config import REPOSITORY
from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath
from ftwt_jax.parallel.processes import cpu_count
from ftwt_jax.version import __version__
from ftwt_jax.workdir import ENVIRONMENT, read_json, write_json

Environment = dict[str, str]


def environment() -> Environment:
    """Versions, devices and processor of this process."""
    devices = jax.devices()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    commit = _commit()
    return {
        "Python": platform.python_version(),
        **versions,
        "ftwt_jax": __version__,
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processor": f"{_processor()}, {cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        **({"git commit": commit} if commit else {}),
    }


def record_environment(folder: AnyPath) -> None:
    """Appends the environment of this process to the workdir's list, unless it equals the last entry."""
    found, here = recorded_environments(folder), environment()
    if found[-1:] != [here]:
        write_json(folder / ENVIRONMENT, [*found, here])


def recorded_environments(folder: AnyPath) -> list[Environment]:
    """The environments that a run was trained in, in order; empty if they were not recorded.

    Raises:
      UserError: the file cannot be read, or does not hold such a list.
    """
    path = folder / ENVIRONMENT
    if not path.exists():
        return []
    found = read_json(path, "list of environments")
    if not (isinstance(found, list) and all(isinstance(entry, dict) for entry in found)):
        raise UserError(f"{path} does not hold a list of environments; delete it, and training writes it again")
    return found


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of a git checkout, and whether files have changed since; None outside of one."""
    if not (REPOSITORY / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}, with uncommitted changes" if changed else commit
