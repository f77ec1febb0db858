"""The target rule against a second implementation in plain NumPy, and what jit, vmap and grad make of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import export

import ftwt_jax as ftwt
from ftwt_jax.gating import ranking

TOLERANCE = 1e-5
# Float32 sums over up to 16 shares are this exact; nearer to a threshold both answers are right.
ROUNDING = 3e-6

SHAPES = [(1, 1, 1, 1), (2, 1, 1, 3), (3, 2, 2, 5), (1, 3, 1, 8), (4, 1, 2, 16)]
PROPERTIES = settings(max_examples=60, deadline=None)


def reference_masses(maps: np.ndarray) -> np.ndarray:
    """[N, C] float64: the largest |activation| of each filter."""
    samples, height, width, filters = maps.shape
    masses = np.zeros((samples, filters))
    for n in range(samples):
        for f in range(filters):
            masses[n, f] = max(abs(float(maps[n, y, x, f])) for y in range(height) for x in range(width))
    return masses


def reference_target(maps: np.ndarray, r: float, min_filters: int = 1) -> np.ndarray:
    """The rule as the design states it, one filter at a time from the strongest to the weakest."""
    masses = reference_masses(maps)
    target = np.zeros(masses.shape, bool)
    for n, mass in enumerate(masses):
        if mass.sum() == 0:
            continue
        held = 0.0
        strongest_first = sorted(range(len(mass)), key=lambda f: (-mass[f], f))
        for rank, f in enumerate(strongest_first):
            share = mass[f] / mass.sum()
            held += share
            wanted = share > TOLERANCE if r >= 1 else held <= r + TOLERANCE
            target[n, f] = wanted or rank < min_filters
    return target


def clear_of_thresholds(maps: np.ndarray, r: float) -> bool:
    """Whether no cumulative sum lies within float32's rounding of r + 1e-5."""
    masses = reference_masses(maps)
    masses = masses[masses.sum(axis=1) > 0]
    shares = -np.sort(-masses, axis=1) / masses.sum(axis=1, keepdims=True)
    return bool(np.all(np.abs(np.cumsum(shares, axis=1) - (r + TOLERANCE)) > ROUNDING))


def maps_of(*masses: list[float]) -> np.ndarray:
    """[N, 1, 1, C] float32 with one pixel a filter."""
    return np.asarray(masses, np.float32)[:, None, None, :]


def feature_maps(low: int = -20) -> st.SearchStrategy[np.ndarray]:
    """Small whole numbers: ties, zeros and all-zero samples come up often, and float32 holds them exactly."""
    return st.sampled_from(SHAPES).flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=st.integers(low, 20)))


thresholds = st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.25, 0.5, 0.75, 0.9, 0.999]))


@pytest.mark.newest
@PROPERTIES
@given(maps=feature_maps(), r=thresholds, min_filters=st.sampled_from([0, 1, 3]))
def test_target_is_the_reference_rule(maps, r, min_filters):
    assume(clear_of_thresholds(maps, r))
    target = ftwt.topk_mass_mask(maps, r, min_filters=min_filters)
    assert target.dtype == bool
    np.testing.assert_array_equal(target, reference_target(maps, r, min_filters))


@PROPERTIES
@given(maps=feature_maps(), min_filters=st.sampled_from([0, 1, 3]))
def test_at_r_1_every_lit_filter_is_kept_and_no_other(maps, min_filters):
    target = ftwt.topk_mass_mask(maps, 1.0, min_filters=min_filters)
    np.testing.assert_array_equal(target, reference_target(maps, 1.0, min_filters))
    if min_filters <= 1:
        np.testing.assert_array_equal(target, np.any(maps != 0, axis=(1, 2)))


WAYS = [jax.jit(way, static_argnames="min_filters") for way in (ranking._by_bisection, ranking._by_sorting)]


