"""The metrics that a run records while it trains: `metrics.jsonl`, and event files for TensorBoard."""

import contextlib
import json
import pathlib
import shutil
import socket
import tempfile
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from ftwt_jax.errors import UserError, os_reason, storage_errors
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


class MetricsWriter:
    """Writes the metrics of one stage as JSON lines and as TensorBoard events; only the first process writes.

    A resumed stage replaces what it wrote after its checkpoint, so that no step appears twice. In a bucket, where
    nothing can be appended, both files are written again as a whole at each report, from copies on disk.

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
            if in_bucket(workdir) and (workdir / METRICS).exists():
                (self._folder / METRICS).write_bytes((workdir / METRICS).read_bytes())
            self._lines = (self._folder / METRICS).open("a", buffering=1)
            # A `SummaryWriter` writes in a thread, which swallows errors and prints them when the program ends; and
            # closing an `EventsWriter` fails on a full disk, which leaves its file open.
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
            self._events = RecordWriter(str(self._folder / name))
            self._names = METRICS, name
            self._add_event(0, file_version="brain.Event:2")
            # Tells TensorBoard to discard what an interrupted process recorded from this step on.
            self._add_event(offset + start + 1, session_log=SessionLog(status=SessionLog.START))

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
            for key, value in scalars.items():
                self._add_event(self._offset + step, summary=scalar(f"{self._stage}/{key}", float(value)))
            self._events.flush()
            if in_bucket(self._workdir):
                for name in self._names:
                    (self._workdir / name).write_bytes((self._folder / name).read_bytes())
        except storage_errors() as error:
            raise UserError(
                f"cannot write the metrics of step {step} to {self._workdir}: {os_reason(error)}; "
                "free some space, then run the same command again to continue from the newest checkpoint"
            ) from None

    def _add_event(self, step: int, **content: object) -> None:
        self._events.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def close(self) -> None:
        """Closes both files."""
        if self._active:
            for file in (self._lines, self._events):
                # On a full disk the buffered rest cannot be written; `write` has already said so.
                with contextlib.suppress(OSError):
                    file.close()
            if in_bucket(self._workdir):
                shutil.rmtree(self._folder, ignore_errors=True)
