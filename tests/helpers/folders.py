"""Folders of images for tests."""

import contextlib
import pathlib
import warnings
from collections.abc import Iterable, Iterator

import pytest
from PIL import Image

from ftwt_jax.data import load_dataset
from ftwt_jax.data.source import Dataset
from ftwt_jax.errors import UserError

GARBAGE = b"This is not an image."
SPLITS = ("train", "val")
CLASSES = ("ant", "bee")


def write_image(path: pathlib.Path, shade: int = 0, side: int = 8) -> pathlib.Path:
    """An image of one shade, which every format nearly preserves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (shade, shade, shade)).save(path)
    return path


def write_tree(root: pathlib.Path, classes: Iterable[str] = CLASSES, each: int = 3, first: int = 0) -> pathlib.Path:
    """`each` images per class, their shades counting up from `first` in the order of the classes."""
    for place, name in enumerate(classes):
        for index in range(each):
            write_image(root / name / f"{index:03}.png", first + place * each + index)
    return root


def write_splits(root: pathlib.Path, splits: Iterable[str] = SPLITS, each: int = 3) -> pathlib.Path:
    for split in splits:
        write_tree(root / split, each=each)
    return root


def load(root: pathlib.Path, **options) -> Dataset:
    return load_dataset(f"folder:{root}", **{"image_size": 8} | options)


def refused(root: pathlib.Path | str, **options) -> str:
    """The one line of the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError) as caught:
            load_dataset(f"folder:{root}", **{"image_size": 8} | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(source, root: pathlib.Path) -> list[tuple[str, int]]:
    """Path below `root` and label of every image in a split."""
    examples = [source[index] for index in range(len(source))]
    return [(pathlib.Path(e["name"]).relative_to(root).as_posix(), int(e["label"])) for e in examples]


@contextlib.contextmanager
def warned_of_images(root: pathlib.Path) -> Iterator[list[str]]:
    """Collects warnings about undecodable images below `root`; threads of other tests may warn too."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [text for warning in caught if "cannot be decoded" in (text := str(warning.message)) and str(root) in text]


def spoil(root: pathlib.Path, names: Iterable[str]) -> None:
    for name in names:
        (root / name).write_bytes(GARBAGE)
