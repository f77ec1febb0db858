"""Gate heads of other designs than the library's, trained by the library's own trainer, to choose between them.

python -m tests.head_study --norm=layer --hidden=0 train --config=configs/fashion_mnist.py:mobilenet_v1 --workdir=DIR …

Everything after the flags of the study is a command of `python -m ftwt_jax`; pool, mode, cooldown and the like are
fields of its config. A hidden layer's MACs are not counted by the library; the study prints them.
"""

import argparse
import sys
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ftwt_jax.__main__ import main
from ftwt_jax.reductions import max_pool_all, mean_pool_all

NORMS = ("softmax", "layer", "none", "rms", "log")


def head_class(norm: str, pools: str, hidden: int) -> type[nn.Module]:
    """A stand-in for `ftwt_jax.gates.GateHead`."""

    class StudiedHead(nn.Module):
        features: int
        pool: str = "max"
        softmax: bool = True

        @nn.compact
        def __call__(self, inputs):
            inputs = inputs.astype(jnp.float32)
            names = {"both": ("max", "mean")}.get(pools or self.pool, (pools or self.pool,))
            parts = [{"max": max_pool_all, "mean": mean_pool_all}[name](inputs) for name in names]
            summary = jnp.concatenate([self._normalized(part) for part in parts], axis=-1)
            if hidden:
                summary = nn.relu(nn.Dense(hidden, dtype=jnp.float32, name="hidden")(summary))
            width = summary.shape[-1]
            return nn.Dense(
                self.features,
                kernel_init=nn.initializers.normal(min(1e-3, 0.1 / width)) if not hidden else nn.initializers.lecun_normal(),
                bias_init=nn.initializers.ones,
                dtype=jnp.float32,
                name="dense",
            )(summary)

        def _normalized(self, x):
            if norm == "softmax":
                return jax.nn.softmax(x, axis=-1) * x.shape[-1]
            if norm == "layer":
                return jax.nn.standardize(x, axis=-1, epsilon=1e-5)
            if norm == "rms":
                return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)
            return jnp.log1p(jnp.maximum(x, 0)) if norm == "log" else x

    return StudiedHead


def weighted_loss(power: float):
    """The gate loss with each filter's rarer side weighted by (0.5 / its share in the batch) ** power."""

    def loss(gates, reduction="mean"):
        total = 0.0
        for gate in gates:
            share = jnp.mean(gate.target, axis=0)
            own = jnp.where(gate.target, share, 1 - share)
            weight = (0.5 / jnp.maximum(own, 0.02)) ** power
            losses = weight * optax.sigmoid_binary_cross_entropy(gate.logits, gate.target.astype(jnp.float32))
            total = total + jnp.mean(jnp.sum(losses, axis=-1))
        return total / len(gates) if reduction == "mean" else total

    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--norm", choices=NORMS, default="softmax")
    parser.add_argument("--pools", choices=("max", "mean", "both"), default="", help="in place of config.gates.pool")
    parser.add_argument("--hidden", type=int, default=0, help="width of a hidden layer")
    parser.add_argument("--rare", type=float, default=0.0, help="power of the weight of a filter's rarer side")
    known, rest = parser.parse_known_args()
    patches = [mock.patch("ftwt_jax.units.GateHead", head_class(known.norm, known.pools, known.hidden))]
    if known.rare:
        patches.append(mock.patch("ftwt_jax.training.gate_loss", weighted_loss(known.rare)))
    for patch in patches:
        patch.start()
    sys.exit(main(rest))
