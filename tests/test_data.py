"""The bundled digits and the batches made of them."""

import numpy as np
import pytest

from ftwt_jax.data import load_dataset
from ftwt_jax.data.pipeline import augment, eval_batches, train_batches
from ftwt_jax.data.source import ArraySource, Dataset


@pytest.fixture(scope="module")
def numbered() -> Dataset:
    """30 pictures, each a single shade and labelled by its own number, so that what was read can be told."""
    images = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None, None, None] + 1, (30, 4, 4, 1))
    source = ArraySource(images, np.arange(30, dtype=np.int32))
    return Dataset(source, source, 30, (4, 4, 1), (0.0,), (1.0,), crop_padding=1, flip=True)


@pytest.mark.parametrize("size", [8, 20, 32])
def test_digits(size):
    digits = load_dataset("digits", image_size=size)
    assert len(digits.train) + len(digits.test) == 1797
    assert len(digits.test) == 450
    image = digits.train[0]["image"]
    assert image.shape == digits.image_shape == (size, size, 1)
    assert image.dtype == np.uint8
    labels = [int(digits.test[i]["label"]) for i in range(len(digits.test))]
    assert set(labels) == set(range(10))
    pixels = np.stack([digits.train[i]["image"] for i in range(len(digits.train))]) / 255
    assert pixels.max() == 1
    np.testing.assert_allclose((digits.mean[0], digits.std[0]), (pixels.mean(), pixels.std()), rtol=1e-5)


def test_no_digit_is_in_both_splits():
    digits = load_dataset("digits")
    train = {digits.train[i]["image"].tobytes() for i in range(len(digits.train))}
    test = [digits.test[i]["image"].tobytes() for i in range(len(digits.test))]
    assert not train.intersection(test)


def test_every_example_comes_once_an_epoch_in_an_order_of_its_own(numbered):
    batches = train_batches(numbered, 10, seed=3)
    epochs = [np.concatenate([next(batches)["label"] for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert list(epochs[0]) != list(epochs[1])


def test_batches_follow_the_seed_alone(numbered):
    def read(seed):
        batches = train_batches(numbered, 8, seed)
        return [next(batches) for _ in range(5)]

    for a, b in zip(read(1), read(1), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
    assert any((a["label"] != b["label"]).any() for a, b in zip(read(1), read(2), strict=True))


def test_a_restored_position_goes_on_with_the_next_batch(numbered):
    batches = train_batches(numbered, 7, seed=0)
    for _ in range(4):
        next(batches)
    position = batches.get_state()
    wanted = [next(batches) for _ in range(6)]
    again = train_batches(numbered, 7, seed=0)
    again.set_state(position)
    for batch in wanted:
        found = next(again)
        np.testing.assert_array_equal(found["image"], batch["image"])
        np.testing.assert_array_equal(found["label"], batch["label"])


def test_augmentation_crops_the_padded_picture_and_mirrors_it():
    image = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    crops = {padded[t : t + 3, x : x + 3].tobytes() for t in range(3) for x in range(3)}
    mirrored = {np.frombuffer(c, np.uint8).reshape(3, 3, 1)[:, ::-1].tobytes() for c in crops}
    rng = np.random.default_rng(0)
    seen = {augment({"image": image, "label": 0}, rng, 1, True)["image"].tobytes() for _ in range(500)}
    assert seen == crops | mirrored
    same = augment({"image": image, "label": 5}, rng, 0, False)
    np.testing.assert_array_equal(same["image"], image)
    assert same["label"] == 5


@pytest.mark.parametrize(("count", "size", "limit"), [(30, 7, None), (30, 30, None), (30, 64, None), (30, 8, 11)])
def test_evaluation_counts_every_example_once_in_batches_of_one_size(numbered, count, size, limit):
    batches = list(eval_batches(numbered.test, size, limit))
    assert {len(batch["label"]) for batch in batches} == {size}
    counted = np.concatenate([batch["label"][batch["weight"] == 1] for batch in batches])
    np.testing.assert_array_equal(counted, np.arange(min(count, limit or count)))
