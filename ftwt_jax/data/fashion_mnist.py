"""Fashion-MNIST: 60,000 grey images of clothes to train on, 10,000 held out (Xiao et al. 2017)."""

import gzip
import os
import pathlib
import zlib

import numpy as np

from ftwt_jax.data import tfds_sets
from ftwt_jax.data.build import build_blank, build_dataset, check_memory, in_memory
from ftwt_jax.data.skipped import Skipped
from ftwt_jax.data.source import ArraySource, Dataset
from ftwt_jax.errors import UserError, os_reason

SIDE, TOTAL = 28, 70_000
# Debian's package, and where it puts its files.
DEBIAN = "dataset-fashion-mnist"
PACKAGE = pathlib.Path("/usr/share/datasets/fashion-mnist")
TRAIN, TEST = "train", "t10k"
TFDS_NAME = "fashion_mnist"
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def load_fashion_mnist(
    image_size: int = 32, augment: str = "crop", flip: bool = True, data_dir: str | None = None
) -> Dataset:
    """Loads Fashion-MNIST from the files of Debian's package, or else from the copy that TFDS prepared.

    Args:
      image_size: side in pixels, at least 28; the images are padded with zeros.
      augment, flip: see `build_dataset`.
      data_dir: folder with the four `*-ubyte.gz` files, or with prepared TFDS data sets.

    Raises:
      UserError: the files are missing or damaged; the message says how to get them.
    """
    if image_size < SIDE:
        raise UserError(f"Fashion-MNIST is {SIDE}x{SIDE} pixels: config.data.image_size must be at least {SIDE}")
    check_memory(TOTAL, (image_size, image_size, 1))
    folder = pathlib.Path(os.path.expanduser(data_dir)) if data_dir else PACKAGE
    if _path(folder, TRAIN, "images").exists():
        parts = [_read_split(folder, split) for split in (TRAIN, TEST)]
    elif tfds_sets.is_prepared(TFDS_NAME, data_dir):
        sources = tfds_sets.open_sources(TFDS_NAME, data_dir=data_dir)
        parts = [
            in_memory(source, (SIDE, SIDE, 1), len(CLASSES), Skipped(len(source)))
            for source in (sources.train, sources.test)
        ]
    else:
        raise UserError(
            f"Fashion-MNIST is neither in {folder} nor prepared by TFDS: run `apt-get install {DEBIAN}` or "
            f"`{tfds_sets.prepare_command(TFDS_NAME, data_dir)}`"
        )
    train, test = (ArraySource(_pad(part.images, image_size), part.labels) for part in parts)
    return build_dataset(train, test, CLASSES, image_size, augment, flip, channels=1)


def describe_fashion_mnist(
    num_classes: int | None, image_size: int, augment: str, flip: bool, data_dir: str | None
) -> Dataset:
    """`load_fashion_mnist` without images; the files need not be there."""
    return build_blank(num_classes or len(CLASSES), 1, image_size, augment, flip, length=60_000)


def _path(folder: pathlib.Path, split: str, kind: str) -> pathlib.Path:
    return folder / f"{split}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz"


def _read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads bytes in the IDX format: two zeros, type 8, the number of axes, their lengths, then the values."""
    try:
        data = gzip.decompress(path.read_bytes())
        axes = data[3] if data[:3] == b"\0\0\x08" else 0
        shape = np.frombuffer(data, ">i4", axes, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {os_reason(error)}; reinstall Debian's {DEBIAN}") from None


def _read_split(folder: pathlib.Path, split: str) -> ArraySource:
    images, labels = (_read_idx(_path(folder, split, kind)) for kind in ("images", "labels"))
    if (
        images.ndim != 3
        or images.shape[1:] != (SIDE, SIDE)
        or labels.shape != images.shape[:1]
        or labels.max() >= len(CLASSES)
    ):
        raise UserError(
            f"{folder} does not hold Fashion-MNIST: {split} has images of shape {images.shape} and labels of shape "
            f"{labels.shape}; reinstall Debian's {DEBIAN}"
        )
    return ArraySource(images[..., None], labels.astype(np.int32))


def _pad(images: np.ndarray, side: int) -> np.ndarray:
    before = (side - SIDE) // 2
    after = side - SIDE - before
    return np.pad(images, ((0, 0), (before, after), (before, after), (0, 0)))
