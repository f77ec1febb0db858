"""Compact execution of a network with subnets: a router, and K ordinary dense networks of their own widths."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ftwt_jax.errors import UserError
from ftwt_jax.gating.activations import Layers
from ftwt_jax.gating.gates import GateControl
from ftwt_jax.gating.units import Outputs, Routes
from ftwt_jax.inference.forward import EVERYTHING, Execution, Forward, copied
from ftwt_jax.inference.packing import Weights
from ftwt_jax.ops.compiling import compiler_options
from ftwt_jax.subnets.network import SubnetNetwork, split_variables, train_option

# A subnet, the places of images in a batch, and these again, repeated up to the size of the part.
Part = tuple[int, np.ndarray, np.ndarray]
# A group of images is cut into parts of a batch's size divided by one of these, so that few shapes are compiled.
_PARTS = (1, 4, 16)


class CompactSubnets:
    """What `compact` returns for a network with subnets: a function of images [N, H, W, channels].

    One image runs through router and subnet in one program. Of more, the router's choice is read by the host, and each
    subnet is given the images that are its own, in parts of a few sizes.

    Attributes:
      count: number of subnets, K.
      macs: exact MACs of each subnet [K].
      router_macs: of the router.
    """

    def __init__(self, model: SubnetNetwork, variables: Any):
        network, router = split_variables(copied(variables))
        if model.router is not None and "params" not in router:
            raise UserError("these variables hold no router: make them by ftwt.init_subnets, or train them")
        self._model, self.count, self.macs = model, model.subnets.count, model.subnets.macs
        whole = Forward(model.network, network, train_option(model.network, False))
        self._forwards, self._executions = [], []
        for subnet in range(self.count):
            masks = {name: np.asarray(mask[subnet]) for name, mask in model.subnets.masks.items()}
            kept = {name: tuple(map(int, np.flatnonzero(mask))) for name, mask in masks.items()}
            self._forwards.append(whole.in_subnet(masks, subnet, self.count))
            self._executions.append(Execution(kept, fixed=True))
        self._router = Forward(model.router, router, {}) if model.router is not None else None
        self._weights: dict[str, Any] = {}
        self.router_macs = 0.0
        self._records = jax.jit(self._layers)
        compiled: Any = {"compiler_options": compiler_options()}
        self._route = jax.jit(self._routed, **compiled)
        self._one = jax.jit(self._single, **compiled)
        self._parts = [
            jax.jit(lambda weights, images, rows, subnet=subnet: self._run(subnet, weights, images[rows]), **compiled)
            for subnet in range(self.count)
        ]

    def __call__(self, images: Float[Array, "N H W channels"]) -> Outputs:
        """What the network returns for these images."""
        logits, routed = self._all(images)
        choice = jnp.argmax(routed, axis=-1).astype(jnp.int32)
        records = self._layers if isinstance(choice, jax.core.Tracer) else self._records
        return Outputs(logits, records(jnp.asarray(images), choice), Routes(routed, choice))

    def logits(self, images: Float[Array, "N H W channels"]) -> Float[Array, "N classes"]:
        """The logits alone."""
        return self._all(images)[0]

    def route(self, images: Float[Array, "N H W channels"]) -> Float[Array, "N K"]:
        """The router's logits; the subnet of an image is the largest."""
        images = jnp.asarray(images)
        route = self._routed if isinstance(images, jax.core.Tracer) else self._route
        return route(self._packed(images)["router"], images)

    def subnet(self, index: int, images: Float[Array, "N H W channels"]) -> Float[Array, "N classes"]:
        """The logits of one subnet for all of these images."""
        images = jnp.asarray(images)
        weights = self._packed(images)["subnets"][index]
        if isinstance(images, jax.core.Tracer):
            return self._run(index, weights, images)
        return self._parts[index](weights, images, np.arange(len(images), dtype=np.int32))

    def one_image(self, image: Float[Array, "1 H W channels"]) -> Float[Array, "1 classes"]:
        """The logits of a single image by router and subnet in one program, also inside of another."""
        return self._single(self._packed(image), image)[0]

    def prepare(self, images: Float[Array, "N H W channels"]) -> None:
        """Compiles what batches of this size need, whichever subnets their images choose."""
        images, weights = jnp.asarray(images), self._packed(jnp.asarray(images))
        if len(images) == 1:
            self._one(weights, images)
            return
        self._route(weights["router"], images)
        for size in part_sizes(len(images)):
            for subnet in range(self.count):
                self._parts[subnet](weights["subnets"][subnet], images, np.arange(size, dtype=np.int32))

    def _all(self, images: Any) -> tuple[Array, Array]:
        """Logits of the classes, and of the router."""
        images = jnp.asarray(images)
        weights = self._packed(images)
        if isinstance(images, jax.core.Tracer):
            routed = self._routed(weights["router"], images)
            choice = jnp.argmax(routed, axis=-1)
            rows = lax.map(lambda row: self._switched(weights, row[0][None], row[1])[0], (images, choice))
            return rows, routed
        if len(images) == 1:
            return self._one(weights, images)
        routed = self._route(weights["router"], images)
        parts = cut_by_choice(np.argmax(jax.device_get(routed), axis=-1), part_sizes(len(images)))
        # All of them are under way before the first is waited for.
        made = [
            self._parts[subnet](weights["subnets"][subnet], images, padded.astype(np.int32))
            for subnet, _, padded in parts
        ]
        return jnp.asarray(merged(parts, jax.device_get(made))), routed

    def _single(self, weights: dict[str, Any], images: Array) -> tuple[Array, Array]:
        routed = self._routed(weights["router"], images)
        return self._switched(weights, images, jnp.argmax(routed, axis=-1).reshape(())), routed

    def _switched(self, weights: dict[str, Any], images: Array, choice: Int[Array, ""]) -> Array:
        branches = [
            lambda weights, images, subnet=subnet: self._run(subnet, weights["subnets"][subnet], images)
            for subnet in range(self.count)
        ]
        return lax.switch(choice, branches, weights, images)

    def _run(self, subnet: int, weights: Weights, images: Array) -> Array:
        return self._forwards[subnet](self._executions[subnet], weights, images)[0].logits

    def _routed(self, weights: Weights, images: Array) -> Array:
        if self._router is None:
            return jnp.zeros((images.shape[0], 1))
        return self._router(EVERYTHING, weights, images)[0].logits

    def _packed(self, images: Array) -> dict[str, Any]:
        if not self._weights:
            subnets = [
                forward.pack(execution, images)
                for forward, execution in zip(self._forwards, self._executions, strict=True)
            ]
            router = None if self._router is None else self._router.pack(EVERYTHING, images)
            self.router_macs = 0.0 if router is None else float(sum(router.macs.values()))
            with jax.ensure_compile_time_eval():
                self._weights = jax.device_put(
                    {
                        "subnets": [layers.weights for layers in subnets],
                        "router": {} if router is None else router.weights,
                    }
                )
        return self._weights

    def _layers(self, images: Array, choice: Int[Array, " N"]) -> Layers:
        """The records of every layer, for which nothing but masks is computed."""
        shapes = jax.eval_shape(self._model.init, jax.random.key(0), images)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        control = GateControl(targets=False, choice=choice)
        outputs: Any = self._model.apply(zeros, images, control=control)
        return outputs.layers


