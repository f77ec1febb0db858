"""What a run tells of itself: `metrics.jsonl`, TensorBoard events, and a progress bar or plain lines."""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from ftwt_jax.errors import UserError
from ftwt_jax.parallel.processes import is_first
from ftwt_jax.printing import say
from ftwt_jax.workdir import METRICS

Scalars = dict[str, float]


def rewind(path: pathlib.Path, stage: str, step: int) -> None:
    """Drops the lines of `stage` after `step`, and a line that was cut off: what a resumed run will write again."""
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


class MetricsWriter:
    """Writes the figures of one stage as JSON lines and as TensorBoard events; a resumed stage overwrites, not repeats.

    Only the first process writes.

    Args:
      workdir: where the files go.
      stage: `baseline` or `gated`; prefix of every TensorBoard tag.
      start: step from which this stage goes on.
      offset: added to the step in TensorBoard, where the stages follow each other on one axis.
    """

    def __init__(self, workdir: pathlib.Path, stage: str, start: int, offset: int):
        self._stage, self._offset = stage, offset
        self._workdir, self._active = workdir, is_first()
        if self._active:
            rewind(workdir / METRICS, stage, start)
            self._lines = (workdir / METRICS).open("a", buffering=1)
            # Without the thread of a `SummaryWriter`, which would keep errors to itself, and print them at the end.
            self._events = EventsWriter(str(workdir / "events"))
            began = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=offset + start + 1, session_log=began))

    def write(self, step: int, scalars: Scalars) -> None:
        """Records figures after `step` steps of the stage."""
        if not self._active:
            return
        entry = {"stage": self._stage, "step": step, **{k: float(v) for k, v in scalars.items()}}
        try:
            self._lines.write(json.dumps(entry) + "\n")
            for key, value in scalars.items():
                summary = scalar(f"{self._stage}/{key}", float(value))
                self._events.write_event(Event(wall_time=time.time(), step=self._offset + step, summary=summary))
            self._events.flush()
        except OSError as error:
            raise UserError(
                f"the figures of step {step} cannot be written to {self._workdir}: {error.strerror or error}; make "
                "room, then give the same command again"
            ) from None

    def close(self) -> None:
        """Ends both files."""
        if self._active:
            for file in (self._lines, self._events._py_recordio_writer._writer):
                # What did not fit has been told.
                with contextlib.suppress(OSError):
                    file.close()


class _Figures(ProgressColumn):
    """The latest figures beside the bar."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"])


# Shown in this order, with these formats, where a step has them.
_SHOWN = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "gate_accuracy": "gate accuracy {:.3f}",
    "density": "density {:.2f}",
    "images_per_second": "{:.0f} images/s",
    "eval_accuracy": "held out {:.4f}",
}


def describe(scalars: Scalars) -> str:
    """The figures worth a look, on one line."""
    return "  ".join(form.format(scalars[key]) for key, form in _SHOWN.items() if key in scalars)


class ProgressDisplay:
    """A bar with the newest figures on a terminal; elsewhere a line for each report."""

    def __init__(self, console: Console, stage: str, total: int, start: int):
        self._console, self._stage, self._total = console, stage, total
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, _Figures(), console=console)
            self._task = self._bar.add_task(stage, total=total, completed=start, figures="compiling")
            self._bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar; says nothing elsewhere."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, scalars: Scalars) -> None:
        """Shows the figures after `step` steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=describe(scalars))
        else:
            say(self._console, f"{self._stage} {step}/{self._total}  {describe(scalars)}")

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()


class Stopwatch:
    """Images per second since it was made, and the share of that time in which the device waited for input."""

    def __init__(self) -> None:
        self._time, self._images, self._waited = time.perf_counter(), 0, 0.0

    def next_batch(self, batches: Iterator[Any], before: jax.Array | None) -> Any:
        """The next batch; all the time that it takes counts as waiting, unless the device is busy to the end of it.

        Args:
          batches: where it comes from.
          before: a result of the step before, by which it is known whether that step has ended.
        """
        start = time.perf_counter()
        batch = next(batches)
        if before is None or before.is_ready():
            self._waited += time.perf_counter() - start
        return batch

    def add(self, images: int) -> None:
        """Counts images that have been dealt with."""
        self._images += images

    def read(self) -> Scalars:
        """`images_per_second` and `input_wait`, a share in [0, 1], so far."""
        passed = max(time.perf_counter() - self._time, 1e-9)
        return {"images_per_second": self._images / passed, "input_wait": self._waited / passed}
