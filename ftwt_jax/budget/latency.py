"""How long subnets take in an engine, and the MACs reduction at which they take as long as is wanted.

Time does not follow MACs: widths fill vectors well or badly, and each layer costs something by itself. So subnets are
timed, as they will run, at a few reductions; they are ordinary networks, and their times are known before training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from ftwt_jax.budget.calibrate import spread
from ftwt_jax.budget.subnets import SubnetFinder
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.engines import sessions
from ftwt_jax.engines.graph import onnx_model
from ftwt_jax.engines.routed import ONE_IMAGE, open_routed, subnet_functions, subnet_graphs
from ftwt_jax.engines.timing import time_engines_in_turns
from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.inference.compact import fold
from ftwt_jax.inference.subnets import CompactSubnets
from ftwt_jax.parallel.processes import broadcast, cpu_count, is_first
from ftwt_jax.printing import say
from ftwt_jax.subnets.find import Subnets, cut_again
from ftwt_jax.subnets.network import SubnetNetwork, init_evenly, make_router
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import BASELINE, GATED

XLA = "xla"
ENGINES = (XLA, *sessions.ENGINES)
# Images that are timed, and batches of them at most.
_IMAGES, _MOST = 32, 16
# How near to the wanted time the search stops, what is accepted, and how many reductions are tried.
_CLOSE, _ACCEPTED, _TRIES = 0.03, 0.1, 10
# Reductions are told to other processes as whole numbers of this.
_MILLIONTH = 1e-6

Run_ = Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times of a batch in milliseconds: each the least of three medians, measured in turns.

    Attributes:
      engine, batch_size: what they were measured in, and on how many images at once.
      dense_ms: of the dense network.
      ms: of router and subnets.
    """

    engine: str
    batch_size: int
    dense_ms: float
    ms: float

    @property
    def share(self) -> float:
        """The time of subnets as a share of the dense network's."""
        return self.ms / self.dense_ms

    def entry(self) -> dict[str, Any]:
        """As JSON data."""
        return {**dataclasses.asdict(self), "share": self.share}


def wants_latency(config: ConfigDict) -> bool:
    """Whether the budget is to be solved for a time."""
    return config.gates.latency is not None or config.gates.latency_ms is not None


def check_latency(config: ConfigDict) -> None:
    """Raises `UserError` where the time that a config asks for cannot be measured, or cannot be met by anything."""
    gates, engine = config.gates, config.subnets.engine
    if not wants_latency(config):
        return
    asked = [name for name in ("latency", "latency_ms", "budget", "budgets") if gates[name] is not None]
    if len(asked) > 1:
        raise UserError(f"config.gates.{asked[0]} and config.gates.{asked[1]} both say how much to save: unset one")
    if not config.subnets.count:
        raise UserError("config.gates.latency is met by subnets, which engines run: set config.subnets.count too")
    if engine not in ENGINES:
        raise unknown_name("config.subnets.engine", engine, ENGINES)
    if engine != XLA:
        sessions.check_engine(engine, f"config.subnets.engine={engine}")


class Stopwatch:
    """Times networks with subnets against the dense network of a run, in the engine that its config names.

    Args:
      dense: variables of the dense network.
    """

    def __init__(self, run: Run, dense: Any):
        self.run, config = run, run.config.subnets
        self._engine, self._batch, self._threads = config.engine, config.batch_size, cpu_count()
        shape, count = run.dataset.image_shape, max(_IMAGES, self._batch)
        train = spread(run.dataset.train, _IMAGES, _IMAGES)
        (batch,) = eval_batches(run.dataset, train, len(train))
        images = np.resize(np.asarray(run.normalize(jnp.asarray(batch["image"]))), (count, *shape))
        starts = range(0, count - self._batch + 1, self._batch)
        self.images = jnp.asarray(images)
        self._batches = [images[start : start + self._batch] for start in starts][:_MOST]
        self._shape = shape
        network = fold(run.models[BASELINE], dense)
        if self._engine == XLA:
            self._dense: Run_ = lambda images: network.logits(jnp.asarray(images))
        else:
            images_ = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
            model = onnx_model(lambda images: network(images).logits, images_, "dense")
            self._dense = sessions.open_session(self._engine, model, self._threads)

    def measure(self, network: SubnetNetwork, variables: Any) -> Latency:
        """The latency of a network with subnets; with one image at once, of the faster way to run it."""
        compact = CompactSubnets(network, variables)
        runs = self._runs(compact)
        # What else runs on the machine only adds to a time: the best turn is the nearest to the truth.
        dense, *found = map(min, time_engines_in_turns([self._dense, *runs], self._batches))
        return Latency(self._engine, self._batch, dense, min(found))

    def _runs(self, compact: CompactSubnets) -> list[Run_]:
        if self._engine == XLA:
            return [lambda images: compact.logits(jnp.asarray(images))]
        functions = subnet_functions(compact)
        if compact.count == 1:
            functions = {"subnet0": functions["subnet0"]}
        elif self._batch > 1:
            del functions[ONE_IMAGE]
        graphs = subnet_graphs(functions, self._shape, np.float32, "subnets")
        if compact.count == 1:
            return [sessions.open_session(self._engine, graphs["subnet0"], self._threads)]
        runs: list[Run_] = [open_routed(self._engine, graphs, self._threads)]
        if self._batch == 1:
            runs.append(sessions.open_session(self._engine, graphs[ONE_IMAGE], self._threads, alone=False))
        return runs