@pytest.mark.parametrize("min_filters", [0, 3])
@pytest.mark.parametrize("r", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("values", ["real", "tied", "few"])
def test_both_ways_to_rank_are_the_reference_rule_on_wide_layers(values, r, min_filters):
    rng = np.random.default_rng(0)
    mass = rng.exponential(size=(6, 300))
    if values == "tied":
        mass = rng.integers(0, 6, size=mass.shape)
    if values == "few":
        mass *= rng.random(mass.shape) < 0.05
    mass = mass.astype(np.float32)
    total = mass.sum(axis=1, keepdims=True)
    limit = -np.inf if r == 1 else np.float32(r) + np.float32(TOLERANCE)
    bisected, ranked = (way(mass, total, limit, min_filters=min_filters) for way in WAYS)
    np.testing.assert_array_equal(bisected, ranked)
    np.testing.assert_array_equal(
        ftwt.topk_mass_mask(mass[:, None, None], r, min_filters=min_filters),
        reference_target(mass[:, None, None], r, min_filters),
    )


@pytest.mark.parametrize("min_filters", [0, 1])
@pytest.mark.parametrize("r", [0.3, 0.5, 0.75, 0.9, 0.97, 1.0])
def test_target_is_the_reference_rule_on_layers_of_real_width(r, min_filters):
    rng = np.random.default_rng(0)
    maps = np.maximum(rng.normal(size=(4, 4, 4, 64)), 0).astype(np.float32) * rng.exponential(size=64)
    maps = maps.astype(np.float32)
    assert r == 1 or clear_of_thresholds(maps, r)
    np.testing.assert_array_equal(
        ftwt.topk_mass_mask(maps, r, min_filters=min_filters), reference_target(maps, r, min_filters)
    )


def test_worked_example_keeps_four():
    maps = maps_of([0.02, 0.3, 0.03, 0.1, 0.3, 0.02, 0.2, 0.03])
    kept = ftwt.topk_mass_mask(maps, 0.92)
    np.testing.assert_array_equal(kept, [[False, True, False, True, True, False, True, False]])


def test_filters_rank_by_their_largest_absolute_activation():
    maps = np.zeros((1, 2, 2, 4), np.float32)
    maps[0, 0, 1, 0] = -8
    maps[0, :, :, 1] = 1
    maps[0, 1, 1, 2] = 3
    np.testing.assert_array_equal(ftwt.filter_mass(maps), [[8, 1, 3, 0]])
    np.testing.assert_array_equal(ftwt.topk_mass_mask(maps, 0.95), [[True, False, True, False]])
    np.testing.assert_array_equal(ftwt.topk_mass_mask(-maps, 0.95), [[True, False, True, False]])


def test_among_equals_the_lower_index_is_kept():
    maps = maps_of([1, 1, 1, 1], [2, 1, 1, 0], [1, 1, 2, 1])
    kept = ftwt.topk_mass_mask(maps, 0.76)
    np.testing.assert_array_equal(
        kept, [[True, True, True, False], [True, True, False, False], [True, False, True, False]]
    )


def test_a_cumulative_sum_exactly_at_r_is_kept():
    maps = maps_of([4, 2, 1, 1])
    np.testing.assert_array_equal(ftwt.topk_mass_mask(maps, 0.75), [[True, True, False, False]])
    np.testing.assert_array_equal(ftwt.topk_mass_mask(maps, 0.74), [[True, False, False, False]])


@pytest.mark.parametrize("min_filters", [0, 1, 2, 9])
@pytest.mark.parametrize("r", [0.3, 0.9, 1.0])
def test_an_all_zero_sample_keeps_no_filter_and_leaves_the_others_alone(r, min_filters):
    maps = maps_of([5, 3, 1], [0, 0, 0], [1, 1, 2])
    kept = np.asarray(ftwt.topk_mass_mask(maps, r, min_filters=min_filters))
    assert not kept[1].any()
    for n in (0, 2):
        np.testing.assert_array_equal(kept[n : n + 1], ftwt.topk_mass_mask(maps[n : n + 1], r, min_filters))


def test_a_strongest_filter_that_alone_exceeds_r_is_kept_unless_the_published_rule_is_asked_for():
    maps = maps_of([1, 8, 1])
    np.testing.assert_array_equal(ftwt.topk_mass_mask(maps, 0.5), [[False, True, False]])
    np.testing.assert_array_equal(ftwt.topk_mass_mask(maps, 0.5, min_filters=0), [[False, False, False]])


@pytest.mark.parametrize("r", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("min_filters", "kept"), [(1, 1), (2, 2), (3, 3), (9, 4)])
def test_min_filters_keeps_that_many_even_where_fewer_are_lit(r, min_filters, kept):
    maps = maps_of([0, 0, 7, 0])
    target = np.asarray(ftwt.topk_mass_mask(maps, r, min_filters=min_filters))
    assert target[0, 2]
    assert target.sum() == kept


def test_at_r_1_a_filter_below_the_tolerance_counts_as_unlit():
    maps = maps_of([1, 2e-5, 5e-6])
    np.testing.assert_array_equal(ftwt.topk_mass_mask(maps, 1.0), [[True, True, False]])


@PROPERTIES
@given(maps=feature_maps(), low=thresholds, high=thresholds)
def test_a_larger_r_keeps_every_filter_that_a_smaller_one_keeps(maps, low, high):
    low, high = sorted((low, high))
    kept_low = np.asarray(ftwt.topk_mass_mask(maps, low))
    kept_high = np.asarray(ftwt.topk_mass_mask(maps, high))
    assert np.all(kept_high | ~kept_low)


@PROPERTIES
@given(maps=feature_maps(), r=thresholds, power=st.integers(-20, 20), seed=st.integers(0, 2**16))
def test_neither_scale_nor_the_place_of_a_pixel_matters(maps, r, power, seed):
    samples, height, width, filters = maps.shape
    pixels = np.random.default_rng(seed).permutation(height * width)
    moved = maps.reshape(samples, -1, filters)[:, pixels].reshape(maps.shape) * np.float32(2.0**power)
    np.testing.assert_array_equal(ftwt.topk_mass_mask(moved, r), ftwt.topk_mass_mask(maps, r))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("r", [0.5, 0.8, 1.0])
def test_half_precision_maps_are_ranked_in_float32(dtype, r):
    maps = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, 3, 200)), dtype)
    exact = np.asarray(maps.astype(jnp.float32))
    assert r == 1 or clear_of_thresholds(exact, r)
    assert ftwt.filter_mass(maps).dtype == jnp.float32
    np.testing.assert_array_equal(ftwt.topk_mass_mask(maps, r), reference_target(exact, r))


