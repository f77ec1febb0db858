"""Told to stop by SIGTERM: at once while everything is saved, otherwise after the batch that is being computed."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils

# Exit status for launchers: everything is saved, and the same command continues from there.
PREEMPTED = 75
NOTHING_TO_SAVE = "told to stop; everything is saved"

_Batch = TypeVar("_Batch")


class _Handling(NamedTuple):
    """What Python does with signals: the handler of SIGTERM, and the file that their numbers are written to."""

    handler: Any
    wakeup: int


class Preempted(Exception):
    """The run was told to stop, and did so with everything saved; the message, on one line, says at which step."""


def said(message: str) -> str:
    """The line that a run ends with."""
    return f"ftwt: {message}; the same command continues from there"


class Preemption:
    """Whether the run was told to stop, by SIGTERM to any of its processes.

    A process that runs alone ends the moment it is told, also in the middle of a compilation, unless something is
    `unsaved`; then it ends when that is `saved`. Checks between batches see to it that this is soon.

    Several processes agree on the check at which they stop, through JAX's preemption service, which handles SIGTERM
    once they have joined. So all of them must make the same checks in the same order.
    """

    def __init__(self) -> None:
        self._told, self._checks = False, 0
        # What there is to say if the process ends now; None while something is unsaved.
        self._standing: str | None = NOTHING_TO_SAVE
        self._lock = threading.Lock()

    def reached(self) -> bool:
        """Whether to stop here; one check, which every process makes."""
        self._checks += 1
        self._told = self._told or multihost_utils.reached_preemption_sync_point(self._checks)
        return self._told

    def between(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """The batches, with a check before each; raises `Preempted` if the run was told to stop."""
        for batch in batches:
            if self.reached():
                raise Preempted(self._standing or NOTHING_TO_SAVE)
            yield batch

    def unsaved(self) -> None:
        """From here on there is something to save; raises `Preempted` if the run was told to stop just before."""
        with self._lock:
            if self._told:
                raise Preempted(self._standing or NOTHING_TO_SAVE)
            self._standing = None

    def saved(self, standing: str) -> None:
        """From here on everything is saved, and `standing` says so; raises `Preempted` if the run was told to stop."""
        with self._lock:
            self._standing = standing
            if self._told:
                raise Preempted(standing)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handles SIGTERM within the block, in the main thread of a run of one process."""
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = self.watch()
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before.handler)
            os.close(signal.set_wakeup_fd(before.wakeup))

    def watch(self) -> "_Handling":
        """Handles SIGTERM from here on; returns what handled it before."""
        # Python runs its handlers between two instructions of the main thread, which may spend minutes in the compiler.
        # The number of a signal is written to the pipe at once, and a thread waits there.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        threading.Thread(target=self._wait, args=(reader,), daemon=True).start()
        handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        return _Handling(handler, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))

    def _wait(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                with self._lock:
                    self._told = True
                    if self._standing is not None:
                        _end(self._standing)
        os.close(reader)


# Called before a process that was told to stop ends at once.
before_end: list[Callable[[], None]] = []
# Longest time in seconds for each.
PATIENCE = 3


def _end(standing: str) -> None:
    for action in list(before_end):
        # In a thread, since a file system, or the thread that was interrupted, may keep it waiting.
        thread = threading.Thread(target=action, daemon=True)
        thread.start()
        thread.join(timeout=PATIENCE)
    if sys.stdout.isatty():
        # A progress bar hides the cursor.
        os.write(1, b"\x1b[?25h\n")
    os.write(2, f"{said(standing)}\n".encode())
    os._exit(PREEMPTED)


def end_when_told() -> None:
    """Lets SIGTERM end the process at once with status `PREEMPTED`, until a run handles it."""
    Preemption().watch()
