"""A run of two processes, one of which is killed, told to stop, or fails: the other does not hang."""

import contextlib
import dataclasses
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from ftwt_jax.parallel.preemption import PREEMPTED
from ftwt_jax.parallel.processes import LOST
from ftwt_jax.training.settings import BASELINE
from tests.commands.test_train import FLAG, reached
from tests.conftest import TINY, read_metrics
from tests.helpers.processes import evaluation, newest, two_processes, wait_until, went_on

pytestmark = pytest.mark.long

# Long enough for all disturbances, one after the other.
LONGER = (*TINY, "--config.baseline.epochs=4", "--config.gates.epochs=1")


@dataclasses.dataclass(frozen=True)
class Disturbed:
    """A run of two processes after one was sent a signal: the outcome of each, and the newest checkpoints.

    Attributes:
      statuses: exit statuses; None for a process that did not exit within two minutes.
    """

    statuses: tuple[int | None, int | None]
    printed: tuple[str, str]
    errors: tuple[str, str]
    before: int
    after: int


def disturb(program, workdir: pathlib.Path, index: int, number: int, saving: bool) -> Disturbed:
    """Sends a signal to one of two processes, just after a new checkpoint or two steps later."""
    before = newest(workdir)[0]

    def moment() -> bool:
        step = newest(workdir)[0]
        return step > before and (saving or reached(workdir, BASELINE, step + 2))

    with two_processes(program, "train", *LONGER, f"--workdir={workdir}") as processes:
        wait_until(moment, *processes)
        processes[index].send_signal(number)
        deadline = time.monotonic() + 120
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
        statuses = tuple(process.poll() for process in processes)
        for process in processes:
            process.kill()
        printed, errors = zip(*(process.communicate() for process in processes), strict=True)
    return Disturbed(statuses, printed, errors, before, newest(workdir)[0])


@pytest.fixture(scope="module")
def disturbed(program, tmp_path_factory) -> tuple[pathlib.Path, list[Disturbed]]:
    """One workdir: process 1 is killed in a save, then in a step, then process 0 in a step; then 1 is told to stop."""
    workdir = tmp_path_factory.mktemp("disturbed") / "run"
    signals = [
        *((1, signal.SIGKILL, True), (1, signal.SIGKILL, False), (0, signal.SIGKILL, False)),
        (1, signal.SIGTERM, False),
    ]
    return workdir, [disturb(program, workdir, *how) for how in signals]


def assert_lost(status: int | None, error: str, lost: int) -> None:
    """Checks that a process exited because another one was lost, and said so."""
    # JAX's runtime, which process 0 coordinates, may end the second process before we do.
    if lost == 0 and status == -signal.SIGABRT:
        assert "another task died" in error
    else:
        assert status == LOST == 76, error
        (line,) = [line for line in error.splitlines() if line.startswith("ftwt: ")]
        assert line.startswith("ftwt: error: another process was lost")
        assert "Traceback" not in error


@pytest.mark.parametrize("which", [0, 1, 2], ids=["1 in a save", "1 in a step", "0 in a step"])
def test_when_a_process_is_killed_the_other_exits_and_says_why(disturbed, which):
    found, killed = disturbed[1][which], (1, 1, 0)[which]
    assert found.statuses[killed] == -signal.SIGKILL
    assert_lost(found.statuses[1 - killed], found.errors[1 - killed], lost=killed)


@pytest.mark.parametrize("which", [1, 2, 3])
def test_both_processes_continue_from_the_newest_checkpoint(disturbed, which):
    found = disturbed[1]
    assert found[which].before == found[which - 1].after > 0
    assert went_on(found[which].printed[0]) == (BASELINE, found[which].before)


def test_telling_one_of_two_processes_to_stop_stops_both_at_the_same_step(disturbed):
    found = disturbed[1][-1]
    assert found.statuses == (PREEMPTED, PREEMPTED), found.errors
    assert f"baseline stopped at step {found.after} of" in found.errors[0]
    assert found.after > found.before


def test_a_run_continues_with_another_number_of_processes_and_devices(disturbed, program, tmp_path):
    workdir, found = disturbed
    alone = dataclasses.replace(program, environment=program.environment | {"XLA_FLAGS": FLAG})
    losses = []
    for name, launched in (("one device", program), ("two devices", alone)):
        shutil.copytree(workdir, tmp_path / name)
        printed = launched.run("train", *LONGER, f"--workdir={tmp_path / name}")
        assert went_on(printed) == (BASELINE, found[-1].after)
        assert evaluation(tmp_path / name)["samples"] == 450
        rows = [row for row in read_metrics(tmp_path / name) if row["stage"] == BASELINE]
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
        losses.append([row["loss"] for row in rows if row["step"] > found[-1].after][:3])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


# A further flag of the second process, and words of its message.
MISTAKES = {
    "another workdir": ("--workdir={}/elsewhere", "this process cannot see it"),
    "another batch size": ("--config.batch_size=127", "config.batch_size=127"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_failure_of_one_process_ends_the_other(program, tmp_path, mistake):
    second, said = MISTAKES[mistake]
    arguments = ["train", *TINY, f"--workdir={tmp_path / 'run'}"]
    with two_processes(program, *arguments, second=(second.format(tmp_path),)) as processes:
        statuses = [process.wait(120) for process in processes]
        errors = [process.communicate()[1] for process in processes]
    assert statuses[1] == 2
    (line,) = [line for line in errors[1].splitlines() if line.startswith("ftwt: error:")]
    assert said in line
    assert_lost(statuses[0], errors[0], lost=1)
