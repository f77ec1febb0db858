"""Training images per second, dense and gated, against a plain Flax loop, and what ranking and input take of a step.

python results/time_training.py FIGURES.jsonl SECONDS [--tiny]      called by results/gpu.sh

All four steps of a network run in turns on the same random batch, which lies on the device: no input, no augmentation.
Steps are dispatched one after the other without waiting, as in a training, and a round of them ends with a wait. Before
them, the dense step with its input: random crops of images from the host, and of images that are on the device.
"""

import concurrent.futures
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import Figures

import ftwt_jax as ftwt
from ftwt_jax.benchmark.feeds import time_feeds
from ftwt_jax.gating import units
from ftwt_jax.models.vgg import PLANS
from ftwt_jax.ops.compiling import keep_compiled
from ftwt_jax.parallel.sharding import data_mesh, put_batch, put_whole, replicated
from ftwt_jax.training.step import GateTraining, create_state, make_train_step

# Network, side of the images, classes, images in a batch, dtype: what says most comes first, and what compiles for
# minutes on a GPU, bfloat16, last.
SETTINGS = (
    ("resnet20", 32, 10, 128, "float32"),
    ("vgg16_bn", 32, 10, 128, "float32"),
    ("resnet56", 32, 10, 128, "float32"),
    ("resnet18", 224, 1000, 128, "float32"),
    ("resnet34", 224, 1000, 128, "float32"),
    ("resnet20", 32, 10, 128, "bfloat16"),
    ("vgg16_bn", 32, 10, 128, "bfloat16"),
    ("resnet56", 32, 10, 128, "bfloat16"),
    ("resnet18", 224, 1000, 128, "bfloat16"),
    ("resnet34", 224, 1000, 128, "bfloat16"),
)
TINY = (("resnet8", 32, 10, 8, "float32"),)
# How long a round of steps takes, and how many there are.
ROUND_SECONDS, ROUNDS = 0.3, 5
STAGES = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
OPTIMIZER = optax.sgd(1e-3, momentum=0.9)

Step = Callable[[Any], Any]


class PlainBlock(nn.Module):
    """A residual block as anybody would write it in Flax; without `projection`, its shortcut has no parameters."""

    features: int
    strides: int
    projection: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        y = nn.relu(norm()(conv(self.features, (3, 3), self.strides, padding=1)(x)))
        y = norm()(conv(self.features, (3, 3), padding=1)(y))
        if x.shape != y.shape and self.projection:
            x = norm()(conv(self.features, (1, 1), self.strides)(x))
        elif x.shape != y.shape:
            x = nn.avg_pool(x, (2, 2), (2, 2))
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.features - x.shape[-1])))
        return nn.relu(x + y)


