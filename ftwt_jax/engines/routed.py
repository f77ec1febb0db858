"""A network with subnets as graphs, and in an engine: the router first, then the subnet that it chooses."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ftwt_jax.engines.graph import onnx_model
from ftwt_jax.engines.sessions import Session, open_session
from ftwt_jax.inference.subnets import CompactSubnets, cut_by_choice, merged

Function = Callable[[Array], Array]
ROUTER, ONE_IMAGE = "router", "one_image"


def subnet_functions(network: CompactSubnets, prepare: Function = lambda images: images) -> dict[str, Function]:
    """The parts of a network with subnets, each a function of images to logits, by name.

    `router` and `subnet0`, `subnet1`, ... take any number of images; `one_image` takes one, routes it, and runs its
    subnet alone.

    Args:
      prepare: what is done to images first.
    """

    def prepared(function: Function) -> Function:
        return lambda images: function(prepare(images))

    parts: dict[str, Function] = {ROUTER: network.route}
    parts |= {f"subnet{index}": functools.partial(network.subnet, index) for index in range(network.count)}
    parts[ONE_IMAGE] = network.one_image
    return {name: prepared(function) for name, function in parts.items()}


def subnet_graphs(functions: Mapping[str, Function], shape: Sequence[int], dtype: Any, name: str) -> dict[str, Any]:
    """These functions as ONNX models, by name; see `onnx_model`.

    Args:
      shape: of an image, [H, W, C].
      dtype: of the images, uint8 or float32.
      name: of the network.
    """
    images = jax.ShapeDtypeStruct((1, *shape), jnp.dtype(dtype))
    return {
        part: onnx_model(function, images, f"{name} {part}", any_number=part != ONE_IMAGE)
        for part, function in functions.items()
    }


def open_routed(engine: str, graphs: Mapping[str, Any], threads: int, dtype: str = "float32") -> Session:
    """Router and subnets as sessions of their own: any number of images to the logits of each by its own subnet.

    Args:
      graphs: what `subnet_graphs` returns.
    """
    # So small a network gains nothing from a second thread.
    router = open_session(engine, graphs[ROUTER], 1, dtype, alone=False)
    subnets = [
        open_session(engine, graph, threads, dtype, alone=False, any_number=True)
        for name, graph in graphs.items()
        if name not in (ROUTER, ONE_IMAGE)
    ]

    def run(images: np.ndarray) -> np.ndarray:
        choice = router(images).argmax(axis=-1)
        if len(images) == 1:
            return subnets[choice[0]](images)
        parts = cut_by_choice(choice)
        return merged(parts, [subnets[subnet](images[rows]) for subnet, rows, _ in parts])

    return run
