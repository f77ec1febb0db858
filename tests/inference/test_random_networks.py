"""Networks put together at random: compact execution, counting and records hold for each."""

import warnings

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ftwt_jax as ftwt
from tests.helpers.compact import assert_same, every_way, masked, random_images, random_variables
from tests.helpers.random_networks import GATES, STEPS, RandomNetwork, counted

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quick_compilation")]
FEW = settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
# A smaller network that fails is not worth the time that looking for it takes.
MANY = settings(FEW, max_examples=300, phases=[Phase.explicit, Phase.generate])


def networks(depth):
    step = st.tuples(st.sampled_from(STEPS), st.integers(0, 999))
    return {
        "steps": st.lists(step, min_size=1, max_size=depth).map(tuple),
        "gates": st.sampled_from(GATES),
        "seed": st.integers(0, 99),
    }


def check(steps, gates, seed):
    model = RandomNetwork(steps, gates)
    images = random_images(4, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ftwt.CompositionWarning)
        variables = random_variables(model, images, seed, never=0.4)
        expected = masked(model, variables, images)
        total, calls = counted(model, variables, images)
        assert ftwt.dense_macs(expected) == total
        names = [layer.name for layer in expected.layers]
        assert {name: names.count(name) for name in names} == calls
        by_hand = np.zeros(len(images))
        for layer in expected.layers:
            ins, outs = (
                np.ones((len(images), size)) if on is None else np.asarray(on, float)
                for on, size in ((layer.active_in, layer.in_features), (layer.active_out, layer.out_features))
            )
            grouped = [each.reshape(len(images), layer.groups, -1).sum(-1) for each in (ins, outs)]
            by_hand += layer.positions * layer.kernel_area * (grouped[0] * grouped[1]).sum(-1)
            if layer.gate is not None:
                by_hand += layer.out_features * (layer.head_inputs or layer.in_features)
        np.testing.assert_array_equal(ftwt.macs(expected), by_hand)
        for network in every_way(model, variables, random_images(8, seed=seed + 1)):
            assert_same(network(images), expected)


@FEW
@given(**networks(3))
def test_a_random_network_is_what_it_is_masked(steps, gates, seed):
    check(steps, gates, seed)


@pytest.mark.slow
@MANY
@given(**networks(8))
def test_many_random_networks_are_what_they_are_masked(steps, gates, seed):
    check(steps, gates, seed)


def test_what_is_off_is_never_read():
    """Where records say that a channel is off, the next layer's inputs are zero: seen in the layers themselves."""
    rng = np.random.default_rng(0)
    for seed in range(5):
        steps = tuple((STEPS[rng.integers(len(STEPS))], int(rng.integers(999))) for _ in range(6))
        model, images = RandomNetwork(steps, GATES[seed % len(GATES)]), random_images(4, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ftwt.CompositionWarning)
            variables = random_variables(model, images, seed, never=0.4)
            _, seen = model.apply(
                variables,
                images,
                capture_intermediates=lambda m, _: isinstance(m, ftwt.GatedUnit),
                mutable=["intermediates"],
            )
        leaves = jax.tree.leaves(seen, is_leaf=lambda x: isinstance(x, ftwt.Activations))
        for out in (leaf for leaf in leaves if isinstance(leaf, ftwt.Activations)):
            lit = np.any(np.asarray(out.values) != 0, axis=tuple(range(1, out.ndim - 1)))
            assert not np.any(lit & ~np.asarray(out.active))
