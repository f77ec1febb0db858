"""A workdir in a bucket: the same run as on disk, also when killed, read by every command, refused in one line.

The bucket is served by `tests/helpers/gcs_server.py`; gcsfs, TensorStore and Google's client speak to it over HTTP.
"""

import dataclasses
import io
import json
import os
import pathlib
import sys
import threading
import time

import pytest
from rich.console import Console
from safetensors.numpy import load, load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftwt_jax.__main__ import main
from ftwt_jax.errors import UserError
from ftwt_jax.training.run import load_run
from ftwt_jax.training.settings import BASELINE, GATED
from ftwt_jax.workdir import absolute
from ftwt_jax.workdir import lock as locks
from ftwt_jax.workdir.bucket import open_bucket
from ftwt_jax.workdir.checkpoints import has_checkpoint, set_damaged_aside
from ftwt_jax.workdir.integrity import LIST, damage
from ftwt_jax.workdir.lock import PATTERN, Holder, RunLock
from tests.commands.test_train import assert_same
from tests.conftest import TINY, TINY_STEPS, fails
from tests.helpers.processes import assert_ends_like, completed, figures, wait_until, went_on
from tests.helpers.weight_files import convert, save, tiny

gcsfs = pytest.importorskip("gcsfs", reason="needs the extra [gcs]")
from tests.helpers.gcs_server import storage_server  # noqa: E402

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def storage():
    """A server that this process, and those that it starts, take for Google's."""
    with storage_server() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in served.environment.items():
            patch.setenv(name, value)
        open_bucket.cache_clear()
        yield served
        open_bucket.cache_clear()
        gcsfs.GCSFileSystem.clear_instance_cache()


