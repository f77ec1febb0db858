"""A run of several processes: joining, exchanging small values, and losing one of them."""

import importlib.util
import json
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ftwt_jax.errors import UserError, one_line, shortened
from ftwt_jax.parallel.preemption import PREEMPTED

# Exit status for launchers: another process was lost, and the same command continues from the newest checkpoint.
LOST = 76
# Seconds without a heartbeat after which a process counts as lost.
HEARTBEAT = 60
# Seconds to wait for the other processes at the start; a cluster may start its hosts minutes apart.
START = 300
# Seconds that the first process waits before it exits with an error, so that the others can print theirs.
GRACE = 3

# The status at the start of an error of a collective operation: UNAVAILABLE: connection reset by peer
_STATUS = re.compile("(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL): ")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_REMEDY = f"set {ADDRESS}, {COUNT} and {INDEX}, or run a single process with --nodistributed"
# Set by Open MPI up to version 4; JAX finds the other tasks with it.
_ORTE = "OMPI_MCA_orte_hnp_uri"


class Lost(Exception):
    """Another process of the run did not join, or was lost; the message, on one line, says what is known."""


def join(wanted: bool | None = None) -> None:
    """Joins the other processes of the run, if this process was started as one of several.

    That is the case under `srun`, `mpirun` or `torchrun` with more than one task, and if `JAX_COORDINATOR_ADDRESS`
    (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are set. Must run before any other use of JAX;
    does nothing if the program has already called `jax.distributed.initialize`.

    Args:
      wanted: True: join whatever JAX detects (Cloud TPU slices); False: run alone; None: as described above.

    Raises:
      UserError: variables are missing, or the other processes cannot be found.
      Lost: the other processes did not join in time.
    """
    if wanted is False or jax.distributed.is_initialized():
        return
    launched = _launched()
    if launched is None and not wanted:
        return
    try:
        jax.distributed.initialize(
            **(launched or {}), initialization_timeout=START, heartbeat_timeout_seconds=HEARTBEAT
        )
    except ValueError as error:
        raise UserError(f"cannot find the other processes of this run: {one_line(error)}; {_REMEDY}") from None
    except RuntimeError as error:
        raise Lost(f"not all processes of this run joined within {START} seconds: {shortened(error)}") from None


def _launched() -> dict[str, Any] | None:
    """What `jax.distributed.initialize` must be told of the launcher of this process; None if it was started alone."""
    given = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}
    if any(given.values()):
        return _described(given)
    step, open_mpi, pmi = (
        _number(os.environ.get(name)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    )
    if open_mpi > 1 and _ORTE in os.environ:
        return {}
    # `mpirun` may start its daemons with `srun`, whose variables its own tasks inherit.
    if open_mpi > 1 or (pmi > 1 and pmi != step):
        return _by_mpi4py(max(open_mpi, pmi))
    if step > 1:
        return {}
    if "SLURM_STEP_NUM_TASKS" not in os.environ and _number(os.environ.get("SLURM_PROCID")) > 0:
        # Passed on by hand, into a container for example. Without `srun` a job has a single process, number 0.
        raise UserError(
            f"SLURM_PROCID={os.environ['SLURM_PROCID']} says that this is one of several tasks, which cannot find each "
            f"other without SLURM_STEP_NUM_TASKS and the other variables of srun: pass them on; or {_REMEDY}"
        )
    return _by_torchrun()


def _described(given: dict[str, str | None]) -> dict[str, Any]:
    """The run that JAX's own variables describe."""
    if given[COUNT] is None and given[INDEX] is None:
        return {"coordinator_address": given[ADDRESS]}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(f"{', '.join(missing)} must be set too for this process to join the others of the run")
    count, index = _number(given[COUNT]), _number(given[INDEX])
    if not 0 <= index < count:
        raise UserError(f"{INDEX} must be at least 0 and less than {COUNT}; got {given[INDEX]!r} and {given[COUNT]!r}")
    return {"coordinator_address": given[ADDRESS], "num_processes": count, "process_id": index}


def _by_mpi4py(tasks: int) -> dict[str, Any]:
    """How tasks of MPICH, Intel MPI and Open MPI 5 find each other; older ones of Open MPI tell JAX themselves."""
    if importlib.util.find_spec("mpi4py") is None:
        raise UserError(
            f"this is one of {tasks} tasks of mpirun, which cannot find each other without mpi4py: pip install mpi4py; "
            f"or {_REMEDY}"
        )
    return {"cluster_detection_method": "mpi4py"}


def _by_torchrun() -> dict[str, Any] | None:
    """The run that torchrun's variables describe; None if they are not all there, or there is one process."""
    names = ("WORLD_SIZE", "RANK", "MASTER_PORT")
    count, index, port = (_number(os.environ.get(name), missing=-1) for name in names)
    host = os.environ.get("MASTER_ADDR")
    if not host or port < 0 or not 0 <= index < count or count < 2:
        return None
    # The port itself belongs to PyTorch's store. JAX derives one from the number of a Slurm job in the same way.
    several_here = _number(os.environ.get("LOCAL_WORLD_SIZE")) > 1
    return {
        "coordinator_address": f"{host}:{port % 2**12 + 2**16 - 2**12}",
        "num_processes": count,
        "process_id": index,
        # One device each.
        "local_device_ids": [_number(os.environ.get("LOCAL_RANK"))] if several_here else None,
    }


def _number(text: str | None, missing: int = 0) -> int:
    try:
        return int(text or missing)
    except ValueError:
        return -1


def cpu_count() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_first() -> bool:
    """Whether this is process 0, which prints and writes the files of the run."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Waits until every process has reached this point; `where` names it in error messages."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def broadcast(value: int) -> int:
    """The value of process 0 on every process; needed for what processes could see differently, such as files."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value))) if jax.process_count() > 1 else value


def all_gather(names: Sequence[str]) -> list[str]:
    """The names of all processes, without duplicates."""
    if jax.process_count() == 1:
        return list(names)
    mine = np.frombuffer(json.dumps(list(names)).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int64(len(mine)))))
    rows = multihost_utils.process_allgather(np.pad(mine, (0, longest - len(mine)), constant_values=ord(" ")))
    return list(dict.fromkeys(name for row in rows for name in json.loads(row.tobytes())))


def lost_process(error: Exception) -> Lost | None:
    """The `Lost` that an error of this process amounts to; None if it does not mean that another process was lost.

    Collective operations fail when a process is gone. JAX raises a `JaxRuntimeError`, or on some paths a `ValueError`
    or `OSError` whose message begins with the name of a status.
    """
    if jax.process_count() == 1 or not (isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))):
        return None
    return Lost(f"another process was lost; see its own output for the reason (error here: {shortened(error)})")


def raise_if_lost(error: Exception) -> None:
    """Raises `Lost` if the error means that another process was lost; errors of files have other statuses."""
    lost = lost_process(error)
    if lost is not None:
        raise lost from error


def leave(status: int) -> None:
    """Ends a failed process of several at once: an orderly exit would wait for the others, and they for it."""
    if not status or status == PREEMPTED or not jax.distributed.is_initialized():
        return
    if is_first():
        # The others lose their connection when process 0 exits; one with the same error should still report it.
        time.sleep(GRACE)
    os._exit(status)
