"""A run of two processes with four devices each does what one process does, each with half of the images."""

import collections
import contextlib
import dataclasses
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from ftwt_jax import workdir as workdirs
from ftwt_jax.__main__ import main
from ftwt_jax.parallel import processes
from ftwt_jax.training import feed
from ftwt_jax.training.run import open_run
from ftwt_jax.training.settings import BASELINE, GATED, SUBNETS
from ftwt_jax.training.stage import make_stage
from tests.conftest import TINY, Program, fails, read_metrics
from tests.helpers.processes import assert_same_subnets, two_processes
from tests.helpers.ten_steps import STEPS, assert_close, named

pytestmark = pytest.mark.long

STAGES = BASELINE, GATED, SUBNETS
BATCH, HELD_OUT = 136, 450
# Ten steps per stage. Heads learn fast enough for some gates to close; the rest as slowly as in helpers/ten_steps.py.
RUN = (
    *("train", *TINY, f"--config.batch_size={BATCH}", "--config.log_every=1", "--config.checkpoint_every=5"),
    *("--config.baseline.epochs=1", "--config.gates.epochs=1"),
    *("--config.baseline.lr=0.01", "--config.gates.lr=0.01", "--config.gates.head_lr=0.3"),
    *("--config.subnets.count=3", "--config.subnets.multiple=1"),
    "--config.data.on_device=False",
)
# On images that are on the devices, three steps in a call.
DIVIDED = (
    *(*RUN, "--config.gates.epochs=0", "--config.subnets.count=0", "--config.shard_optimizer=True"),
    *("--config.data.on_device=True", "--config.steps_per_call=3"),
)

# Runs two commands in a row, and records in FOLDER which images each process receives.
RECORDING = """
import json, os, sys
from ftwt_jax.training import feed
from ftwt_jax.__main__ import main
folder, *commands = map(json.loads, sys.argv[1:])
put_batch, log = feed.put_batch, open(os.path.join(folder, os.environ["JAX_PROCESS_ID"]), "a")
def recording(batch, mesh):
    print(json.dumps(batch["index"].tolist()), file=log, flush=True)
    return put_batch(batch, mesh)
feed.put_batch = recording
sys.exit(max([main(command) for command in commands]))
"""


