"""The main job: dense baseline, estimate, gate training, evaluation."""

import contextlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax import workdir
from ftwt_jax.budget.keeper import BudgetKeeper
from ftwt_jax.commands.estimate import choose_r
from ftwt_jax.commands.evaluate.held_out import count_skipped, evaluate_run
from ftwt_jax.data.pipeline import train_batches
from ftwt_jax.errors import UserError
from ftwt_jax.gating.variables import init_from_dense
from ftwt_jax.parallel.processes import Preempted, Preemption
from ftwt_jax.parallel.sharding import put_batch, put_whole, replicated
from ftwt_jax.printing import say
from ftwt_jax.training.progress import MetricsWriter, ProgressDisplay, Stopwatch
from ftwt_jax.training.run import BASELINE, GATED, SECTIONS, STAGES, Adopted, Run, make_run
from ftwt_jax.training.stage import Stage, make_stage
from ftwt_jax.training.step import TrainState, create_state
from ftwt_jax.workdir.checkpoints import Checkpoints, has_checkpoint, set_damaged_aside
from ftwt_jax.workdir.environment import record_environment

Variables = dict[str, Any]
# What a dense network is trained with.
UNGATED = {"r": 1.0, "macs_reduction": 0.0}


def train(config: ConfigDict, folder: str, console: Console) -> None:
    """Trains baseline and gates in `folder`, or goes on where an earlier run stopped, and evaluates the result.

    Raises:
      UserError: the config cannot work, the folder belongs to another config, or a loss is no longer a number.
      Preempted: the process was told to stop, and has saved everything.
    """
    started = time.perf_counter()
    path = workdir.absolute(folder)
    for note in (note for stage in STAGES for note in set_damaged_aside(path, stage)):
        say(console, note)
    run = make_run(config, path)
    if config.init_from:
        config.init_from = str(workdir.absolute(config.init_from))
    own = has_checkpoint(run.workdir, BASELINE)
    adopted = run.adopted(pathlib.Path(config.init_from)) if config.init_from and not own else None
    if config.baseline.epochs <= 0:
        if not (own or adopted):
            raise UserError("config.baseline.epochs=0 leaves no baseline: set config.init_from to a workdir with one")
        if not (adopted.finished if adopted else run.is_finished(BASELINE)):
            raise UserError("config.baseline.epochs=0 would leave the baseline's new classifier untrained")
    data = run.dataset
    say(
        console,
        f"{config.data.name}: {len(data.train):,} images to train on, {len(data.test):,} held out, "
        f"{data.num_classes} classes",
    )
    workdir.prepare(run.workdir, config)

    if adopted is not None:
        keep_baseline(run, adopted, console)
    preemption = Preemption()
    with preemption.watched():
        baseline = train_stage(run, BASELINE, console, preemption, lambda: init_dense(run))
        if config.gates.epochs > 0:
            estimate = choose_r(run, baseline, console)
            train_stage(run, GATED, console, preemption, lambda: init_gated(run, baseline), estimate)
    if config.gates.epochs > 0:
        evaluate_run(run, console)
    else:
        count_skipped(run)
        if run.dataset.skipped.names:
            say(console, run.dataset.skipped.summary())
    seconds = time.perf_counter() - started
    say(console, f"done in {seconds:.0f} s; everything is in {run.workdir}")


def keep_baseline(run: Run, adopted: Adopted, console: Console) -> None:
    """Copies a baseline from elsewhere into this run, which then stands by itself."""
    for note in adopted.notes:
        say(console, f"baseline of {run.config.init_from}: {note}")
    with contextlib.closing(run.checkpoints(BASELINE, create=True)) as checkpoints:
        checkpoints.save_network(adopted.variables, adopted.finished)


def init_dense(run: Run) -> Variables:
    """What the baseline's training starts from: what was given, or fresh variables."""
    if has_checkpoint(run.workdir, BASELINE):
        return run.trained(BASELINE)
    return jax.jit(run.models[BASELINE].init)(run.key(BASELINE), run.example_images)


def init_gated(run: Run, baseline: Variables) -> Variables:
    """The baseline's variables with fresh gate heads."""
    return init_from_dense(run.models[GATED], baseline, run.example_images, run.key(GATED))


