"""Two runs in one workdir: the second stops at once, the first goes on as if nothing had happened."""

import dataclasses
import json
import os
import socket

import pytest

from ftwt_jax.__main__ import main
from ftwt_jax.training.settings import BASELINE
from ftwt_jax.workdir.lock import PATTERN, Holder
from tests.commands.test_train import reached
from tests.conftest import TINY
from tests.helpers.processes import assert_ends_like, completed, figures, two_processes, wait_until

pytestmark = pytest.mark.long


def test_a_second_run_stops_at_once_and_the_first_ends_as_if_alone(program, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["train", *TINY, f"--workdir={workdir}"]
    first = program.start(*arguments)
    wait_until(lambda: reached(workdir, BASELINE, 4), first)
    error = program.run(*arguments, status=2)
    assert error.count("\n") == 1
    for words in (
        f"ftwt: error: another run trains in {workdir}",
        f"process {first.pid} on {socket.gethostname()}",
        "or choose another --workdir",
    ):
        assert words in error
    _, error = first.communicate(timeout=300)
    assert first.returncode == 0, error
    assert_ends_like(workdir, tiny_run[0])
    assert figures(workdir) == figures(tiny_run[0])
    assert not list(workdir.glob(PATTERN))


def test_a_killed_run_blocks_neither_its_successor_nor_a_reader(program, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["train", *TINY, f"--workdir={workdir}"]
    process = program.start(*arguments)
    wait_until(lambda: bool(completed(workdir, BASELINE)), process)
    (lock,) = workdir.glob(PATTERN)
    out = tmp_path / "network.safetensors"
    assert main(["export", f"--workdir={workdir}", f"--out={out}"]) == 0
    assert process.poll() is None, "the run still trains while its network is exported"
    process.kill()
    process.communicate()
    assert lock.exists()
    assert "locked" not in program.run(*arguments)
    assert_ends_like(workdir, tiny_run[0])
    assert not list(workdir.glob(PATTERN))


# The workdir, and the beginning of the message.
REFUSALS = {
    "is taken": ("run", f"another run trains in {{}}: process {os.getpid()} on "),
    "cannot be written": ("file/run", "cannot write to the workdir {}: "),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_all_processes_of_a_run_learn_that_the_workdir(program, tmp_path, why):
    workdir, said = tmp_path / REFUSALS[why][0], REFUSALS[why][1]
    lock = tmp_path / "run" / PATTERN.replace("*", "first")
    lock.parent.mkdir()
    lock.write_text(json.dumps(dataclasses.asdict(Holder.here())))
    (tmp_path / "file").write_text("")
    with two_processes(program, "train", *TINY, f"--workdir={workdir}") as processes:
        results = [(process.wait(120), process.communicate()[1]) for process in processes]
    for status, error in results:
        assert status == 2, results
        (line,) = [line for line in error.splitlines() if line.startswith("ftwt: ")]
        assert line.startswith(f"ftwt: error: {said.format(workdir)}")
    assert list(lock.parent.iterdir()) == [lock]
