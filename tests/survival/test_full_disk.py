"""A disk that fills up during a run: one line says so, nothing older is lost, and with more space it continues."""

import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from ftwt_jax.training.settings import BASELINE
from ftwt_jax.workdir.integrity import LIST
from tests.commands.test_train import reached
from tests.conftest import TINY, fails, read_metrics
from tests.helpers.processes import being_written, completed, wait_until, went_on

pytestmark = pytest.mark.long

# Checkpoints of 4.7 MB each, at steps 4, 8 and 11.
LARGE = (*TINY, "--config.model.plan=(8,'M',256,256)", "--config.baseline.epochs=1", "--config.gates.epochs=0")
# Enough steps to fill whatever space the files still have.
LONG = (*TINY, "--config.log_every=1", "--config.baseline.epochs=8", "--config.gates.epochs=0")


def mount(folder: pathlib.Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[pathlib.Path]:
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount(folder, "size=8m")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: pathlib.Path) -> pathlib.Path:
    """Fills the disk to the last page; returns the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_that_does_not_fit_leaves_older_ones_intact_until_there_is_space(program, disk, tmp_path):
    workdir, undisturbed = disk / "run", tmp_path / "undisturbed"
    arguments = ["train", *LARGE, f"--workdir={workdir}"]
    first = workdir / "checkpoints" / BASELINE / "4"
    process = program.start(*arguments)
    wait_until((first / LIST).exists, process)
    before = contents(first)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.count("\n") == 1, error
    for words in (
        f"ftwt: error: cannot write the checkpoint of step 8 to {workdir}",
        "no space left on device; the checkpoint of step 4 is intact",
        "free some space",
    ):
        assert words in error
    assert completed(workdir, BASELINE) == [4]
    assert contents(first) == before
    assert not being_written(workdir)

    mount(disk, "remount,size=64m")
    assert went_on(program.run(*arguments)) == (BASELINE, 4)
    assert completed(workdir, BASELINE) == [8, 11]
    program.run("train", *LARGE, f"--workdir={undisturbed}")
    losses = [[(line["step"], line["loss"]) for line in read_metrics(folder)] for folder in (workdir, undisturbed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("full", ["metrics.jsonl", "events"])
def test_metrics_that_cannot_be_written_end_the_run_with_one_line(program, disk, tmp_path, full):
    """Only the file under test is on the full disk."""
    workdir = disk / "run" if full == "events" else tmp_path / "run"
    workdir.mkdir()
    (tmp_path / "checkpoints").mkdir()
    (workdir / "checkpoints").symlink_to(tmp_path / "checkpoints")
    (workdir / "metrics.jsonl").symlink_to((tmp_path if full == "events" else disk) / "figures")
    arguments = ["train", *LONG, f"--workdir={workdir}"]
    process = program.start(*arguments)
    wait_until(lambda: reached(workdir, BASELINE, 5), process)
    filler = fill(disk)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.startswith("ftwt: error: ")
    assert "cannot write the metrics of step" in error
    assert "no space left" in error
    assert error.count("\n") == 1, error

    filler.unlink()
    step = completed(workdir, BASELINE)[-1]
    assert went_on(program.run(*arguments)) == (BASELINE, step)
    assert [line["step"] for line in read_metrics(workdir)] == [*range(1, 86)]


def test_a_config_that_cannot_be_written_is_one_line(disk, capsys):
    fill(disk)
    error = fails(capsys, "train", *TINY, f"--workdir={disk / 'run'}")
    for word in ("cannot write", str(disk / "run"), "no space left"):
        assert word in error
    assert contents(disk).keys() == {"filler"}


def test_results_that_cannot_be_written_are_one_line_and_the_old_ones_stay(tiny_run, disk, capsys):
    workdir = disk / "run"
    shutil.copytree(tiny_run[0], workdir)
    filler = fill(disk)
    before = contents(workdir)
    for command in (["evaluate"], ["export", f"--out={workdir / 'network.safetensors'}"]):
        assert "no space left" in fails(capsys, *command, f"--workdir={workdir}")
        assert contents(workdir) == before
    os.unlink(filler)