def test_another_r_does_not_compile_anew():
    maps = np.random.default_rng(2).normal(size=(2, 3, 3, 7)).astype(np.float32)
    before = ftwt.topk_mass_mask._cache_size()
    counts = [int(ftwt.topk_mass_mask(maps, r).sum()) for r in (0.2, 0.5, 0.8, 0.95, 1.0)]
    assert ftwt.topk_mass_mask._cache_size() == before + 1
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(("platform", "sorts"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_ranking_sorts_nothing_on_a_cpu_and_scatters_nothing(platform, sorts):
    text = export.export(ftwt.topk_mass_mask, platforms=[platform])(jnp.ones((2, 4, 4, 16)), 0.9).mlir_module()
    assert len(re.findall(r"stablehlo.sort\b", text)) == sorts
    assert not re.search(r"\bscatter\b", text)


@pytest.mark.newest
def test_ranking_agrees_under_jit_and_vmap():
    maps = np.random.default_rng(3).normal(size=(3, 2, 2, 12)).astype(np.float32)
    levels = jnp.asarray([0.3, 0.6, 0.9, 1.0])
    one_by_one = np.stack([ftwt.topk_mass_mask(maps, float(r)) for r in levels])
    sweep = jax.vmap(ftwt.topk_mass_mask, in_axes=(None, 0))(maps, levels)
    np.testing.assert_array_equal(sweep, one_by_one)
    np.testing.assert_array_equal(jax.jit(ftwt.topk_mass_mask)(maps, 0.6), one_by_one[1])
    per_sample = jax.vmap(lambda sample: ftwt.topk_mass_mask(sample[None], 0.6)[0])(maps)
    np.testing.assert_array_equal(per_sample, one_by_one[1])


@pytest.mark.parametrize("r", [0.6, 1.0])
def test_no_gradient_and_no_nan_comes_through_the_target(r):
    maps = np.random.default_rng(4).normal(size=(3, 2, 2, 6)).astype(np.float32)
    maps[1] = 0

    def kept_sum(maps, r):
        target = ftwt.topk_mass_mask(maps, r)
        return jnp.sum(jnp.where(target[:, None, None, :], maps, 0))

    by_maps, by_r = jax.jit(jax.grad(kept_sum, argnums=(0, 1)))(maps, r)
    target = reference_target(maps, r)
    np.testing.assert_array_equal(by_maps, np.broadcast_to(target[:, None, None, :], maps.shape).astype(np.float32))
    assert by_r == 0
