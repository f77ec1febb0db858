"""How the images of a stage reach its steps: one batch after the other from the host, or many steps in one call.

Both take the same images in the same order, and augment them in the same way: a call of many steps gives the same state
and the same metrics as the steps one by one. On a GPU or TPU a call is one program. On a CPU it is a program for each
step: XLA's loops leave convolutions there to code that is 30 times slower.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array

from ftwt_jax.data.order import Order
from ftwt_jax.data.pipeline import train_batches
from ftwt_jax.data.resident import Resident
from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.parallel.processes import broadcast
from ftwt_jax.parallel.sharding import jit_on, put_batch, replicated
from ftwt_jax.training.run import Run
from ftwt_jax.training.stage import Stage
from ftwt_jax.training.step import Metrics, TrainState

# Metrics of programs, scalars or [most], and how many steps of each count.
Calls = list[tuple[Metrics, int]]
# Most steps of one call, for each of which the numbers of its images are sent along.
MOST_STEPS = 256
# Longest call: what is told to stop has to wait for two of them.
SECONDS = 0.5


class Feed(Protocol):
    """Runs the steps of a stage.

    Attributes:
      most: most steps of one call.
    """

    most: int

    def inputs(self, step: int, count: int) -> Any:
        """What the host has to do for `count` steps after `step` of them."""

    def run(self, state: TrainState, inputs: Any, r: float, offsets: list[float]) -> tuple[TrainState, Calls]:
        """Runs as many steps as there are offsets."""


def make_feed(run: Run, stage: Stage, start: int) -> Feed:
    """The feed of a stage after its first `start` steps."""
    resident, wanted = run.resident, run.config.steps_per_call
    if resident is None:
        if wanted is not None and wanted > 1:
            raise UserError(
                f"config.steps_per_call={wanted} needs the images on the devices, where they do not fit or were not "
                "wanted: leave it out, or see config.data.on_device"
            )
        return HostFeed(run, stage, start)
    in_loop = runs_in_loop(run.mesh)
    most = wanted or (min(MOST_STEPS, run.config.log_every) if in_loop else 1)
    return DeviceFeed(run, stage, resident, most, in_loop)


def runs_in_loop(mesh: Mesh) -> bool:
    """Whether the steps of a call are one program on these devices."""
    return mesh.devices.flat[0].platform != "cpu"


class Pace:
    """How many steps a call takes: the wanted number, or twice as many each time until calls are long enough.

    Attributes:
      steps: of the next call.
    """

    def __init__(self, most: int, wanted: int | None):
        self._most = most if wanted is None else min(wanted, most)
        self.steps = 1 if wanted is None else self._most
        self._start = time.perf_counter()

    def resume(self) -> None:
        """The device has done everything and starts on the next call."""
        self._start = time.perf_counter()

    def ended(self, count: int) -> None:
        """A call of `count` steps has ended, and the next is under way."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        # All processes take the number of the first: they run the same calls.
        if count == self.steps < self._most and broadcast(int(seconds < SECONDS / 2)):
            self.steps = min(2 * self.steps, self._most)


class HostFeed:
    """A batch at a time, gathered or decoded by the host."""

    most = 1

    def __init__(self, run: Run, stage: Stage, start: int):
        self._run, self._stage = run, stage
        config = run.config
        self._batches: Iterator[Any] = train_batches(run.dataset, config.batch_size, stage.seed, start, stage.total)
        self._control: tuple[tuple[float, float], GateControl] | None = None

    def inputs(self, step: int, count: int) -> Any:
        """The next batch."""
        return next(self._batches)

    def placed(self, inputs: Any) -> Any:
        """A batch on the devices, which may be run again."""
        return put_batch(inputs, self._run.mesh)

    def run(self, state: TrainState, inputs: Any, r: float, offsets: list[float]) -> tuple[TrainState, Calls]:
        """Runs one step."""
        values = (r, offsets[0])
        if self._control is None or self._control[0] != values:
            control: Any = GateControl(r=np.float32(r), offset=np.float32(offsets[0]))  # type: ignore[arg-type]
            self._control = values, self._run.replicated(control)
        state, metrics = self._stage.step(state, self.placed(inputs), self._control[1])
        return state, [(metrics, 1)]


