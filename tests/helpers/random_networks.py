"""Networks put together at random from all that a user may write, and their work counted from what Flax itself runs."""

import math
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import ftwt_jax as ftwt

_ACTS = (nn.relu, nn.relu, nn.relu6, nn.gelu, nn.leaky_relu, None, nn.sigmoid, jnp.cos)
_KEEPING = (
    nn.relu,
    nn.gelu,
    lambda v: jnp.tanh(v) * 2,
    lambda v: v[:, ::-1],
    lambda v: v * jnp.linspace(-1, 1, v.shape[-1]),
)
_LOSING = (
    nn.sigmoid, lambda v: v + 1, lambda v: nn.softmax(v), lambda v: v[..., ::-1], lambda v: v - v.mean(0)[None],
    lambda v: jnp.concatenate([v, jnp.cos(v)], -1), lambda v: v / jnp.sqrt(jnp.square(v).mean(-1, keepdims=True) + 1),
    lambda v: jnp.roll(v, 1, axis=-1),
)  # fmt: skip
_SPELLINGS = (
    {}, {"kernel_size": (3, 3)}, {"kernel_size": (1, 5)}, {"kernel_size": 1}, {"kernel_size": 2, "padding": "SAME"},
    {"strides": 2}, {"strides": (2, 1), "padding": "SAME"}, {"padding": ((0, 2), (1, 1))}, {"padding": "CIRCULAR"},
    {"kernel_dilation": (1, 2), "padding": "SAME"}, {"kernel_size": (2, 3), "transpose": True},
    {"transpose": True, "strides": 2, "kernel_size": 2}, {"padding": 2, "strides": (1, 2)},
)  # fmt: skip
_NORMS = ("batch", "batch", "batch", None, "layer", "group", nn.LayerNorm, nn.BatchNorm)
GATES = (
    ftwt.GateConfig(), ftwt.GateConfig.paper(), ftwt.GateConfig(norm="none", pool="mean"),
    ftwt.GateConfig(mode="joint"),
)  # fmt: skip


class Pair(nn.Module):
    """Two units, the second with a shortcut around it."""

    gates: ftwt.GateConfig | None

    def setup(self):
        self.first = ftwt.GatedUnit(6, gates=self.gates)
        self.second = ftwt.GatedUnit(6, gates=self.gates)

    def __call__(self, x):
        y = self.first(x)
        return self.second(y, shortcut=y)


