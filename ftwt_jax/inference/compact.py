"""Compact execution: a gated network that leaves out the filters that its gates do not turn on."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import lax
from jaxtyping import Array, Bool, Float

from ftwt_jax.errors import UserError
from ftwt_jax.gating.activations import Activations
from ftwt_jax.inference import native
from ftwt_jax.inference.kept import Channels, choose_kept
from ftwt_jax.inference.packing import SEEN, PackedLayers, Weights
from ftwt_jax.ops.compiling import compiler_options

# Samples of a calibration batch; and the share of a batch that may be outside before all of it is computed again.
_CALIBRATION_BATCH = 64
_FEW = 8
# Images on which ways to run are timed.
_TRIALS = 24


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compact network computes.

    Attributes:
      kept: the filters held ready, ascending, for each unit that leaves some out for good.
      per_sample: of those, each sample computes only the ones that its own masks turn on, by kernels for a CPU.
    """

    kept: Mapping[str, Channels] = dataclasses.field(default_factory=dict)
    per_sample: bool = False


EVERYTHING = Plan()


def compact(
    model: nn.Module, variables: Any, calibration: Any = None, portable: bool = False, **options: Any
) -> "CompactNetwork":
    """A network made ready for inference: batch norm folded in, and only the filters that its gates turn on.

    For any network of `GatedUnit`s, gated or dense (which is then only folded). On a CPU with a C++ compiler, kernels
    of our own compute for each sample the filters that its own masks turn on, and nothing else. With calibration,
    filters that none of its samples turns on, nor comes near to, are left out for good: the kernels of all units are
    packed once to what is left. That helps on any device, and where there is no such compiler it is all that is done:
    small dense convolutions, each sample's own mask applied to the result. A sample whose gates want a filter that was
    left out is noticed and computed again with all of them.

    Args:
      model: a Linen module; `model.apply(variables, images, **options)` runs it for inference.
      variables: its parameters and batch statistics, concrete.
      calibration: images as the network is given them, [S, H, W, channels] or an iterable of such batches, like those
        that it will meet; some hundred. None: nothing is left out for good.
      portable: only operations of XLA's own, as for a program that is exported.
      **options: further arguments of the model's `__call__`, such as `train=False` where that is not the default.

    Returns:
      A function of images [N, H, W, channels], compiled once for each of their shapes. Its outputs are the network's
      own to rounding; a gate logit within rounding of zero may fall on either side.

    Raises:
      UserError: the network has no units, or the calibration no images.
    """
    forward = _Forward(model, variables, options)
    per_sample = not portable and jax.default_backend() == "cpu" and native.available()
    if calibration is None:
        return CompactNetwork(forward, Plan(per_sample=per_sample))
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
    weights = jax.tree.map(jnp.asarray, masked.weights)
    seen = [jax.device_get(see(weights, chunk)) for chunk in chunks]
    if not seen[0]:
        return CompactNetwork(forward)
    gate_logits = {name: np.concatenate([part[name] for part in seen]) for name in seen[0]}

    def share_of_work(kept: Mapping[str, Channels]) -> float:
        if not kept:
            return 1.0
        return sum(forward.pack(Plan(kept), example).macs.values()) / sum(masked.macs.values())

    plan = Plan(choose_kept(gate_logits, share_of_work))
    plans = [plan]
    if per_sample:
        # Where branches meet, channels that differ have to be brought together, which may cost more than it saves.
        plans += [dataclasses.replace(plan, per_sample=True), Plan(per_sample=True)][: 2 if plan.kept else 1]
    singles = [example[index : index + 1] for index in range(min(len(example), _TRIALS))]
    return _fastest([CompactNetwork(forward, plan) for plan in plans], singles)


def fold(model: nn.Module, variables: Any, **options: Any) -> "CompactNetwork":
    """The network with batch norm folded in and nothing left out: masks only set to zero what was computed.

    Args and errors as of `compact`.
    """
    return CompactNetwork(_Forward(model, variables, options))


def _fastest(networks: list["CompactNetwork"], images: list[Array]) -> "CompactNetwork":
    """The network of the least median time, measured in turns on the same images."""
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
    """The gate logits of each call of each unit, under the names that `PackedLayers` gives calls."""
    named = {
        name.removesuffix("gate_logits").rstrip("/"): calls for name, calls in seen.items() if "gate_logits" in name
    }
    return {
        name if call == 1 else f"{name}#{call}": logits
        for name, calls in named.items()
        for call, logits in enumerate(calls, start=1)
    }


def _chunks(images: Array) -> list[Array]:
    """Batches of one size as far as they go, so that few shapes are compiled."""
    return [images[start : start + _CALIBRATION_BATCH] for start in range(0, len(images), _CALIBRATION_BATCH)]


