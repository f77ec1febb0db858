"""A run that is told to stop outside its steps: in evaluations, estimate, calibration, statistics and the compiler."""

import contextlib
import dataclasses
import pathlib
import sys
import time

import pytest

from ftwt_jax.parallel.preemption import PREEMPTED
from ftwt_jax.training.settings import BASELINE, GATED
from ftwt_jax.workdir.checkpoints import Checkpoints
from tests.conftest import TINY, TINY_STEPS, Program
from tests.helpers.processes import STAGES, assert_ends_like, figures, two_processes, went_on

pytestmark = pytest.mark.long

# Seconds from the signal to the end of the process: it should be 10, and more only where the machine is busy.
LIMIT = 30


@dataclasses.dataclass
class Told(Program):
    """The program, told to stop in a phase; see `tests/helpers/told.py`."""

    phase: str = ""

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "tests.helpers.told", self.phase, *map(str, arguments)]


def best(workdir: pathlib.Path, stage: str) -> int | None:
    """Step of the checkpoint of highest accuracy."""
    with contextlib.closing(Checkpoints(workdir, stage, {})) as checkpoints:
        return checkpoints.best_step()


def told(program: Program, tmp_path: pathlib.Path, phase: str, *arguments: str) -> tuple[str, str]:
    """Runs a command that is told to stop in a phase; returns what it printed, once it ended as it should."""
    at = tmp_path / "told-at"
    process = Told(program.cwd, program.environment | {"TOLD_AT": str(at)}, phase).start(*arguments)
    printed, error = process.communicate(timeout=300)
    ended = time.time()
    assert process.returncode == PREEMPTED, f"status {process.returncode}\n{printed}\n{error}"
    assert ended - float(at.read_text()) < LIMIT
    assert error.startswith("ftwt: ")
    assert error.endswith("; the same command continues from there\n")
    assert error.count("\n") == 1, error
    return printed, error


# Where a run is told to stop, one process after the other; from which stage and step that process goes on, and the step
# after which it stops. The heads freeze after step 16.
STOPS = (
    ("compilation", None, None),
    ("evaluation", None, (BASELINE, 4)),
    ("estimate", (BASELINE, 4), (BASELINE, TINY_STEPS)),
    ("evaluation", None, (GATED, 4)),
    ("calibration", (GATED, 4), (GATED, 16)),
    ("statistics", (GATED, 16), (GATED, TINY_STEPS)),
    ("final evaluation", (GATED, TINY_STEPS), (GATED, TINY_STEPS)),
)


def test_a_run_told_to_stop_in_any_phase_ends_at_once_and_continues_like_an_undisturbed_one(
    program, tiny_run, tmp_path
):
    workdir = tmp_path / "run"
    arguments = ["train", *TINY, f"--workdir={workdir}"]
    for phase, start, stop in STOPS:
        printed, error = told(program, tmp_path, phase, *arguments)
        assert went_on(printed) == start, phase
        standing = "told to stop; " if stop is None else "{} stopped at step {} of ".format(*stop)
        assert error.startswith(f"ftwt: {standing}"), phase
    assert went_on(program.run("train", *TINY, f"--workdir={workdir}")) is None
    assert_ends_like(workdir, tiny_run[0])
    assert figures(workdir) == figures(tiny_run[0])
    for stage in STAGES:
        assert best(workdir, stage) == best(tiny_run[0], stage)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == set(STAGES)


def test_two_processes_told_to_stop_between_two_batches_both_end(program, tiny_run, tmp_path):
    at = tmp_path / "told-at"
    pair = Told(program.cwd, program.environment | {"TOLD_AT": str(at), "TOLD_MOST": "30"}, "evaluate")
    with two_processes(pair, "evaluate", f"--workdir={tiny_run[0]}") as processes:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    ended = time.time()
    assert [process.returncode for process in processes] == [PREEMPTED] * 2, errors
    assert ended - float(at.read_text()) < LIMIT