class Recording(Program):
    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", RECORDING, *arguments]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
      printed: the output of each process.
      images: int [steps, share] of each process: the indices of the images of all stages.
    """

    workdir: pathlib.Path
    printed: list[str]
    images: list[np.ndarray]

    @property
    def evaluation(self) -> dict:
        return json.loads((self.workdir / "evaluation.json").read_text())

    def state(self, stage: str) -> dict[str, np.ndarray]:
        """Every array of the newest checkpoint: network, optimizer and step."""
        path, config = workdirs.load(str(self.workdir))
        run = open_run(config, path)
        with contextlib.closing(run.checkpoints(stage)) as checkpoints:
            return named(checkpoints.restore(make_stage(run, stage).state))


@pytest.fixture(scope="module")
def together(program, tmp_path_factory):
    """A run of two processes, which then train a baseline with a sharded optimizer in `divided` beside its workdir."""
    folder = tmp_path_factory.mktemp("together")
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    commands = [[*RUN, f"--workdir={folder / 'run'}"], [*DIVIDED, f"--workdir={folder / 'divided'}"]]
    recording = Recording(program.cwd, program.environment | settings)
    with two_processes(recording, *map(json.dumps, [str(folder), *commands])) as started:
        outputs = [process.communicate(timeout=400) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    rows = [[json.loads(row) for row in (folder / str(index)).read_text().splitlines()] for index in range(2)]
    images = [np.array(log[: len(STAGES) * STEPS]) for log in rows]
    return Trained(folder / "run", [printed for printed, _ in outputs], images)


@pytest.fixture(scope="module")
def alone(quick_compilation, tmp_path_factory):
    """The same run by this process, with one device."""
    assert jax.device_count() == 1
    workdir, received, printed = tmp_path_factory.mktemp("alone") / "run", [], io.StringIO()

    def recording(batch, mesh, put_batch=feed.put_batch):
        received.append(batch["index"])
        return put_batch(batch, mesh)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(feed, "put_batch", recording)
        assert main([*RUN, f"--workdir={workdir}"]) == 0
    return Trained(workdir, [printed.getvalue()], [np.array(received)])


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_end_with_the_parameters_of_one(together, alone, stage):
    assert_close(together.state(stage), alone.state(stage), 1e-5)


def test_two_processes_find_the_subnets_of_one(together, alone):
    assert_same_subnets(together.workdir, alone.workdir)


def test_two_processes_report_the_figures_of_one_and_every_step_once(together, alone):
    both, one = read_metrics(together.workdir), read_metrics(alone.workdir)
    assert [(m["stage"], m["step"]) for m in both] == [(stage, n + 1) for stage in STAGES for n in range(STEPS)]
    timed = {"stage", "images_per_second", "input_wait"}
    for ours, theirs in zip(both, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - timed:
            # A small reduction is the difference of two large numbers.
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), (ours["stage"], ours["step"], name)
    assert [m for m in both if m["stage"] == GATED][-1]["density"] < 0.99, "some gates have closed"


def test_held_out_images_that_fill_no_batch_are_counted_once(together, alone):
    both, one = together.evaluation, alone.evaluation
    assert HELD_OUT % 128
    assert both["samples"] == one["samples"] == HELD_OUT
    for name in ("accuracy", "dense_accuracy"):
        assert both[name] == one[name]
    assert jax.tree.structure(both) == jax.tree.structure(one)
    for (path, value), found in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(both), strict=True):
        assert found == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), path


def test_each_process_reads_half_of_each_batch(together, alone):
    (whole,) = alone.images
    assert whole.shape == (len(STAGES) * STEPS, BATCH)
    assert [share.shape for share in together.images] == [(len(whole), BATCH // 2)] * 2
    np.testing.assert_array_equal(np.concatenate(together.images, axis=1), whole)


def test_one_process_writes(together, alone):
    def files(workdir: pathlib.Path) -> collections.Counter:
        """Files and checkpoints; of a TensorBoard file, only the start of its name, which continues with the time."""
        found = [*workdir.iterdir(), *workdir.glob("checkpoints/*/*")]
        return collections.Counter(str(path.relative_to(workdir)).partition("tfevents")[0] for path in found)

    assert files(together.workdir) == files(alone.workdir)


# Printed by Gloo, the library for collectives on CPUs, from several threads at once.
GLOO = "[Gloo] Rank is connected to peer ranks. Expected number of connected peer ranks is :"


def test_one_process_prints(together):
    first, second = together.printed
    assert first.count(f"gated {STEPS}/{STEPS} ") == 1
    ours, gloos = (set(re.findall(r"[A-Za-z]+", text)) for text in (second, GLOO))
    assert ours <= gloos


def test_one_process_continues_from_a_sharded_optimizer_of_two(together, alone, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(together.workdir.parent / "divided", workdir)
    divided = Trained(workdir, [], [])
    assert_close(divided.state(BASELINE), alone.state(BASELINE), 1e-5)
    # As if it had been stopped halfway.
    shutil.rmtree(workdir / "checkpoints" / BASELINE / str(STEPS))
    assert main([*DIVIDED, f"--workdir={workdir}"]) == 0
    assert f"baseline: resuming from step 5 of {STEPS}" in capsys.readouterr().out
    assert_close(divided.state(BASELINE), alone.state(BASELINE), 1e-5)


COMPLETE = {processes.ADDRESS: "localhost:1", processes.COUNT: "2", processes.INDEX: "1"}
# Variables that launchers set.
LAUNCHERS = (
    *("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri"),
    *("PMI_SIZE", "PMI_RANK", "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
)
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture
def surroundings(monkeypatch):
    """Sets these variables and removes others that announce several processes; returns the list of attempts to join."""
    attempts = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: attempts.append(given))

    def surround(**given: str) -> list[dict]:
        for name in (*COMPLETE, *LAUNCHERS):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return attempts

    return surround


def test_a_process_joins_the_run_that_its_variables_describe(surroundings):
    attempts = surroundings(**COMPLETE)
    processes.join()
    (given,) = attempts
    assert (given["coordinator_address"], given["num_processes"], given["process_id"]) == ("localhost:1", 2, 1)


TO_JAX: dict[str, str] = {}
TO_MPI4PY = {"cluster_detection_method": "mpi4py"}
TO_TORCHRUN = {"coordinator_address": "node1:62268", "num_processes": 4, "process_id": 3, "local_device_ids": None}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, TO_JAX),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "PMI_SIZE": "2", "PMI_RANK": "0"}, TO_JAX),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "PMI_SIZE": "8", "PMI_RANK": "5"}, TO_MPI4PY),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}, TO_JAX),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, TO_MPI4PY),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, TO_MPI4PY),
        (TORCHRUN, TO_TORCHRUN),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, TO_TORCHRUN | {"local_device_ids": [1]}),
    ],
)
def test_each_launcher_is_told_apart(surroundings, monkeypatch, given, told):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    attempts = surroundings(**given)
    processes.join()
    (attempt,) = attempts
    assert {name: attempt[name] for name in attempt if "timeout" not in name} == told


@pytest.mark.parametrize(
    "given",
    [
        # A shell of `salloc -n 4`, and the script of `sbatch -n 4`.
        {"SLURM_NTASKS": "4"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "4", "RANK": "0"},
        TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"},
    ],
)
def test_a_process_that_was_started_alone_stays_alone(surroundings, given):
    attempts = surroundings(**given)
    processes.join()
    assert attempts == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "one of 2 tasks of mpirun"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "one of 3 tasks of mpirun"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_PROCID=1 says that this is one of several tasks"),
    ],
)
def test_tasks_that_cannot_find_each_other_do_not_train_side_by_side(
    surroundings, monkeypatch, capsys, tmp_path, given, says
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    attempts = surroundings(**given)
    error = fails(capsys, *RUN, f"--workdir={tmp_path / 'run'}")
    assert says in error
    for remedy in (*COMPLETE, "--nodistributed"):
        assert remedy in error
    assert attempts == []
    assert not (tmp_path / "run").exists()


def test_tasks_of_torchrun_find_each_other(program):
    code = "import jax; from ftwt_jax.parallel.processes import *; join()"
    code += "; print(all_gather([f'task {jax.process_index()}']))"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command += [sys.executable, "-c", code]
    environment = program.environment | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=program.cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.count("['task 0', 'task 1']") == 2, done.stderr


@pytest.mark.parametrize("missing", [processes.ADDRESS, processes.COUNT, processes.INDEX])
def test_a_missing_variable_is_named(surroundings, capsys, tmp_path, missing):
    attempts = surroundings(**{name: value for name, value in COMPLETE.items() if name != missing})
    error = fails(capsys, "evaluate", f"--workdir={tmp_path / 'none'}")
    assert missing in error
    assert "must be set too" in error
    assert not [name for name in COMPLETE if name != missing and name in error]
    assert attempts == []


@pytest.mark.parametrize("index", ["2", "-1", "first"])
def test_an_index_out_of_range_is_refused(surroundings, capsys, tmp_path, index):
    attempts = surroundings(**COMPLETE | {processes.INDEX: index})
    error = fails(capsys, "evaluate", f"--workdir={tmp_path / 'none'}")
    assert processes.INDEX in error
    assert repr(index) in error
    assert attempts == []


@pytest.mark.parametrize(
    ("given", "flags"), [({}, ()), (COMPLETE, ("--nodistributed",)), ({processes.COUNT: "2"}, ("--nodistributed",))]
)
def test_a_single_process_joins_no_other(surroundings, capsys, tmp_path, given, flags):
    attempts = surroundings(**given)
    error = fails(capsys, "evaluate", f"--workdir={tmp_path / 'none'}", *flags)
    assert "there is no workdir" in error
    assert attempts == []
