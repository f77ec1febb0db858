"""launch/tpu_pod.sh with a fake gcloud that simulates a slice of two workers, with preemptions and failures."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import pytest

from ftwt_jax.parallel.preemption import PREEMPTED
from ftwt_jax.parallel.processes import LOST
from tests.conftest import ROOT

pytestmark = pytest.mark.long

SCRIPT = ROOT / "launch" / "tpu_pod.sh"
WORKERS = 2

# Keeps the slice in a folder, and runs the commands of each worker in a folder that is new with each slice. `launches`
# has a word for how each launch ends: an exit status, or "status:STATE" if the state of the slice changes too.
GCLOUD = """#!/usr/bin/env -S python3 -IS
import json, os, pathlib, shutil, subprocess, sys

cloud = pathlib.Path(os.environ["CLOUD"])
arguments = sys.argv[1:]
with (cloud / "calls").open("a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
assert arguments[:2] == ["compute", "tpus"] and "--zone=here" in arguments
group, verb, name = arguments[2:5]
state, workers = cloud / "state", [cloud / f"worker{number}" for number in range(2)]
flags = dict(each.split("=", 1) for each in arguments if each.startswith("--") and "=" in each)

if verb == "create":
    if (cloud / "no_create").exists():
        sys.exit("ERROR: quota")
    assert not state.exists()
    state.write_text("WAITING_FOR_RESOURCES")
    for worker in workers:
        python = worker / "ftwt_jax" / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        shutil.copy(cloud / "python", python)
elif verb == "describe":
    if not state.exists():
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: there is none")
    print(found := state.read_text())
    if found != "ACTIVE":
        state.write_text({"WAITING_FOR_RESOURCES": "ACTIVE", "SUSPENDING": "SUSPENDED"}.get(found, found))
elif verb == "delete":
    assert "--force" in arguments
    state.unlink()
    for worker in workers:
        shutil.rmtree(worker)
else:
    assert flags["--worker"] == "all"
    if state.read_text() != "ACTIVE":
        sys.exit("ERROR: the workers are in an unusable state")
    statuses = []
    for worker in workers:
        if verb == "scp":
            assert arguments[4] == f"{arguments[4].rpartition('/')[0]}/ftwt_jax.tgz" and arguments[5].endswith(":")
            shutil.copy(arguments[4], worker)
        else:
            environment = os.environ | {"HOME": str(worker), "WORKER": worker.name}
            done = subprocess.run(["bash", "-c", flags["--command"]], cwd=worker, env=environment)
            statuses.append(done.returncode)
    if verb == "ssh" and " train " in flags["--command"]:
        launches = (cloud / "launches").read_text().split()
        _, _, after = launches[0].partition(":")
        (cloud / "launches").write_text(" ".join(launches[1:]))
        if after:
            state.write_text(after)
    sys.exit(next(filter(None, statuses), 0))
"""
# Stands in for Python on the workers: everything is installed, and training ends as `launches` says.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
    "-m pip") exit 0 ;;
    "-m ftwt_jax") ;;
    *) exec python3 "$@" ;;
esac
echo "$WORKER $PWD $*" >>"$CLOUD/trained"
read -r ending _ <"$CLOUD/launches"
[ "$ending" != never ] || exec sleep 60
exit "${ending%%:*}"
"""
RECORDED = """#!/usr/bin/env bash
echo "$WORKER ${0##*/} $*" >>"$CLOUD/ran"
"""


@dataclasses.dataclass
class Cloud:
    folder: pathlib.Path

    def start(self, *arguments, endings="0"):
        """Starts the script; each word of `endings` says how a launch ends."""
        (self.folder / "launches").write_text(endings)
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "CLOUD": str(self.folder), "POLL_SECONDS": "0.05"}
        environment.pop("SSH_AUTH_SOCK", None)
        return subprocess.Popen(
            [SCRIPT, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(self, *arguments, endings="0"):
        """Runs the script to its end."""
        process = self.start(*arguments, endings=endings)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def calls(self):
        return [json.loads(line)[2:] for line in (self.folder / "calls").read_text().splitlines()]

    def count(self, verb):
        return sum(call[1] == verb for call in self.calls)

    @property
    def trained(self):
        file = self.folder / "trained"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def cloud(tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    programs = {"gcloud": GCLOUD, "sudo": RECORDED, "gcsfuse": RECORDED, "mount.nfs": RECORDED}
    for name, text in (programs | {"mountpoint": "#!/bin/sh\nexit 1\n"}).items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return Cloud(tmp_path)


def wait_for_training(cloud):
    deadline = time.monotonic() + 60
    while not cloud.trained and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cloud.trained


SLICE = ("--zone=here", "--type=v5litepod-16", "--bucket=images")
RUN = ("--config=configs/imagenet.py:resnet50", "--workdir=/mnt/images/a run")


def test_a_slice_is_created_trains_on_all_workers_and_is_deleted(cloud):
    done = cloud.launch(*SLICE, *RUN, "--spot")
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in cloud.calls if call[1] != "describe"] == ["create", "scp", "ssh", "ssh", "delete"]
    created = cloud.calls[1]
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(created)
    for number, line in enumerate(cloud.trained):
        folder = cloud.folder / f"worker{number}" / "ftwt_jax"
        assert line == f"worker{number} {folder} -m ftwt_jax train --distributed {' '.join(RUN)}"
    assert len(cloud.trained) == WORKERS
    ran = (cloud.folder / "ran").read_text()
    for number in range(WORKERS):
        assert re.search(rf"worker{number} gcsfuse .*--rename-dir-limit=\d+ .* images /mnt/images\n", ran)


def test_a_preempted_slice_is_created_again_until_training_is_done(cloud):
    endings = f"{PREEMPTED}:SUSPENDING {LOST}:SUSPENDED 255:SUSPENDED 1:SUSPENDING 0"
    done = cloud.launch(*SLICE, *RUN, endings=endings)
    assert done.returncode == 0, done.stderr
    assert (cloud.count("create"), cloud.count("delete")) == (5, 5)
    assert len(cloud.trained) == 5 * WORKERS


def test_a_slice_that_survives_a_failure_is_used_again_and_then_replaced(cloud):
    done = cloud.launch(*SLICE, *RUN, endings=f"{LOST} {LOST} 0")
    assert done.returncode == 0, done.stderr
    assert (cloud.count("create"), cloud.count("delete")) == (2, 2)
    # The training was told to stop but the slice survived: it is kept.
    again = cloud.launch(*SLICE, *RUN, endings=f"{PREEMPTED} {PREEMPTED} {PREEMPTED} {PREEMPTED} 0")
    assert again.returncode == 0, again.stderr
    assert (cloud.count("create"), cloud.count("delete")) == (3, 3)


def test_it_gives_up_after_failures_in_a_row_and_leaves_no_slice(cloud):
    done = cloud.launch(*SLICE, *RUN, endings=" ".join([str(LOST)] * 9))
    assert done.returncode == LOST
    assert "giving up after 4 failures in a row; run the same command again" in done.stderr
    assert len(cloud.trained) == 4 * WORKERS
    assert not (cloud.folder / "state").exists()


def test_a_mistake_is_not_tried_again(cloud):
    done = cloud.launch(*SLICE, *RUN, endings="2")
    assert done.returncode == 2
    assert len(cloud.trained) == WORKERS
    assert not (cloud.folder / "state").exists()


def test_stopping_the_script_deletes_the_slice(cloud):
    process = cloud.start(*SLICE, *RUN, endings="never")
    wait_for_training(cloud)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert cloud.count("delete") == 1
    assert not (cloud.folder / "state").exists()


def test_a_slice_that_is_kept_serves_the_next_run(cloud):
    kept = cloud.launch(*SLICE, *RUN, "--keep", "--name=mine", endings="2")
    assert kept.returncode == 2
    assert "delete mine --force" in kept.stderr
    assert cloud.launch(*SLICE, *RUN, "--name=mine").returncode == 0
    assert (cloud.count("create"), cloud.count("delete")) == (1, 1)


def test_a_slice_that_cannot_be_created_is_reported_at_once(cloud):
    (cloud.folder / "no_create").touch()
    done = cloud.launch(*SLICE, *RUN)
    assert done.returncode == 2
    assert "ERROR: quota" in done.stderr
    assert cloud.count("delete") == 0


@pytest.fixture
def worker(cloud, tmp_path):
    """Starts one launch on a new worker."""
    folder = tmp_path / "worker"
    shutil.copytree(ROOT / "launch", folder / "launch")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "python", python)

    def train(launch, ending):
        (tmp_path / "launches").write_text(ending)
        command = ["bash", folder / "launch" / "tpu_worker.sh", "train", launch]
        return subprocess.Popen(command, env=os.environ | {"HOME": str(folder), "CLOUD": str(tmp_path), "WORKER": "0"})

    return train


def test_a_worker_that_receives_its_command_again_does_not_start_alone(cloud, worker):
    assert [worker(name, "0").wait(60) for name in ("first", "first", "second")] == [0, LOST, 0]
    assert len(cloud.trained) == 2


def test_a_process_left_of_an_earlier_launch_exits_first(cloud, worker):
    left_behind = worker("first", "never")
    wait_for_training(cloud)
    assert worker("second", "0").wait(60) == 0
    assert left_behind.wait(60) == -signal.SIGTERM


def test_an_nfs_share_is_mounted_in_place_of_a_bucket(cloud):
    nfs = ("--zone=here", "--type=v6e-16", "--nfs=10.0.0.2:/vol1", "--workdir=/mnt/vol1/run")
    assert cloud.launch(*nfs).returncode == 0
    assert "worker1 sudo mount -t nfs 10.0.0.2:/vol1 /mnt/vol1\n" in (cloud.folder / "ran").read_text()


def test_a_workdir_in_a_bucket_needs_no_shared_folder(cloud):
    done = cloud.launch("--zone=here", "--type=v6e-16", "--workdir=gs://images/run")
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in cloud.trained] == ["--workdir=gs://images/run"] * WORKERS
    assert not (cloud.folder / "ran").exists()


