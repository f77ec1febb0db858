"""Fashion-MNIST from its four files: images are padded, labels stay with them, damaged files are refused."""

import gzip
import pathlib
import struct

import numpy as np
import pytest

from ftwt_jax.data import load_dataset
from ftwt_jax.data.fashion_mnist import PACKAGE
from ftwt_jax.data.source import Dataset
from ftwt_jax.errors import UserError

FILES = {
    ("train", "images"): "train-images-idx3-ubyte.gz",
    ("train", "labels"): "train-labels-idx1-ubyte.gz",
    ("t10k", "images"): "t10k-images-idx3-ubyte.gz",
    ("t10k", "labels"): "t10k-labels-idx1-ubyte.gz",
}
SIZES = {"train": 40, "t10k": 20}


def idx(values: np.ndarray) -> bytes:
    """The format of the files: two zeros, the type of a byte, the number of axes, their lengths, the values."""
    return struct.pack(f">HBB{values.ndim}i", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def arrays() -> dict[tuple[str, str], np.ndarray]:
    """A small set without a black pixel, so that padding can be told from images."""
    rng = np.random.default_rng(0)
    return {
        (split, kind): rng.integers(1, 256, (size, 28, 28), np.uint8) if kind == "images" else np.arange(size) % 10
        for split, size in SIZES.items()
        for kind in ("images", "labels")
    }


@pytest.fixture
def folder(tmp_path, arrays) -> pathlib.Path:
    for key, name in FILES.items():
        (tmp_path / name).write_bytes(gzip.compress(idx(arrays[key])))
    return tmp_path


def load(folder: pathlib.Path, **options) -> Dataset:
    return load_dataset("fashion_mnist", data_dir=str(folder), **options)


def refused(folder: pathlib.Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("side", "before"), [(None, 2), (28, 0), (29, 0), (32, 2), (35, 3), (64, 18)])
def test_images_are_padded_with_zeros_and_keep_their_pixels(folder, arrays, side, before):
    dataset = load(folder, image_size=side)
    side = side or 32
    assert dataset.image_shape == (side, side, 1)
    for split, source in (("train", dataset.train), ("t10k", dataset.test)):
        assert source.images.dtype == np.uint8
        assert source.images.shape == (SIZES[split], side, side, 1)
        own = slice(before, before + 28)
        np.testing.assert_array_equal(source.images[:, own, own, 0], arrays[split, "images"])
        assert np.count_nonzero(source.images) == SIZES[split] * 28 * 28


def test_labels_stay_with_their_images_and_have_names(folder):
    dataset = load(folder)
    for split, source in (("train", dataset.train), ("t10k", dataset.test)):
        assert source.labels.dtype == np.int32
        np.testing.assert_array_equal(source.labels, np.arange(SIZES[split]) % 10)
    assert dataset.num_classes == 10
    assert dataset.class_names[:2] == ("t-shirt", "trouser")
    assert dataset.class_names[5::4] == ("sandal", "ankle boot")
    assert len(set(dataset.class_names)) == 10


def test_mean_and_deviation_are_those_of_the_padded_training_images(folder):
    dataset = load(folder)
    pixels = dataset.train.images / 255
    np.testing.assert_allclose((*dataset.mean, *dataset.std), (pixels.mean(), pixels.std()), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (4, True, False)),
        ({"flip": False}, (4, False, False)),
        ({"augment": "none"}, (0, True, False)),
        ({"augment": "resized_crop"}, (0, True, True)),
    ],
)
def test_the_wanted_augmentation_is_set(folder, options, wanted):
    dataset = load(folder, **options)
    assert (dataset.crop_padding, dataset.flip, dataset.resized_crop) == wanted


@pytest.mark.parametrize("side", [27, 8, 0, -32])
def test_a_side_shorter_than_that_of_the_images_is_refused(folder, side):
    assert "config.data.image_size must be at least 28" in refused(folder, image_size=side)


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_file_is_refused_by_its_name(folder, key, keep):
    path = folder / FILES[key]
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    error = refused(folder)
    assert f"{path} cannot be read" in error
    assert "dataset-fashion-mnist" in error


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: gzip.compress(b""),
        lambda data: gzip.compress(gzip.decompress(data)[:-1]),
        lambda data: gzip.compress(gzip.decompress(data) + b"\0"),
        lambda data: gzip.compress(b"\0\0\x0d" + gzip.decompress(data)[3:]),
        lambda data: gzip.compress(b"\0\0\x08\x7f" + gzip.decompress(data)[4:]),
        lambda data: gzip.compress(b"These are not images."),
        lambda data: b"These are not images.",
        lambda data: data[:30] + bytes(byte ^ 0xFF for byte in data[30:]),
    ],
    ids=["empty", "a value less", "a value more", "floats", "127 axes", "text", "not packed", "garbage"],
)
def test_a_damaged_file_is_refused_by_its_name(folder, key, damage):
    path = folder / FILES[key]
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} cannot be read" in refused(folder)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        (("train", "images"), np.zeros((40, 27, 28))),
        (("train", "images"), np.zeros((40, 28, 28, 3))),
        (("train", "images"), np.zeros((40, 784))),
        (("train", "labels"), np.zeros(39)),
        (("train", "labels"), np.zeros((40, 1))),
        (("t10k", "images"), np.zeros((21, 28, 28))),
        (("t10k", "labels"), np.zeros(40)),
    ],
)
def test_files_of_another_shape_are_refused_with_what_they_hold(folder, key, values):
    (folder / FILES[key]).write_bytes(gzip.compress(idx(values)))
    error = refused(folder)
    assert f"{folder} does not hold Fashion-MNIST: {key[0]} has" in error
    assert str(values.shape) in error


@pytest.mark.parametrize("split", SIZES)
def test_labels_without_a_class_are_refused(folder, split):
    (folder / FILES[split, "labels"]).write_bytes(gzip.compress(idx(np.arange(SIZES[split]) % 11)))
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("key", list(FILES)[1:])
def test_a_missing_file_is_refused_by_its_name(folder, key):
    (folder / FILES[key]).unlink()
    assert f"{folder / FILES[key]} cannot be read" in refused(folder)


def test_without_files_the_message_says_how_to_get_them(tmp_path):
    error = refused(tmp_path)
    assert str(tmp_path) in error
    assert "apt-get install dataset-fashion-mnist" in error
    assert f"python -m ftwt_jax prepare tfds:fashion_mnist --data_dir={tmp_path}" in error


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_files_hold_equally_many_images_of_every_class():
    dataset = load_dataset("fashion_mnist")
    assert np.bincount(dataset.train.labels).tolist() == [6000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    assert dataset.train.images.shape == (60_000, 32, 32, 1)
    # 0.2860 and 0.3530 are the known figures of 28x28 pixels; the zeros around them dilute both.
    share = 28**2 / 32**2
    np.testing.assert_allclose(dataset.mean, 0.2860 * share, atol=1e-4)
    np.testing.assert_allclose(dataset.std, np.sqrt((0.3530**2 + 0.2860**2) * share - (0.2860 * share) ** 2), atol=1e-4)
