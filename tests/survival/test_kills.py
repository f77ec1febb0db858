"""A run of one process that is told to stop, or killed: nothing saved is lost, and the result is the same."""

import dataclasses
import functools
import pathlib
import random
import shutil
import signal
import time

import pytest

from ftwt_jax.parallel.preemption import PREEMPTED
from ftwt_jax.training.settings import BASELINE, GATED, SUBNETS
from ftwt_jax.workdir.lock import PATTERN
from ftwt_jax.workdir.metrics import rewind
from tests.commands.test_train import reached
from tests.conftest import TINY, TINY_STEPS, TINY_SUBNETS
from tests.helpers.processes import (
    STAGES,
    assert_ends_like,
    assert_same_subnets,
    being_written,
    completed,
    figures,
    newest,
    wait_until,
    went_on,
)

pytestmark = pytest.mark.long


def test_a_run_told_to_stop_saves_and_continues_from_that_step_each_time(program, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    for stage, moment in (
        (None, lambda: (workdir / "config.json").exists()),
        (BASELINE, lambda: reached(workdir, BASELINE, 4)),
        (GATED, lambda: reached(workdir, GATED, 4)),
        (None, lambda: newest(workdir) == (TINY_STEPS, TINY_STEPS)),
    ):
        before = newest(workdir)
        process = program.start("train", *TINY, f"--workdir={workdir}")
        wait_until(moment, process)
        process.send_signal(signal.SIGTERM)
        printed, error = process.communicate(timeout=120)
        assert process.returncode == PREEMPTED == 75
        assert not list(workdir.glob(PATTERN)), "it gives the workdir back"
        assert error.startswith("ftwt: ")
        assert error.count("\n") == 1, error
        if 0 < before[before[1] > 0] < TINY_STEPS:
            assert went_on(printed) == (STAGES[before[1] > 0], before[before[1] > 0])
        if stage:
            step = newest(workdir)[STAGES.index(stage)]
            assert f"{stage} stopped at step {step} of {TINY_STEPS}; everything is saved" in error
    assert not (workdir / "evaluation.json").exists()
    program.run("train", *TINY, f"--workdir={workdir}")
    assert_ends_like(workdir, tiny_run[0])


# A checkpoint after every step, so that most of the time is spent saving.
OFTEN = (*TINY, "--config.checkpoint_every=1")


@dataclasses.dataclass(frozen=True)
class Kill:
    """When a run is killed: `delay` seconds after its `start`, or after a checkpoint is `being written` or `complete`.

    Attributes:
      checkpoint: its number, counted over both stages; the next one if it exists already.
    """

    moment: str
    checkpoint: int
    delay: float

    def has_come(self, workdir: pathlib.Path, first: int) -> bool:
        """Whether the delay starts; `first` is the number of the first checkpoint that the process can write."""
        done, wanted = sum(newest(workdir)), max(self.checkpoint, first)
        if self.moment == "being written":
            return done >= wanted or (done == wanted - 1 and bool(being_written(workdir)))
        return self.moment == "start" or done >= wanted


def random_kills(tens: int, seed: int) -> list[Kill]:
    """Ten moments for each of `tens`, spread over the whole run."""
    rng = random.Random(seed)
    longest = {"being written": 0.12, "complete": 0.04, "start": 5.0}
    moments = (["being written"] * 5 + ["complete"] * 3 + ["start"] * 2) * tens
    rng.shuffle(moments)
    checkpoints = sorted(rng.sample(range(1, 2 * TINY_STEPS - 2), len(moments)))
    return [
        Kill(moment, step, rng.uniform(0, longest[moment])) for moment, step in zip(moments, checkpoints, strict=True)
    ]


@pytest.mark.parametrize("tens", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_many_times_never_loses_progress_and_ends_the_same(program, tmp_path, tens):
    undisturbed, workdir, log = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "log"
    program.run("train", *OFTEN, f"--workdir={undisturbed}")
    interrupted = 0
    for kill in random_kills(tens, seed=0):
        before = newest(workdir)
        with log.open("w") as output:
            process = program.start("train", *OFTEN, f"--workdir={workdir}", stdout=output, stderr=output)
            wait_until(functools.partial(kill.has_come, workdir, sum(before) + 1), process)
            time.sleep(kill.delay)
            process.kill()
            assert process.wait() == -signal.SIGKILL, log.read_text()
        assert newest(workdir) >= before, kill
        interrupted += bool(being_written(workdir))
        if found := went_on(log.read_text()):
            assert found == (STAGES[before[1] > 0], before[before[1] > 0]), kill
    assert interrupted > tens, "saves were cut off in the middle"
    before = newest(workdir)
    assert went_on(program.run("train", *OFTEN, f"--workdir={workdir}")) == (GATED, before[1])
    assert_ends_like(workdir, undisturbed)
    assert figures(workdir) == figures(undisturbed)
    assert not being_written(workdir)


def test_subnets_are_found_and_trained_as_if_no_kill_had_come(program, tiny_subnets, tmp_path):
    undisturbed, workdir, log = tiny_subnets[0], tmp_path / "run", tmp_path / "log"
    shutil.copytree(undisturbed, workdir)
    # As it was when its gates were trained.
    shutil.rmtree(workdir / "checkpoints" / SUBNETS)
    for name in ("subnets.safetensors", "evaluation.json"):
        (workdir / name).unlink()
    rewind(workdir / "metrics.jsonl", SUBNETS, 0)
    for moment in (
        lambda: (workdir / "subnets.safetensors").exists(),
        lambda: max(completed(workdir, SUBNETS), default=0) >= (4 if being_written(workdir) else 8),
        lambda: TINY_STEPS in completed(workdir, SUBNETS),
    ):
        before = completed(workdir, SUBNETS)
        with log.open("w") as output:
            process = program.start("train", *TINY_SUBNETS, f"--workdir={workdir}", stdout=output, stderr=output)
            wait_until(moment, process)
            process.kill()
            assert process.wait() == -signal.SIGKILL, log.read_text()
        if before:
            assert went_on(log.read_text()) == (SUBNETS, before[-1])
    assert not (workdir / "evaluation.json").exists()
    program.run("train", *TINY_SUBNETS, f"--workdir={workdir}")
    assert_same_subnets(workdir, undisturbed)
    assert_ends_like(workdir, undisturbed, (*STAGES, SUBNETS))
    assert figures(workdir) == figures(undisturbed)
