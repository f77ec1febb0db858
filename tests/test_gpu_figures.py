"""results/gpu.sh's plain Flax loop trains the networks that it is compared with."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftwt_jax as ftwt
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import time_training


@pytest.mark.parametrize("setting", time_training.SETTINGS[:5], ids=lambda setting: setting[0])
def test_the_plain_network_is_the_dense_one(setting):
    """Of a network without parameters' names in common: as many of each shape, and the same number of operations."""
    name, side, classes, _, dtype = setting
    options = {"stem": "imagenet"} if side >= 64 else {}
    dense = ftwt.create_model(name, classes, dtype=jnp.dtype(dtype), **options)
    plain = time_training.PlainNetwork(name, classes, jnp.dtype(dtype))
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)

    def shapes(init, **arguments):
        variables = jax.eval_shape(lambda image: init(jax.random.key(0), image, **arguments), image)
        return sorted(leaf.shape for leaf in jax.tree.leaves(variables))

    assert shapes(plain.init, train=False) == shapes(dense.init)


def test_both_networks_answer_alike():
    plain, dense = time_training.PlainNetwork("resnet8", 10, jnp.float32), ftwt.create_model("resnet8", 10)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    theirs = time_training.random_variables(lambda key, x: plain.init(key, x, train=False), 32)

    def renamed(tree):
        def unit(tree, index):
            parts = {"conv": tree.get(f"Conv_{index}"), "bn": tree[f"BatchNorm_{index}"]}
            return {name: part for name, part in parts.items() if part is not None}

        blocks = [tree[f"PlainBlock_{index}"] for index in range(3)]
        found = {
            f"stage{index + 1}_block0": {"conv1": unit(block, 0), "conv2": unit(block, 1)}
            for index, block in enumerate(blocks)
        }
        found["stem"] = unit(tree, 0)
        if "Dense_0" in tree:
            found["classifier"] = {"dense": tree["Dense_0"]}
        return found

    ours = {kind: renamed(tree) for kind, tree in theirs.items()}
    options = {"xla_backend_optimization_level": 0}
    wanted = jax.jit(lambda v: plain.apply(v, images, train=False), compiler_options=options)(theirs)
    found = jax.jit(dense.apply, compiler_options=options)(ours, images).logits
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
