"""Data sets without their images: shapes and numbers that the config, TFDS or a folder's names tell."""

import dataclasses
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ftwt_jax.data import FAMILIES, REGISTRY, load_dataset, tfds_sets
from ftwt_jax.data.build import build_dataset
from ftwt_jax.data.fashion_mnist import CLASSES as CLOTHES
from ftwt_jax.data.fashion_mnist import load_fashion_mnist
from ftwt_jax.data.folder import HELD_OUT, SPLIT_NAMES, TRAIN, load_folder
from ftwt_jax.data.source import ArraySource, Dataset, Example
from ftwt_jax.data.tfds_sets import load_tfds
from ftwt_jax.errors import UserError, unknown_name

# In place of a number of examples that nobody here knows. In a training step it only moves the epochs' boundaries.
UNKNOWN_EXAMPLES = 1_000_000


@dataclasses.dataclass(frozen=True)
class NoImages:
    """A source of known length of which nothing can be read."""

    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        raise UserError(f"image {index} was asked of a data set that is only described")


def describe_dataset(name: str, num_classes: int | None = None, **options: Any) -> Dataset:
    """A data set as `load_dataset` would load it, but for its images, their mean and deviation. Downloads nothing.

    Args:
      name: see `load_dataset`; the data need not be there.
      num_classes: where it cannot be found out, or to have others.
      **options: as for `load_dataset`.

    Raises:
      UserError: unknown name or option, or a number of classes that is known nowhere.
    """
    given = {option: value for option, value in options.items() if value is not None}
    kind, _, place = name.partition(":")
    if kind == "tfds" and place:
        return _described(load_tfds, given, lambda: _tfds(place, given, num_classes))
    if kind == "folder" and place:
        return _described(load_folder, given, lambda: (num_classes or _folder(place, given), 3, None, UNKNOWN_EXAMPLES))
    if name == "fashion_mnist":
        return _described(load_fashion_mnist, given, lambda: (num_classes or len(CLOTHES), 1, None, 60_000))
    # What is bundled is there, and of any other name the error says which there are.
    dataset = load_dataset(name, **given)
    return dataset if num_classes is None else dataclasses.replace(dataset, num_classes=num_classes)


Facts = tuple[int, int, int | None, int]


def _described(load: Callable[..., Dataset], given: dict[str, Any], find: Callable[[], Facts]) -> Dataset:
    """The data set that a loader would make with these options, of classes, channels, side and number of examples."""
    usual = {key: one.default for key, one in inspect.signature(load).parameters.items() if key != "place"}
    for option in given:
        if option not in usual:
            kind = next(name for name, one in {**REGISTRY, **FAMILIES}.items() if one is load)
            raise unknown_name(f"option of the data set {kind}", option, list(usual))
    options = usual | given
    classes, channels, side, examples = find()
    size = options["image_size"]
    if size is None:
        size = tfds_sets.LARGE_SIDE if options["augment"] == "resized_crop" else side or tfds_sets.LARGE_SIDE
    blank = ArraySource(np.zeros((1, max(size, 1), max(size, 1), channels), np.uint8), np.zeros(1, np.int32))
    names = [str(index) for index in range(classes)]
    made = build_dataset(blank, blank, names, size, options["augment"], options["flip"], channels)
    return dataclasses.replace(made, train=NoImages(examples), test=NoImages(examples))


def _tfds(name: str, given: dict[str, Any], num_classes: int | None) -> Facts:
    """What TFDS knows of a data set, prepared or not; of a bucket, only what its own code says."""
    place = given.get("data_dir")
    builder = tfds_sets.open_builder(name, None if place and "://" in place else place)
    image, label = tfds_sets.image_and_label(builder, name)
    classes = num_classes or builder.info.features[label].num_classes
    if not classes:
        raise UserError(f"TFDS does not say how many classes {tfds_sets.PREFIX}{name} has: give --num_classes")
    height, width, channels = builder.info.features[image].shape
    split = given.get("train_split") or tfds_sets.TRAIN
    known = builder.info.splits
    try:
        examples = known[split].num_examples if known else UNKNOWN_EXAMPLES
    except (KeyError, ValueError, AssertionError):
        raise UserError(f"{tfds_sets.PREFIX}{name} has no split {split!r}; its splits: {', '.join(known)}") from None
    return classes, 1 if channels == 1 else 3, min(height, width) if height and width else None, examples


def _folder(place: str, given: dict[str, Any]) -> int:
    """Number of classes of a folder of images, by the names in it."""
    root = pathlib.Path(place).expanduser()
    if given.get("train_split") or any((root / split).is_dir() for split in (TRAIN, *HELD_OUT)):
        root /= given.get("train_split") or TRAIN
    try:
        names = [one.name for one in root.iterdir() if one.is_dir() and not one.name.startswith(".")]
    except OSError:
        names = []
    if len(names) < 2 or {name.lower() for name in names} <= SPLIT_NAMES:
        raise UserError(f"no folder with classes of images at {root}: give --num_classes to plan without it")
    return len(names)
