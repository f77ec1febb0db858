"""Runs that are killed: two joined processes, moments to wait for, and how a run must end nevertheless."""

import dataclasses
import json
import pathlib
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ftwt_jax.training.settings import BASELINE, GATED
from ftwt_jax.training.subnets_file import read_subnets
from ftwt_jax.workdir.checkpoints import cut_off
from tests.commands.test_train import assert_same, variables
from tests.conftest import Program, read_metrics

STAGES = BASELINE, GATED
# Time limit in seconds, for a busy machine.
SOON = 300


@contextmanager
def two_processes(program: Program, *arguments: str, second: tuple[str, ...] = ()) -> Iterator[list[subprocess.Popen]]:
    """The same command as processes 0 and 1 of one run; neither outlives the block.

    Args:
      second: further arguments of process 1 alone.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started: list[subprocess.Popen] = []
    try:
        for index in range(2):
            joined = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
                "JAX_PLATFORMS": "cpu",
            }
            one = dataclasses.replace(program, environment=program.environment | joined)
            started.append(one.start(*arguments, *(second if index else ())))
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Waits until a condition holds, while the processes run."""
    deadline = time.monotonic() + SOON
    while not condition():
        for process in processes:
            assert process.poll() is None, f"ended with status {process.returncode}: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def completed(workdir: pathlib.Path, stage: str) -> list[int]:
    """Steps of the complete checkpoints, in order."""
    folder = workdir / "checkpoints" / stage
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def newest(workdir: pathlib.Path) -> tuple[int, int]:
    """Newest step of the baseline and of the gated stage that a run goes on from, 0 if there is none."""
    found = ([*completed(workdir, stage), *completed(workdir, cut_off(stage))] for stage in STAGES)
    baseline, gated = (max(steps, default=0) for steps in found)
    return baseline, gated


def went_on(printed: str) -> tuple[str, int] | None:
    """Stage and step from which a run reports that it goes on."""
    found = re.search(r"^(\w+): resuming from step (\d+) of", printed, re.MULTILINE)
    return (found.group(1), int(found.group(2))) if found else None


def being_written(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints that are not complete."""
    return [*workdir.glob("checkpoints/*/*.orbax-checkpoint-tmp*")]


def evaluation(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "evaluation.json").read_text())


def assert_ends_like(workdir: pathlib.Path, undisturbed: pathlib.Path, stages: Sequence[str] = STAGES) -> None:
    """The same parameters and the same evaluation."""
    for stage in stages:
        assert_same(variables(workdir, stage), variables(undisturbed, stage))
    assert evaluation(workdir) == evaluation(undisturbed)


def assert_same_subnets(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """The same masks, and every image in the same group."""
    found, wanted = read_subnets(workdir), read_subnets(other)
    np.testing.assert_array_equal(found.assignment, wanted.assignment)
    assert_same(dict(found.masks), dict(wanted.masks))


def figures(workdir: pathlib.Path) -> list[dict]:
    """Every line of metrics.jsonl without times."""
    lines = read_metrics(workdir)
    for line in lines:
        for timed in ("images_per_second", "input_wait"):
            line.pop(timed, None)
    return lines