def solve_budget(finder: SubnetFinder, dense: Any, console: Console, near: float | None = None) -> float:
    """The MACs reduction at which the subnets of a run take the time that its config asks for.

    Args:
      dense: variables of the dense network.
      near: a reduction that is tried first.

    Raises:
      UserError: no reduction brings them to within a tenth of that time; the message gives the range.
    """
    run, gates = finder.run, finder.run.config.gates
    least, most = finder.reductions()
    grouped = finder.group((least + most) / 2)
    found = 0.0
    if is_first():
        in_ms = gates.latency is None
        name = "latency_ms" if in_ms else "latency"
        wanted = gates[name]
        if near is None and not in_ms:
            near = 1 - wanted  # Where time would follow MACs.
        measure = _measure(finder, Stopwatch(run, dense), grouped)

        def value(one: Latency) -> float:
            return one.ms if in_ms else one.share

        budget, latency = search(measure, value, wanted, max(least, 0.0), most, near, f"config.gates.{name}")
        say(
            console,
            f"latency: {latency.ms:.3g} ms, {latency.share:.3f} of the dense network's {latency.dense_ms:.3g}, in "
            f"{latency.engine} at batch {latency.batch_size}, for a MACs reduction of {budget:.3f}",
        )
        found = budget
    return broadcast(round(found / _MILLIONTH)) * _MILLIONTH


def _measure(finder: SubnetFinder, stopwatch: Stopwatch, grouped: Subnets) -> Callable[[float], Latency]:
    """The latency as a function of the MACs reduction, for the same groups of images."""
    run, router = finder.run, make_router(grouped.count, finder.run.dataset.image_shape, grouped.dense_macs)
    network = SubnetNetwork(run.models[GATED], grouped, router)
    # The variables of the run are spread over its processes, and this one measures alone.
    variables = jax.device_get(finder.variables)
    variables = init_evenly(network, variables, stopwatch.images, jax.random.key(run.config.seed))
    multiple, extra = run.config.subnets.multiple, finder.router_macs()

    def measure(budget: float) -> Latency:
        subnets = cut_again(grouped, finder.ties, budget, multiple=multiple, extra_macs=extra)
        return stopwatch.measure(network.clone(subnets=subnets), variables)

    return measure


def search(
    measure: Callable[[float], Latency],
    value: Callable[[Latency], float],
    wanted: float,
    least: float,
    most: float,
    near: float | None = None,
    asked_by: str = "config.gates.latency",
) -> tuple[float, Latency]:
    """The MACs reduction between two whose time is nearest to the wanted one, and what was measured there.

    Args:
      measure: the latency at a reduction; it falls as that grows, in steps and with noise.
      value: what is wanted of it.
      near: a reduction that is tried first; None: the middle.
      asked_by: what says which one is wanted, for the message.

    Raises:
      UserError: none is within a tenth; the message gives the range.
    """
    ends: dict[bool, tuple[float, float]] = {}
    best: tuple[float, Latency] | None = None
    budget = (least + most) / 2 if near is None else near
    tried: set[float] = set()
    for _ in range(_TRIES):
        budget = float(np.clip(budget, least, most))
        if budget in tried:
            break
        tried.add(budget)
        latency = measure(budget)
        if best is None or abs(value(latency) / wanted - 1) < abs(value(best[1]) / wanted - 1):
            best = budget, latency
        off = value(latency) / wanted - 1
        if abs(off) <= _CLOSE:
            break
        ends[off > 0] = budget, off
        if len(ends) == 2:
            (slow, above), (fast, below) = ends[True], ends[False]
            # Not too near to either end: a step, or noise, would hold the search there.
            share = np.clip(above / (above - below), 0.25, 0.75)
            budget = slow + (fast - slow) * share
        else:
            budget = most - (most - budget) / 3 if off > 0 else least + (budget - least) / 3
    assert best is not None
    if abs(value(best[1]) / wanted - 1) > _ACCEPTED:
        raise UserError(
            f"no subnets take what {asked_by} asks for, {wanted:g}: the nearest, with a MACs reduction of "
            f"{best[0]:.3f}, take {value(best[1]):.3g} in {best[1].engine}, where the dense network takes "
            f"{best[1].dense_ms:.3g} ms; let nothing else run meanwhile (the same command goes on from here), "
            "or ask for another time, batch size or engine"
        )
    return best
