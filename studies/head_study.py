"""Compares gate heads of other designs than the library's, trained by the library's own trainer.

python -m studies.head_study --hidden=32 train --config=configs/fashion_mnist.py:mobilenet_v1 --workdir=DIR …

After the flags of the study comes a command of `python -m ftwt_jax`; pool, norm, depthwise, mode and so on are fields
of its config. The MACs of a hidden layer are not counted.
"""

import argparse
import sys
from unittest import mock

import flax.linen as nn
import jax.numpy as jnp
import optax

from ftwt_jax.__main__ import main
from ftwt_jax.gating.gates import GateConfig, GateHead, gate_pool, normalized


def head_class(both: bool, hidden: int) -> type[nn.Module]:
    """A replacement for `ftwt_jax.gating.gates.GateHead` that reads both pools or has `hidden` hidden features."""

    class StudiedHead(GateHead):
        @nn.compact
        def __call__(self, inputs):
            if self.own:
                return super().__call__(inputs)
            norm = GateConfig(softmax=self.softmax, norm=self.norm).normalization
            pools = ("max", "mean") if both else (self.pool,)
            maps = inputs.astype(jnp.float32)
            summary = jnp.concatenate([normalized(gate_pool(pool)(maps), norm) for pool in pools], axis=-1)
            kernel_init = nn.initializers.normal(min(1e-3, 0.1 / summary.shape[-1]))
            if hidden:
                summary = nn.relu(nn.Dense(hidden, dtype=jnp.float32, name="hidden")(summary))
                kernel_init = nn.initializers.lecun_normal()
            dense = nn.Dense(
                self.features, kernel_init=kernel_init, bias_init=nn.initializers.ones, dtype=jnp.float32, name="dense"
            )
            return dense(summary)

    return StudiedHead


def weighted_loss(power: float):
    """The gate loss, in which each filter's targets are weighted by (0.5 / their share in the batch) ** power."""

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
    parser.add_argument("--both", action="store_true", help="pool by maximum and mean, concatenated")
    parser.add_argument("--hidden", type=int, default=0, help="features of a hidden layer; 0 for none")
    parser.add_argument("--rare", type=float, default=0.0, help="power by which rare targets weigh more; 0 for none")
    known, rest = parser.parse_known_args()
    if known.both or known.hidden:
        mock.patch("ftwt_jax.gating.units.GateHead", head_class(known.both, known.hidden)).start()
    if known.rare:
        mock.patch("ftwt_jax.training.step.gate_loss", weighted_loss(known.rare)).start()
    sys.exit(main(rest))
