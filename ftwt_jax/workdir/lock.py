"""One training run for one workdir: a file there says which process writes.

Every run writes a lock with a name of its own, then looks for others. Of several that start at the same moment, those
that see another one withdraw and try again after a random time, so that never two go on. This asks nothing of a file
system but that a new file is seen by whoever looks after it was written; and the lock of a dead run can be removed by
anyone, since no other run's has its name.
"""

import contextlib
import dataclasses
import datetime
import fnmatch
import json
import os
import pathlib
import random
import socket
import threading
import time
import uuid

from rich.console import Console

from ftwt_jax.errors import UserError, one_line, storage_errors
from ftwt_jax.files import AnyPath, list_folder, written_whole
from ftwt_jax.parallel.preemption import before_end
from ftwt_jax.parallel.processes import all_gather, is_first
from ftwt_jax.printing import say
from ftwt_jax.workdir import make

PATTERN = "lock-*.json"
# Seconds between two heartbeats, and without one after which a run counts as dead. File systems of several hosts may
# show a file as it was a minute ago.
HEARTBEAT, STALE = 10, 90
# Longest pause in seconds before a run tries again that started at the same moment as another.
RETRY = 1.0
_POLL = 0.5
_PROC = pathlib.Path("/proc")


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
      since: local time at which it took the lock.
      started: start of the process, in clock ticks since boot; process numbers are used again.
      boot, namespace: the boot of the machine, and the namespace of its process numbers, which containers with equal
        host names do not share. Empty where the system does not tell.
    """

    host: str
    process: int
    since: str
    started: int
    boot: str
    namespace: str

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        try:
            boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink(_PROC / "self/ns/pid")
        except OSError:
            boot = namespace = ""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), now, _start(os.getpid()) or 0, boot, namespace)

    @classmethod
    def parse(cls, text: bytes) -> "Holder | None":
        """The holder that a lock names; None if it is not readable."""
        try:
            found = json.loads(text)
            host, since, boot, namespace = (str(found[name]) for name in ("host", "since", "boot", "namespace"))
            return cls(host, int(found["process"]), since, int(found["started"]), boot, namespace)
        except (ValueError, KeyError, TypeError):
            return None

    def is_alive(self, here: "Holder") -> bool | None:
        """Whether the process runs; None if the process `here` cannot tell, because it sees other processes."""
        if not self.boot or (self.host, self.boot, self.namespace) != (here.host, here.boot, here.namespace):
            return None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            # Another user's, whose start may be hidden.
            return None
        return _start(self.process) == self.started

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


class RunLock:
    """The right of one run to write to a workdir, for a `with` block; every process of a run must use it alike.

    Args:
      console: where a run says that it waits.
    """

    def __init__(self, workdir: AnyPath, console: Console):
        self._workdir, self._console = workdir, console
        self._path = workdir / PATTERN.replace("*", uuid.uuid4().hex[:12])
        self._here = Holder.here()
        self._ended = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self, create: bool) -> None:
        """Takes the lock, if this run does not have it yet.

        A lock whose process is dead does not count. Where only its heartbeat can tell, this waits for the next one, at
        most `STALE` seconds.

        Args:
          create: make the workdir if it is missing; otherwise a missing one is not locked.

        Raises:
          UserError: another run holds it, or the workdir cannot be written; on every process.
        """
        refusal = []
        if is_first() and self._heartbeat is None and (create or self._workdir.is_dir()):
            try:
                self._take()
            except storage_errors(UserError) as error:
                refusal = [one_line(error)]
        for message in all_gather(refusal):
            raise UserError(message)

    def _take(self) -> None:
        make(self._workdir)
        while True:
            for path in self._others():
                self._remove_if_dead(path)
            if self._is_alone():
                break
            time.sleep(random.uniform(0, RETRY))
        self._heartbeat = threading.Thread(target=self._beat, daemon=True, name="heartbeat of the workdir's lock")
        self._heartbeat.start()
        before_end.append(self.release)

    def _is_alone(self) -> bool:
        """Writes the lock, and takes it back if there is another one."""
        with written_whole(self._path) as temporary:
            temporary.write_text(self._content(0))
        alone = False
        try:
            alone = not self._others()
        finally:
            if not alone:
                self._path.unlink(missing_ok=True)
        return alone

    def _others(self) -> list[AnyPath]:
        found = [path for path in list_folder(self._workdir) if fnmatch.fnmatch(path.name, PATTERN)]
        return [path for path in found if path.name != self._path.name]

    def _remove_if_dead(self, path: AnyPath) -> None:
        """Removes the lock of a dead run; raises `UserError` if the run is alive."""
        seen, since = None, time.monotonic()
        while True:
            try:
                text = path.read_bytes()
            except FileNotFoundError:
                return
            holder = Holder.parse(text)
            alive = holder.is_alive(self._here) if holder else None
            if alive or (seen is not None and text != seen):
                raise UserError(
                    f"another run trains in {self._workdir}: {holder or 'its lock cannot be read'}; stop it or wait "
                    "until it ends, or choose another --workdir"
                )
            if alive is False or time.monotonic() - since >= STALE:
                path.unlink(missing_ok=True)
                return
            if seen is None:
                seen = text
                who = f"{self._workdir} is locked by {holder or path.name}"
                say(self._console, f"{who}: waiting for a sign of life, at most {STALE} s")
            time.sleep(_POLL)

    def _content(self, beats: int) -> str:
        return json.dumps({**dataclasses.asdict(self._here), "beats": beats}) + "\n"

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(HEARTBEAT):
            beats += 1
            try:
                self._rewrite(self._content(beats))
            except FileNotFoundError:
                self._end()
            except storage_errors(UserError):
                # The next one may succeed.
                continue

    def _rewrite(self, text: str) -> None:
        """Replaces what the lock says; raises `FileNotFoundError` if it is gone."""
        if isinstance(self._path, pathlib.Path):
            # In place: this needs no space on a full disk, and other clients of NFS see it when they open the file.
            with self._path.open("r+") as file:
                file.write(text)
        elif self._path.exists():
            self._path.write_text(text)
        else:
            raise FileNotFoundError

    def _end(self) -> None:
        """Ends the process at once: whoever removed its lock may write here now."""
        if not self._ended.is_set():
            text = f"ftwt: error: {self._path} was removed: {self._workdir} may belong to another run now\n"
            os.write(2, text.encode())
            os._exit(2)

    def release(self) -> None:
        """Gives the lock back, if this run has it."""
        self._ended.set()
        if self._heartbeat is not None:
            self._heartbeat.join(timeout=HEARTBEAT)
            self._heartbeat = None
            before_end.remove(self.release)
            # Where it cannot be removed, it will be stale.
            with contextlib.suppress(*storage_errors()):
                self._path.unlink(missing_ok=True)


def _start(process: int) -> int | None:
    """Start of a process in clock ticks since boot; None if it is gone, or only waits to be reaped."""
    try:
        # 1234 (python (a)) S 1 ...: the name may hold anything, so fields are counted from its end.
        state, *fields = (_PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])