class DeviceFeed:
    """Many steps in one call, on images that are on the devices; the host sends their numbers alone.

    Args:
      most: most steps of one call; fewer need no other program.
      in_loop: whether a call is one program.
    """

    def __init__(self, run: Run, stage: Stage, resident: Resident, most: int, in_loop: bool):
        self.most, self._length = most, most if in_loop else 1
        self._run, self._arrays, self._batch = run, resident.arrays, run.config.batch_size
        self._order = Order(len(run.dataset.train), stage.seed)
        whole, shardings = replicated(run.mesh), stage.shardings
        self._program: Callable[..., tuple[TrainState, Metrics]] = jit_on(
            run.mesh,
            _many_steps(stage, resident) if in_loop else _one_step(stage, resident),
            donate_argnums=0,
            in_shardings=(shardings, resident.sharding, whole, whole, whole),
            out_shardings=(shardings, whole),
        )

    def inputs(self, step: int, count: int) -> Any:
        """The numbers of the images, and their positions in the stream of all epochs, int32 and uint32 [count, B]."""
        positions = np.arange(step * self._batch, (step + count) * self._batch)
        found = {"index": self._order(positions).astype(np.int32), "position": positions.astype(np.uint32)}
        return {name: values.reshape(count, self._batch) for name, values in found.items()}

    def run(self, state: TrainState, inputs: Any, r: float, offsets: list[float]) -> tuple[TrainState, Calls]:
        """Runs as many steps as there are offsets, each program as many as it takes."""
        inputs = {**inputs, "offset": np.asarray(offsets, np.float32)}
        threshold, calls = np.float32(r), []
        for first in range(0, len(offsets), self._length):
            part = {name: values[first : first + self._length] for name, values in inputs.items()}
            count = len(part["offset"])
            # A program takes arrays of one length; what lies behind `count` is not read.
            part = {name: np.resize(values, (self._length, *values.shape[1:])) for name, values in part.items()}
            state, metrics = self._program(
                state, self._arrays, *self._run.replicated((part, threshold, np.int32(count)))
            )
            calls.append((metrics, count))
        return state, calls


def _step_at(stage: Stage, resident: Resident, arrays: Any, inputs: Any, r: Array) -> Callable:
    """(index, state) -> (state, metrics): one of the steps whose numbers and offsets are given."""

    def step(index: Any, state: TrainState) -> tuple[TrainState, Metrics]:
        here = {name: lax.dynamic_index_in_dim(values, index, keepdims=False) for name, values in inputs.items()}
        control = GateControl(r=r, offset=here.pop("offset"))
        return stage.function(state, here | resident.gather(arrays, here["index"]), control)

    return step


def _one_step(stage: Stage, resident: Resident) -> Callable[..., tuple[TrainState, Metrics]]:
    def step(state: TrainState, arrays: Any, inputs: Any, r: Any, count: Any) -> tuple[TrainState, Metrics]:
        return _step_at(stage, resident, arrays, inputs, r)(0, state)

    return step


def _many_steps(stage: Stage, resident: Resident) -> Callable[..., tuple[TrainState, Metrics]]:
    """A loop whose length is traced: reports and checkpoints fall on the end of a call without another program."""

    def steps(state: TrainState, arrays: Any, inputs: Any, r: Any, count: Any) -> tuple[TrainState, Metrics]:
        step = _step_at(stage, resident, arrays, inputs, r)

        def body(index: Any, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = step(index, carry[0])
            return state, jax.tree.map(lambda all_, value: all_.at[index].set(value), carry[1], metrics)

        most = len(inputs["index"])
        shapes = jax.eval_shape(step, 0, state)[1]
        metrics = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)
        return lax.fori_loop(0, count, body, (state, metrics))

    return steps
