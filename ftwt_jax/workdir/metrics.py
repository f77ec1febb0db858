"""The metrics that a run records while it trains: `metrics.jsonl`, and event files for TensorBoard."""

import contextlib
import functools
import importlib.util
import json
import pathlib
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

from ftwt_jax.errors import MissingPackageWarning, UserError, os_reason, storage_errors
from ftwt_jax.files import AnyPath, in_bucket, written_whole
from ftwt_jax.parallel.processes import is_first
from ftwt_jax.workdir import METRICS

Scalars = dict[str, float]


def rewind(path: AnyPath, stage: str, step: int) -> None:
    """Drops the lines of `stage` after `step`, which a resumed run writes again, and any line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["stage"] != stage or entry["step"] <= step:
            kept.append(line + "\n")
    with written_whole(path) as temporary:
        temporary.write_text("".join(kept))


@functools.cache
def has_tensorboard() -> bool:
    """Whether event files can be written; the first call says so where they cannot."""
    found = importlib.util.find_spec("tensorboardX") is not None
    if not found:
        message = f"tensorboardX is not installed: metrics go to {METRICS} alone, and no event files are written"
        warnings.warn(message, MissingPackageWarning, stacklevel=2)
    return found


@contextlib.contextmanager
def _hidden(*modules: str) -> Iterator[None]:
    """Keeps what is imported within the block from loading these, if it can do without them."""
    loaded: dict[str, Any] = sys.modules
    hidden = [name for name in modules if name not in loaded]
    # To Python, None is a module that cannot be imported.
    loaded.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del loaded[name]


class EventFile:
    """A file of TensorBoard events in a folder of the file system.

    Attributes:
      name: of the file.
    """

    def __init__(self, folder: AnyPath):
        # Loading PyTorch takes seconds.
        with _hidden("torch", "boto3", "google.cloud.storage"):
            from tensorboardX.record_writer import RecordWriter

        # A `SummaryWriter` writes in a thread, which swallows errors and prints them when the program ends; and
        # closing an `EventsWriter` fails on a full disk, which leaves its file open.
        self.name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        self._records = RecordWriter(str(folder / self.name))
        self._add(0, file_version="brain.Event:2")

    def restart(self, step: int) -> None:
        """Tells TensorBoard to discard what an interrupted process recorded from this step on."""
        from tensorboardX.proto.event_pb2 import SessionLog

        self._add(step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Scalars) -> None:
        """Adds scalars, and hands everything to the operating system."""
        from tensorboardX.summary import scalar

        for tag, value in scalars.items():
            self._add(step, summary=scalar(tag, float(value)))
        self._records.flush()

    def _add(self, step: int, **content: object) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def close(self) -> None:
        """Closes the file; raises `OSError` if the rest cannot be written."""
        self._records.close()


class MetricsWriter:
    """Writes the metrics of one stage as JSON lines and, where tensorboardX is installed, as TensorBoard events.

    Only the first process writes. A resumed stage replaces what it wrote after its checkpoint, so that no step appears
    twice.
    In a bucket, where nothing can be appended, both files are written again as a whole at each report, from copies on
    disk.

    Args:
      workdir: where the files go.
      stage: `baseline` or `gated`; prefix of every TensorBoard tag.
      start: step from which this stage continues.
      offset: added to the step in TensorBoard, where the stages follow each other on one axis.
    """

    def __init__(self, workdir: AnyPath, stage: str, start: int, offset: int):
        self._stage, self._offset = stage, offset
        self._workdir, self._active = workdir, is_first()
        if self._active:
            rewind(workdir / METRICS, stage, start)
            self._folder = pathlib.Path(tempfile.mkdtemp()) if in_bucket(workdir) else workdir
            self._open_lines()
            self._events = EventFile(self._folder) if has_tensorboard() else None
            if self._events is not None:
                self._events.restart(offset + start + 1)

    def _open_lines(self) -> None:
        if in_bucket(self._workdir) and (self._workdir / METRICS).exists():
            (self._folder / METRICS).write_bytes((self._workdir / METRICS).read_bytes())
        self._lines = (self._folder / METRICS).open("a", buffering=1)

    def write(self, step: int, scalars: Scalars) -> None:
        """Records metrics after `step` steps of the stage.

        Raises:
          UserError: the files cannot be written.
        """
        if not self._active:
            return
        entry = {"stage": self._stage, "step": step, **{k: float(v) for k, v in scalars.items()}}
        try:
            self._lines.write(json.dumps(entry) + "\n")
            if self._events is not None:
                self._events.write(self._offset + step, {f"{self._stage}/{k}": v for k, v in scalars.items()})
            if in_bucket(self._workdir):
                for name in (METRICS, *([] if self._events is None else [self._events.name])):
                    (self._workdir / name).write_bytes((self._folder / name).read_bytes())
        except storage_errors() as error:
            raise UserError(
                f"cannot write the metrics of step {step} to {self._workdir}: {os_reason(error)}; "
                "free some space, then run the same command again to continue from the newest checkpoint"
            ) from None

    def complete(self, step: int, scalars: Scalars) -> Scalars:
        """Adds to the metrics that an earlier process recorded of a step; returns them all."""
        if not self._active:
            return scalars
        path = self._workdir / METRICS
        lines = map(json.loads, path.read_text().splitlines())
        found = [line for line in lines if (line.pop("stage"), line.pop("step")) == (self._stage, step)]
        self._lines.close()
        rewind(path, self._stage, step - 1)
        self._open_lines()
        every = {key: value for line in found for key, value in line.items()} | scalars
        self.write(step, every)
        return every

    def close(self) -> None:
        """Closes both files."""
        if self._active:
            for file in (self._lines, *([] if self._events is None else [self._events])):
                # On a full disk the buffered rest cannot be written; `write` has already said so.
                with contextlib.suppress(OSError):
                    file.close()
            if in_bucket(self._workdir):
                shutil.rmtree(self._folder, ignore_errors=True)
