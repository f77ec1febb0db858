"""launch/slurm.sbatch under a Slurm with one node, which runs on this machine during the tests."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from ftwt_jax.parallel.preemption import PREEMPTED
from ftwt_jax.parallel.processes import LOST
from tests.conftest import ROOT, TINY, read_metrics

SCRIPT = ROOT / "launch" / "slurm.sbatch"
DAEMONS = ("munged", "slurmctld", "slurmd")
needs_slurm = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, DAEMONS)), reason="needs slurm-wlm and munge, and root to start them"
)
# All tests share one Slurm.
pytestmark = pytest.mark.long

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={other_port}
AuthType=auth/munge
# A requeued job waits until its credential expires: by default 120 seconds.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1
# The node has more CPUs and GPUs than this machine; nothing checks that.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES
"""

# Stands in for Python: each run takes one word of STATUSES, which says how its processes exit.
STUB = """#!/usr/bin/env bash
run=${SLURM_RESTART_COUNT:-0}
statuses=($STATUSES)
status=${statuses[$run]}
echo "run $run process $SLURM_PROCID of $SLURM_NTASKS: $*"
case $status in
    wait)
        trap 'exit $PREEMPTED' TERM
        for _ in {1..600}; do sleep 0.1; done
        ;;
    dies)
        if [ "$SLURM_PROCID" = 1 ]; then kill -9 $$; fi
        exit $LOST
        ;;
    mistake)
        sleep $((2 * SLURM_PROCID))
        exit 2
        ;;
esac
exit "$status"
"""


def wait_until(condition, what, seconds=90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what} after {seconds} s"
        time.sleep(0.2)
    return found


