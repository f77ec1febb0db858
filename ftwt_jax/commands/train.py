"""The command `train`: dense baseline, estimate, gates, subnets, evaluation."""

import contextlib
import time

import jax
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax import workdir
from ftwt_jax.budget.calibrate import Calibration
from ftwt_jax.budget.estimate import check_budgets, choose_r
from ftwt_jax.budget.keeper import BudgetKeeper
from ftwt_jax.budget.latency import check_latency, solve_budget, wants_latency
from ftwt_jax.budget.subnets import SubnetFinder, SubnetKeeper, choose_subnets, subnet_network
from ftwt_jax.commands.command import Arguments, Command, define_distributed, define_workdir, join_processes
from ftwt_jax.commands.evaluate.held_out import count_skipped, evaluate_run
from ftwt_jax.errors import UserError
from ftwt_jax.gating.variables import init_from_dense
from ftwt_jax.printing import say
from ftwt_jax.subnets.network import init_subnets
from ftwt_jax.training.loop import Hook, Variables, train_stage
from ftwt_jax.training.run import Adopted, Run, open_run
from ftwt_jax.training.settings import BASELINE, GATED, STAGES, SUBNETS
from ftwt_jax.training.stage import make_stage
from ftwt_jax.workdir.checkpoints import cut_off, set_damaged_aside
from ftwt_jax.workdir.lock import RunLock


def _define(values: flags.FlagValues) -> None:
    define_workdir(values)
    define_distributed(values)


def run(arguments: Arguments, console: Console) -> None:
    """Runs the command."""
    config, folder = arguments.config("--config=configs/digits.py"), arguments.workdir()
    train(config, folder, join_processes(arguments, console))


COMMAND = Command(_define, run, takes_config=True)


def train(config: ConfigDict, folder: str, console: Console) -> None:
    """Trains baseline and gates in `folder`, or resumes where an earlier run stopped, and evaluates the result.

    Raises:
      UserError: the config cannot work, the folder belongs to another config or another run trains there, or a loss
        is no longer a finite number.
      Preempted: the process was told to stop, and everything is saved.
    """
    started = time.perf_counter()
    path = workdir.absolute(folder)
    with RunLock(path, console) as lock:
        lock.acquire(create=False)
        for kept in (name for stage in STAGES for name in (stage, cut_off(stage))):
            for note in set_damaged_aside(path, kept):
                say(console, note)
        run = open_run(config, path)
        if not run.has(BASELINE):
            _check_start(run)
        adopted = _starting_baseline(run)
        data, name = run.dataset, run.config.data.name
        say(
            console,
            f"{name}: {len(data.train):,} images to train on, {len(data.test):,} held out, {data.num_classes} classes",
        )
        if data.order_doubt:
            say(console, f"classes in order of bytes: {data.order_doubt} (config.data.class_order)")
        lock.acquire(create=True)
        workdir.prepare(run.workdir, run.config)
        if adopted is not None:
            _keep_baseline(run, adopted, console)
        with run.preemption.watched():
            _train_stages(run, console)
    say(console, f"done in {time.perf_counter() - started:.0f} s; everything is in {run.workdir}")


def _train_stages(run: Run, console: Console) -> None:
    network = train_stage(run, make_stage(run, BASELINE), lambda: _init_dense(run), Hook(run), console)
    gated, subnets = run.config.gates.epochs > 0, run.config.subnets.count > 0
    if gated or subnets:
        calibration, baseline = Calibration.of_training(run), network
        timed = wants_latency(run.config)

        def first_budget() -> float:
            return solve_budget(SubnetFinder(run, baseline, run.config.gates.r, "targets"), baseline, console)

        estimate = choose_r(calibration, baseline, console, first_budget if timed else None)
        if gated:
            stage = make_stage(run, GATED)
            keeper = BudgetKeeper(calibration, stage, estimate["r"], estimate["macs_reduction"], console)
            network = train_stage(run, stage, lambda: _init_gated(run, baseline), keeper, console)
        if subnets:

            def budget(finder: SubnetFinder) -> float:
                predicted = estimate["macs_reduction"]
                return solve_budget(finder, baseline, console, predicted) if timed else predicted

            choose_subnets(run, network, estimate["r"], budget, console)
            _train_subnets(run, network, estimate["r"], calibration, console)
        evaluate_run(run, console)
        return
    count_skipped(run)
    if run.dataset.skipped.names:
        say(console, run.dataset.skipped.summary())


def _train_subnets(run: Run, network: Variables, r: float, calibration: Calibration, console: Console) -> None:
    """Trains the subnets of a network, and their router."""
    stage = make_stage(run, SUBNETS)
    keeper = SubnetKeeper(calibration, stage.total, r)
    train_stage(run, stage, lambda: _init_subnets(run, network), keeper, console)


def _check_start(run: Run) -> None:
    """Raises `UserError` for what would only be found out in training, or never."""
    batch, images = run.config.batch_size, len(run.dataset.train)
    if batch > images:
        raise UserError(
            f"config.batch_size={batch} is more than the {images} images to train on: a batch would hold some of them "
            "several times; choose a smaller one"
        )
    check_latency(run.config)
    if run.config.gates.epochs > 0:
        check_budgets(run)


def _starting_baseline(run: Run) -> Adopted | None:
    """The baseline of another workdir that this run starts from; None if it has, or trains, one itself.

    Raises:
      UserError: the config leaves the run without a trained baseline.
    """
    config, has_own = run.config, run.has(BASELINE)
    if config.fine_tune and not (has_own or config.init_from):
        raise UserError("config.fine_tune trains a baseline further: set config.init_from to a workdir with one")
    adopted = run.adopted(workdir.absolute(config.init_from)) if config.init_from and not has_own else None
    if config.baseline.epochs <= 0:
        if not (has_own or adopted):
            raise UserError("config.baseline.epochs=0 leaves no baseline: set config.init_from to a workdir with one")
        if not (adopted.finished if adopted else run.is_finished(BASELINE)):
            if config.fine_tune:
                raise UserError("config.fine_tune needs config.baseline.epochs: for how long to train further")
            raise UserError("config.baseline.epochs=0 would leave the baseline's new classifier untrained")
    return adopted


def _keep_baseline(run: Run, adopted: Adopted, console: Console) -> None:
    """Copies a baseline from elsewhere into this run, which from then on needs the other workdir no more."""
    for note in adopted.notes:
        say(console, f"baseline of {run.config.init_from}: {note}")
    with contextlib.closing(run.checkpoints(BASELINE, create=True)) as checkpoints:
        checkpoints.save_network(adopted.variables, adopted.finished)


def _init_dense(run: Run) -> Variables:
    """What the baseline's training starts from: the one that was adopted, or fresh variables."""
    if run.has(BASELINE):
        return run.trained(BASELINE)
    return jax.jit(run.models[BASELINE].init)(run.key(BASELINE), run.example_images)


def _init_gated(run: Run, baseline: Variables) -> Variables:
    """The baseline's variables with fresh gate heads."""
    return init_from_dense(run.models[GATED], baseline, run.example_images, run.key(GATED))


def _init_subnets(run: Run, network: Variables) -> Variables:
    """The variables of the network that was cut, with a fresh router."""
    return init_subnets(subnet_network(run), network, run.example_images, run.key(SUBNETS))
