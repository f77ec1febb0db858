"""The metrics that a run records while it trains: `metrics.jsonl`, and event files for TensorBoard."""

import contextlib
import functools
import importlib.util
import json
import pathlib
import socket
import time
import warnings

from ftwt_jax.errors import MissingPackageWarning, UserError
from ftwt_jax.parallel.processes import is_first
from ftwt_jax.workdir import METRICS

Scalars = dict[str, float]


def rewind(path: pathlib.Path, stage: str, step: int) -> None:
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
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


@functools.cache
def has_tensorboard() -> bool:
    """Whether event files can be written; the first call says so where they cannot."""
    found = importlib.util.find_spec("tensorboardX") is not None
    if not found:
        message = f"tensorboardX is not installed: metrics go to {METRICS} alone, and no event files are written"
        warnings.warn(message, MissingPackageWarning, stacklevel=2)
    return found


class EventFile:
    """A file of TensorBoard events."""

    def __init__(self, workdir: pathlib.Path):
        from tensorboardX.record_writer import RecordWriter

        # A `SummaryWriter` writes in a thread, which swallows errors and prints them when the program ends; and
        # closing an `EventsWriter` fails on a full disk, which leaves its file open.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        self._records = RecordWriter(str(workdir / name))
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

    Args:
      workdir: where the files go.
      stage: `baseline` or `gated`; prefix of every TensorBoard tag.
      start: step from which this stage continues.
      offset: added to the step in TensorBoard, where the stages follow each other on one axis.
    """

    def __init__(self, workdir: pathlib.Path, stage: str, start: int, offset: int):
        self._stage, self._offset = stage, offset
        self._workdir, self._active = workdir, is_first()
        if self._active:
            rewind(workdir / METRICS, stage, start)
            self._lines = (workdir / METRICS).open("a", buffering=1)
            self._events = EventFile(workdir) if has_tensorboard() else None
            if self._events is not None:
                self._events.restart(offset + start + 1)

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
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"cannot write the metrics of step {step} to {self._workdir}: {reason}; "
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
        self._lines = path.open("a", buffering=1)
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
