"""What `python -m build` makes: a wheel that trains from any folder, and an sdist that a wheel can be built from."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from tests.conftest import ROOT, TINY, Program

pytestmark = pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs the package `build`")

# Folders of the repository whose files are no part of what is installed.
ELSEWHERE = ("tests/", "studies/", "results/", "docs/", "mkdocs.yml", ".")


def run(*command, cwd: pathlib.Path = ROOT, env: dict[str, str] | None = None) -> str:
    # Without PYTHONPATH: nothing here may find the repository itself.
    settings = {key: value for key, value in (env or os.environ).items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """The repository's files, those that are new and not ignored included."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def packages(sources, tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """The wheel and the sdist, the wheel built from the sdist, as by `python -m build` in a fresh clone."""
    folder = tmp_path_factory.mktemp("package")
    clone, made = folder / "clone", folder / "dist"
    for name in sources:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    run(sys.executable, "-m", "build", "--no-isolation", f"--outdir={made}", clone, cwd=folder)
    (wheel,), (sdist,) = made.glob("*.whl"), made.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_every_file_of_the_package_and_the_configs(packages, sources):
    with zipfile.ZipFile(packages[0]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {name for name in sources if name.startswith("ftwt_jax/")}
    configs = {f"ftwt_jax/{name}" for name in sources if name.startswith("configs/")}
    assert held == package | configs
    for name in (
        "inference/native/gated_unit.cc",
        "ops/native/vectors.h",
        "ops/native/weight_gradient.cc",
        "report/page.html",
        "configs/digits.py",
    ):
        assert f"ftwt_jax/{name}" in held


def test_the_sdist_holds_what_building_and_starting_need(packages, sources):
    with tarfile.open(packages[1]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name for name in sources if not name.startswith(ELSEWHERE)} <= held
    assert {"launch/local.sh", "requirements.txt", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= held


@pytest.fixture(scope="module")
def installed(packages, program, tmp_path_factory) -> Program:
    """The wheel alone in an environment of its own, which borrows from this one what the wheel requires."""
    folder = tmp_path_factory.mktemp("installed")
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index", packages[0])
    (site,) = environment.glob("lib/python*/site-packages")
    # Lines of this file are searched after the environment's own packages; an editable install there is not followed.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    caches = {"XDG_CACHE_HOME": str(folder / "cache"), "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    return dataclasses.replace(program, cwd=folder, environment=program.environment | caches)


def call(installed: Program, *command) -> str:
    return run(*command, cwd=installed.cwd, env=installed.environment)


def test_the_wheel_trains_by_the_name_of_a_config_from_another_folder(installed):
    place = call(installed, "python", "-c", "import ftwt_jax; print(ftwt_jax.__file__)").strip()
    assert pathlib.Path(place).is_relative_to(installed.cwd)
    printed = call(installed, "ftwt", "--help")
    assert "train" in printed
    call(installed, "ftwt", "train", "--config=digits", *TINY[1:], "--workdir=run")
    assert json.loads((installed.cwd / "run" / "evaluation.json").read_text())["samples"] == 450


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("package", ["inference", "ops"])
def test_the_kernels_of_the_wheel_build(installed, package):
    script = f"from ftwt_jax.{package} import native; print(native.available())"
    assert call(installed, "python", "-c", script) == "True\n"
    assert [*(installed.cwd / "cache").rglob(f"{package}-*.so")]
