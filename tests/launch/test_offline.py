"""A machine without a network: a bundle, the set-up from it, and results/gpu.sh there, with little of everything."""

import collections
import gzip
import importlib.metadata
import json
import os
import pathlib
import struct
import subprocess
import tarfile

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT, SLOW_FIXTURE
from tests.helpers.packages import python_with, requirements, wheel_of, with_needs
from tests.launch.test_bundle import bundle

pytestmark = pytest.mark.long

# In the bundle; the machine has all else that a run needs.
CARRIED = "ml_collections"
# Whoever asks for anything gets no answer.
NO_NETWORK = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "http_proxy": "http://localhost:9"}
NO_NETWORK |= {"https_proxy": "http://localhost:9", "all_proxy": "http://localhost:9"}
PARTS = ("digits", "tests", "fashion", "training", "inference")


def few_images(folder: pathlib.Path) -> pathlib.Path:
    """A Fashion-MNIST of few images, in the format of its four files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 256), ("t10k", 64)):
        labels = np.arange(count) % 10
        arrays = {"images-idx3": rng.integers(0, 256, (count, 28, 28)), "labels-idx1": labels}
        for kind, values in arrays.items():
            header = struct.pack(f">HBB{values.ndim}i", 0, 8, values.ndim, *values.shape)
            content = header + values.astype(np.uint8).tobytes()
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    return folder


@pytest.fixture(scope="module")
def machine(program, tmp_path_factory) -> tuple[pathlib.Path, dict[str, str]]:
    """A folder with the bundle and the sources from it, and the settings of a shell there.

    The Python there has what a run needs and not one package more, but for the one that the bundle carries.
    """
    folder = tmp_path_factory.mktemp("machine")
    needed = [one for one in requirements() if canonicalize_name(one.name) not in bundle.OPTIONAL]
    needed += [Requirement(text) for text in ("pip", *bundle.BESIDES)]
    names = with_needs(needed) - {canonicalize_name(CARRIED)}
    python = python_with(names, folder / "python")
    (folder / "installed.txt").write_text("".join(f"{name}=={importlib.metadata.version(name)}\n" for name in names))
    wheel_of(CARRIED, folder)
    command = [
        ROOT / "launch" / "bundle.sh",
        f"--installed={folder / 'installed.txt'}",
        f"--data={few_images(folder / 'data')}",
        folder / "bundle",
    ]
    settings = {key: value for key, value in program.environment.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    settings |= NO_NETWORK | {"PYTHON": str(python)}
    making = settings | {"PIP_FIND_LINKS": str(folder)}
    done = subprocess.run(command, env=making, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"MB, with 1 wheels for Python {python_version(python)}")
    with tarfile.open(folder / "bundle" / "ftwt_jax.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    settings.pop("PIP_FIND_LINKS", None)
    return folder, settings


def python_version(python: pathlib.Path) -> str:
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def call(machine, *command: str, status: int = 0) -> tuple[str, str]:
    folder, settings = machine
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=900)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module", params=SLOW_FIXTURE)
def figures(machine) -> pathlib.Path:
    """The folder of figures that the whole script has written."""
    call(machine, "ftwt_jax/results/gpu.sh", "--offline=bundle", "--tiny")
    return machine[0] / "ftwt_jax" / "results" / "gpu"


def lines(figures: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (figures / "figures.jsonl").read_text().splitlines()]


def test_the_bundle_alone_sets_up_the_environment(figures, machine):
    code = f"import {CARRIED}; print({CARRIED}.__file__)"
    out, _ = call(machine, "ftwt_jax/.venv/bin/python", "-c", code)
    assert out.startswith(str(machine[0] / "ftwt_jax" / ".venv"))


def test_every_part_writes_its_figures(figures):
    found = collections.Counter(line["part"] for line in lines(figures))
    assert found == {"run": 3, "tests": 1, "training": 2, "inference": 2}
    by_name = {line["name"]: line for line in lines(figures)}
    assert 0 < by_name["digits"]["evaluation"]["macs_reduction"] < 1
    assert by_name["digits"]["gated"]["steps"] == by_name["digits"]["baseline"]["steps"] == 22
    assert by_name["fashion_vgg_bn_dense"]["baseline"]["images_per_second"] > 0
    assert by_name["fashion_vgg_bn_gated"]["gated"]["images_per_second"] > 0
    assert by_name["device"]["passed"] == by_name["device"]["tests"] > 10
    feeds = by_name["resnet8 at 32x32, images from the host and from the device"]
    assert all(feeds[f"train_{way}_images_per_second"] > 0 for way in ("host", "device"))
    step = by_name["resnet8 at 32x32, float32"]
    assert all(rate > 0 for rate in step["images_per_second"].values())
    assert step["parameters"]["plain Flax"] == step["parameters"]["dense"] < step["parameters"]["gated"]
    assert step["ranking_share"] < 1
    times = [line for line in lines(figures) if line["part"] == "inference"]
    assert all(line[f"{kind}_ms"] > 0 for line in times for kind in ("dense", "masked", "compact"))


def test_few_files_hold_all_of_it(figures):
    assert {path.name for path in figures.iterdir()} == {"figures.jsonl", "local.log", "tests.log"}


def test_what_is_there_is_not_measured_again(figures, machine):
    before = (figures / "figures.jsonl").read_text()
    out, _ = call(machine, "ftwt_jax/results/gpu.sh", "--offline=bundle", "--tiny", "digits", "tests", "inference")
    assert out.count("is there already") >= 4
    assert (figures / "figures.jsonl").read_text() == before


def test_without_tensorboard_a_run_says_so_once_and_keeps_its_metrics(figures, machine):
    runs = machine[0] / "ftwt_jax" / "workdirs" / "gpu"
    log = (figures / "local.log").read_text()
    assert log.count("tensorboardX is not installed") == 3  # Three runs.
    assert (runs / "digits" / "metrics.jsonl").exists()
    assert not list(runs.glob("*/events.*"))


@pytest.mark.parametrize(
    ("arguments", "package"),
    [(["report", "ftwt_jax/workdirs/gpu/digits"], "matplotlib"), (["estimate", "--workdir=x"], "matplotlib")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_needs_more_names_it_in_one_line(figures, machine, arguments, package):
    _, error = call(machine, "ftwt_jax/.venv/bin/ftwt", *arguments, status=2)
    assert f"needs the package {package}" in error
    assert error.count("\n") == 1


def test_local_is_set_up_by_then(figures, machine):
    """Neither a bundle nor a network is asked for a second time."""
    _, error = call(machine, "ftwt_jax/launch/local.sh", "--config.seeed=1", status=2)
    assert "installing" not in error
    assert "did you mean 'seed'" in error


@pytest.mark.parametrize("argument", ["--offline", "--offline=", "--offline=nowhere", "--offline=ftwt_jax"])
def test_what_is_not_a_bundle_is_refused_in_one_line(machine, argument):
    _, error = call(machine, "ftwt_jax/launch/local.sh", argument, status=2)
    assert "launch/bundle.sh" in error
    assert error.count("\n") == 1


def test_a_bundle_for_another_python_is_refused_in_one_line(machine, tmp_path):
    (tmp_path / "bundle.txt").write_text("python=3.99\n")
    with tarfile.open(machine[0] / "bundle" / "ftwt_jax.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    _, error = call(machine, str(tmp_path / "ftwt_jax/launch/local.sh"), f"--offline={tmp_path}", status=2)
    assert "no Python 3.99 with JAX" in error
    assert error.count("\n") == 1


def test_an_unknown_part_is_refused_in_one_line(machine):
    _, error = call(machine, "ftwt_jax/results/gpu.sh", "trainings", status=2)
    assert all(part in error for part in PARTS)
    assert error.count("\n") == 1
