"""Folders that each hold the images of one class: their names, their order, their files, and what is left out."""

import dataclasses
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ftwt_jax.data.decoding import is_readable
from ftwt_jax.errors import SkippedImageWarning, UserError, listed, printable, unknown_name
from ftwt_jax.files import as_text
from ftwt_jax.parallel.processes import is_first

# What systems and programs leave in folders of images, in lower case; names that begin with a dot are left out as well.
LITTER = {"__macosx", "@eadir", "lost+found", "#recycle", "$recycle.bin", "system volume information"}
LITTER_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini"}
TRAIN_NAMES = {"train", "training"}
HELD_OUT_NAMES = {"val", "valid", "validation", "test", "testing"}
# Orders of classes, and who else sorts like this.
BYTES, NATURAL = "bytes", "natural"
SORTED_BY = {BYTES: "torchvision and TFDS", NATURAL: "timm"}
# Names that a message lists.
SHOWN = 5

# The image files of each class, by path.
Classes = dict[str, list[str]]


def first_of(names: Iterable[str]) -> str:
    """The first of some names, for a message."""
    return listed(list(names), SHOWN, rest=", ...")


@dataclasses.dataclass
class LeftOut:
    """What below a data set's folder is not read as an image of a class, to be told on one line.

    Attributes:
      files: of kinds that are not read, by extension.
      loose: images that are in no class folder.
      litter: hidden folders, and those of other programs.
      empty: class folders without images.
      merged: folders that are not taken for classes, because they are further down.
    """

    root: pathlib.Path
    files: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    loose: list[str] = dataclasses.field(default_factory=list)
    litter: list[str] = dataclasses.field(default_factory=list)
    empty: list[str] = dataclasses.field(default_factory=list)
    merged: list[str] = dataclasses.field(default_factory=list)

    def file(self, path: str) -> None:
        """Notes a file that is in a class folder and not an image."""
        name = os.path.basename(path)
        if not (name.startswith(".") or name.lower() in LITTER_FILES):
            kind = os.path.splitext(name)[1].lower() or "without an extension"
            self.files.setdefault(kind, []).append(path)

    def warn(self) -> None:
        """Warns of all of it at once, in the first process of a run."""
        kinds = sorted(self.files.items(), key=lambda item: -len(item[1]))
        parts = [
            f"files of kinds that are not read: {sum(map(len, self.files.values()))} "
            f"({first_of(f'{len(paths)} {printable(kind)} such as {self._short(paths[0])}' for kind, paths in kinds)})"
            if kinds
            else "",
            f"images in no class folder: {len(self.loose)} ({self._some(self.loose[:1])})" if self.loose else "",
            f"hidden folders and other programs' ({self._some(self.litter)})" if self.litter else "",
            f"class folders without images ({self._some(self.empty)})" if self.empty else "",
        ]
        said = ["left out: " + ", ".join(filter(None, parts))] if any(parts) else []
        if self.merged:
            said.append(f"classes are the upper folders, not those within them ({self._some(self.merged)})")
        if said and is_first():
            warnings.warn(f"{printable(str(self.root))}: {'; '.join(said)}", SkippedImageWarning, stacklevel=2)

    def _short(self, path: str) -> str:
        return printable(os.path.relpath(path, self.root))

    def _some(self, paths: Sequence[str]) -> str:
        return first_of(map(self._short, paths))


