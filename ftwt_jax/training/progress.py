"""What a run shows while it trains: a progress bar, or plain lines."""

import contextlib
import time
from collections.abc import Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ftwt_jax.printing import say, say_compiling
from ftwt_jax.workdir.metrics import Scalars


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
        else:
            say_compiling(console, f"the {stage} network's evaluation and training step")

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

    @contextlib.contextmanager
    def input(self, before: jax.Array | None) -> Iterator[None]:
        """Counts the time of the block as waiting for input, unless the device is busy to the end of it.

        Args:
          before: a result of the step before, by which it is known whether that step has ended.
        """
        start = time.perf_counter()
        yield
        if before is None or before.is_ready():
            self._waited += time.perf_counter() - start

    def add(self, images: int) -> None:
        """Counts images that have been dealt with."""
        self._images += images

    def read(self) -> Scalars:
        """`images_per_second`, if there were any, and `input_wait`, a share in [0, 1], so far."""
        passed = max(time.perf_counter() - self._time, 1e-9)
        if not self._images:
            return {"input_wait": self._waited / passed}
        return {"images_per_second": self._images / passed, "input_wait": self._waited / passed}
