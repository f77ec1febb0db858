"""From two sources to a data set: skips broken images, holds small ones in memory, measures mean and deviation."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ftwt_jax.data.decoding import MAX_PIXELS, BrokenImageError, LazyImage
from ftwt_jax.data.skipped import Skipped
from ftwt_jax.data.source import ArraySource, Dataset, Example, NoImages, Source
from ftwt_jax.data.views import central_view
from ftwt_jax.errors import UserError, unknown_name
from ftwt_jax.parallel.processes import cpu_count

AUGMENTS = ("crop", "resized_crop", "none")
# The side over the zero pixels added on each side before the crop: 32 over 4.
SIDE_OVER_PADDING = 8
# ImageNet's, used by convention for all networks that take regions of large images.
IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)
# Share of the machine's memory that images may take.
MEMORY_SHARE = 0.5
# Images per task of a thread.
CHUNK = 256
# Up to this many large images are checked before training; of more, broken ones are skipped as they are read.
MOST_CHECKED = 20_000
# Stands for an unknown number of images. In a training step it only moves the boundaries of epochs.
UNKNOWN_LENGTH = 1_000_000


def build_dataset(
    train: Source,
    test: Source,
    class_names: Sequence[str],
    image_size: int,
    augment: str = "crop",
    flip: bool = True,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Makes a data set from two sources.

    Args:
      train, test: images of any size, decoded or not; see `Example`.
      class_names: in the order of the labels.
      image_size: side in pixels of the network's input.
      augment: `crop` is for small images: decoded once, held in memory at `image_size`, padded by an eighth of the side
        and cropped at random, normalised with the set's own mean and deviation. `none` is the same without the crop.
        `resized_crop` is for large images: decoded as they are read, random regions resized (see `random_view`),
        normalised with ImageNet's mean and deviation.
      flip: whether to mirror training images at random.
      channels: 1 for grey, 3 for RGB.
      max_pixels: most pixels of an image; larger ones are skipped, but a JPEG only if it has more at a reduced scale.

    Raises:
      UserError: an unknown `augment`, images that do not fit in memory, or too many that cannot be decoded.
    """
    if augment not in AUGMENTS:
        raise unknown_name("config.data.augment", augment, AUGMENTS)
    if image_size < 1:
        raise UserError(f"config.data.image_size is the side in pixels and must be positive; got {image_size}")
    if max_pixels < 1:
        raise UserError(f"config.data.max_pixels is the most pixels of an image and must be positive; got {max_pixels}")
    skipped = Skipped(len(train) + len(test), max_pixels)
    shape = (image_size, image_size, channels)
    if augment == "resized_crop":
        if len(train) + len(test) <= MOST_CHECKED:
            train, test = (_without_broken(source, channels, len(class_names), skipped) for source in (train, test))
        mean, std = (for_channels(values, channels) for values in (IMAGENET_MEAN, IMAGENET_STD))
    else:
        check_memory(len(train) + len(test), shape)
        train, test = (in_memory(source, shape, len(class_names), skipped) for source in (train, test))
        mean, std = mean_and_std(train.images)
    return Dataset(
        train=train,
        test=test,
        num_classes=len(class_names),
        image_shape=shape,
        mean=mean,
        std=std,
        crop_padding=image_size // SIDE_OVER_PADDING if augment == "crop" else 0,
        flip=flip,
        resized_crop=augment == "resized_crop",
        class_names=tuple(class_names),
        skipped=skipped,
    )


def build_blank(
    num_classes: int, channels: int, image_size: int, augment: str, flip: bool, length: int = UNKNOWN_LENGTH
) -> Dataset:
    """`build_dataset` without images: a data set of the right shapes and `length` that cannot be read."""
    side = max(image_size, 1)
    blank = ArraySource(np.zeros((1, side, side, channels), np.uint8), np.zeros(1, np.int32))
    names = [str(index) for index in range(num_classes)]
    dataset = build_dataset(blank, blank, names, image_size, augment, flip, channels)
    return dataclasses.replace(dataset, train=NoImages(length), test=NoImages(length))


def for_channels(values: Sequence[float], channels: int) -> Sequence[float]:
    """The means or deviations of RGB images, for this many channels: grey takes their average."""
    return values if len(values) == channels else [sum(values) / len(values)] * channels


def mean_and_std(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel of uint8 images [n, H, W, channels], scaled to [0, 1]; a deviation of 0 is returned as 1."""
    # Counts of the 256 values are exact. In chunks, because `bincount` copies its input.
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        counts += [np.bincount(part[..., c].ravel(), minlength=256) for c in range(len(counts))]
    shares = counts / counts[0].sum()
    values = np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt(np.maximum(shares @ values**2 - mean**2, 0))
    return tuple(map(float, mean)), tuple(float(s) if s > 1e-6 else 1.0 for s in std)


def in_memory(source: Source, shape: tuple[int, int, int], classes: int, skipped: Skipped) -> ArraySource:
    """Decodes a whole source to images of one size; those that cannot be decoded are left out."""
    if isinstance(source, ArraySource) and source.images.shape[1:] == shape:
        return source
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)

    def read(index: int, example: Example, image: LazyImage) -> None:
        images[index] = central_view(image, shape[0], central=1)
        labels[index] = checked_label(example, classes)

    good = _use_each(source, shape[-1], skipped, read)
    return ArraySource(images, labels) if good.all() else ArraySource(images[good], labels[good])


@dataclasses.dataclass(frozen=True)
class Selection:
    """Some images of another source."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(self.indices[index])]


def _without_broken(source: Source, channels: int, classes: int, skipped: Skipped) -> Source:
    def check(index: int, example: Example, image: LazyImage) -> None:
        checked_label(example, classes)
        image.pixels(8)  # The coarsest scale is enough to tell whether the file is complete.

    good = _use_each(source, channels, skipped, check)
    return source if good.all() else Selection(source, np.flatnonzero(good))


def _use_each(source: Source, channels: int, skipped: Skipped, use: Callable[[int, Any, LazyImage], Any]) -> np.ndarray:
    """Calls `use` on every image, on all cores; returns which succeeded, bool [n]."""
    good = np.ones(len(source), bool)

    def work(start: int) -> list[tuple[int, str, str]]:
        broken = []
        for index in range(start, min(start + CHUNK, len(source))):
            example = source[index]
            try:
                use(index, example, LazyImage(example["image"], channels, skipped.max_pixels))
            except BrokenImageError as error:
                broken.append((index, example.get("name", f"image {index}"), str(error)))
        return broken

    with concurrent.futures.ThreadPoolExecutor(cpu_count()) as pool:
        try:
            for broken in pool.map(work, range(0, len(source), CHUNK)):
                for index, name, reason in broken:
                    good[index] = False
                    skipped.add(name, reason)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return good


def checked_label(example: Example, classes: int) -> int:
    """The label of an example; raises `UserError` if there is no such class."""
    label = int(example["label"])
    if not 0 <= label < classes:
        raise UserError(
            f"{example.get('name', 'an image')} has label {label}, but there are {classes} classes: a split "
            "without labels cannot be used; choose others with config.data.train_split and config.data.test_split"
        )
    return label


def check_memory(count: int, shape: tuple[int, int, int]) -> None:
    needed = count * int(np.prod(shape))
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > MEMORY_SHARE * installed:
        raise UserError(
            f"{count} images of {shape[0]}x{shape[1]} pixels take {needed / 2**30:.0f} GiB, too much for the "
            f"{installed / 2**30:.0f} GiB of this machine: set config.data.augment=resized_crop, which reads images "
            "only as they are needed, or a smaller config.data.image_size"
        )
