"""The loop of a stage: its steps, with reports, evaluations and checkpoints in between."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

from ftwt_jax.errors import UserError
from ftwt_jax.parallel.preemption import Preempted
from ftwt_jax.parallel.sharding import put_whole, replicated
from ftwt_jax.training.cut_off import CutOff
from ftwt_jax.training.feed import Calls, Pace, make_feed
from ftwt_jax.training.progress import ProgressDisplay, Stopwatch
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import GATED, SECTIONS, STAGES
from ftwt_jax.training.stage import Stage
from ftwt_jax.training.step import TrainState, create_state
from ftwt_jax.workdir.checkpoints import Checkpoints
from ftwt_jax.workdir.environment import record_environment
from ftwt_jax.workdir.metrics import MetricsWriter

Variables = dict[str, Any]


class Hook:
    """What a stage is steered by; this one leaves it alone, at one mass threshold.

    Attributes:
      r: mass threshold of the targets.
    """

    def __init__(self, run: Run, r: float = 1.0):
        self.run, self.r = run, r

    def offset(self, step: int) -> float:
        """What is added to all gate logits in `step`, counted from 1."""
        return 0.0

    @property
    def stops(self) -> tuple[int, ...]:
        """The steps after which `after` has something to do."""
        return ()

    def compile(self, variables: Variables) -> None:
        """Compiles what `after` runs, for variables of these shapes and dtypes."""

    def after(self, state: TrainState, step: int) -> TrainState:
        """The state to go on with after `step`; raises `Preempted` if the run is told to stop before it is known."""
        return state

    def comparable(self, step: int) -> bool:
        """Whether the accuracy after this step may be compared with later ones, to find the best checkpoint."""
        return True


def train_stage(run: Run, stage: Stage, init: Callable[[], Variables], hook: Hook, console: Console) -> Variables:
    """Trains one stage to its end, from its newest checkpoint if there is one; returns the variables.

    Args:
      init: makes the variables to start from.

    Raises:
      Preempted: the process was told to stop, and everything is saved.
      UserError: a loss is no longer a finite number.
    """
    checkpoints, cut_off = run.checkpoints(stage.name, create=True), CutOff(run, stage)
    try:
        start, unfinished = checkpoints.latest_step() or 0, cut_off.step()
        if checkpoints.is_finished(stage.total):
            return checkpoints.restore_network(run.abstract_variables(stage.name), replicated(run.mesh))
        record_environment(run.workdir)
        if max(start, unfinished):
            state = cut_off.restore() if unfinished > start else checkpoints.restore(stage.state)
            console.print(
                f"{stage.name}: resuming from step {max(start, unfinished)} of {stage.total}", highlight=False
            )
        else:
            state = put_whole(create_state(init(), stage.optimizer), stage.shardings)
        loop = _Loop(run, stage, hook, checkpoints, cut_off)
        return loop.run(state, max(start, unfinished), unfinished > start, console).variables
    finally:
        checkpoints.close()


class _Loop:
    def __init__(self, run: Run, stage: Stage, hook: Hook, checkpoints: Checkpoints, cut_off: CutOff):
        self._run, self._stage, self._hook = run, stage, hook
        self._checkpoints, self._cut_off, self._preemption = checkpoints, cut_off, run.preemption
        # Steps of earlier stages, by which TensorBoard counts on.
        earlier = STAGES[: STAGES.index(stage.name)]
        self._offset = sum(run.steps_of(name) for name in earlier if run.has(name))

    def run(self, state: TrainState, start: int, is_cut_off: bool, console: Console) -> TrainState:
        name, total = self._stage.name, self._stage.total
        self._writer = MetricsWriter(self._run.workdir, name, start, self._offset)
        self._display = ProgressDisplay(console, name, total, start)
        try:
            # Before the first step, since a compilation that has begun cannot be stopped to save something.
            self._run.evaluator(name).compile(state.variables, self._run.eval_batch)
            self._hook.compile(state.variables)
            return self._steps(self._finished(state, start) if is_cut_off else state, start)
        finally:
            self._display.close()
            self._writer.close()

    def _steps(self, state: TrainState, start: int) -> TrainState:
        config, total = self._run.config, self._stage.total
        feed = make_feed(self._run, self._stage, start)
        pace, watch = Pace(feed.most, config.steps_per_call), Stopwatch()
        pending: Calls = []
        step, newest, before, compiling = start, None, 0, True
        while step < total:
            count = min(pace.steps, self._next_stop(step) - step)
            with watch.input(newest):
                inputs = feed.inputs(step, count)
            offsets = [self._hook.offset(step + 1 + index) for index in range(count)]
            state, calls = feed.run(state, inputs, self._hook.r, offsets)
            pending += calls
            if newest is not None:
                # One call ahead is enough to keep the device busy; more would only hold batches, and Ctrl-C, up.
                newest.block_until_ready()
                pace.ended(before)
            newest, before = calls[-1][0]["loss"], count
            step += count
            if compiling:
                # The first step compiles; the rate that is shown leaves it out.
                newest.block_until_ready()
                watch, compiling = Stopwatch(), False
                pace.resume()
            else:
                watch.add(count * config.batch_size)
            self._preemption.unsaved()
            self._display.advance(step)
            taken, save = state, self._is_saved(step)
            try:
                state = self._hook.after(taken, step)
                if save or step % config.log_every == 0:
                    self._report(state, step, pending, watch, evaluated=save)
                    pending, watch = [], Stopwatch()
                    pace.resume()
            except Preempted:
                self._report(taken, step, pending, watch)
                self._cut_off.save(taken)
                raise Preempted(self._standing(step)) from None
            if save:
                self._preemption.saved(self._standing(step))
            if self._preemption.reached():
                if pending:
                    self._report(state, step, pending, watch)
                if not save:
                    self._save(state)
                raise Preempted(self._standing(step))
        return state

    def _is_saved(self, step: int) -> bool:
        """Whether the network is evaluated and saved after this step."""
        return step % self._run.config.checkpoint_every == 0 or step == self._stage.total

    def _standing(self, step: int) -> str:
        return f"{self._stage.name} stopped at step {step} of {self._stage.total}; everything is saved"

    def _finished(self, state: TrainState, step: int) -> TrainState:
        """The state after what follows a step, which an earlier process began; until then its own is the one saved."""
        state = self._hook.after(state, step)
        if self._is_saved(step):
            scalars = self._writer.complete(step, self._evaluate(state))
            self._display.report(step, scalars)
            self._save(state, scalars)
            self._preemption.saved(self._standing(step))
        return state

    def _next_stop(self, step: int) -> int:
        """The first step after `step` with something to do outside of the device."""
        config = self._run.config
        regular = (step + every - step % every for every in (config.log_every, config.checkpoint_every))
        return min(*regular, self._stage.total, *(stop for stop in self._hook.stops if stop > step))

    def _report(self, state: TrainState, step: int, pending: Calls, watch: Stopwatch, evaluated: bool = False) -> None:
        """Writes and shows the means since the last report; with `evaluated`, evaluates and saves the network too."""
        scalars = self._collect(pending, step)
        scalars |= {"learning_rate": float(self._stage.rate(step - 1)), **watch.read()}
        if evaluated:
            scalars |= self._evaluate(state)
        # Figures before checkpoint: a kill in between repeats the step, and its line is then replaced.
        self._writer.write(step, scalars)
        self._display.report(step, scalars)
        if evaluated:
            self._save(state, scalars)

    def _save(self, state: TrainState, scalars: dict[str, float] | None = None) -> None:
        """Saves a checkpoint, with the accuracy if it was measured and may be compared with others."""
        comparable = scalars and self._hook.comparable(int(state.step))
        self._checkpoints.save(state, {"accuracy": scalars["eval_accuracy"]} if scalars and comparable else None)
        self._cut_off.forget()

    def _collect(self, pending: Calls, step: int) -> dict[str, float]:
        """Means of the steps since the last report; the one place where the loop waits for the device."""
        rows, counts = zip(*pending, strict=True)
        parts = list(zip(jax.device_get(rows), counts, strict=True))
        values = {name: np.concatenate([np.ravel(row[name])[:count] for row, count in parts]) for name in parts[0][0]}
        for name in ("loss", "gate_loss", "router_loss", "grad_norm"):
            bad = np.flatnonzero(~np.isfinite(values.get(name, ())))
            if bad.size:
                raise self._diverged(name, values[name][bad[0]], step - len(values[name]) + 1 + int(bad[0]))
        return {name: float(np.mean(found)) for name, found in values.items()}

    def _diverged(self, name: str, value: float, step: int) -> UserError:
        newest = self._checkpoints.latest_step()
        kept = f"the checkpoint of step {newest} is intact" if newest else "no checkpoint had been written yet"
        return UserError(
            f"{self._stage.name}: {name.replace('_', ' ')} is {value} at step {step}; {kept}; "
            f"lower the learning rate (config.{SECTIONS[self._stage.name]}.lr) in a new workdir"
        )

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        run = self._run
        batches = run.test_batches() if run.resident is None else run.placed_test_batches
        found = run.evaluator(self._stage.name).run(state.variables, batches, self._hook.r)
        scalars = {"eval_accuracy": found.accuracy}
        if found.gates is not None:
            scalars["eval_macs_reduction"] = found.macs_reduction
        if found.gates is not None and self._stage.name == GATED:
            scalars["eval_gate_accuracy"] = found.gates.gate_accuracy
            scalars["eval_static_gate_accuracy"] = found.gates.static_gate_accuracy
        return scalars