def part_sizes(images: int) -> list[int]:
    """The sizes of the parts that a batch is cut into, the largest first."""
    return sorted({max(images // part, 1) for part in _PARTS}, reverse=True)


def cut_by_choice(choice: Int[np.ndarray, " N"], sizes: Sequence[int] | None = None) -> list[Part]:
    """The images of a batch in parts, by the subnets that they are to run in.

    Args:
      sizes: those that a part may have; None: any, so that each subnet is given its images at once.
    """
    groups = [(int(subnet), np.flatnonzero(choice == subnet)) for subnet in np.unique(choice)]
    if sizes is None:
        return [(subnet, rows, rows) for subnet, rows in groups]
    return [(subnet, part, np.resize(part, size)) for subnet, rows in groups for part, size in cut_rows(rows, sizes)]


def merged(parts: Sequence[Part], logits: Sequence[np.ndarray]) -> np.ndarray:
    """The logits [N, classes] of all images from those of their parts."""
    found = np.empty((sum(len(rows) for _, rows, _ in parts), *logits[0].shape[1:]), logits[0].dtype)
    for (_, rows, _), part in zip(parts, logits, strict=True):
        found[rows] = part[: len(rows)]
    return found


def cut_rows(rows: np.ndarray, sizes: Sequence[int]) -> list[tuple[np.ndarray, int]]:
    """Rows in parts, each with the size that it is padded to: less than half of a part is padding.

    With sizes 32, 8 and 2: 9 rows are cut into 8 and 1, 5 to 7 are padded to 8, 3 are cut into 2 and 1. A single row is
    padded to the smallest size.
    """
    parts = []
    while len(rows):
        size = next((size for size in sizes if len(rows) > size // 2), sizes[-1])
        parts.append((rows[:size], size))
        rows = rows[size:]
    return parts
