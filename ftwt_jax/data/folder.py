"""Folders of images: `PATH/train/CLASS/*` with `PATH/val/` or `PATH/test/`, or one tree `PATH/CLASS/*`."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ftwt_jax.data.build import build_blank, build_dataset
from ftwt_jax.data.class_folders import (
    HELD_OUT_NAMES,
    TRAIN_NAMES,
    Classes,
    LeftOut,
    find_classes,
    first_of,
    put_in_order,
    with_images,
)
from ftwt_jax.data.decoding import EXTENSIONS, MAX_PIXELS
from ftwt_jax.data.flat_folder import flat_images, how_to_sort
from ftwt_jax.data.source import Dataset, Example
from ftwt_jax.errors import UserError, printable

TRAIN, HELD_OUT = "train", ("val", "test")
SPLIT_NAMES = TRAIN_NAMES | HELD_OUT_NAMES


class Entry(NamedTuple):
    """An image file and the number of its class."""

    path: str
    label: int


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files, in the order of `entries`."""

    entries: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        path, label = self.entries[index]
        return {"image": pathlib.Path(path), "label": label, "name": printable(path)}


def load_folder(
    place: str,
    image_size: int = 224,
    augment: str = "resized_crop",
    flip: bool = True,
    train_split: str | None = None,
    test_split: str | None = None,
    test_fraction: float = 0.1,
    class_order: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Loads `folder:PATH`; the names of its class folders are the classes.

    What is left out is told by one `SkippedImageWarning`.

    Args:
      place: the path. It holds `train/` and `val/` or `test/`, each with a folder of images per class; or the class
        folders themselves, of which `test_fraction` is held out, always the same images.
      image_size, augment, flip, max_pixels: see `build_dataset`.
      train_split, test_split: names of the two folders, if not these.
      test_fraction: share of each class that is held out if there are no splits.
      class_order: `bytes` (0, 1, 10, 2: as torchvision and TFDS sort) or `natural` (0, 1, 2, 10: as timm sorts); None
        is `bytes`, except that a classifier whose classes have no names is refused where the two differ.

    Raises:
      UserError: no such folder, no images, fewer than two classes, or different classes in the two splits.
    """
    root = pathlib.Path(os.path.expanduser(place))
    if not place or not root.is_dir():
        raise UserError(
            f"config.data.name=folder:PATH must name a folder of images; {printable(place)!r} is not a folder"
        )
    root = root.absolute()
    left_out = LeftOut(root)
    if train_split or test_split or any((root / split).is_dir() for split in (TRAIN, *HELD_OUT)):
        places = [_split_folder(root, train_split, (TRAIN,)), _split_folder(root, test_split, HELD_OUT)]
        if places[0].samefile(places[1]):
            raise UserError(
                f"{places[0]} is both trained on and held out: config.data.test_split must be another folder"
            )
        splits = [find_classes(place, left_out) for place in places]
        names, order_doubt = put_in_order(_common_classes(places, splits, left_out), class_order)
        train, test = (_entries(split, names) for split in splits)
    else:
        places, splits = [root], [find_classes(root, left_out)]
        if splits[0] and {name.lower() for name in splits[0]} <= SPLIT_NAMES:
            raise UserError(
                f"the folders {', '.join(splits[0])} of {printable(str(root))} look like splits, not classes: name "
                "them with config.data.train_split and config.data.test_split"
            )
        _check_sorted(root, splits[0], left_out)
        names, order_doubt = put_in_order(with_images(splits[0]), class_order)
        train, test = _divide(_entries(splits[0], names), test_fraction)
    empty = {name: str(place / name) for place, split in zip(places, splits, strict=True) for name in split}
    left_out.empty += [path for name, path in empty.items() if name not in names]
    left_out.warn()
    dataset = build_dataset(
        FileSource(train), FileSource(test), names, image_size, augment, flip, max_pixels=max_pixels
    )
    return dataclasses.replace(dataset, order_doubt=order_doubt)


def describe_folder(
    place: str, num_classes: int | None, image_size: int, augment: str, flip: bool, train_split: str | None, **_: Any
) -> Dataset:
    """`load_folder` without images: counts the class folders, if `num_classes` is None.

    Empty ones are no classes, as in `load_folder`, unless all are: then the images are elsewhere.
    """
    return build_blank(num_classes or _class_count(place, train_split), 3, image_size, augment, flip)


def _class_count(place: str, train_split: str | None) -> int:
    root = pathlib.Path(place).expanduser()
    if train_split or any((root / split).is_dir() for split in (TRAIN, *HELD_OUT)):
        root /= train_split or TRAIN
    try:
        classes = find_classes(root, LeftOut(root)) if place else {}
    except OSError:
        classes = {}
    names = with_images(classes) or [*classes]
    if len(names) < 2 or {name.lower() for name in names} <= SPLIT_NAMES:
        raise UserError(
            f"no class folders at {printable(str(root)) if place else repr(place)}: set --num_classes to plan without "
            "the data"
        )
    return len(names)


def _split_folder(root: pathlib.Path, name: str | None, usual: tuple[str, ...]) -> pathlib.Path:
    for candidate in [name] if name else usual:
        if (root / candidate).is_dir():
            return root / candidate
    wanted = f"{name}/" if name else " or ".join(f"{candidate}/" for candidate in usual)
    where = printable(str(root))
    raise UserError(
        f"{where} has no {wanted}: add it, or set config.data.name=folder:{where}/{TRAIN} to hold out a part of its "
        "classes"
    )


def _check_sorted(folder: pathlib.Path, classes: Classes, left_out: LeftOut) -> None:
    """Raises `UserError` unless a folder has images of two classes."""
    names, where = with_images(classes), printable(str(folder))
    if len(names) > 1:
        return
    if flat_images(folder, classes, left_out):
        raise UserError(how_to_sort(folder))
    empty = [printable(str(folder / name)) for name in classes if name not in names]
    has = f"only one class folder, {names[0]!r}" if names else "no class folders"
    if empty:
        has += f" with images; no images in {first_of(empty)}: a class folder must hold image files "
        has += f"({', '.join(EXTENSIONS)})"
    raise UserError(f"{where} has {has}: it needs at least two, each with the images of one class")


def _common_classes(places: Sequence[pathlib.Path], splits: Sequence[Classes], left_out: LeftOut) -> list[str]:
    """The classes of both splits, in order of the bytes of the first's folders."""
    _check_sorted(places[0], splits[0], left_out)
    names, others = map(with_images, splits)
    if not {*names} & {*others} and flat_images(places[1], splits[1], left_out):
        raise UserError(how_to_sort(places[1]))
    only = [
        f"only in {printable(str(place))}: {first_of(sorted(extra))}"
        for place, extra in zip(places, ({*names} - {*others}, {*others} - {*names}), strict=True)
        if extra
    ]
    empty = [
        printable(str(place / name))
        for place, split in zip(places, splits, strict=True)
        for name, images in split.items()
        if name in {*names} ^ {*others} and not images
    ]
    if only:
        only += [f"no images in {first_of(empty)}"] if empty else []
        raise UserError(f"the two splits have different classes: {'; '.join(only)}")
    return names


def _entries(classes: Classes, names: Sequence[str]) -> tuple[Entry, ...]:
    return tuple(Entry(path, label) for label, name in enumerate(names) for path in classes[name])


def _divide(entries: tuple[Entry, ...], fraction: float) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Holds out the same share of every class, at least one image each."""
    if not 0 < fraction < 1:
        raise UserError(f"config.data.test_fraction is the share held out and must be between 0 and 1; got {fraction}")
    labels = np.asarray([entry.label for entry in entries])
    rng = np.random.default_rng(0)
    held_out = np.zeros(len(entries), bool)
    for label in np.unique(labels):
        shuffled = rng.permutation(np.flatnonzero(labels == label))
        if len(shuffled) < 2:
            folder = pathlib.Path(entries[shuffled[0]].path).parent
            raise UserError(
                f"{printable(str(folder))} has only one image: a class needs at least two, one for each split"
            )
        held_out[shuffled[: min(max(1, round(fraction * len(shuffled))), len(shuffled) - 1)]] = True
    parts = (np.flatnonzero(chosen) for chosen in (~held_out, held_out))
    train, test = (tuple(entries[i] for i in part) for part in parts)
    return train, test