def find_classes(folder: pathlib.Path, left_out: LeftOut) -> Classes:
    """The images in each folder right below this one, in order of path; the classes in order of their names' bytes.

    Raises:
      UserError: two folders have the same name, written in two ways, or a class is itself divided into splits.
      OSError: a folder cannot be read.
    """
    classes: Classes = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        broken_link = entry.is_symlink() and not os.path.exists(entry.path)
        if not entry.is_dir() and not (broken_link and not is_readable(entry.name)):
            if is_readable(entry.name) and not entry.name.startswith("."):
                left_out.loose.append(entry.path)
        elif _is_litter(entry.name):
            left_out.litter.append(entry.path)
        else:
            name = as_text(entry.name)
            if name in classes:
                raise UserError(
                    f"{printable(str(folder))} holds two folders {name!r}, which differ only in how Unicode writes it: "
                    "merge them"
                )
            classes[name] = [] if broken_link else _images(entry.path, left_out)
    return classes


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def _images(folder: str, left_out: LeftOut) -> list[str]:
    found: list[str] = []
    below: list[str] = []
    for parent, folders, images in _walk(folder, left_out, _raise):
        if parent == folder:
            _check_undivided(folder, folders)
        found += images
        if images:
            below.append(parent)
    if len(below) > 1 and folder not in below:
        left_out.merged += below
    return found


def find_images(folder: str, left_out: LeftOut, on_error: Callable[[OSError], None]) -> list[str]:
    """The image files in a folder and in all folders within it, in order of path; what is hidden is left out.

    Args:
      left_out: is told of everything else in there.
      on_error: is told why a folder cannot be read; the others still are.
    """
    return [path for _, _, images in _walk(folder, left_out, on_error) for path in images]


def _raise(error: OSError) -> None:
    raise error


def _walk(
    folder: str, left_out: LeftOut, on_error: Callable[[OSError], None]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """A folder and all those within it: its path, the names of the folders in it, and the paths of its images."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=on_error):
        if os.path.realpath(parent) in seen:
            folders.clear()  # A link to a folder above.
            continue
        seen.add(os.path.realpath(parent))
        left_out.litter += [os.path.join(parent, name) for name in folders if _is_litter(name)]
        folders[:] = sorted(name for name in folders if not _is_litter(name))
        images = [name for name in sorted(files) if is_readable(name) and not name.startswith(".")]
        for name in sorted({*files} - {*images}):
            left_out.file(os.path.join(parent, name))
        yield parent, folders, [os.path.join(parent, name) for name in images]


def _check_undivided(folder: str, inner: Sequence[str]) -> None:
    """Raises `UserError` if a class has its own splits, which would be mixed."""
    names = {name.lower(): name for name in inner}
    train, test = ([names[name] for name in sorted(usual & {*names})] for usual in (TRAIN_NAMES, HELD_OUT_NAMES))
    if train and test:
        name = as_text(os.path.basename(folder))
        raise UserError(
            f"{printable(folder)} is divided into {train[0]}/ and {test[0]}/: if it is a class, put the splits above "
            f"it, as in train/{name}/ and val/{name}/; if it is the whole data set, set config.data.name=folder:PATH"
        )


def natural_key(name: str) -> list[Any]:
    """Sorts numbers in names by their value, and capitals among small letters, as timm does."""
    return [int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"(\d+)", name.lower()))]


def put_in_order(names: Sequence[str], order: str | None) -> tuple[list[str], str]:
    """The classes in an order, and a sentence if the two usual ones differ and none was chosen.

    Args:
      names: in order of bytes.
      order: `bytes` or `natural`; None is `bytes`.
    """
    if order not in (None, *SORTED_BY):
        raise unknown_name("config.data.class_order", str(order), SORTED_BY)
    natural = sorted(names, key=natural_key)
    pairs = [(number, *pair) for number, pair in enumerate(zip(names, natural, strict=True)) if pair[0] != pair[1]]
    if order is not None or not pairs:
        return natural if order == NATURAL else list(names), ""
    number, here, there = pairs[0]
    return list(names), (
        f"class {number} is {here!r} in order of bytes, as {SORTED_BY[BYTES]} sort, and {there!r} in natural order, as "
        f"{SORTED_BY[NATURAL]} sorts"
    )


def with_images(classes: Mapping[str, list[str]]) -> list[str]:
    """The names of the classes that have images."""
    return [name for name, images in classes.items() if images]
