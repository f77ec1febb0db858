"""All gates moved at once by an offset, and masks fixed to the filters that are on most often."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

import ftwt_jax as ftwt
from ftwt_jax.gating.gates import HEAD_NAME
from ftwt_jax.gating.variables import fix_gates, shift_gates
from tests.conftest import random_like

PLAN = (9, "M", 12)
SAMPLES = 24
IMAGES = jax.random.normal(jax.random.key(1), (SAMPLES, 16, 16, 3))
OFFSETS = (-1e3, -2.0, -0.3, 0.0, 0.7, 2.0, 1e3)
RATES = st.lists(st.sampled_from([0, 0.1, 0.25, 0.5, 0.9, 1]) | st.floats(0, 1), min_size=1, max_size=20)


@dataclasses.dataclass(frozen=True)
class Network:
    """A gated network with random variables, called under one compilation with any of them and any offset."""

    variables: dict
    names: tuple[str, ...]
    compiled: Callable[..., ftwt.Outputs]

    def apply(self, variables: dict, offset: float = 0.0) -> ftwt.Outputs:
        return self.compiled(variables, jnp.float32(offset))

    def masks(self, variables: dict, offset: float = 0.0) -> list[np.ndarray]:
        return [np.asarray(gate.mask) for gate in self.apply(variables, offset).gates]


@pytest.fixture(scope="module", params=["vgg_bn", "resnet8", "mobilenet_v1"])
def network(request, quick_compilation) -> Network:
    options = {"vgg_bn": {"plan": PLAN}, "resnet8": {"width": 0.5}, "mobilenet_v1": {"width": 0.125}}[request.param]
    model = ftwt.create_model(request.param, 4, gates=ftwt.GateConfig.paper(depthwise="own"), **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)

    @jax.jit
    def apply(variables, offset):
        return model.apply(variables, IMAGES, control=ftwt.GateControl(targets=False, offset=offset))

    variables = jax.tree.map(jnp.asarray, random_like(shapes))
    return Network(variables, apply(variables, jnp.float32(0)).gate_names, apply)


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_shift_for_good_is_the_offset_of_one_call(network, offset):
    once, good = network.apply(network.variables, offset), network.apply(shift_gates(network.variables, offset))
    for a, b in zip(once.gates, good.gates, strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)
        np.testing.assert_allclose(a.logits, b.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(once.logits, good.logits)


def test_a_larger_offset_turns_more_filters_on_until_all_are_and_nothing_is_compiled_again(network):
    first = [network.masks(network.variables, offset)[0] for offset in OFFSETS]
    for fewer, more in itertools.pairwise(first):
        assert (fewer <= more).all()
    assert 0 < first[OFFSETS.index(0)].mean() < 1
    assert not any(mask.any() for mask in network.masks(network.variables, OFFSETS[0]))
    assert all(mask.all() for mask in network.masks(network.variables, OFFSETS[-1]))
    assert network.compiled._cache_size() == 1


def test_only_the_biases_of_heads_are_moved_and_what_was_given_stays(network):
    before = jax.tree.map(np.array, network.variables)
    moved = flatten_dict(shift_gates(network.variables, 0.5), sep="/")
    biases = 0
    for name, value in flatten_dict(before, sep="/").items():
        is_bias = name.endswith(f"{HEAD_NAME}/dense/bias")
        biases += is_bias
        np.testing.assert_array_equal(moved[name], value + np.float32(0.5 * is_bias))
        assert moved[name].dtype == value.dtype
    assert biases == len(network.names)
    jax.tree.map(np.testing.assert_array_equal, before, network.variables)


def test_an_offset_may_be_traced(network):
    moved = jax.jit(shift_gates)(network.variables, jnp.float32(0.25))
    jax.tree.map(np.testing.assert_array_equal, moved, shift_gates(network.variables, 0.25))


def most_frequent(rates) -> list[bool]:
    """As many filters as are on in the mean, those with the highest rates; of two alike the first."""
    wanted = max(round(float(np.sum(rates, dtype=np.float32))), 1)
    order = sorted(range(len(rates)), key=lambda index: (-rates[index], index))
    return [index in order[:wanted] for index in range(len(rates))]


def test_fixed_masks_are_the_same_for_every_sample_and_the_most_frequent_ones(network):
    seen = network.masks(network.variables)
    assert any((mask != mask[:1]).any() for mask in seen)
    rates = {name: tuple(mask.mean(0)) for name, mask in zip(network.names, seen, strict=True)}
    fixed = network.masks(fix_gates(network.variables, rates))
    for name, before, after in zip(network.names, seen, fixed, strict=True):
        assert (after == after[:1]).all()
        assert after[0].sum() == max(round(float(before.mean(0).sum())), 1)
        np.testing.assert_array_equal(after[0], most_frequent(rates[name]))
        if not after[0].all():
            assert before.mean(0)[after[0]].min() >= before.mean(0)[~after[0]].max()


def one_head(filters: int) -> dict:
    dense = {"kernel": np.ones((3, filters), np.float32), "bias": np.full(filters, 7, np.float32)}
    return {"params": {"unit": {HEAD_NAME: {"dense": dense}}}, "batch_stats": {}}


@settings(deadline=None)
@given(RATES, st.integers(-20, 20))
def test_fixed_gates_for_any_rates_and_a_shift_by_one_filter_after_the_other(rates, more):
    rates = [float(np.float32(rate)) for rate in rates]
    fixed = fix_gates(one_head(len(rates)), {"unit": rates})
    head = fixed["params"]["unit"][HEAD_NAME]["dense"]
    assert not np.any(head["kernel"])
    assert (np.asarray(head["bias"]) > 0).tolist() == most_frequent(rates)
    shifted = shift_gates(fixed, more / len(rates))["params"]["unit"][HEAD_NAME]["dense"]["bias"]
    assert (shifted > 0).sum() == min(max(sum(most_frequent(rates)) + more, 0), len(rates))


def test_filters_that_no_sample_turns_on_still_leave_a_unit_one():
    for rates in ([0.0] * 5, [0.02, 0.1, 0.08, 0, 0]):
        bias = fix_gates(one_head(5), {"unit": rates})["params"]["unit"][HEAD_NAME]["dense"]["bias"]
        assert np.flatnonzero(np.asarray(bias) > 0).tolist() == [int(np.argmax(rates))]


def test_a_majority_would_have_shut_what_fixed_masks_keep():
    """Ten filters, each on for four samples in ten: four stay, though none has a majority."""
    bias = fix_gates(one_head(10), {"unit": [0.4] * 10})["params"]["unit"][HEAD_NAME]["dense"]["bias"]
    assert (np.asarray(bias) > 0).sum() == 4


def test_a_dense_network_has_nothing_to_move():
    dense = ftwt.create_model("vgg_bn", 4, plan=PLAN)
    variables = random_like(jax.eval_shape(dense.init, jax.random.key(0), IMAGES))
    for refused in (lambda: shift_gates(variables, 0.5), lambda: fix_gates(variables, {})):
        with pytest.raises(ftwt.UserError, match="no gate head: they belong to a dense network"):
            refused()


@pytest.mark.parametrize("rates", [{}, {"units": [0.5] * 4}, {"unit": [0.5] * 3}, {"unit": [0.5] * 5}])
def test_fixed_masks_need_a_rate_for_every_filter_of_every_unit(rates):
    with pytest.raises(ftwt.UserError, match=r"no rates for unit: .* each of its 4 filters") as refused:
        fix_gates(one_head(4), rates)
    assert "\n" not in str(refused.value)
