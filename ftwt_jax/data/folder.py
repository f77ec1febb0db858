"""Folders of images: `PATH/train/CLASS/*` with `PATH/val/` or `PATH/test/`, or one tree `PATH/CLASS/*`."""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from ftwt_jax.data.build import build_blank, build_dataset
from ftwt_jax.data.source import Dataset, Example
from ftwt_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
TRAIN, HELD_OUT = "train", ("val", "test")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


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
        return {"image": pathlib.Path(path), "label": label, "name": path}


def load_folder(
    place: str,
    image_size: int = 224,
    augment: str = "resized_crop",
    flip: bool = True,
    train_split: str | None = None,
    test_split: str | None = None,
    test_fraction: float = 0.1,
) -> Dataset:
    """Loads `folder:PATH`; the names of its class folders are the classes.

    Args:
      place: the path. It holds `train/` and `val/` or `test/`, each with a folder of images per class; or the class
        folders themselves, of which `test_fraction` is held out, always the same images.
      image_size, augment, flip: see `build_dataset`.
      train_split, test_split: names of the two folders, if not these.
      test_fraction: share of each class that is held out if there are no splits.

    Raises:
      UserError: no such folder, no images, fewer than two classes, or different classes in the two splits.
    """
    root = pathlib.Path(os.path.expanduser(place))
    if not place or not root.is_dir():
        raise UserError(f"config.data.name=folder:PATH must name a folder of images; {place!r} is not a folder")
    root = root.absolute()
    if train_split or test_split or any((root / split).is_dir() for split in (TRAIN, *HELD_OUT)):
        splits = [_split_folder(root, train_split, (TRAIN,)), _split_folder(root, test_split, HELD_OUT)]
        if splits[0].samefile(splits[1]):
            raise UserError(
                f"{splits[0]} is both trained on and held out: config.data.test_split must be another folder"
            )
        names = _common_classes(*splits)
        train, test = (_entries(split, names) for split in splits)
    else:
        names = _class_names(root)
        if {name.lower() for name in names} <= SPLIT_NAMES:
            raise UserError(
                f"the folders {', '.join(names)} of {root} look like splits, not classes: name them with "
                "config.data.train_split and config.data.test_split"
            )
        train, test = _divide(_entries(root, names), test_fraction)
    sources = FileSource(train), FileSource(test)
    return build_dataset(*sources, class_names=names, image_size=image_size, augment=augment, flip=flip)


def describe_folder(
    place: str, num_classes: int | None, image_size: int, augment: str, flip: bool, train_split: str | None, **_: Any
) -> Dataset:
    """`load_folder` without images: counts the class folders, if `num_classes` is None."""
    return build_blank(num_classes or _class_count(place, train_split), 3, image_size, augment, flip)


def _class_count(place: str, train_split: str | None) -> int:
    root = pathlib.Path(place).expanduser()
    if train_split or any((root / split).is_dir() for split in (TRAIN, *HELD_OUT)):
        root /= train_split or TRAIN
    try:
        names = _class_names(root) if place else []
    except (OSError, UserError):
        names = []
    if {name.lower() for name in names} <= SPLIT_NAMES:
        raise UserError(
            f"no class folders at {root if place else repr(place)}: set --num_classes to plan without the data"
        )
    return len(names)


def _split_folder(root: pathlib.Path, name: str | None, usual: tuple[str, ...]) -> pathlib.Path:
    for candidate in [name] if name else usual:
        if (root / candidate).is_dir():
            return root / candidate
    wanted = f"{name}/" if name else " or ".join(f"{candidate}/" for candidate in usual)
    raise UserError(
        f"{root} has no {wanted}: add it, or set config.data.name=folder:{root / TRAIN} to hold out a part of its "
        "classes"
    )


def _class_names(folder: pathlib.Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        has = f"only one class folder, {names[0]!r}" if names else "no class folders"
        raise UserError(f"{folder} has {has}: it needs at least two, each with the images of one class")
    return names


def _common_classes(train: pathlib.Path, test: pathlib.Path) -> list[str]:
    names, others = _class_names(train), _class_names(test)
    if names != others:
        only = [
            f"only in {folder}: {', '.join(sorted(extra)[:5])}{', ...' if len(extra) > 5 else ''}"
            for folder, extra in ((train, {*names} - {*others}), (test, {*others} - {*names}))
            if extra
        ]
        raise UserError(f"the two splits have different classes: {'; '.join(only)}")
    return names


def _entries(folder: pathlib.Path, names: list[str]) -> tuple[Entry, ...]:
    """All images below the class folders, ordered by path."""
    entries: list[Entry] = []
    for label, name in enumerate(names):
        before = len(entries)
        seen: set[str] = set()
        for parent, folders, files in os.walk(folder / name, followlinks=True):
            if os.path.realpath(parent) in seen:
                folders.clear()  # A link to a folder above.
                continue
            seen.add(os.path.realpath(parent))
            folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
            images = (f for f in sorted(files) if f.lower().endswith(EXTENSIONS) and not f.startswith("."))
            entries += [Entry(os.path.join(parent, file), label) for file in images]
        if len(entries) == before:
            kinds = ", ".join(EXTENSIONS)
            raise UserError(f"no images in {folder / name}: a class folder must hold image files ({kinds})")
    return tuple(entries)


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
            raise UserError(f"{folder} has only one image: a class needs at least two, one for each split")
        held_out[shuffled[: min(max(1, round(fraction * len(shuffled))), len(shuffled) - 1)]] = True
    parts = (np.flatnonzero(chosen) for chosen in (~held_out, held_out))
    train, test = (tuple(entries[i] for i in part) for part in parts)
    return train, test