def train_stage(
    run: Run,
    name: str,
    console: Console,
    preemption: Preemption,
    init: Callable[[], Variables],
    estimate: dict[str, float] | None = None,
) -> Variables:
    """Trains one stage to its end, from its newest checkpoint if there is one; returns the variables.

    Raises `Preempted` once that is asked for, with everything saved.

    Args:
      init: makes the variables to start from.
      estimate: of the gated stage, the mass threshold of its targets and the MACs reduction to expect.
    """
    stage = make_stage(run, name)
    checkpoints = run.checkpoints(name, create=True)
    try:
        start = checkpoints.latest_step() or 0
        if checkpoints.is_finished(stage.total):
            return checkpoints.restore_network(run.abstract_variables(name), replicated(run.mesh))
        record_environment(run.workdir)
        if start:
            state = checkpoints.restore(stage.state)
            console.print(f"{name}: going on from step {start} of {stage.total}", highlight=False)
        else:
            state = put_whole(create_state(init(), stage.optimizer), stage.shardings)
        offset = 0 if name == BASELINE else run.steps_of(BASELINE)
        writer = MetricsWriter(run.workdir, name, start, offset)
        display = ProgressDisplay(console, name, stage.total, start)
        try:
            loop = _Loop(run, stage, estimate or UNGATED, checkpoints, writer, display, preemption, offset)
            return loop.run(state, start).variables
        finally:
            display.close()
            writer.close()
    finally:
        checkpoints.close()


class _Loop:
    """The steps of one stage, with reports, evaluations and checkpoints in between."""

    def __init__(
        self,
        run: Run,
        stage: Stage,
        estimate: dict[str, float],
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        display: ProgressDisplay,
        preemption: Preemption,
        offset: int,
    ):
        self._preemption, self._offset = preemption, offset
        self._run, self._stage, self._r = run, stage, estimate["r"]
        self._keeper = BudgetKeeper(run, stage, self._r, estimate["macs_reduction"])
        self._checkpoints, self._writer, self._display = checkpoints, writer, display
        self._evaluator = run.evaluator(stage.name)

    def run(self, state: TrainState, start: int) -> TrainState:
        config, stage = self._run.config, self._stage
        total = stage.total
        batches = train_batches(self._run.dataset, config.batch_size, stage.seed, start, total)
        watch, newest = Stopwatch(), None
        pending: list[Any] = []
        for step in range(start + 1, total + 1):
            batch = watch.next_batch(batches, newest)
            state, metrics = stage.step(state, put_batch(batch, self._run.mesh), self._keeper.control(step))
            pending.append(metrics)
            if newest is not None:
                # One step ahead is enough to keep the device busy; more would only hold batches, and Ctrl-C, up.
                newest.block_until_ready()
            newest = metrics["loss"]
            if step == start + 1:
                # The first step compiles; the rate that is shown leaves it out.
                jax.block_until_ready(metrics)
                watch = Stopwatch()
            else:
                watch.add(config.batch_size)
            state = self._keeper.after(state, step)
            self._display.advance(step)
            save = step % config.checkpoint_every == 0 or step == total
            if save or step % config.log_every == 0:
                self._report(state, step, pending, watch, evaluated=save)
                pending, watch = [], Stopwatch()
            if self._preemption.reached(self._offset + step):
                if pending:
                    self._report(state, step, pending, watch)
                if not save:
                    self._checkpoints.save(state)
                raise Preempted(f"{stage.name} has stopped at step {step} of {total}, and everything is saved")
        return state

    def _report(
        self, state: TrainState, step: int, pending: list[Any], watch: Stopwatch, evaluated: bool = False
    ) -> None:
        """Writes and shows the means since the last report; evaluates the network and saves it, if it is time to."""
        scalars = self._collect(pending, step)
        scalars |= {"learning_rate": float(self._stage.rate(step - 1)), **watch.read()}
        if evaluated:
            scalars |= self._evaluate(state)
        # Figures before checkpoint: a kill in between repeats the step, and its line is then replaced.
        self._writer.write(step, scalars)
        self._display.report(step, scalars)
        if evaluated:
            comparable = self._keeper.comparable(step)
            self._checkpoints.save(state, {"accuracy": scalars["eval_accuracy"]} if comparable else None)

    def _collect(self, pending: list[Any], step: int) -> dict[str, float]:
        """Means of the steps since the last report; the one place where the loop waits for the device."""
        rows = jax.device_get(pending)
        first = step - len(rows) + 1
        for index, row in enumerate(rows):
            for name in ("loss", "gate_loss", "grad_norm"):
                if name in row and not np.isfinite(row[name]):
                    self._stop(name, row[name], first + index)
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def _stop(self, name: str, value: float, step: int) -> None:
        newest = self._checkpoints.latest_step()
        kept = f"the checkpoint of step {newest} is kept" if newest else "no checkpoint had been written yet"
        raise UserError(
            f"{self._stage.name}: {name.replace('_', ' ')} is {value} at step {step}; {kept}; "
            f"lower the learning rate (config.{SECTIONS[self._stage.name]}.lr) in a new workdir"
        )

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        found = self._evaluator.run(state.variables, self._run.test_batches(), self._r)
        scalars = {"eval_accuracy": found.accuracy}
        if found.gates is not None:
            scalars["eval_macs_reduction"] = found.macs_reduction
            scalars["eval_gate_accuracy"] = found.gates.gate_accuracy
            scalars["eval_static_gate_accuracy"] = found.gates.static_gate_accuracy
        return scalars
