"""Inference of a network with subnets, compiled for a TPU that you need not have, beside that of the dense network.

The programs are those of `ftwt.compact`: batch norm is folded in, and a subnet is a narrower dense network. Shapes are
all that a compiler looks at, so where nothing is trained yet, random masks stand in. They leave about the same share of
filters in every layer, which trained ones need not, at the same exact MACs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftwt_jax.errors import UserError
from ftwt_jax.files import AnyPath
from ftwt_jax.inference.forward import EVERYTHING, Execution, Forward
from ftwt_jax.parallel.sharding import jit_on, replicated, shapes_of, split
from ftwt_jax.plan.compile import Step, compile_lowered
from ftwt_jax.plan.roofline import Slice
from ftwt_jax.subnets.find import Subnets, cut
from ftwt_jax.subnets.network import (
    SubnetNetwork,
    router_macs,
    routing_macs,
    split_variables,
    subnet_variables,
    train_option,
)
from ftwt_jax.subnets.ties import Ties, find_ties
from ftwt_jax.training.run import Run
from ftwt_jax.training.settings import BASELINE, GATED, SUBNETS
from ftwt_jax.training.subnets_file import read_subnets
from ftwt_jax.workdir import SUBNETS as SUBNETS_FILE

# Random masks for each subnet, and the budget where the config sets none.
_ROWS, _BUDGET = 64, 0.5
_REMEDY = "use a smaller --config.eval_batch_size, or a slice with more chips"
# The figures of a step that add up where one runs after the other.
_SUMMED = ("flops", "hbm_traffic_bytes", "bound_s")


def add_subnets(run: Run, folder: AnyPath | None = None) -> float | None:
    """Gives a run that is only planned its subnets: those that a workdir holds, or else ones cut from random masks.

    Args:
      folder: the workdir, which need not exist; None: there is none.

    Returns:
      The MACs reduction that random masks were cut at, in (0, 1); None for subnets of the workdir.

    Raises:
      UserError: no subnets of this network have the budget, or those of the workdir are damaged or of another network.
    """
    ties = find_ties(run.models[GATED], run.abstract_variables(GATED), run.example_images)
    if folder is not None and (folder / SUBNETS_FILE).exists():
        run.add_subnets(_read(run, ties, folder))
        return None
    count, multiple, seed = run.config.subnets.count, run.config.subnets.multiple, run.config.seed
    budget = _BUDGET if run.config.gates.budget is None else run.config.gates.budget
    wanted = np.random.default_rng(seed).integers(0, 2, (_ROWS * count, ties.count)).astype(np.float32)
    shape = run.dataset.image_shape
    extra = routing_macs(count, shape, ties.dense_macs)
    found = cut(wanted, ties, count, budget, "heads", multiple=multiple, seed=seed, extra_macs=extra)
    # Training holds the subnet of every training image on the chips.
    assignment = np.resize(found.assignment, len(run.dataset.train))
    run.add_subnets(dataclasses.replace(found, assignment=assignment))
    return budget


def _read(run: Run, ties: Ties, folder: AnyPath) -> Subnets:
    found, count = read_subnets(folder), run.config.subnets.count
    wanted = {name: (count, len(groups)) for name, groups in ties.groups.items()}
    if {name: mask.shape for name, mask in found.masks.items()} != wanted:
        raise UserError(
            f"{folder / SUBNETS_FILE} does not hold {count} subnets of this network: plan with the config that was "
            "trained there, or without this --workdir"
        )
    return found


def compile_inference(run: Run, tpu_slice: Slice) -> dict[str, Step]:
    """Compiles inference for a batch of `config.eval_batch_size`, split over the chips as training splits its own.

    Images are float32, prepared as the networks receive them; weights are arguments, whole on every chip.

    Returns:
      What each chip needs for its part of the batch in "dense", "router" (not there if a single subnet needs none) and
      "subnet", the one with the most MACs.

    Raises:
      UserError: a network does not fit into the memory of a chip.
    """
    model = run.models[SUBNETS]
    assert isinstance(model, SubnetNetwork)
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), run.abstract_variables(SUBNETS))
    network, router = split_variables(blank)
    largest = int(np.argmax(model.subnets.macs))
    masks = {name: mask[largest] for name, mask in model.subnets.masks.items()}
    kept = {name: tuple(map(int, np.flatnonzero(mask))) for name, mask in masks.items()}
    options = train_option(model.network, False)
    dense = subnet_variables(network, largest, model.subnets.count)
    forwards = {"dense": (Forward(run.models[BASELINE], dense, options), EVERYTHING)}
    if model.router is not None:
        forwards["router"] = Forward(model.router, router, {}), EVERYTHING
    subnet = Forward(model.network, network, options).in_subnet(masks, largest, model.subnets.count)
    forwards["subnet"] = subnet, Execution(kept, fixed=True)
    return {name: _compile(run, name, *how, tpu_slice) for name, how in forwards.items()}


def _compile(run: Run, name: str, forward: Forward, execution: Execution, tpu_slice: Slice) -> Step:
    whole, parts = replicated(run.mesh), split(run.mesh)
    images = jax.ShapeDtypeStruct((run.eval_batch_size, *run.dataset.image_shape), jnp.float32, sharding=parts)
    weights = shapes_of(forward.pack(execution, run.example_images).weights, whole)

    def logits(weights: Any, images: jax.Array) -> jax.Array:
        return forward(execution, weights, images)[0].logits

    program = jit_on(run.mesh, logits, in_shardings=(whole, parts), out_shardings=parts)
    return compile_lowered(program.lower(weights, images), name, f"inference ({name})", _REMEDY, tpu_slice)


def inference_figures(run: Run, steps: dict[str, Step], budget: float | None, tpu_slice: Slice) -> dict[str, Any]:
    """The figures of inference as JSON data, per chip and its part of a batch; seconds, bytes and shares in [0, 1].

    Args:
      steps: from `compile_inference`.
      budget: from `add_subnets`.

    Returns:
      `networks`: figures of each step and, as "subnets", of router and subnet one after the other; `saved`: the share
      of the dense network's that these save; `macs_reduction`: the same of exact MACs; and what was planned for.
    """
    model, batch = run.models[SUBNETS], run.eval_batch_size // tpu_slice.size
    assert isinstance(model, SubnetNetwork)
    networks = {name: _figures(step, tpu_slice) for name, step in steps.items()}
    parts = [figures for name, figures in networks.items() if name != "dense"]
    networks["subnets"] = {name: sum(part[name] for part in parts) for name in _SUMMED}
    for figures in networks.values():
        figures["images_per_second"] = batch / figures["bound_s"]
    dense, subnets = networks["dense"], networks["subnets"]
    macs = max(model.subnets.macs) + router_macs(model.router, run.dataset.image_shape)
    return {
        "batch_per_chip": batch,
        "count": model.subnets.count,
        "masks": SUBNETS_FILE if budget is None else "random",
        "budget": budget,
        "budget_assumed": budget is not None and run.config.gates.budget is None,
        "macs_reduction": float(1 - macs / model.subnets.dense_macs),
        "networks": networks,
        "saved": {name: 1 - subnets[name] / dense[name] for name in _SUMMED},
    }


def _figures(step: Step, tpu_slice: Slice) -> dict[str, Any]:
    bound = step.compute_bound(tpu_slice)
    return {
        "memory_bytes": step.memory,
        "flops": step.flops,
        "hbm_traffic_bytes": step.traffic,
        "accessed_bytes": step.accessed,
        "bound_s": bound.step,
        "limit": bound.limit,
    }
