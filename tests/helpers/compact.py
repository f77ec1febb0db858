"""Networks with gates that differ between images, and the reference for their compact execution."""

import dataclasses
import functools

import jax
import numpy as np
from hypothesis import settings

import ftwt_jax as ftwt
from ftwt_jax.inference import native
from ftwt_jax.inference.compact import CompactNetwork
from tests.conftest import random_like

KEY = jax.random.key(0)
BARE = ftwt.GateControl(targets=False)
GATES = ftwt.GateConfig.paper()
PLAIN_HEADS = ftwt.GateConfig.paper(norm="none")
NEVER = -1e3
few_examples = functools.partial(settings, deadline=None, derandomize=True, database=None)


def random_images(samples, side=8, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, side, side, channels)).astype(np.float32)


def heads_of(variables):
    """The gate heads, in the order of their units' names."""

    def is_unit(tree):
        return isinstance(tree, dict) and "gate_head" in tree

    flat = jax.tree.leaves(variables["params"], is_leaf=is_unit)
    return [unit["gate_head"]["dense"] for unit in flat if is_unit(unit)]


def random_variables(model, images, seed=0, never=0.0, **options):
    """Variables that all differ from their initial values; a share of all filters is never on."""
    shapes = jax.eval_shape(lambda x: model.init(KEY, x, **options), images[:1])
    variables = random_like(shapes, seed)
    rng = np.random.default_rng(seed)
    for head in heads_of(variables):
        if len(head["kernel"]) == 1:
            # If gates turned off the channels that light up, no image would reach the end of a network.
            head["kernel"] = np.abs(head["kernel"])
        head["bias"][rng.random(head["bias"].shape) < never] = NEVER
    return variables


def masked(model, variables, images, **options):
    """The network's own outputs."""
    return jax.jit(lambda v, x: model.apply(v, x, **options))(variables, images)


def every_way(model, variables, calibration, **options):
    """Its compact networks: all filters by our own kernel, then those of the calibration by XLA and by the kernel."""
    if native.available():
        yield ftwt.compact(model, variables, **options)
    calibrated = ftwt.compact(model, variables, calibration, portable=True, **options)
    yield calibrated
    if native.available():
        yield CompactNetwork(calibrated._forward, dataclasses.replace(calibrated.execution, per_image=True))


def assert_close(actual, expected, share=1e-4):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=share * np.abs(expected).max())


def assert_same(actual, expected):
    """Compares logits up to rounding, masks and counted work exactly."""
    assert_close(actual.logits, expected.logits)
    assert actual.gate_names == expected.gate_names
    for ours, theirs in zip(actual.gates, expected.gates, strict=True):
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        assert_close(ours.logits, theirs.logits)
    for convention in ("exact", "published"):
        np.testing.assert_array_equal(ftwt.macs(actual, convention), ftwt.macs(expected, convention))
    assert ftwt.dense_macs(actual) == ftwt.dense_macs(expected)