def download(storage, folder: str, target: pathlib.Path) -> pathlib.Path:
    """A copy of a folder on disk."""
    for name, data in storage.folder(folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    return target


def copy(storage, folder: str, target: str):
    """A copy of a folder within the bucket; returns its path."""
    for name, data in storage.folder(folder).items():
        storage.put(f"{target}/{name}", data)
    return absolute(f"gs://bucket/{target}")


@pytest.fixture(scope="module")
def trained(storage, program) -> tuple[str, list[str]]:
    """The address of a finished run, which was killed in the middle of a save; and what each process printed."""
    address = "gs://bucket/deep/run"
    launched = dataclasses.replace(program, environment=program.environment | storage.environment)
    arguments = ["train", *TINY, f"--workdir={address}"]
    process = launched.start(*arguments)
    wait_until(lambda: any(name.startswith("deep/run/checkpoints/baseline/12/") for name in storage.objects), process)
    process.kill()
    printed, _ = process.communicate()
    assert any(name.startswith("deep/run/lock-") for name in storage.objects)
    return address, [printed, launched.run(*arguments)]


def test_a_run_that_was_killed_ends_as_one_on_disk(storage, trained, tiny_run, tmp_path):
    stage, step = went_on(trained[1][1]) or ("", 0)
    assert (stage, step in (8, 12)) == (BASELINE, True)
    local = download(storage, "deep/run", tmp_path / "run")
    assert figures(local) == figures(tiny_run[0])
    # A copy on disk is a workdir, too.
    assert_ends_like(local, tiny_run[0])
    for name in ("config.json", "estimate.json"):
        assert (local / name).read_text() == (tiny_run[0] / name).read_text()
    for kind in (BASELINE, GATED):
        steps = completed(local, kind)
        assert TINY_STEPS in steps
        assert len(steps) <= 3
        assert all((local / "checkpoints" / kind / str(step) / LIST).exists() for step in steps)
    assert not list(local.glob(PATTERN))
    events = EventAccumulator(str(local)).Reload()
    assert [event.step for event in events.Scalars("gated/loss")] == list(range(TINY_STEPS + 2, 2 * TINY_STEPS + 1, 2))


def test_commands_read_it_and_write_there(storage, trained, tmp_path, capsys, quick_compilation):
    address, _ = trained
    assert main(["estimate", f"--workdir={address}", "--r=0.9"]) == 0
    assert storage.folder("deep/run")["estimate.png"].startswith(b"\x89PNG")
    assert main(["report", address]) == 0
    assert b"deep/run" in storage.folder("deep/run/report")["index.html"]
    exports = [f"{folder}/network.safetensors" for folder in (tmp_path, "gs://bucket/exports")]
    for out in exports:
        assert main(["export", f"--workdir={address}", f"--out={out}"]) == 0
    here, there = load_file(tmp_path / "network.safetensors"), load(storage.folder("exports")["network.safetensors"])
    assert_same(here, there)
    assert "already exists" in fails(capsys, "export", f"--workdir={address}", f"--out={exports[1]}")


def test_a_network_is_converted_into_a_bucket_and_back(storage, capsys, tmp_path, quick_compilation):
    checkpoint = save(tiny(gated=True, channels=1), tmp_path / "net.safetensors")
    address = "gs://bucket/converted/run"
    convert(checkpoint, address, *TINY)
    assert {"config.json", "conversion.safetensors"} <= storage.folder("converted/run").keys()
    assert "already exists" in fails(capsys, "convert", f"--checkpoint={checkpoint}", f"--out={address}", *TINY)
    for name in ("network.safetensors", "network.stablehlo"):
        assert main(["export", f"--workdir={address}", f"--out=gs://bucket/converted/{name}"]) == 0
    assert_same(load(storage.folder("converted")["network.safetensors"]), load_file(checkpoint))
    assert storage.folder("converted")["network.stablehlo"]
    before = dict(storage.objects)
    capsys.readouterr()
    for out, command in (("gs:/bucket/a.safetensors", "export"), ("gs:bucket/a", "convert")):
        given = [f"--workdir={address}"] if command == "export" else [f"--checkpoint={checkpoint}", *TINY]
        assert "for a bucket, write gs://bucket/a" in fails(capsys, command, *given, f"--out={out}")
    assert storage.objects == before


def test_a_run_on_disk_starts_from_it(trained, tmp_path, quick_compilation):
    workdir = tmp_path / "run"
    arguments = [*TINY, "--config.baseline.epochs=0", "--config.gates.epochs=0", f"--config.init_from={trained[0]}"]
    assert main(["train", *arguments, f"--workdir={workdir}"]) == 0
    assert completed(workdir, BASELINE) == [0]
    assert json.loads((workdir / "config.json").read_text())["init_from"] == trained[0]


def test_a_run_that_was_copied_from_a_disk_is_read(storage, tiny_run):
    for path in tiny_run[0].rglob("*"):
        if path.is_file():
            storage.put(f"copied/{path.relative_to(tiny_run[0])}", path.read_bytes())
    path = absolute("gs://bucket/copied")
    # What `train` begins with.
    assert [set_damaged_aside(path, stage) for stage in (BASELINE, GATED)] == [[], []]
    run = load_run(str(path))
    assert_same(run.trained(GATED), load_run(str(tiny_run[0])).trained(GATED))
    assert run.steps_of(BASELINE) == TINY_STEPS


# The damage to the files of a checkpoint, and words of the message.
DAMAGES = {
    "gone": (lambda storage, name: storage.delete(name), "is missing"),
    "cut short": (lambda storage, name: storage.put(name, storage.get(name).data[:-1]), "bytes long"),
    "another": (lambda storage, name: storage.put(name, bytes(len(storage.get(name).data))), "have changed"),
}


@pytest.mark.parametrize(
    ("part", "kind"), [*(("network/d/", kind) for kind in DAMAGES), ("commit_success.txt", "gone")]
)
def test_a_damaged_checkpoint_is_set_aside(storage, trained, kind, part):
    harm, says = DAMAGES[kind]
    copied = f"{kind}/{part}".replace("/", "-").replace(" ", "-")
    path = copy(storage, "deep/run", copied)
    folder = f"{copied}/checkpoints/{BASELINE}/{TINY_STEPS}"
    name = min(name for name in storage.objects if name.startswith(f"{folder}/{part}"))
    checkpoint = path / "checkpoints" / BASELINE / str(TINY_STEPS)
    assert damage(checkpoint) is None
    harm(storage, name)
    before = storage.folder(folder)
    (note,) = set_damaged_aside(path, BASELINE)
    assert name.removeprefix(f"{folder}/") in note
    assert says in note
    assert storage.folder(f"{copied}/checkpoints/{BASELINE}/damaged-{TINY_STEPS}") == before
    assert storage.folder(folder) == {}
    assert set_damaged_aside(path, BASELINE) == []
    assert has_checkpoint(path, BASELINE)
    assert load_run(str(path)).steps_of(BASELINE) < TINY_STEPS


def test_one_run_of_several_gets_a_bucket(storage, monkeypatch):
    for name, seconds in {"HEARTBEAT": 0.2, "STALE": 2, "_POLL": 0.05, "RETRY": 0.2}.items():
        monkeypatch.setattr(locks, name, seconds)
    workdir = absolute("gs://bucket/locked")
    left = PATTERN.replace("*", "left")
    other = dataclasses.replace(Holder.here(), host="node7", boot="another")
    storage.put(f"locked/{left}", json.dumps(dataclasses.asdict(other)).encode())
    starters = [RunLock(workdir, Console(file=io.StringIO())) for _ in range(4)]
    outcomes = []

    def start(lock: RunLock) -> None:
        try:
            lock.acquire(create=True)
            outcomes.append("got it")
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=start, args=(lock,)) for lock in starters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    refusals = [outcome for outcome in outcomes if outcome != "got it"]
    assert len(refusals) == 3
    assert all(f"gs://bucket/locked: process {os.getpid()} on" in refusal for refusal in refusals)
    (name,) = storage.folder("locked")
    assert name != left
    written = storage.written[f"locked/{name}"]
    deadline = time.monotonic() + 30
    while storage.written[f"locked/{name}"] < written + 2:
        assert time.monotonic() < deadline, "its heart beats"
        time.sleep(0.05)
    for lock in starters:
        lock.release()
    assert storage.folder("locked") == {}


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("gs://other/run", "The specified bucket does not exist"),
        ("gs://bucket", "is not the address of a folder in a bucket, such as gs://BUCKET/run"),
        ("gs://bucket/a/../b", "is not the address of a folder"),
        ("s3://bucket/run", "neither a folder nor in a bucket of Google Cloud"),
        ("hf://user/run", "neither a folder nor in a bucket of Google Cloud"),
        ("https://host/run", "neither a folder nor in a bucket of Google Cloud"),
        ("gs://bucket/none", "there is no workdir gs://bucket/none"),
    ],
)
def test_an_address_that_is_no_workdir_is_one_line(storage, capsys, address, says):
    before = dict(storage.objects)
    error = fails(capsys, "evaluate", f"--workdir={address}")
    assert says in error
    assert address in error
    assert storage.objects == before


@pytest.mark.parametrize("only_changes", [False, True], ids=["reading", "writing"])
def test_missing_rights_are_one_line(storage, capsys, monkeypatch, only_changes):
    open_bucket.cache_clear()
    message = "me@example.org does not have storage.objects access to the Google Cloud Storage bucket."
    monkeypatch.setattr(storage, "denied", (403, message))
    monkeypatch.setattr(storage, "only_changes", only_changes)
    error = fails(capsys, "train", *TINY, "--workdir=gs://bucket/denied")
    for words in (message, "gs://bucket/denied", "cannot write" if only_changes else "gcloud auth"):
        assert words in error
    assert not storage.folder("denied")


def test_without_gcsfs_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    open_bucket.cache_clear()
    assert "pip install -e '.[gcs]'" in fails(capsys, "evaluate", "--workdir=gs://bucket/run")