class RandomNetwork(nn.Module):
    """Steps of (what to do, a number that decides how); all that no later step takes meets before the classifier."""

    steps: tuple[tuple[str, int], ...]
    gates: ftwt.GateConfig | None = None

    @nn.compact
    def __call__(self, images):
        shared = ftwt.GatedUnit(5, gates=self.gates, name="shared")
        ends = [ftwt.GatedUnit(8, gates=self.gates, name="first")(images)]
        for step, seed in self.steps:
            rng = np.random.default_rng(seed)
            taken = ends.pop(int(rng.integers(len(ends))))
            ends += getattr(self, f"_{step}")(rng, taken, ends, shared)
        flat = [ftwt.flatten(end.map(lambda v: v[:, :2, :2])) for end in ends]
        return ftwt.Classifier(3)(ftwt.concatenate(flat))

    def _unit(self, rng, x, ends, shared):
        spelling = dict(_SPELLINGS[rng.integers(len(_SPELLINGS))])
        if min(x.shape[1:3]) < 3:
            spelling = {"kernel_size": 1}
        features = int(rng.integers(1, 17))
        if not spelling.get("transpose") and rng.integers(3) == 0:
            features = x.shape[-1]
            spelling["groups"] = features if rng.integers(2) else math.gcd(features, 4)
        act = _ACTS[rng.integers(len(_ACTS))]
        norm = _NORMS[rng.integers(len(_NORMS))]
        bias = bool(rng.integers(2))
        return [ftwt.GatedUnit(features, gates=self.gates, act=act, norm=norm, use_bias=bias, **spelling)(x)]

    def _prelu(self, rng, x, ends, shared):
        return [ftwt.GatedUnit(7, gates=self.gates, act=nn.PReLU())(x)]

    def _dense(self, rng, x, ends, shared):
        return [ftwt.GatedDense(int(rng.integers(1, 20)), act=nn.gelu, gates=self.gates)(x)]

    def _plain(self, rng, x, ends, shared):
        kernel_size = (None, 1, 3)[rng.integers(3)]
        norm = (None, "batch", "layer")[rng.integers(3)]
        return [ftwt.PlainConv(int(rng.integers(1, 9)), kernel_size=kernel_size, norm=norm, use_bias=True)(x)]

    def _keep(self, rng, x, ends, shared):
        return [x.map(_KEEPING[rng.integers(len(_KEEPING))])]

    def _lose(self, rng, x, ends, shared):
        return [x.map(_LOSING[rng.integers(len(_LOSING))])]

    def _module(self, rng, x, ends, shared):
        return [x.map((nn.LayerNorm(), nn.PReLU(), lambda v: nn.GroupNorm(1)(v))[rng.integers(3)])]

    def _branch(self, rng, x, ends, shared):
        return [x, x.map(lambda v: v[:, :, ::-1])]

    def _residual(self, rng, x, ends, shared):
        y = ftwt.GatedUnit(x.shape[-1] if rng.integers(3) else 1, gates=self.gates, act=None)(x)
        return [ftwt.residual_add(y, x) if rng.integers(2) else ftwt.residual_add(x, y)]

    def _shortcut(self, rng, x, ends, shared):
        y = ftwt.GatedUnit(9, gates=self.gates)(x)
        return [ftwt.GatedUnit(9, gates=self.gates)(y, shortcut=y)]

    def _join(self, rng, x, ends, shared):
        fits = [end for end in ends if end.shape[1:3] == x.shape[1:3]]
        for end in fits:
            ends.remove(end)
        return [ftwt.concatenate([x, *fits, ftwt.GatedUnit(3, gates=self.gates)(x)])]

    def _permute(self, rng, x, ends, shared):
        order = rng.permutation(x.shape[-1])
        cut = int(rng.integers(1, x.shape[-1] + 1))
        return [ftwt.permute_channels(x, order[:cut]), ftwt.permute_channels(x, order[cut - 1 :])]

    def _shuffle(self, rng, x, ends, shared):
        if all(side % 2 == 0 for side in x.shape[1:3]) and rng.integers(2):
            return [ftwt.pixel_unshuffle(x, 2)]
        return [ftwt.pixel_shuffle(ftwt.GatedUnit(8, kernel_size=1, gates=self.gates)(x), 2)]

    def _shared(self, rng, x, ends, shared):
        x = ftwt.GatedUnit(8, kernel_size=1, gates=self.gates)(x)
        # The unit's kernel was made for images of 8 channels.
        return [shared(x), shared(x.map(lambda v: v * 2))]

    def _remat(self, rng, x, ends, shared):
        if rng.integers(2):
            return [nn.remat(Pair)(self.gates)(x)]
        unit = nn.remat(ftwt.GatedUnit)(6, gates=self.gates)
        return [ftwt.concatenate([unit(x), unit(x.map(nn.relu))])]

    def _jit(self, rng, x, ends, shared):
        return [nn.jit(Pair)(self.gates)(x)]

    def _block(self, rng, x, ends, shared):
        return [Pair(self.gates)(x)]


STEPS = (
    "unit", "unit", "unit", "prelu", "dense", "plain", "keep", "lose", "module", "branch", "residual", "shortcut",
    "join", "permute", "shuffle", "shared", "remat", "jit", "block",
)  # fmt: skip


def counted(model, variables, images):
    """Dense MACs of an image and how often each layer was called, from the convolutions and products that Flax runs."""
    total, calls = 0, Counter()
    ours = (ftwt.GatedUnit, ftwt.PlainConv, ftwt.Classifier)

    def count(call, args, kwargs, context):
        nonlocal total
        module = context.module
        out = call(*args, **kwargs)
        if context.method_name != "__call__":
            return out
        if isinstance(module, ours):
            calls["/".join(module.path)] += 1
        if isinstance(module, (nn.Conv, nn.ConvTranspose, nn.Dense)) and "gate_head" not in module.path:
            kernel = math.prod(module.variables["params"]["kernel"].shape)
            pixels = args[0] if isinstance(module, nn.ConvTranspose) else out
            total += math.prod(pixels.shape[1:-1]) * kernel
        return out

    with nn.intercept_methods(count):
        jax.eval_shape(model.apply, variables, images)
    return total, calls
