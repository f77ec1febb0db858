"""Gates that nobody trained: random heads of a wanted MACs reduction whose masks differ from image to image."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from ftwt_jax.budget.trained import CALIBRATION, HELD_OUT, Subject, random_images
from ftwt_jax.errors import UserError
from ftwt_jax.gating.gates import GateConfig, GateControl, GateHead
from ftwt_jax.gating.macs import dense_macs, macs
from ftwt_jax.models import create_model, options_of
from ftwt_jax.ops.batch_norm import of_batch_alone
from ftwt_jax.ops.compiling import compiler_options

_LARGEST_OFFSET, _ROUNDS = 6.0, 12
# How near a reduction comes to the budget before the search for it ends.
_CLOSE = 1e-3
# Images that heads are made on, fewer of large ones; on few, a deep network misses its budget on others.
_HEAD_IMAGES, _LARGE_HEAD_IMAGES = CALIBRATION, 64


def synthetic_subject(arch: str, budget: float, size: int | None = None, seed: int = 0) -> Subject:
    """A network of random weights whose gates are random too and save the share `budget` of its MACs.

    Args:
      size: side of the images; None: 224 for networks that have ImageNet's stem by themselves, otherwise 32.
    """
    if not 0 < budget < 1:
        raise UserError(f"--budget is the wanted MACs reduction, between 0 and 1; got {budget}")
    model = create_model(arch, 10)
    size = size or (224 if getattr(model, "stem", "cifar") == "imagenet" else 32)
    classes = 10 if size < 64 else 1000
    stem: dict[str, Any] = {"stem": "imagenet"} if size >= 64 and "stem" in options_of(arch) else {}
    dense = create_model(arch, classes, **stem)
    gated = create_model(arch, classes, gates=GateConfig(), **stem)
    images = random_images(CALIBRATION + HELD_OUT, (size, size, 3), jax.random.key(seed))
    seen = images[: _HEAD_IMAGES if size < 64 else _LARGE_HEAD_IMAGES]
    variables, _ = random_gates(gated, random_variables(gated, images.shape[1:], seed), seen, budget, seed)
    return Subject(
        arch,
        "synthetic",
        dense,
        gated,
        variables,
        variables,
        images[:CALIBRATION],
        images[CALIBRATION:],
        lambda x: x / 128 - 1,
    )


def random_variables(model: nn.Module, image_shape: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Variables of a network that nobody trained, drawn by NumPy: to compile Flax's own takes ResNet-56 20 seconds.

    Args:
      image_shape: [H, W, channels].
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key.endswith(("scale", "var")):
            return np.ones(leaf.shape, np.float32)
        # A kernel's last axis is that of its filters; biases and means are 0.
        spread = math.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.0
        return spread * rng.standard_normal(leaf.shape, np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_gates(
    model: nn.Module, variables: Any, images: Float[Array, "N H W channels"], budget: float, seed: int = 0
) -> tuple[Any, float]:
    """Sets every gate head at random so that the network saves the share `budget` of its MACs on these images.

    Batch norm receives the statistics of these images, without which the layers of a random network hardly distinguish
    one image from another.

    Each gate logit is a random projection of the pooled input, scaled to standard deviation 1 over the images, plus one
    offset that all filters of the network share. So every filter of a unit is on equally often, hardly any two images
    share a mask, and no filter is always off or always on: the worst case for whatever calibration learns.

    Args:
      model: a gated network, of any architecture.
      variables: its parameters and batch statistics; the heads' values do not matter.
      images: 32 or more, prepared as the network will receive them.

    Returns:
      Variables with the new heads and statistics, and the exact MACs reduction that they reach on these images.

    Raises:
      UserError: the network has no gates, or cannot save that much.
    """
    control = GateControl(targets=False)

    def forward(variables: Any, images: Array, offset: Array) -> tuple[Array, dict[str, Any]]:
        heads: dict[str, dict[str, Array]] = {}

        def draw(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
            if not isinstance(context.module, GateHead) or context.method_name != "__call__":
                return call(*args, **kwargs)
            head = context.module
            key = jax.random.fold_in(jax.random.key(seed), len(heads))
            summary = head.summary(args[0])
            kernel = jax.random.normal(key, (1 if head.own else summary.shape[-1], head.features))
            logits = summary * kernel if head.own else summary @ kernel
            scale = 1 / jnp.maximum(jnp.std(logits, axis=0), 1e-6)
            bias = offset - jnp.mean(logits, axis=0) * scale
            heads["/".join((*head.path, "dense"))] = {"kernel": kernel * scale, "bias": bias}
            return logits * scale + bias

        with nn.intercept_methods(draw):
            outputs, updates = model.apply(variables, images, train=True, control=control, mutable=["batch_stats"])
        reduction = jnp.mean(1 - macs(outputs) / dense_macs(outputs))
        return reduction, {"heads": heads, "batch_stats": updates.get("batch_stats", {})}

    if not jax.eval_shape(forward, variables, images, jnp.float32(0))[1]["heads"]:
        raise UserError("this network has no gates to set: create it with gates=GateConfig()")
    compiled = jax.jit(forward, compiler_options=compiler_options())
    low, high = -_LARGEST_OFFSET, _LARGEST_OFFSET
    most, least = (float(compiled(variables, images, jnp.float32(end))[0]) for end in (low, high))
    if not least <= budget <= most:
        raise UserError(f"random gates cannot cut this network by {budget:g} of its MACs; the most is {most:.2f}")
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        reduction, made = compiled(variables, images, jnp.float32(middle))
        if abs(reduction - budget) < _CLOSE:
            break
        low, high = (middle, high) if reduction > budget else (low, middle)
    params = flatten_dict(variables["params"], sep="/")
    for name, leaves in made["heads"].items():
        params |= {f"{name}/{leaf}": value for leaf, value in leaves.items()}
    batch_stats = of_batch_alone(variables.get("batch_stats", {}), made["batch_stats"])
    return {"params": unflatten_dict(params, sep="/"), "batch_stats": batch_stats}, float(reduction)
