"""What calibration leaves out, that samples which want it are noticed, and values packed to what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ftwt_jax as ftwt
from ftwt_jax.inference.compact import CompactNetwork
from ftwt_jax.inference.kept import choose_kept
from ftwt_jax.inference.packed import Packed
from tests.helpers.compact import (
    BARE,
    GATES,
    PLAIN_HEADS,
    assert_close,
    assert_same,
    few_examples,
    heads_of,
    masked,
    random_images,
    random_variables,
)

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quick_compilation")]

# A network whose masks are drawn in the images. A channel of one colour is off in both units (-1), on in the first
# alone (1), or on in both (2): the first unit passes its input on, and the second one's gate asks for more than 1.5.
FILTERS = 64
PREPARED = 40  # Filters that calibration turns on in the first unit; half of them in the second.


def drawn(levels, side=4):
    levels = np.asarray(levels, np.float32)
    noise = 1 + 0.05 * np.random.default_rng(0).random((len(levels), side, side, FILTERS), np.float32)
    return levels[:, None, None, :] * noise


def levels_of(first, second=0, shift=0):
    """One sample with so many filters on in the first unit and, of those, in the second."""
    levels = np.full(FILTERS, -1)
    levels[:first] = 1
    levels[:second] = 2
    return np.roll(levels, shift)


@pytest.fixture(scope="module")
def drawable(prepare):
    """(masked network as a function, calibrated compact network)."""
    model = ftwt.create_model("vgg_bn", 5, plan=(FILTERS, FILTERS), gates=PLAIN_HEADS)
    variables = random_variables(model, drawn([levels_of(0)]))
    first = variables["params"]["unit0"]
    first["conv"]["kernel"][:] = 0
    first["conv"]["kernel"][1, 1] = np.eye(FILTERS)
    first["conv"]["bias"][:] = first["bn"]["bias"][:] = variables["batch_stats"]["unit0"]["bn"]["mean"][:] = 0
    first["bn"]["scale"][:] = variables["batch_stats"]["unit0"]["bn"]["var"][:] = 1
    for head, threshold in zip(heads_of(variables), (0, 1.5), strict=True):
        head["kernel"][:] = np.eye(FILTERS)
        head["bias"][:] = -threshold
    calibration = [levels_of(count, count // 2) for count in range(PREPARED + 1)]
    compact = prepare(model, variables, drawn(calibration))
    apply = jax.jit(lambda images: model.apply(variables, images, control=BARE))
    return apply, compact


def wants_more(levels):
    """Samples that want a filter that no calibration sample turned on."""
    levels = np.asarray(levels)
    return np.any(levels[:, PREPARED:] > 0, axis=1) | np.any(levels[:, PREPARED // 2 :] > 1, axis=1)


def test_filters_never_on_in_calibration_leave_and_all_others_stay(drawable):
    kept = drawable[1].execution.kept
    assert kept == {"unit0": tuple(range(PREPARED)), "unit1": tuple(range(PREPARED // 2))}


@pytest.mark.parametrize("strangers", [[], [4], [0, 15], [1, 2, 3], list(range(1, 16)), list(range(16))], ids=len)
def test_samples_outside_calibration_are_noticed_and_computed_rightly_all_the_same(drawable, strangers):
    apply, compact = drawable
    levels = np.stack([levels_of(5 + index, 3) for index in range(16)])
    for index in strangers:
        levels[index, PREPARED + index] = 1 + index % 2
    outputs, outside = compact.run(drawn(levels))
    assert np.flatnonzero(outside).tolist() == strangers
    assert_same(outputs, apply(drawn(levels)))


@few_examples(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0, 0.02, 0.5, 1]),
    only=st.sampled_from([PREPARED // 2, PREPARED, FILTERS]),
)
def test_any_images_are_answered_as_by_the_masked_network(drawable, seed, share, only):
    apply, compact = drawable
    rng = np.random.default_rng(seed)
    levels = np.where(rng.random((16, FILTERS)) < share, rng.integers(1, 3, (16, FILTERS)), -1)
    levels[:, only:] = -1
    outputs, outside = compact.run(drawn(levels))
    np.testing.assert_array_equal(outside, wants_more(levels))
    assert_same(outputs, apply(drawn(levels)))


def test_a_network_is_compiled_once_for_each_shape_of_images(drawable):
    compact = CompactNetwork(drawable[1]._forward, drawable[1].execution)
    for shapes, samples in enumerate((3, 1), start=1):
        for count in (0, 5, PREPARED, FILTERS):
            for shift in (0, 9):
                compact(drawn([levels_of(count, count // 3, shift)] * samples))
        assert compact._jitted._cache_size() == shapes


def test_a_network_runs_within_a_function_that_is_compiled_and_outside_it_again(drawable):
    apply, prepared = drawable
    compact = CompactNetwork(prepared._forward, prepared.execution)
    images = drawn([levels_of(10, 5), levels_of(FILTERS)])
    expected = apply(images).logits
    assert_close(jax.jit(lambda x: compact(x).logits)(images), expected)
    assert_close(compact(images).logits, expected)
    assert_close(jax.jit(lambda x: 2 * compact(x).logits)(images), 2 * expected)


NO_IMAGES = np.zeros((0, 8, 8, 3), np.float32)


@pytest.mark.parametrize("empty", [NO_IMAGES, [], iter(()), [NO_IMAGES]], ids=["array", "list", "iterator", "batch"])
def test_a_calibration_without_images_is_refused(empty):
    model = ftwt.create_model("vgg_bn", 5, plan=(6,), gates=GATES)
    with pytest.raises(ftwt.UserError) as error:
        ftwt.compact(model, random_variables(model, random_images(1)), empty)
    assert "\n" not in str(error.value)


def test_a_single_image_is_a_calibration():
    model = ftwt.create_model("vgg_bn", 5, plan=(8,), gates=GATES)
    images = random_images(3, 4)
    variables = random_variables(model, images, never=0.5)
    compact = ftwt.compact(model, variables, images[:1])
    outputs, outside = compact.run(images)
    assert not outside[0]
    assert_same(outputs, masked(model, variables, images, control=BARE))


def test_calibration_in_batches_of_any_size_is_the_same_calibration():
    model = ftwt.create_model("vgg_bn", 5, plan=(24, 8), gates=GATES)
    images = random_images(70, 4)
    variables = random_variables(model, images, never=0.3)
    whole = ftwt.compact(model, variables, images, portable=True).execution
    batches = (images[start:stop] for start, stop in ((0, 6), (6, 6), (6, 70)))
    assert ftwt.compact(model, variables, batches, portable=True).execution.kept == whole.kept
    assert whole.kept


@few_examples(max_examples=40)
@given(seed=st.integers(0, 10_000), samples=st.integers(1, 9), filters=st.integers(1, 20))
def test_whatever_calibration_turned_on_is_kept(seed, samples, filters):
    rng = np.random.default_rng(seed)
    logits = {f"unit{i}": rng.normal(size=(samples, filters)) + rng.normal(size=filters) - 1 for i in range(2)}

    def share_of_work(kept):
        return sum(len(kept.get(name, range(filters))) for name in logits) / (2 * filters)

    kept = choose_kept(logits, share_of_work)
    for name, values in logits.items():
        ready = kept.get(name, tuple(range(filters)))
        assert ready
        assert list(ready) == sorted(set(ready))
        assert set(np.flatnonzero(np.any(values > 0, axis=0))) <= set(ready)
        assert name not in kept or len(ready) < filters


@few_examples(max_examples=40)
@given(data=st.data())
def test_packed_values_are_found_under_any_other_channels(data):
    channel_sets = st.sets(st.integers(0, 9), min_size=1).map(lambda s: tuple(sorted(s)))
    channels, wanted = data.draw(channel_sets), data.draw(channel_sets)
    values = np.random.default_rng(0).normal(size=(1, 2, 2, len(channels))).astype(np.float32)
    whole = np.zeros((1, 2, 2, 10), np.float32)
    whole[..., list(channels)] = values
    packed = Packed(jnp.asarray(values), channels)
    np.testing.assert_array_equal(packed.aligned(wanted), whole[..., list(wanted)])
