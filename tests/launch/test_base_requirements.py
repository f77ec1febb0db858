"""Every command with requirements.txt alone: it works, or names in one line the extra that it needs."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest
from packaging.utils import canonicalize_name

from tests.conftest import ROOT, TINY
from tests.helpers.packages import requirements, with_needs

pytestmark = pytest.mark.long

# Read by Python when it starts: modules of other packages are not found, as if they were not installed.
SITECUSTOMIZE = """
import sys

HIDDEN = frozenset({hidden!r})


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""

# Runs the commands one after the other in one process, each as `python -m ftwt_jax` does.
RUNNER = """
import contextlib, io, json, sys, traceback
from ftwt_jax.__main__ import main

results = []
for arguments in json.loads(sys.argv[1]):
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            status = main(arguments)
        except Exception:
            status = 1
            traceback.print_exc()
    results.append((status, error.getvalue()))
print("\\n" + json.dumps(results))
"""

WORKDIR = "--workdir=run"
# Only with --slow: these import little that the others do not, and take most of the time.
SLOW = ("evaluate at budgets", "evaluate corruptions", "benchmark training", "benchmark against torch")
# What it runs, and the extra that it names if it needs one. The first makes the workdir that others read.
COMMANDS: dict[str, tuple[list[str], str | None]] = {
    "train": (["train", *TINY, WORKDIR], None),
    "estimate": (["estimate", WORKDIR], None),
    "evaluate": (["evaluate", WORKDIR], None),
    "evaluate at budgets": (["evaluate", WORKDIR, "--budgets=0.3"], None),
    "evaluate corruptions": (["evaluate", WORKDIR, "--corruptions"], None),
    "report": (["report", "run"], None),
    "export weights": (["export", WORKDIR, "--out=network.safetensors"], None),
    "export a program": (["export", WORKDIR, "--out=network.stablehlo"], None),
    "export onnx": (["export", WORKDIR, "--out=network.onnx"], "[onnx]"),
    "benchmark engines": (["benchmark", WORKDIR, "--engines=onnxruntime"], "[bench]"),
    "convert safetensors": (["convert", *TINY[:2], "--checkpoint=network.safetensors", "--out=converted"], None),
    "convert torch.save": (["convert", *TINY[:2], "--checkpoint=network.pt", "--out=other"], "[convert]"),
    "benchmark training": (["benchmark", WORKDIR, "--train"], None),
    "benchmark input": (["benchmark", "--input", "--config=digits", "--seconds=0.5"], None),
    "benchmark against torch": (["benchmark", WORKDIR, "--torch"], "[convert]"),
    "plan": (["plan", "--config=digits", "--topology=v5e:2x2"], "[plan]"),
    "prepare": (["prepare", "tfds:mnist", "--data_dir=data"], "[prepare]"),
    "train on what is not prepared": (
        ["train", "--config=cifar10", "--config.data.data_dir=data", "--workdir=c"],
        None,
    ),
}


@pytest.fixture(scope="module")
def results(request, program, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Status and errors of every command."""
    folder = tmp_path_factory.mktemp("base")
    kept = {*with_needs(requirements()), "ftwt-jax"}
    owners = importlib.metadata.packages_distributions()
    hidden = {module for module, names in owners.items() if not kept & set(map(canonicalize_name, names))}
    assert {"torch", "tensorflow", "libtpu", "pytest", "tensorboard"} <= hidden
    assert not {"jax", "numpy", "flatbuffers", "tensorflow_datasets"} & hidden
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(hidden=sorted(hidden)))
    (folder / "network.pt").write_bytes(b"PK")  # Not empty: that is refused before PyTorch is looked for.
    paths = os.pathsep.join([str(folder), str(ROOT)])
    chosen = [name for name in COMMANDS if name not in SLOW or request.config.getoption("--slow")]
    commands = [COMMANDS[name][0] for name in chosen]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(commands)],
        cwd=folder,
        env=program.environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(chosen, map(tuple, found), strict=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in COMMANDS]
)
def test_it_works_with_the_requirements_alone_or_names_the_extra(results, name):
    (status, error), extra = results[name], COMMANDS[name][1]
    if extra is None and not name.endswith("not prepared"):
        assert status == 0, error
        return
    assert status == 2, error
    (line,) = [line for line in error.splitlines() if not line.startswith("WARNING")]
    assert line.startswith("ftwt: error: ")
    assert re.search(re.escape(extra or "prepare tfds:cifar10"), line)