@dataclasses.dataclass
class Job:
    """A submitted job, and the file of its output."""

    number: str
    log: pathlib.Path
    environment: dict[str, str]

    def call(self, *command):
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def field(self, name):
        return re.search(rf"\b{name}=(\S*)", self.call("scontrol", "show", "job", "-o", self.number)).group(1)

    def prints(self, text):
        return self.log.exists() and text in self.log.read_text()

    def end(self, seconds=90):
        """Waits for the end of the job; returns its state, the number of restarts, and its output."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        try:
            state = wait_until(lambda: {self.field("JobState")} & ended, "end", seconds).pop()
        except AssertionError as late:
            raise AssertionError(f"{late}\n{self.log.read_text() if self.log.exists() else ''}") from None
        return state, int(self.field("Restarts")), self.log.read_text()


@dataclasses.dataclass
class Slurm:
    """The environment of a user of Slurm."""

    environment: dict[str, str]

    def submit(self, cwd, *arguments, script=SCRIPT, options=("--gpus-per-node=0", "--ntasks-per-node=2"), **variables):
        environment = self.environment | variables
        command = ["sbatch", "--parsable", "--cpus-per-task=1", *options, script, *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        return Job(number, cwd / f"slurm-{number}.out", environment)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def slurm(program):
    with contextlib.ExitStack() as stack:
        # Not a folder of pytest: the path of a socket must be shorter than 100 characters.
        folder = pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True))
        )
        port, other_port = free_ports(2)
        conf = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        conf.write_text(CONF.format(folder=folder, host=host, port=port, other_port=other_port))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        for number in range(8):
            (folder / f"gpu{number}").touch()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        environment = program.environment | {"SLURM_CONF": str(conf), "FTWT_VENV": sys.prefix}
        log = stack.enter_context((folder / "daemons.log").open("w"))

        def start(*command):
            # The daemons exit with this process, however it ends.
            guarded = ["setpriv", "--pdeathsig", "TERM", *command] if shutil.which("setpriv") else command
            process = subprocess.Popen(guarded, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait, timeout=20)
            stack.callback(process.terminate)

        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        wait_until((folder / "munge.socket").exists, "munged")
        start("slurmctld", "-D", "-f", str(conf))
        start("slurmd", "-D", "-f", str(conf))

        def ask(*command):
            return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()

        try:
            wait_until(lambda: ask("sinfo", "--noheader", "--format=%T") == "idle", "node")
        except AssertionError as late:
            raise AssertionError(f"{late}\n{(folder / 'daemons.log').read_text()}") from None
        yield Slurm(environment)
        ask("scancel", "--user=root")
        wait_until(lambda: not ask("squeue", "--noheader"), "end of the jobs")


@pytest.fixture
def stub(tmp_path):
    """A Python environment whose interpreter is STUB."""
    python = tmp_path / "stub" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    return str(tmp_path / "stub")


@pytest.mark.slow
@needs_slurm
def test_a_job_that_slurm_requeues_continues_and_finishes(slurm, tmp_path):
    more = ("--config.baseline.epochs=12", "--config.checkpoint_every=10")
    job = slurm.submit(tmp_path, *TINY, *more, "--workdir=run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text(), "training", 180)
    job.call("scontrol", "requeue", job.number)
    state, restarts, output = job.end(240)
    assert (state, restarts) == ("COMPLETED", 1), output
    assert re.search(r"resuming from step \d+", output)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["samples"] == 450
    steps = [(row["stage"], row["step"]) for row in read_metrics(tmp_path / "run")]
    assert steps == sorted(set(steps))


@needs_slurm
def test_what_becomes_of_a_job_depends_on_the_status(slurm, tmp_path, stub):
    expected = {
        "0": ("COMPLETED", 0),
        "mistake": ("FAILED", 0),
        f"{PREEMPTED} 0": ("COMPLETED", 1),
        f"dies {PREEMPTED} dies 0": ("COMPLETED", 3),
        f"{LOST} dies dies dies 0": ("FAILED", 3),
    }
    jobs = {
        statuses: slurm.submit(tmp_path, "--workdir=some where", FTWT_VENV=stub, STATUSES=statuses, LOST=str(LOST))
        for statuses in expected
    }
    for statuses, job in jobs.items():
        state, restarts, output = job.end()
        assert (state, restarts) == expected[statuses], f"{statuses}\n{output}"
        for run in range(restarts + 1):
            for process in range(2):
                assert f"run {run} process {process} of 2: -m ftwt_jax train --workdir=some where\n" in output
    assert jobs["mistake"].prints("status 2: not started again")
    assert jobs[f"{LOST} dies dies dies 0"].prints("processes died 4 times; not started again")
    assert not list(tmp_path.glob("*.deaths"))


@needs_slurm
def test_a_signalled_job_is_requeued_and_a_cancelled_one_is_not(slurm, tmp_path, stub):
    signalled, cancelled = (
        slurm.submit(tmp_path, FTWT_VENV=stub, STATUSES="wait 0", PREEMPTED=str(PREEMPTED)) for _ in range(2)
    )
    for job, command in ((signalled, ("scancel", "--signal=TERM")), (cancelled, ("scancel",))):
        wait_until(lambda job=job: job.prints("process 0") and job.prints("process 1"), "start")
        job.call(*command, job.number)
    assert signalled.end()[:2] == ("COMPLETED", 1)
    assert cancelled.end()[:2] == ("CANCELLED", 0)


@needs_slurm
def test_the_default_is_one_process_per_gpu_of_a_node_with_eight(slurm, tmp_path, stub):
    state, _, output = slurm.submit(tmp_path, options=(), FTWT_VENV=stub, STATUSES="0").end()
    assert state == "COMPLETED", output
    assert sorted(re.findall(r"process (\d) of 8", output)) == list("01234567")


@needs_slurm
def test_a_copy_of_the_script_asks_for_the_repository(slurm, tmp_path, stub):
    copy = tmp_path / "mine.sbatch"
    shutil.copy(SCRIPT, copy)
    lost, told = (
        slurm.submit(tmp_path, script=copy, FTWT_VENV=stub, STATUSES="0", **more)
        for more in ({}, {"FTWT_ROOT": str(ROOT)})
    )
    state, _, output = lost.end()
    assert state == "FAILED"
    assert "FTWT_ROOT=FOLDER" in output
    assert told.end()[0] == "COMPLETED"


def test_without_slurm_a_dry_run_shows_the_command(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}

    def start(*arguments):
        return subprocess.run(
            ["bash", SCRIPT, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    shown = start("--dry-run", "--config=configs/digits.py", "--workdir=some where")
    assert shown.returncode == 0
    assert re.search(r"srun .*/bin/python -m ftwt_jax train --config=\S+ --workdir=some\\ where\n", shown.stdout)
    refused = start("--config=configs/digits.py")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "sbatch" in refused.stderr
