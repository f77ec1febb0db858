"""Images on the devices: whole on each, or split over them, where they fit; the right ones are gathered."""

import dataclasses

import jax
import numpy as np
import pytest

from ftwt_jax.data import resident
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.errors import UserError
from ftwt_jax.parallel.sharding import data_mesh

COUNT = 21


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    source = ArraySource(rng.integers(0, 256, (COUNT, 4, 4, 3), np.uint8), np.arange(COUNT, dtype=np.int64))
    return Dataset(source, source, COUNT, (4, 4, 3), (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("shard", [False, True])
def test_the_images_of_the_indices_are_gathered_with_their_labels(dataset, shard):
    placed = resident.put(dataset.train, data_mesh(), shard)
    indices = np.array([3, 0, 20, 3, 11, 7, 19, 2])
    found = jax.jit(placed.gather)(placed.arrays, indices)
    np.testing.assert_array_equal(found["image"], dataset.train.images[indices])
    np.testing.assert_array_equal(found["label"], indices)
    assert (found["image"].dtype, found["label"].dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize(
    ("free", "wanted", "there"),
    [
        (1e6, None, True),
        (1e6, True, True),
        (1e6, False, False),
        # A quarter of this may be used, which is less than one of the two splits takes.
        (COUNT * 48 * 3, None, False),
        (COUNT * 48 * 3, True, True),
    ],
)
def test_images_go_to_the_devices_where_they_fit_or_are_wanted(dataset, monkeypatch, free, wanted, there):
    monkeypatch.setattr(resident, "free_memory", lambda mesh: free)
    found = resident.place(dataset, data_mesh(), wanted)
    assert (found is not None) == there
    if found is not None:
        np.testing.assert_array_equal(found.arrays["image"][:COUNT], dataset.train.images)


def test_images_that_are_read_from_files_stay_there(dataset):
    streamed = dataclasses.replace(dataset, resized_crop=True)
    assert resident.place(streamed, data_mesh()) is None
    with pytest.raises(UserError, match=r"config\.data\.on_device=True needs images that are held in memory"):
        resident.place(streamed, data_mesh(), wanted=True)
