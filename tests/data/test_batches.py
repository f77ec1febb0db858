"""Batches: deterministic in (seed, epoch, index), resumable, each image once; and the bundled digits."""

import jax
import numpy as np
import pytest

from ftwt_jax.data import load_dataset
from ftwt_jax.data.augment import crop_and_flip, make_augment
from ftwt_jax.data.build import build_dataset, mean_and_std
from ftwt_jax.data.decoding import LazyImage
from ftwt_jax.data.pipeline import eval_batches, train_batches
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.data.views import central_view
from ftwt_jax.errors import UserError
from ftwt_jax.parallel.sharding import data_mesh, split

COUNT = 30


class Numbered:
    """Images of one shade each, 10x12 pixels, labelled by their number; read one by one, as large ones are."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int):
        return {"image": np.full((10, 12, 3), index + 1, np.uint8), "label": index}


@pytest.fixture(scope="module")
def in_memory() -> Dataset:
    """30 images, each a single shade and labelled by its number, so that a test can tell what was read."""
    images = np.broadcast_to(np.arange(COUNT, dtype=np.uint8)[:, None, None, None] + 1, (COUNT, 4, 4, 1))
    source = ArraySource(images, np.arange(COUNT, dtype=np.int32))
    return Dataset(source, source, COUNT, (4, 4, 1), (0.0,), (1.0,), crop_padding=1, flip=True)


@pytest.fixture(scope="module")
def one_by_one() -> Dataset:
    """The same, decoded as they are read."""
    return build_dataset(Numbered(), Numbered(), [str(n) for n in range(COUNT)], 4, "resized_crop")


@pytest.fixture(params=["in_memory", "one_by_one"])
def numbered(request) -> Dataset:
    return request.getfixturevalue(request.param)


@pytest.fixture
def processes(monkeypatch):
    """Makes this process appear to be one of several."""

    def pretend(index: int, count: int) -> None:
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: count)

    return pretend


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


def test_mean_and_deviation_are_those_of_the_pixels():
    images = np.random.default_rng(0).integers(0, 256, (20, 5, 7, 3), np.uint8)
    images[..., 2] = 9
    mean, std = mean_and_std(images)
    pixels = images / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], pixels.std((0, 1, 2))[:2], rtol=1e-9)
    assert std[2] == 1, "a channel of one value must not be divided by 0"


def test_every_image_comes_once_per_epoch_in_a_new_order(numbered):
    batches = train_batches(numbered, 10, seed=3)
    epochs = [[next(batches) for _ in range(3)] for _ in range(2)]
    orders = [np.concatenate([batch["index"] for batch in epoch]) for epoch in epochs]
    for order, epoch in zip(orders, epochs, strict=True):
        assert sorted(order) == list(range(COUNT))
        np.testing.assert_array_equal(order, np.concatenate([batch["label"] for batch in epoch]))
        shades = np.concatenate([batch["image"].max((1, 2, 3)) for batch in epoch])
        np.testing.assert_array_equal(shades, order + 1)
    assert list(orders[0]) != list(orders[1])


def test_batches_depend_only_on_the_seed(numbered):
    def read(seed):
        batches = train_batches(numbered, 8, seed)
        return [next(batches) for _ in range(5)]

    for a, b in zip(read(1), read(1), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert any((a["label"] != b["label"]).any() for a, b in zip(read(1), read(2), strict=True))


def test_a_later_start_gives_the_batches_from_there_on(numbered):
    wanted = list(train_batches(numbered, 7, seed=0, stop=10))
    assert len(wanted) == 10
    for batch, again in zip(wanted[4:], train_batches(numbered, 7, seed=0, start=4, stop=10), strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, again)


def test_an_interrupted_epoch_is_completed_without_repeating_or_missing_an_image(numbered):
    before, after = train_batches(numbered, 6, seed=5), train_batches(numbered, 6, seed=5, start=2)
    seen = [next(before)["index"] for _ in range(2)]
    seen += [next(after)["index"] for _ in range(3)]
    assert sorted(np.concatenate(seen)) == list(range(COUNT))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_together_read_what_one_reads(numbered, processes, count):
    """Side by side, their shares are the whole batch: the same crops of the same images in the same order."""

    def read() -> list[dict[str, np.ndarray]]:
        return list(train_batches(numbered, 6, seed=2, stop=7))

    alone, shares = read(), []
    for index in range(count):
        processes(index, count)
        shares.append(read())
        assert all(len(batch["label"]) == 6 // count for batch in shares[-1])
    for parts, whole in zip(zip(*shares, strict=True), alone, strict=True):
        together = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        jax.tree.map(np.testing.assert_array_equal, together, whole)


def test_the_number_of_threads_changes_nothing(one_by_one, monkeypatch):
    def read():
        batches = train_batches(one_by_one, 8, seed=4)
        return [next(batches) for _ in range(4)]

    wanted = read()
    monkeypatch.setattr("ftwt_jax.data.pipeline.cpu_count", lambda: 5)
    jax.tree.map(np.testing.assert_array_equal, read(), wanted)


def test_augmentation_crops_the_padded_image_and_mirrors_it():
    image = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    crops = {padded[t : t + 3, x : x + 3].tobytes() for t in range(3) for x in range(3)}
    mirrored = {np.frombuffer(c, np.uint8).reshape(3, 3, 1)[:, ::-1].tobytes() for c in crops}
    images, positions = np.stack([image] * 500), np.arange(500, dtype=np.uint32)
    key = jax.random.key(0)

    def seen(padding: int, flip: bool) -> set[bytes]:
        return {x.tobytes() for x in np.asarray(crop_and_flip(images, positions, key, padding, flip))}

    assert seen(1, True) == crops | mirrored
    assert seen(1, False) == crops
    assert seen(0, True) == {image.tobytes(), np.ascontiguousarray(image[:, ::-1]).tobytes()}


def test_augmentation_depends_on_seed_and_position_not_on_the_batch(in_memory):
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1), np.uint8)
    positions = np.arange(100, 112, dtype=np.uint32)
    augment = make_augment(in_memory, seed=3)
    whole = np.asarray(augment(images, positions))
    parts = [augment(images[i : i + 4], positions[i : i + 4]) for i in (0, 4, 8)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (np.asarray(make_augment(in_memory, seed=4)(images, positions)) != whole).any()
    assert (np.asarray(augment(images, positions + 12)) != whole).any()


def test_augmentation_needs_nothing_from_other_devices(in_memory):
    """The crop is a gather; if it were not split with the batch, every device would receive every image."""
    augment, whole = make_augment(in_memory, seed=0), split(data_mesh())
    images, positions = np.zeros((8, 4, 4, 1), np.uint8), np.zeros(8, np.uint32)
    text = jax.jit(augment, in_shardings=whole, out_shardings=whole).lower(images, positions).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" not in text


@pytest.mark.parametrize(("count", "size"), [(30, 7), (30, 30), (30, 64)])
def test_evaluation_counts_every_image_once_in_batches_of_one_size(numbered, count, size):
    batches = list(eval_batches(numbered, numbered.test, size))
    assert {len(batch["label"]) for batch in batches} == {size}
    counted = np.concatenate([batch["label"][batch["weight"] == 1] for batch in batches])
    np.testing.assert_array_equal(counted, np.arange(count))


def test_a_limited_evaluation_is_spread_over_the_source(numbered):
    batches = list(eval_batches(numbered, numbered.test, 4, limit=10))
    counted = np.concatenate([batch["label"][batch["weight"] == 1] for batch in batches])
    np.testing.assert_array_equal(counted, np.arange(0, 30, 3))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_evaluate_every_image_once(numbered, processes, count):
    counted = []
    for index in range(count):
        processes(index, count)
        for batch in eval_batches(numbered, numbered.test, 8):
            assert len(batch["label"]) == 8 // count
            counted += batch["label"][batch["weight"] == 1].tolist()
    assert sorted(counted) == list(range(COUNT))


def test_images_in_memory_are_resized_and_cropped_like_others_on_request():
    images = np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3), np.uint8)
    source = ArraySource(images, np.arange(6, dtype=np.int32))
    dataset = build_dataset(source, source, [str(n) for n in range(6)], 4, "resized_crop")
    assert next(train_batches(dataset, 6, 0))["image"].shape == (6, 4, 4, 3)
    (batch,) = eval_batches(dataset, dataset.test, 6)
    wanted = [central_view(LazyImage(image, 3), 4) for image in images]
    np.testing.assert_array_equal(batch["image"], wanted)


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_a_class_is_refused(augment, label):
    class Labelled(Numbered):
        def __getitem__(self, index: int):
            return super().__getitem__(index) | {"label": label if index == 7 else 0, "name": f"number {index}"}

    with pytest.raises(UserError, match=f"number 7 has label {label}, but there are 3 classes"):
        build_dataset(Labelled(), Labelled(), ["a", "b", "c"], 8, augment)


def test_a_data_set_can_be_made_from_two_sources_and_their_classes(one_by_one):
    small = build_dataset(Numbered(), Numbered(), [str(n) for n in range(COUNT)], 8, "crop", flip=False)
    assert small.train.images.shape == (COUNT, 8, 8, 3)
    assert small.num_classes == one_by_one.num_classes == COUNT
    assert small.crop_padding == 1
    assert not one_by_one.crop_padding
    np.testing.assert_array_equal(small.train.images[:, 0, 0, 0], np.arange(COUNT) + 1)
