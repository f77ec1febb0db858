"""The subnets of a run: found in its trained network, and looked at on held-out images."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array
from rich.console import Console

from ftwt_jax.budget.batch_statistics import BatchStatistics
from ftwt_jax.budget.calibrate import Calibration, spread
from ftwt_jax.data.pipeline import eval_batches
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.gating.norms import BATCH_NORM
from ftwt_jax.parallel.sharding import each_batch, jit_on, put_batch, replicated, split
from ftwt_jax.printing import say, say_compiling
from ftwt_jax.subnets.find import Subnets, cut, cut_again, nearest, wanted_groups
from ftwt_jax.subnets.masks import reduction_range
from ftwt_jax.subnets.network import (
    ROUTER_NAME,
    SubnetNetwork,
    router_macs,
    routing_macs,
    split_variables,
    subnet_variables,
)
from ftwt_jax.subnets.ties import Ties, find_ties
from ftwt_jax.training.evaluator import Evaluation, Evaluator
from ftwt_jax.training.loop import Hook
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import GATED, SUBNETS
from ftwt_jax.training.step import TrainState
from ftwt_jax.training.subnets_file import read_subnets, write_subnets

# Training images that are grouped; all others join the group that they are nearest to.
GROUPED_IMAGES = 4096


class SubnetFinder:
    """Finds the subnets of a run by the masks of its trained gates or, without gates, by its dense network's targets.

    Args:
      variables: of the network with gates, or of the dense one.
      r: mass threshold of the targets.
      source: `heads` or `targets`.
    """

    def __init__(self, run: Run, variables: Any, r: float, source: str):
        self.run, self.variables, self.r, self.source = run, variables, r, source
        self._model = run.models[GATED]
        # The same images fall into the same groups at every budget.
        self._cut: dict[int, Subnets] = {}
        self.ties: Ties = find_ties(self._model, variables, run.example_images)
        whole = replicated(run.mesh)
        self._look = jit_on(run.mesh, self._wanted, in_shardings=(whole, split(run.mesh), whole), out_shardings=whole)
        self._label = jit_on(
            run.mesh, self._labels, in_shardings=(whole, split(run.mesh), whole, whole), out_shardings=whole
        )

    def _wanted(self, variables: Any, images: Array, r: Array) -> Array:
        return wanted_groups(self._model, variables, self.run.normalize(images), self.ties, self.source, r)

    def _labels(self, variables: Any, images: Array, r: Array, groups: Any) -> Array:
        return nearest(self._wanted(variables, images, r), *groups)

    def _each(self, program: Any, batches: Iterable[Any], *more: Any) -> np.ndarray:
        """What a program makes of all images of these batches, in their order."""
        run, r = self.run, self.run.replicated(np.float32(self.r))

        def step(batch: dict[str, Any]) -> Any:
            return program(self.variables, put_batch(batch["image"], run.mesh), r, *more)

        found = each_batch(run.mesh, step, run.preemption.between(batches))
        return np.concatenate([np.asarray(part) for part in jax.device_get(found)])

    @functools.cached_property
    def _wanted_by(self) -> np.ndarray:
        """What the images that are grouped want, [S, G]."""
        run, train, size = self.run, self.run.dataset.train, self.run.eval_batch_size
        grouped = spread(train, min(GROUPED_IMAGES, len(train)), size)
        return self._each(self._look, eval_batches(run.dataset, grouped, size))[: len(grouped)]

    def router_macs(self, count: int | None = None) -> float:
        """What the router of so many subnets costs an image; of as many as the config says."""
        count = self.run.config.subnets.count if count is None else count
        return routing_macs(count, self.run.dataset.image_shape, self.ties.dense_macs)

    def reductions(self) -> tuple[float, float]:
        """The least and the most MACs reduction of the subnets that the config asks for, the router included."""
        extra, ties = self.router_macs(), self.ties
        multiple = self.run.config.subnets.multiple
        return reduction_range(ties.blocks(), lambda kept: ties.macs(kept) + extra, ties.dense_macs, multiple)

    def group(self, budget: float, count: int | None = None, multiple: int | None = None) -> Subnets:
        """Cuts the network at a budget; only the images that are grouped are assigned to a subnet."""
        settings, seed = self.run.config.subnets, self.run.config.seed
        count = settings.count if count is None else count
        options: Any = {
            "multiple": settings.multiple if multiple is None else multiple,
            "extra_macs": self.router_macs(count),
        }
        if count in self._cut:
            return cut_again(self._cut[count], self.ties, budget, **options)
        self._cut[count] = cut(self._wanted_by, self.ties, count, budget, self.source, seed=seed, **options)
        return self._cut[count]

    def find(self, budget: float, count: int | None = None, multiple: int | None = None) -> Subnets:
        """Cuts the network at a budget, and assigns every training image to a subnet."""
        subnets, train = self.group(budget, count, multiple), self.run.dataset.train
        if subnets.count == 1:
            labels = np.zeros(len(train), np.int32)
        else:
            labels = self.labels(subnets, eval_batches(self.run.dataset, train, self.run.eval_batch_size))[: len(train)]
        return dataclasses.replace(subnets, assignment=labels)

    def labels(self, subnets: Subnets, batches: Iterable[Any]) -> np.ndarray:
        """The subnet that each image of these batches belongs to, int32, by the filters that it wants."""
        groups = self.run.replicated((subnets.centers, subnets.weights))
        return self._each(self._label, batches, groups).astype(np.int32)


def subnet_network(run: Run) -> SubnetNetwork:
    """The network of a run that has been cut into subnets."""
    model = run.models[SUBNETS]
    assert isinstance(model, SubnetNetwork)
    return model


def choose_subnets(
    run: Run, variables: Any, r: float, budget: Callable[[SubnetFinder], float], console: Console
) -> None:
    """Gives a run its subnets: those that its workdir holds, or new ones, which are written there.

    Args:
      variables: of the network that is cut.
      r: mass threshold of its targets.
      budget: the exact MACs reduction, asked for if there are none yet.
    """
    if SUBNETS in run.models:
        return
    say_compiling(console, f"the search for subnets of {run.config.model.name}")
    source = "heads" if run.config.gates.epochs > 0 else "targets"
    started, finder = time.perf_counter(), SubnetFinder(run, variables, r, source)
    subnets = finder.find(budget(finder))
    write_subnets(run.workdir, subnets)
    # Those of the first process: k-means may round otherwise in another one.
    run.add_subnets(read_subnets(run.workdir))
    extra = router_macs(subnet_network(run).router, run.dataset.image_shape)
    images = np.bincount(subnets.assignment, minlength=subnets.count)
    say(
        console,
        f"subnets: {subnets.count} found by {finder.source} in {time.perf_counter() - started:.1f} s, images of each "
        f"{', '.join(f'{count:,}' for count in images)}; MACs reduction "
        f"{subnets.macs_reduction - extra / subnets.dense_macs:.3f} exact",
    )


class SubnetKeeper(Hook):
    """Measures the batch statistics again when the subnets are trained, under the masks that the router chooses."""

    def __init__(self, calibration: Calibration, last: int, r: float):
        super().__init__(calibration.run, r)
        self._calibration, self._last = calibration, last
        run = calibration.run
        self._statistics = BatchStatistics(run.models[SUBNETS], run.normalize, run.mesh, run.preemption)

    def compile(self, variables: Any) -> None:
        """Compiles what `after` runs, for variables of these shapes and dtypes."""
        self._statistics.compile(variables, self.run.eval_batch["image"])

    @property
    def stops(self) -> tuple[int, ...]:
        """The steps after which `after` has something to do."""
        return (self._last,)

    def after(self, state: TrainState, step: int) -> TrainState:
        """The state to go on with after `step`."""
        if step != self._last:
            return state
        renewed = _renewed(self._statistics, state.variables, self._calibration)
        return state.replace(batch_stats=renewed["batch_stats"])


def _renewed(statistics: BatchStatistics, variables: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    """The variables of a network with subnets with the batch statistics of its masks, measured again."""
    found = dict(statistics.renewed(variables, calibration.batches)["batch_stats"])
    if ROUTER_NAME in found:
        # The router keeps the statistics that it was trained with: those of augmented images.
        found[ROUTER_NAME] = variables["batch_stats"][ROUTER_NAME]
    return {**variables, "batch_stats": found}


def cut_to_budgets(run: Run, variables: Any, budgets: Sequence[float]) -> list[SubnetNetwork]:
    """The network with subnets of a run with masks for other budgets; groups of images and router are the same.

    Args:
      variables: of the network with subnets.
      budgets: MACs reductions, the router's MACs included.

    Raises:
      UserError: no subnets have one of these reductions.
    """
    model, whole = subnet_network(run), run.models[GATED]
    first = subnet_variables(split_variables(variables)[0], 0, model.subnets.count)
    ties = find_ties(whole, first, run.example_images)
    extra, multiple = router_macs(model.router, run.dataset.image_shape), run.config.subnets.multiple
    found = (cut_again(model.subnets, ties, budget, multiple=multiple, extra_macs=extra) for budget in budgets)
    return [SubnetNetwork(whole, subnets, model.router) for subnets in found]


def evaluate_cut(model: SubnetNetwork, variables: Any, calibration: Calibration, r: float) -> Evaluation:
    """The figures on the held-out split under masks that the variables were not trained with.

    Batch statistics are measured again under them, on the calibration images.
    """
    run = calibration.run
    statistics = BatchStatistics(model, run.normalize, run.mesh, run.preemption)
    evaluator = Evaluator(model, run.normalize, run.mesh, preemption=run.preemption)
    return evaluator.run(_renewed(statistics, variables, calibration), run.test_batches(), r)


def look_at_subnets(finder: SubnetFinder, variables: Any) -> dict[str, float]:
    """How well the router knows the subnets of held-out images, and what its mistakes cost.

    Args:
      finder: of the network that the subnets were found in.
      variables: of the network with subnets.

    Returns:
      `router_accuracy`: share of images that the router sends to the subnet that their own filters ask for;
      `own_accuracy`: accuracy with each image in that subnet; fractions.
    """
    run = finder.run
    model, mesh = subnet_network(run), run.mesh
    own = finder.labels(model.subnets, run.test_batches())
    whole = replicated(mesh)

    def step(variables: Any, batch: dict[str, Array], own: Array) -> Array:
        control = GateControl(choice=own, targets=False)
        outputs: Any = model.apply(variables, run.normalize(batch["image"]), train=False, control=control)
        hits = jnp.argmax(outputs.logits, axis=-1) == batch["label"]
        routed = jnp.argmax(outputs.routes.logits, axis=-1) == own
        return jnp.stack([jnp.sum(x * batch["weight"]) for x in (routed, hits, jnp.ones_like(hits))])

    program = jit_on(mesh, step, in_shardings=(whole, split(mesh), whole), out_shardings=whole)
    sums, size = np.zeros(3), run.eval_batch_size
    for index, batch in enumerate(run.preemption.between(run.test_batches())):
        labels = run.replicated(own[index * size : (index + 1) * size])
        sums += np.asarray(program(variables, put_batch(batch, mesh), labels))
    return {"router_accuracy": float(sums[0] / sums[2]), "own_accuracy": float(sums[1] / sums[2])}


def one_subnet(finder: SubnetFinder, variables: Any, budget: float) -> dict[str, Any]:
    """The accuracy of a single subnet for all images, with statistics of its own and without further training.

    Its weights are those of the subnets, its batch norms the mean of theirs, each counted as often as it has images.

    Args:
      finder, variables: as of `look_at_subnets`.
    """
    run = finder.run
    model = SubnetNetwork(run.models[GATED], finder.find(budget, count=1))
    network = _of_one(split_variables(variables)[0], subnet_network(run).subnets)
    found = evaluate_cut(model, network, Calibration(run), finder.r)
    return {"accuracy": found.accuracy, "macs_reduction": found.macs_reduction}


def _of_one(variables: dict[str, Any], subnets: Subnets) -> dict[str, Any]:
    """The variables of a network whose batch norms [1, C] are the mean of those of its subnets."""
    images = np.bincount(subnets.assignment, minlength=subnets.count)
    found = flatten_dict(jax.device_get(variables))
    for path, leaf in found.items():
        if path[-2:-1] == (BATCH_NORM,) and leaf.ndim == 2:
            mask = subnets.masks.get("/".join(path[1:-2]), np.ones(leaf.shape, bool))
            # Of a filter that no subnet keeps, there is nothing to know.
            shares = images[:, None] * (mask | ~mask.any(axis=0))
            found[path] = np.average(leaf, axis=0, weights=shares)[None]
    return unflatten_dict(found)
