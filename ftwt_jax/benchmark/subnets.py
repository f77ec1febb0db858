"""Subnets among the networks that `benchmark --engines` times: the router first, then each image's own subnet."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftwt_jax.benchmark.rows import Row, Run, image_of, wait
from ftwt_jax.budget.trained import Subject
from ftwt_jax.engines import sessions
from ftwt_jax.engines.graph import onnx_model
from ftwt_jax.errors import UserError
from ftwt_jax.inference.subnets import CompactSubnets, cut_by_choice, merged
from ftwt_jax.subnets.find import find_subnets
from ftwt_jax.subnets.network import SubnetNetwork, init_subnets, make_router

# Subnets of networks that nobody trained.
COUNT = 4


def synthetic_subnets(subject: Subject, budget: float) -> tuple[SubnetNetwork, Any]:
    """Subnets of a network with random gates, and a random router that sends images to all of them."""
    images = subject.calibration[:64]
    shape = image_of(subject)
    first = find_subnets(subject.gated, subject.gated_variables, images, COUNT, budget)
    router = make_router(COUNT, shape, first.dense_macs)
    network = SubnetNetwork(subject.gated, first, router)
    variables = init_subnets(network, subject.gated_variables, images[:1], jax.random.key(0))
    assert router is not None
    head = variables["params"]["router"]["classifier"]["dense"]
    routed = {kind: tree["router"] for kind, tree in variables.items()}
    logits = jax.jit(router.apply)(routed, images).logits
    head["bias"] = head["bias"] - jnp.mean(logits, axis=0)
    return network, variables


def subnet_rows(
    network: SubnetNetwork, variables: Any, subject: Subject, engines: Sequence[str], threads: int
) -> dict[str, Row]:
    """The networks "subnets", and "one subnet", the largest without its router, in every engine that runs them."""
    if network.router is None:
        raise UserError("--engines times a router and its subnets, and this network has a single one")
    compact, shape = CompactSubnets(network, variables), image_of(subject)
    biggest = int(np.argmax(compact.macs))
    choice = np.concatenate([np.argmax(compact.route(image[None]), axis=-1) for image in subject.held_out])
    runs: dict[tuple[str, str], Run] = {}
    single: dict[tuple[str, str], Run] = {}
    if "xla" in engines:
        runs["xla", "float32"] = wait(compact.logits)
        single["xla", "float32"] = wait(functools.partial(compact.subnet, biggest))
    others = [engine for engine in engines if engine in sessions.ENGINES]
    if others:
        images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        router = onnx_model(compact.route, images, "router")
        models = [
            onnx_model(functools.partial(compact.subnet, index), images, f"subnet{index}")
            for index in range(compact.count)
        ]
        for engine in others:
            for dtype in sessions.DTYPES[engine]:
                opened = [sessions.open_session(engine, model, threads, dtype, alone=False) for model in models]
                # So small a network gains nothing from a second thread.
                first = sessions.open_session(engine, router, 1, dtype, alone=False)
                runs[engine, dtype] = functools.partial(_routed, first, opened)
                single[engine, dtype] = opened[biggest]
    mean = float(np.mean(compact.macs[choice])) + compact.router_macs
    return {"subnets": Row(runs, mean), "one subnet": Row(single, float(compact.macs[biggest]))}


def _routed(router: Run, subnets: Sequence[Callable[[np.ndarray], np.ndarray]], images: np.ndarray) -> np.ndarray:
    """Logits of images, each from its own subnet."""
    choice = router(images).argmax(axis=-1)
    if len(images) == 1:
        return subnets[choice[0]](images)
    parts = cut_by_choice(choice)
    return merged(parts, [subnets[subnet](images[padded]) for subnet, _, padded in parts])