class PlainNetwork(nn.Module):
    """The dense network of a name, as anybody would write it in Flax."""

    name_: str
    classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        if self.name_ in PLANS:
            for step in PLANS[self.name_]:
                if step == "M":
                    x = nn.max_pool(x, (2, 2), (2, 2))
                else:
                    x = nn.relu(norm()(nn.Conv(int(step), (3, 3), padding=1, dtype=self.dtype)(x)))
        else:
            large = self.name_ in STAGES
            conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
            x = conv(64, (7, 7), 2, padding=3)(x) if large else conv(16, (3, 3), padding=1)(x)
            x = nn.relu(norm()(x))
            if large:
                x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
            depth = int(self.name_.removeprefix("resnet"))
            for stage, blocks in enumerate(STAGES.get(self.name_, ((depth - 2) // 6,) * 3)):
                for block in range(blocks):
                    features = (64 if large else 16) * 2**stage
                    x = PlainBlock(features, 2 if stage and not block else 1, large, self.dtype)(x, train)
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean(axis=(1, 2))).astype(jnp.float32)


def plain_step(model: nn.Module) -> Callable[..., Any]:
    """A training step as anybody would write it."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: dict[str, jax.Array]) -> Any:
        params, batch_stats, opt_state = state

        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = model.apply(variables, batch["image"] / 128.0 - 1, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        changes, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), updates["batch_stats"], opt_state), loss

    return step


def steps_of(name: str, side: int, classes: int, batch: int, dtype: str) -> tuple[dict[str, Any], dict[str, int]]:
    """For each kind of step, its state before the first and the step lowered but not compiled; their parameters."""
    mesh = data_mesh()
    example = {
        "image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)),
        "label": jnp.arange(batch) % classes,
    }
    data = put_batch(example, mesh)
    found: dict[str, Any] = {}

    plain = PlainNetwork(name, classes, jnp.dtype(dtype))
    variables = random_variables(functools.partial(plain.init, train=False), side)
    state: Any = (variables["params"], variables["batch_stats"], OPTIMIZER.init(variables["params"]))
    found["plain Flax"] = state, plain_step(plain).lower(state, example), (example,)
    counts = {"plain Flax": _count(variables["params"])}

    r = jnp.float32(0.9)
    options = {"stem": "imagenet"} if side >= 64 else {}
    for kind, gates in (("dense", None), ("gated", ftwt.GateConfig()), ("gated, no ranking", ftwt.GateConfig())):
        model = ftwt.create_model(name, classes, gates=gates, dtype=jnp.dtype(dtype), **options)
        variables = random_variables(model.init, side)
        counts[kind] = _count(variables["params"])
        state = put_whole(create_state(variables, OPTIMIZER), replicated(mesh))
        weight = GateTraining(optax.constant_schedule(1.0)) if gates else None
        step = make_train_step(model, OPTIMIZER, lambda batch: batch["image"] / 128.0 - 1, mesh, weight)
        ranking = _given if kind == "gated, no ranking" else units.topk_mass_mask
        with mock.patch.object(units, "topk_mass_mask", ranking):
            found[kind] = state, step.lower(state, data, r), (data, r)
    return found, counts


def random_variables(init: Callable[..., Any], side: int) -> Any:
    """What `init` would make, without compiling it: kernels that keep the scale of their inputs."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.sqrt(2 / np.prod(leaf.shape[:-1])))
        return jnp.ones(leaf.shape, leaf.dtype) if name in ("scale", "var") else jnp.zeros(leaf.shape, leaf.dtype)

    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def _given(maps: jax.Array, *_: Any) -> jax.Array:
    """In place of the ranking: every second filter, whatever the maps hold."""
    return jnp.broadcast_to(jnp.arange(maps.shape[-1]) % 2 == 0, (maps.shape[0], maps.shape[-1]))


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def measure(setting: tuple[str, int, int, int, str], round_seconds: float, rounds: int) -> dict[str, Any]:
    """Images per second of each kind of step, and the share of ranking in the gated one."""
    start = time.perf_counter()
    kinds, counts = steps_of(*setting)
    with concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool:
        compiled = dict(zip(kinds, pool.map(lambda kind: kinds[kind][1].compile(), kinds), strict=True))
    compile_s = time.perf_counter() - start
    states = {kind: kinds[kind][0] for kind in kinds}

    def run(kind: str, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            states[kind], metrics = compiled[kind](states[kind], *kinds[kind][2])
        jax.block_until_ready((states[kind], metrics))
        return (time.perf_counter() - start) / steps

    steps: dict[str, int] = {}
    for kind in kinds:
        run(kind, 2)
        steps[kind] = max(2, round(round_seconds / run(kind, 2)))
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            seconds[kind].append(run(kind, steps[kind]))
    _, _, _, batch, _ = setting
    shares = [
        1 - without / gated for gated, without in zip(seconds["gated"], seconds["gated, no ranking"], strict=True)
    ]
    return {
        "batch": batch,
        "images_per_second": {kind: batch / statistics.median(times) for kind, times in seconds.items()},
        "ranking_share": statistics.median(shares),
        "parameters": counts,
        "steps_in_a_round": steps,
        "compile_s": compile_s,
    }


def main() -> None:
    """Measures what is not there yet."""
    path, limit, *flags = sys.argv[1:]
    tiny = "--tiny" in flags
    keep_compiled()
    figures = Figures(path, "training", float(limit))
    for arch in ("resnet8",) if tiny else ("resnet20", "vgg16_bn"):
        name = f"{arch} at 32x32, images from the host and from the device"
        if figures.wants(name):
            model = ftwt.create_model(arch, 10)
            figures.write(name, **time_feeds(arch, model, (32, 32, 3), 8 if tiny else 128))
    for setting in TINY if tiny else SETTINGS:
        name = f"{setting[0]} at {setting[1]}x{setting[1]}, {setting[4]}"
        if figures.wants(name):
            figures.write(name, **measure(setting, *((0.01, 2) if tiny else (ROUND_SECONDS, ROUNDS))))


if __name__ == "__main__":
    main()
