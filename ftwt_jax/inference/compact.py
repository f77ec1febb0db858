"""Compact execution: a gated network that leaves out the filters that its gates do not turn on."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from ftwt_jax.errors import UserError
from ftwt_jax.inference import native
from ftwt_jax.inference.forward import EVERYTHING, Execution, Forward
from ftwt_jax.inference.kept import choose_kept
from ftwt_jax.inference.packed import Channels
from ftwt_jax.inference.packing import Weights
from ftwt_jax.inference.subnets import CompactSubnets
from ftwt_jax.ops.compiling import compiler_options
from ftwt_jax.subnets.network import SubnetNetwork

# Images of a calibration batch.
_CALIBRATION_BATCH = 64
# One image in this many may be outside before the whole batch is computed again.
_FEW = 8
# Images on which ways to run are timed.
_TRIALS = 24


def compact(
    model: nn.Module, variables: Any, calibration: Any = None, portable: bool = False, **options: Any
) -> "CompactNetwork | CompactSubnets":
    """A network made ready for inference: batch norm folded in, and only the filters that its gates turn on.

    For any network of `GatedUnit`s, gated or dense (which is then only folded). On a CPU with a C++ compiler, kernels
    of our own compute for each image the filters that its own masks turn on, and nothing else. With calibration,
    filters that no calibration image turns on, nor comes close to, are left out for good: the kernels of all units are
    packed once to what is left. That helps on any device, and without such a compiler it is all that is done: small
    dense convolutions, with each image's own mask applied to the result. An image whose gates want a filter that was
    left out is noticed and computed again with all filters.

    Of a `SubnetNetwork`, the router and each subnet become dense networks of their own, on any device; calibration has
    nothing to add there.

    Args:
      model: a Linen module; `model.apply(variables, images, **options)` runs it for inference.
      variables: its parameters and batch statistics, concrete. They are copied.
      calibration: some hundred images like those that the network will meet, prepared as it receives them:
        [S, H, W, channels], or an iterable of such batches. None: nothing is left out for good.
      portable: use only XLA's own operations, as a program that is exported needs.
      **options: further arguments of the model's `__call__`, such as `train=False` where that is not the default.

    Returns:
      A function of images [N, H, W, channels], compiled once for each of their shapes. Its outputs are the network's
      own to rounding; a gate logit within rounding of zero may fall on either side.

    Raises:
      UserError: the network has no units, the variables no parameters, or the calibration no images.
    """
    if isinstance(model, SubnetNetwork):
        return CompactSubnets(model, variables)
    forward = Forward(model, variables, options)
    per_image = not portable and jax.default_backend() == "cpu" and native.available()
    if calibration is None:
        return CompactNetwork(forward, Execution(per_image=per_image))
    batches = [calibration] if hasattr(calibration, "shape") else calibration
    chunks = [chunk for batch in batches for chunk in _chunks(jnp.asarray(batch))]
    if not chunks:
        raise UserError("calibration holds no images: pass some hundred like those that the network will meet")
    example = chunks[0]
    masked = forward.pack(EVERYTHING, example)
    see = jax.jit(
        lambda weights, images: _gate_logits(forward(EVERYTHING, weights, images)[1]),
        compiler_options=compiler_options(),
    )
    weights = jax.device_put(masked.weights)
    seen = [jax.device_get(see(weights, chunk)) for chunk in chunks]
    if not seen[0]:
        return CompactNetwork(forward)
    gate_logits = {name: np.concatenate([part[name] for part in seen]) for name in seen[0]}

    def share_of_work(kept: Mapping[str, Channels]) -> float:
        if not kept:
            return 1.0
        return sum(forward.pack(Execution(kept), example).macs.values()) / sum(masked.macs.values())

    packed = Execution(choose_kept(gate_logits, share_of_work))
    candidates = [packed]
    if per_image and packed.kept:
        # Where branches meet, channels that differ have to be brought together, which may cost more than it saves.
        candidates += [dataclasses.replace(packed, per_image=True), Execution(per_image=True)]
    elif per_image:
        candidates.append(Execution(per_image=True))
    singles = [example[index : index + 1] for index in range(min(len(example), _TRIALS))]
    return _fastest([CompactNetwork(forward, execution) for execution in candidates], singles)


def fold(model: nn.Module, variables: Any, **options: Any) -> "CompactNetwork":
    """The network with batch norm folded in and nothing left out: masks only set to zero what was computed.

    Args and errors as of `compact`.
    """
    return CompactNetwork(Forward(model, variables, options))


def _fastest(networks: list["CompactNetwork"], images: list[Array]) -> "CompactNetwork":
    """The network with the least median time, measured in turns on the same images."""
    if len(networks) == 1:
        return networks[0]
    seconds: list[list[float]] = [[] for _ in networks]
    for network in networks:
        jax.block_until_ready(network(images[0]))
    for image in images:
        for network, times in zip(networks, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(network(image))
            times.append(time.perf_counter() - start)
    return min(zip(networks, seconds, strict=True), key=lambda pair: float(np.median(pair[1])))[0]


def _gate_logits(seen: dict[str, Any]) -> dict[str, Array]:
    """The gate logits of each call of each unit, under the names that `PackedLayers` gives calls.

    A unit called twice: {"shared/gate_logits": (a, b)} becomes {"shared": a, "shared#2": b}.
    """
    named = {
        name.removesuffix("gate_logits").rstrip("/"): calls for name, calls in seen.items() if "gate_logits" in name
    }
    return {
        name if call == 1 else f"{name}#{call}": logits
        for name, calls in named.items()
        for call, logits in enumerate(calls, start=1)
    }


def _chunks(images: Array) -> list[Array]:
    """Batches of one size as far as possible, so that few shapes are compiled."""
    return [images[start : start + _CALIBRATION_BATCH] for start in range(0, len(images), _CALIBRATION_BATCH)]


@jax.custom_jvp
def _not_differentiable(images: Array) -> Array:
    return images


@_not_differentiable.defjvp
def _no_derivative(primals: Any, tangents: Any) -> Any:
    raise UserError(
        "the kernels of compact execution have no derivatives: make the network with compact(…, portable=True)"
    )


class CompactNetwork:
    """What `compact` returns.

    Attributes:
      execution: the filters that are held ready, and whether each image computes only its own of them.
    """

    def __init__(self, forward: Forward, execution: Execution = EVERYTHING):
        self.execution = execution
        self._everything = dataclasses.replace(execution, kept={})
        self._forward = forward
        self._weights: dict[str, Weights] = {}
        self._jitted = jax.jit(self._run, compiler_options=compiler_options())
        self._jitted_logits = jax.jit(lambda *args: self._run(*args)[0].logits, compiler_options=compiler_options())

    def __call__(self, images: Float[Array, "N H W channels"], *others: Any) -> Any:
        """What the network returns for these images.

        Raises:
          UserError: there is more than one array of images.
        """
        return self.run(images, *others)[0]

    def run(self, images: Float[Array, "N H W channels"], *others: Any) -> tuple[Any, Bool[Array, " N"]]:
        """What the network returns, and which images wanted a filter that was left out: they were computed again."""
        images = self._array(images, *others)
        # A jit within another takes no compiler options of its own.
        run = self._run if isinstance(images, jax.core.Tracer) else self._jitted
        return run(self._packed(images), images)

    def logits(self, images: Float[Array, "N H W channels"]) -> Float[Array, "N classes"]:
        """The logits alone of a network that returns `Outputs`: faster than with all that its gates returned."""
        images = self._array(images)
        if isinstance(images, jax.core.Tracer):
            return self.run(images)[0].logits
        return self._jitted_logits(self._packed(images), images)

    def _array(self, images: Any, *others: Any) -> Array:
        if others or not (hasattr(images, "shape") or isinstance(images, (list, tuple))):
            got = f"{1 + len(others)} inputs" if others else f"a {type(images).__name__}"
            raise UserError(f"compact execution is for networks of one array of images; got {got}")
        images = jnp.asarray(images)
        # Derivatives come with tracers; without one, the call would only take time.
        traced = isinstance(images, jax.core.Tracer)
        return _not_differentiable(images) if traced and self.execution.per_image else images

    def _packed(self, images: Array) -> dict[str, Weights]:
        if not self._weights:
            packed = {"compact": self._forward.pack(self.execution, images).weights}
            if self.execution.kept and not self.execution.fixed:
                packed["masked"] = self._forward.pack(self._everything, images).weights
            with jax.ensure_compile_time_eval():
                # `jnp.asarray` compiles a program for every shape.
                self._weights = jax.device_put(packed, may_alias=False)
        return self._weights

    def _run(self, weights: dict[str, Weights], images: Array) -> tuple[Any, Array]:
        count = images.shape[0]
        outputs, seen = self._forward(self.execution, weights["compact"], images)
        wanting = [one for name, calls in seen.items() if name.endswith("outside") for one in calls]
        if not wanting:
            return outputs, jnp.zeros(count, bool)
        outside = jnp.any(jnp.stack(wanting), axis=0)

        def masked(images: Array) -> Any:
            return self._forward(self._everything, weights["masked"], images)[0]

        def all_again() -> Any:
            return masked(images)

        few = -(-count // _FEW)

        def few_again() -> Any:
            first = jnp.argsort(~outside, stable=True)[:few]
            return jax.tree.map(lambda whole, part: whole.at[first].set(part), outputs, masked(images[first]))

        # In a batch of 16, `few` is 2. No image outside: branch 0, the outputs as they are. Images 3 and 7 outside:
        # branch 2, those two are computed again and written over the outputs' rows 3 and 7. Only image 3: branch 2
        # too, with image 0 computed again beside it, since shapes are fixed. Three or more: branch 1, all 16 again.
        branches = [lambda: outputs, all_again]
        which = jnp.any(outside).astype(jnp.int32)
        # Rows can be written over only where all that the network returns has one row for each image.
        if few < count and all(jnp.shape(leaf)[:1] == (count,) for leaf in jax.tree.leaves(outputs)):
            branches.append(few_again)
            which = jnp.where(jnp.sum(outside) <= few, 2 * which, which)
        return lax.switch(which, branches), outside
