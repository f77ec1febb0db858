"""Several processes of one run: how they join, who writes, when all of them stop, and what is said when one is lost."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ftwt_jax.errors import UserError, one_line, shortened

# Exit statuses for whatever started the program: stopped by SIGTERM with everything saved, and another process was
# lost. After both, the same command goes on from the newest checkpoint.
PREEMPTED, LOST = 75, 76
# Seconds without a sign of life after which a process counts as lost.
HEARTBEAT = 60
# Seconds to wait for the others at the start; a cluster may bring up its hosts minutes apart.
START = 300
GRACE = 3

_EXCHANGE = re.compile("(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL): ")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


class Preempted(Exception):
    """The run was told to stop and did, with everything saved; the message, on one line, says where."""


class Lost(Exception):
    """Another process of the run is not there, or no longer; the message, on one line, says what is known."""


def join(wanted: bool | None = None) -> None:
    """Makes this process one of several if it was started as such; call it before anything else of JAX.

    That is so under `srun` or `mpirun` with more than one task, and where `JAX_COORDINATOR_ADDRESS` (host:port of
    process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are set. A program that has called
    `jax.distributed.initialize` is left as it is.

    Args:
      wanted: True: join whatever JAX itself finds (Cloud TPU slices); False: stay alone; None: as above.

    Raises:
      UserError: variables are missing, or JAX finds no other processes.
      Lost: the others did not come in time.
    """
    if wanted is False or jax.distributed.is_initialized():
        return
    given = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}
    tasks = max(_number(os.environ.get(name)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if not wanted and not any(given.values()) and tasks < 2:
        return
    if given[COUNT] is not None or given[INDEX] is not None:
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise UserError(f"{', '.join(missing)} must be set too, to join the other processes of this run")
        if not 0 <= _number(given[INDEX]) < _number(given[COUNT]):
            raise UserError(
                f"{INDEX} must lie between 0 and {COUNT} - 1; they are {given[INDEX]!r} and {given[COUNT]!r}"
            )
    known = given[COUNT] is not None
    try:
        jax.distributed.initialize(
            coordinator_address=given[ADDRESS],
            num_processes=_number(given[COUNT]) if known else None,
            process_id=_number(given[INDEX]) if known else None,
            initialization_timeout=START,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except ValueError as error:
        raise UserError(
            f"this process cannot find the others: {one_line(error)}; set {ADDRESS}, {COUNT} and {INDEX}, or start it "
            "alone with --nodistributed"
        ) from None
    except RuntimeError as error:
        raise Lost(f"the processes of this run did not all come within {START} seconds: {shortened(error)}") from None


def _number(text: str | None) -> int:
    try:
        return int(text or 0)
    except ValueError:
        return -1


def cpu_count() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_first() -> bool:
    """Whether this is the process that prints, and writes what is written once."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def broadcast(value: int) -> int:
    """The first process's number on every process, for what they would otherwise each look up at another moment."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value))) if jax.process_count() > 1 else value


def all_gather(names: Sequence[str]) -> list[str]:
    """What all processes name, each name once."""
    if jax.process_count() == 1:
        return list(names)
    mine = np.frombuffer(json.dumps(list(names)).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int64(len(mine)))))
    rows = multihost_utils.process_allgather(np.pad(mine, (0, longest - len(mine)), constant_values=ord(" ")))
    return list(dict.fromkeys(name for row in rows for name in json.loads(row.tobytes())))


class Preemption:
    """Whether the run has been told to stop, by SIGTERM to any of its processes.

    Several processes agree on the step at which all of them do; JAX's preemption service sees to that. It takes over
    SIGTERM as soon as the processes have joined.
    """

    def __init__(self) -> None:
        self._told = threading.Event()

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after every step, by a number that always grows."""
        return self._told.is_set() or multihost_utils.reached_preemption_sync_point(step)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Listens to SIGTERM where this process is the only one, and its main thread calls."""
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda number, frame: self._told.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def lost_process(error: Exception) -> Lost | None:
    """What an error means in the middle of a run of several processes; None if it is not that another one was lost.

    What the processes exchange fails when one of them is gone, and the error says little else. JAX raises a
    `JaxRuntimeError`; on some ways a `ValueError` or `OSError` whose message begins with the name of such a status.
    """
    if jax.process_count() == 1 or not (isinstance(error, jax.errors.JaxRuntimeError) or _EXCHANGE.match(str(error))):
        return None
    return Lost(f"another process was lost, and its own output says why; here it looks like this: {shortened(error)}")


def raise_if_lost(error: Exception) -> None:
    """Raises `Lost` for an error that only means that; of files, errors have other statuses."""
    lost = lost_process(error)
    if lost is not None:
        raise lost from error


def end_when_told() -> None:
    """Lets SIGTERM end the process with `PREEMPTED` at once, as long as there is nothing to save."""

    def end(number: int, frame: Any) -> None:
        os.write(2, b"ftwt: told to stop, with nothing to save; the same command goes on from the newest checkpoint\n")
        os._exit(PREEMPTED)

    signal.signal(signal.SIGTERM, end)


def leave(status: int) -> None:
    """Ends a process that joined others and failed, at once: an orderly end would wait for them, and they for it."""
    if not status or status == PREEMPTED or not jax.distributed.is_initialized():
        return
    if is_first():
        # The others meet here; one that makes the same mistake a moment later should still be able to say so.
        time.sleep(GRACE)
    os._exit(status)
