"""A workdir belongs to one training run: who gets it, and when the lock of a dead run no longer counts."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from ftwt_jax.errors import UserError
from ftwt_jax.workdir import lock as locks
from ftwt_jax.workdir.lock import PATTERN, Holder, RunLock

HERE = Holder.here()
ELSEWHERE = dataclasses.replace(HERE, host="node7", process=1234, boot="another")


@pytest.fixture
def quick(monkeypatch):
    """The same in hundredths of the time."""
    for name, seconds in {"HEARTBEAT": 0.1, "STALE": 1, "_POLL": 0.02, "RETRY": 0.02}.items():
        monkeypatch.setattr(locks, name, seconds)


@pytest.fixture
def take():
    """Takes the lock of a workdir; returns the lock and what was printed. All are released in the end."""
    taken = []

    def acquired(workdir, create=True) -> tuple[RunLock, str]:
        printed = io.StringIO()
        taken.append(RunLock(workdir, Console(file=printed, width=200)))
        taken[-1].acquire(create)
        return taken[-1], printed.getvalue()

    yield acquired
    for lock in taken:
        lock.release()


def leave(workdir, holder: Holder, name: str = "left", beats: int = 0):
    """The lock that a process left behind."""
    path = workdir / PATTERN.replace("*", name)
    path.write_text(json.dumps({**dataclasses.asdict(holder), "beats": beats}))
    return path


def ended_process(kill: bool) -> Holder:
    """What `Holder.here` gives in another process, which has ended; if `kill`, it still waits to be reaped."""
    code = "import dataclasses, json; from ftwt_jax.workdir.lock import Holder; print(json.dumps(dataclasses.asdict("
    code += "Holder.here())), flush=True); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    holder = Holder(**json.loads(process.stdout.readline()))
    assert holder.is_alive(HERE) is True
    process.kill()
    if kill:
        time.sleep(0.2)
        return holder
    process.communicate()
    return holder


def test_a_workdir_is_locked_while_a_run_holds_it_and_clean_afterwards(tmp_path, take):
    workdir = tmp_path / "deep" / "run"
    lock, _ = take(workdir, create=False)
    assert not workdir.exists()
    lock.acquire(create=True)
    lock.acquire(create=True)
    (path,) = workdir.iterdir()
    with pytest.raises(UserError) as refused:
        take(workdir)
    for words in (f"another run trains in {workdir}", f"process {os.getpid()} on {HERE.host}", "--workdir"):
        assert words in str(refused.value)
    assert list(workdir.iterdir()) == [path]
    lock.release()
    assert not list(workdir.iterdir())
    take(workdir, create=False)


@pytest.mark.parametrize("kill", [False, True], ids=["gone", "not yet reaped"])
def test_a_dead_process_of_this_host_blocks_nobody(tmp_path, take, kill):
    left = leave(tmp_path, ended_process(kill))
    start = time.monotonic()
    _, printed = take(tmp_path)
    assert time.monotonic() - start < 1
    assert (left.exists(), printed) == (False, "")


def test_another_process_with_the_number_of_a_dead_one_blocks_nobody(tmp_path, take):
    left = leave(tmp_path, dataclasses.replace(HERE, started=HERE.started - 1))
    assert take(tmp_path)[1] == ""
    assert not left.exists()


# Processes whose number means nothing here, although there is a process with it, or none.
OTHERS = {
    "another host": ELSEWHERE,
    "a host of the same name": dataclasses.replace(HERE, boot="another"),
    "a container on this host": dataclasses.replace(HERE, namespace="pid:[1]", process=2**22 + 1),
    "a system that does not tell": dataclasses.replace(HERE, boot="", namespace=""),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_process_elsewhere_is_dead_when_its_heartbeat_is(tmp_path, take, quick, other):
    left = leave(tmp_path, OTHERS[other])
    start = time.monotonic()
    _, printed = take(tmp_path)
    assert time.monotonic() - start > locks.STALE
    assert printed.count("\n") == 1
    assert f"process {OTHERS[other].process} on {OTHERS[other].host}" in printed
    assert "at most 1 s" in printed
    assert not left.exists()


@pytest.mark.parametrize("other", OTHERS)
def test_a_process_elsewhere_is_alive_while_its_heart_beats(tmp_path, take, quick, other):
    left = leave(tmp_path, OTHERS[other])
    threading.Timer(0.3, leave, (tmp_path, OTHERS[other], "left", 1)).start()
    with pytest.raises(UserError, match=f"process {OTHERS[other].process} on {OTHERS[other].host}"):
        take(tmp_path)
    assert list(tmp_path.iterdir()) == [left]


def test_a_lock_given_back_while_another_run_waits_is_taken(tmp_path, take, quick):
    left = leave(tmp_path, ELSEWHERE)
    threading.Timer(0.3, left.unlink).start()
    start = time.monotonic()
    take(tmp_path)
    assert time.monotonic() - start < locks.STALE


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "node7"}'])
def test_an_unreadable_lock_goes_stale(tmp_path, take, quick, text):
    left = tmp_path / PATTERN.replace("*", "left")
    left.write_text(text)
    assert left.name in take(tmp_path)[1]
    assert not left.exists()


def test_a_lock_beats_visibly(tmp_path, take, quick):
    take(tmp_path)
    (path,) = tmp_path.iterdir()
    seen = set()
    deadline = time.monotonic() + 10
    while len(seen) < 3 and time.monotonic() < deadline:
        seen.add(path.read_text())
        time.sleep(0.01)
    assert len({json.loads(text)["beats"] for text in seen}) == len(seen) == 3


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
def test_of_many_runs_that_start_at_once_one_gets_the_workdir(tmp_path, quick, monkeypatch, stale):
    monkeypatch.setattr(locks, "STALE", 0.1)
    for turn in range(10):
        workdir = tmp_path / str(turn)
        workdir.mkdir()
        if stale:
            leave(workdir, ELSEWHERE)
        starters = [RunLock(workdir, Console(file=io.StringIO())) for _ in range(6)]
        together, outcomes = threading.Barrier(len(starters)), []

        def start(lock, together=together, outcomes=outcomes):
            together.wait()
            try:
                lock.acquire(create=True)
                outcomes.append("got it")
            except UserError as error:
                outcomes.append(str(error).partition(" in ")[0])

        threads = [threading.Thread(target=start, args=(lock,)) for lock in starters]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(outcomes) == ["another run trains"] * 5 + ["got it"], turn
        assert len(list(workdir.iterdir())) == 1
        for lock in starters:
            lock.release()
        assert not list(workdir.iterdir())


def test_a_run_whose_lock_was_taken_over_ends(tmp_path):
    """As happens to a process that was stopped for minutes, and goes on."""
    code = f"""
import pathlib, time
from rich.console import Console
from ftwt_jax.workdir import lock
lock.HEARTBEAT = 0.1
lock.RunLock(pathlib.Path({str(tmp_path)!r}), Console()).acquire(create=True)
print("holds it", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    (path,) = tmp_path.iterdir()
    path.unlink()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    assert error == f"ftwt: error: {path} was removed: {tmp_path} may belong to another run now\n"