def test_a_dry_run_touches_nothing(cloud):
    done = cloud.launch(*SLICE, *RUN, "--dry-run")
    assert done.returncode == 0
    verbs = re.findall(r"^gcloud compute tpus \S+ (\w+) ", done.stdout, flags=re.MULTILINE)
    assert verbs == ["create", "describe", "scp", "ssh", "ssh", "delete"]
    assert not (cloud.folder / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--type=v6e-8", "--bucket=b", "--workdir=/mnt/b/run"), "--zone"),
        (("--zone=here", "--bucket=b", "--workdir=/mnt/b/run"), "--type"),
        (("--zone=here", "--type=v6e-8", "--workdir=/mnt/b/run"), "--bucket=NAME"),
        (("--zone=here", "--type=v6e-8", "--bucket=b", "--workdir=run"), "--workdir=/mnt/b/DIR"),
        (("--zone=here", "--type=v6e-8", "--bucket=b"), "--workdir=/mnt/b/DIR"),
        (("--zone=here", "--type=v99-8", "--bucket=b", "--workdir=/mnt/b/run"), "--runtime=VERSION"),
    ],
)
def test_a_missing_flag_is_named_in_one_line(cloud, arguments, says):
    done = cloud.launch(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("ftwt: error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not (cloud.folder / "calls").exists()
