"""Subnets among the networks that `benchmark --engines` times: the router first, then each image's own subnet."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftwt_jax.benchmark.rows import Row, Run, image_of, wait
from ftwt_jax.budget.trained import Subject
from ftwt_jax.engines import sessions
from ftwt_jax.engines.nodes import UnknownOperatorError
from ftwt_jax.engines.routed import ONE_IMAGE, open_routed, subnet_functions, subnet_graphs
from ftwt_jax.errors import UserError
from ftwt_jax.inference.subnets import CompactSubnets
from ftwt_jax.subnets.find import find_subnets
from ftwt_jax.subnets.network import SubnetNetwork, init_evenly, make_router

# Subnets of networks that nobody trained.
COUNT = 4


def synthetic_subnets(subject: Subject, budget: float) -> tuple[SubnetNetwork, Any]:
    """Subnets of a network with random gates, and a random router that sends images to all of them."""
    images = subject.calibration[:64]
    shape = image_of(subject)
    first = find_subnets(subject.gated, subject.gated_variables, images, COUNT, budget)
    router = make_router(COUNT, shape, first.dense_macs)
    network = SubnetNetwork(subject.gated, first, router)
    return network, init_evenly(network, subject.gated_variables, images, jax.random.key(0))


def subnet_rows(
    network: SubnetNetwork, variables: Any, subject: Subject, engines: Sequence[str], threads: int
) -> dict[str, Row]:
    """The rows of subnets in every engine that runs them.

    "subnets": router and subnets as graphs of their own; "subnets, one graph": a single image by one graph of all;
    "one subnet": the largest, without a router.
    """
    if network.router is None:
        raise UserError("--engines times a router and its subnets, and this network has a single one")
    compact, shape = CompactSubnets(network, variables), image_of(subject)
    biggest = int(np.argmax(compact.macs))
    choice = np.concatenate([np.argmax(compact.route(image[None]), axis=-1) for image in subject.held_out])
    runs: dict[tuple[str, str], Run] = {}
    whole: dict[tuple[str, str], Run] = {}
    single: dict[tuple[str, str], Run] = {}
    if "xla" in engines:
        runs["xla", "float32"] = wait(compact.logits)
        single["xla", "float32"] = wait(functools.partial(compact.subnet, biggest))
    others = [engine for engine in engines if engine in sessions.ENGINES]
    if others:
        graphs = subnet_graphs(subnet_functions(compact), shape, jnp.float32, subject.arch)
        for engine in others:
            for dtype in sessions.DTYPES[engine]:
                key = engine, dtype
                with contextlib.suppress(UnknownOperatorError):
                    runs[key] = open_routed(engine, graphs, threads, dtype)
                    single[key] = sessions.open_session(engine, graphs[f"subnet{biggest}"], threads, dtype, alone=False)
                    whole[key] = sessions.open_session(engine, graphs[ONE_IMAGE], threads, dtype, alone=False)
    mean = float(np.mean(compact.macs[choice])) + compact.router_macs
    return {
        "subnets": Row(runs, mean),
        "subnets, one graph": Row(whole, mean, most=1),
        "one subnet": Row(single, float(compact.macs[biggest])),
    }
