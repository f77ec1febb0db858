"""The order of a training's images is Grain's, for any position by itself."""

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftwt_jax.data.order import Order


@settings(deadline=None, max_examples=60)
@given(
    # The number of bits that are permuted changes at powers of four.
    length=st.one_of(st.integers(1, 3_000), st.sampled_from([65_535, 65_536, 65_538, 262_144, 1_281_167])),
    seed=st.integers(0, 2**31 - 1),
    data=st.data(),
)
def test_the_order_is_grains(length, seed, data):
    positions = data.draw(st.lists(st.integers(0, 4 * length), min_size=1, max_size=30))
    theirs = grain.MapDataset.range(length).seed(seed).shuffle().repeat()
    found = Order(length, seed)(np.array(positions))
    assert found.tolist() == [theirs[position] for position in positions]


@pytest.mark.parametrize("length", [1, 2, 7, 1_347, 65_537, 262_145])
def test_each_epoch_has_every_image_once_in_an_order_of_its_own(length):
    epochs = Order(length, seed=3)(np.arange(3 * length)).reshape(3, length)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(length))
    if length > 2:
        assert len({tuple(epoch) for epoch in epochs}) == 3
