"""Installed packages: what some of them need, and a Python that has no others."""

import importlib.metadata
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT


def requirements() -> list[Requirement]:
    """The lines of requirements.txt."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def with_needs(asked: Iterable[Requirement]) -> set[str]:
    """Names of these packages, and of those that these ask for."""
    pending, found = list(asked), set()
    seen = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        wanted = (name, frozenset(requirement.extras))
        if wanted in seen:
            continue
        seen.add(wanted)
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            extras = ["", *requirement.extras]
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                pending.append(needed)
    return found


def files_of(name: str) -> dict[str, pathlib.Path]:
    """The files of an installed package below site-packages, by their names there."""
    paths = importlib.metadata.distribution(name).files or []
    kept = [path for path in paths if path.parts[0] != ".." and "__pycache__" not in path.parts]
    return {path.as_posix(): pathlib.Path(str(path.locate())) for path in kept}


def python_with(names: Iterable[str], folder: pathlib.Path) -> pathlib.Path:
    """An environment in `folder` that has these packages of this one and no others; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in names:
        for file, path in files_of(name).items():
            # A folder that several packages share, such as `google`, comes whole.
            top, *inner = file.split("/")
            if not (site / top).exists():
                (site / top).symlink_to(path.parents[len(inner) - 1] if inner else path)
    return folder / "bin" / "python"


def wheel_of(name: str, folder: pathlib.Path) -> None:
    """Packs an installed package of Python files alone as the wheel that it came from."""
    version = importlib.metadata.version(name)
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
        for file, path in files_of(name).items():
            if not file.endswith((".dist-info/INSTALLER", ".dist-info/REQUESTED", ".dist-info/RECORD")):
                wheel.write(path, file)
        names = wheel.namelist()
        (metadata,) = [file for file in names if file.endswith(".dist-info/METADATA")]
        record = metadata.replace("METADATA", "RECORD")
        wheel.writestr(record, "".join(f"{file},,\n" for file in [*names, record]))