class _Forward:
    """A network run layer by layer in packed form."""

    def __init__(self, model: nn.Module, variables: Any, options: Mapping[str, Any]):
        if options.get("control") is not None:
            raise UserError("compact execution runs the masks of the gate heads: leave control out")
        self._model = model
        self._variables = variables
        self._options = options

    def pack(self, plan: Plan, images: Array) -> PackedLayers:
        """The weights for these filters; nothing is run."""
        layers = PackedLayers(self._variables, plan.kept, plan.per_sample)
        jax.eval_shape(lambda images: self._apply(layers, images), images)
        if not layers.weights:
            raise UserError("this network has no units: build it from ftwt.GatedUnit, or by ftwt.create_model")
        return layers

    def __call__(self, plan: Plan, weights: Weights, images: Array) -> tuple[Any, dict[str, Any]]:
        """The network's outputs, and what its units wrote into `SEEN`: {"unit/kind": (first call, second, ...)}."""
        return self._apply(PackedLayers(self._variables, plan.kept, plan.per_sample, weights), images)

    def _apply(self, layers: PackedLayers, images: Array) -> tuple[Any, dict[str, Any]]:
        with nn.intercept_methods(layers):
            outputs, seen = self._model.apply(self._variables, images, mutable=[SEEN], **self._options)
        outputs = jax.tree.map(_without_packed, outputs, is_leaf=lambda x: isinstance(x, Activations))
        return outputs, flatten_dict(seen.get(SEEN, {}), sep="/")


def _without_packed(x: Any) -> Any:
    return x.replace(packed=None) if isinstance(x, Activations) else x


class CompactNetwork:
    """What `compact` returns.

    Attributes:
      plan: the filters that are held ready, and whether each sample computes its own of them alone.
    """

    def __init__(self, forward: _Forward, plan: Plan = EVERYTHING):
        self.plan = plan
        self._everything = dataclasses.replace(plan, kept={})
        self._forward = forward
        self._weights: dict[str, Weights] = {}
        self._jitted = jax.jit(self._run, compiler_options=compiler_options())
        self._jitted_logits = jax.jit(lambda *given: self._run(*given)[0].logits, compiler_options=compiler_options())

    def __call__(self, images: Float[Array, "N H W channels"]) -> Any:
        """What the network returns for these images."""
        return self.run(images)[0]

    def run(self, images: Float[Array, "N H W channels"]) -> tuple[Any, Bool[Array, " N"]]:
        """What the network returns, and which samples were outside what calibration prepared."""
        images = jnp.asarray(images)
        # A jit within another takes no compiler options of its own.
        run = self._run if isinstance(images, jax.core.Tracer) else self._jitted
        return run(self._packed(images), images)

    def logits(self, images: Float[Array, "N H W channels"]) -> Float[Array, "N classes"]:
        """The logits alone of a network that returns `Outputs`: sooner than with all that its gates said."""
        images = jnp.asarray(images)
        if isinstance(images, jax.core.Tracer):
            return self.run(images)[0].logits
        return self._jitted_logits(self._packed(images), images)

    def _packed(self, images: Array) -> dict[str, Weights]:
        if not self._weights:
            packed = {"compact": self._forward.pack(self.plan, images).weights}
            if self.plan.kept:
                packed["masked"] = self._forward.pack(self._everything, images).weights
            with jax.ensure_compile_time_eval():
                self._weights = jax.tree.map(jnp.asarray, packed)
        return self._weights

    def _run(self, weights: dict[str, Weights], images: Array) -> tuple[Any, Array]:
        samples = images.shape[0]
        outputs, seen = self._forward(self.plan, weights["compact"], images)
        found = [one for name, calls in seen.items() if name.endswith("outside") for one in calls]
        if not found:
            return outputs, jnp.zeros(samples, bool)
        outside = jnp.any(jnp.stack(found), axis=0)

        def masked(images: Array) -> Any:
            return self._forward(self._everything, weights["masked"], images)[0]

        def all_again() -> Any:
            return masked(images)

        few = -(-samples // _FEW)

        def few_again() -> Any:
            first = jnp.argsort(~outside, stable=True)[:few]
            return jax.tree.map(lambda whole, part: whole.at[first].set(part), outputs, masked(images[first]))

        branches = [lambda: outputs, all_again]
        which = jnp.any(outside).astype(jnp.int32)
        if few < samples and all(jnp.shape(leaf)[:1] == (samples,) for leaf in jax.tree.leaves(outputs)):
            branches.append(few_again)
            which = jnp.where(jnp.sum(outside) <= few, 2 * which, which)
        return lax.switch(which, branches), outside
