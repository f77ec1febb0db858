"""What several test files need: the slow flag, the real program run as a process, and compact networks."""

import dataclasses
import fcntl
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

# Commands that a test runs in its own process keep nothing in the user's cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
# GPUs multiply float32 matrices in TF32 by default, which is too coarse for what is compared here.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

# With libtpu, which [plan] installs, JAX looks for a TPU, and on some virtual machines prints lines of what it misses.
if importlib.util.find_spec("libtpu") is not None and not pathlib.Path("/dev/accel0").exists():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import ftwt_jax as ftwt
from ftwt_jax import config as configs
from ftwt_jax.__main__ import main
from ftwt_jax.inference import native
from ftwt_jax.inference.compact import CompactNetwork

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A network and a schedule that train in seconds: 22 steps of baseline, 22 of gates.
TINY = (
    "--config=configs/digits.py",
    "--config.model.plan=(8,'M',16)",
    "--config.batch_size=128",
    "--config.log_every=2",
    "--config.checkpoint_every=4",
    "--config.baseline.epochs=2",
    "--config.gates.epochs=2",
)
TINY_STEPS = 22
# The same, then as many steps of three subnets.
TINY_SUBNETS = (*TINY, "--config.subnets.count=3", "--config.subnets.multiple=1", "--config.gates.budget=0.3")
# What a fixture takes as its `params`, so that the tests that use it are those that take minutes.
SLOW_FIXTURE = [pytest.param("", marks=pytest.mark.slow)]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [plan]")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    # Files are handed out whole, so that what a file prepares is prepared once; the longest first, to end together.
    items.sort(key=lambda item: "long" not in item.keywords)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: give --slow"))


@dataclasses.dataclass
class Program:
    """Runs `python -m ftwt_jax` as a user would, from a folder that is not the repository."""

    cwd: pathlib.Path
    environment: dict[str, str]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "ftwt_jax", *map(str, arguments)]

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen(self.command(*arguments), cwd=self.cwd, env=self.environment, **streams)

    def run(self, *arguments: str, status: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=600)
        assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
        return out if status == 0 else err


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> pathlib.Path:
    """A folder that all workers see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def program(shared, tmp_path_factory) -> Program:
    folder = tmp_path_factory.mktemp("somewhere")
    settings = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "COLUMNS": "120",
        # What one process compiled, the others load.
        "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Nearly all of the time goes into compiling, and how hard XLA tries changes nothing but rounding.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return Program(folder, os.environ | settings)


@pytest.fixture(scope="session")
def tiny_run(program, shared, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A finished tiny run: its workdir, a copy for each worker, and what it printed."""
    return trained_once(TINY, program, shared / "tiny", tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="session")
def tiny_subnets(program, shared, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The same of a run with subnets."""
    return trained_once(TINY_SUBNETS, program, shared / "subnets", tmp_path_factory.mktemp("subnets") / "run")


def trained_once(arguments, program, folder: pathlib.Path, copy: pathlib.Path) -> tuple[pathlib.Path, str]:
    """A copy of the run that all workers share in this folder, and what its training printed."""
    printed = folder / "printed.txt"
    folder.mkdir(exist_ok=True)
    # The first worker to come here trains; the others wait for it.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            printed.write_text(program.run("train", *arguments, f"--workdir={folder / 'run'}"))
    return shutil.copytree(folder / "run", copy), printed.read_text()


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests whose time is compiling: how hard XLA tries changes nothing but rounding."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", params=["XLA's operations", "a kernel of our own"])
def prepare(request, quick_compilation):
    """`compact`, without the choice by timing between its two ways to run."""

    def compacted(model, variables, calibration=None, **options):
        network = ftwt.compact(model, variables, calibration, portable=True, **options)
        if request.param == "XLA's operations":
            return network
        if jax.default_backend() != "cpu" or not native.available():
            pytest.skip("needs a CPU and a C++ compiler")
        return CompactNetwork(network._forward, dataclasses.replace(network.execution, per_image=True))

    return compacted


def config_of(arguments: list[str]) -> ConfigDict:
    """The config that a command line asks for."""
    return configs.read(configs.split_flags(arguments)[0])


def fails(capsys, *arguments: str) -> str:
    """The one line that a command prints when it ends with status 2."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("ftwt: error: ")
    assert error.count("\n") == 1
    return error


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def random_like(shapes, seed: int = 0):
    """Variables of these shapes with nothing left at its first value; kernels at a scale that keeps signals alive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1])) if path[-1].key == "kernel" else 0.5
        return (spread * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
