"""Images that lie together in one folder, as in ImageNet's `val/`: sorted by class from a file of annotations."""

import errno
import os
import pathlib
import shlex
import shutil
from collections.abc import Mapping

from rich.console import Console

from ftwt_jax.data.annotations import read_classes
from ftwt_jax.data.class_folders import Classes, LeftOut, find_classes, first_of, natural_key, with_images
from ftwt_jax.errors import UserError, printable
from ftwt_jax.files import folder_written_whole
from ftwt_jax.printing import say

# What is added to the folder's name for the sorted one.
SORTED = "_by_class"
# A folder that stands for no class.
PLAIN = {"images", "image", "imgs", "img", "jpegimages"}
# Splits that are looked for in a folder that also holds `train/`.
_USUAL = ("val", "test", "validation")
_ANNOTATIONS = (".txt", ".csv", ".tsv")


def flat_images(folder: pathlib.Path, classes: Classes, left_out: LeftOut) -> list[str]:
    """The images of a folder that does not sort them by class, in order of path; empty if it does, or has none."""
    names = with_images(classes)
    if any(name.lower() not in PLAIN for name in names):
        return []
    loose = [path for path in left_out.loose if os.path.dirname(path) == str(folder)]
    return sorted([*loose, *(path for name in names for path in classes[name])])


def how_to_sort(folder: pathlib.Path) -> str:
    """What is wrong with a flat folder, and the remedy."""
    done = folder.with_name(folder.name + SORTED)
    if done.is_dir():
        remedy = f"set config.data.test_split={done.name}, where they are sorted"
    else:
        file = "" if _annotations(folder) else " --annotations=FILE"
        command = f"`python -m ftwt_jax prepare folder:{shlex.quote(printable(str(folder)))}{file}`"
        remedy = f"{command} sorts them into a new folder" + (", by a file that tells their classes" if file else "")
    return f"{printable(str(folder))} holds images that are not in a folder per class: {remedy}"


def _annotations(folder: pathlib.Path) -> pathlib.Path | None:
    """The file beside the images that can only be that of their classes."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in _ANNOTATIONS and path.is_file()]
    return found[0] if len(found) == 1 else None


def sort_by_class(
    place: str, annotations: str | None, numbers: str | None, out: str | None, console: Console
) -> pathlib.Path:
    """Links the images of a flat folder, or copies them where links cannot be made, into a new folder by class.

    Args:
      place: the flat folder, or one that holds it as `val/` or `test/`; classes are then those of its `train/`.
      annotations: a file with a name and its class on each line, as in Tiny ImageNet's `val_annotations.txt`, or in
        the columns that its first line names so; or a class on each line, in order of the images' names, as in
        ImageNet's ground truth. None: the one beside the images.
      numbers: a file with the class of each number, where `annotations` gives numbers: a class on each line, from the
        first number; or class and number on each line; or ImageNet's `meta.mat`.
      out: the new folder; None: beside the flat one, with `_by_class` added to its name.

    Raises:
      UserError: nothing to sort, annotations that do not fit, or a folder that is there already; nothing is written.
    """
    folder, images = _find(pathlib.Path(place).expanduser().absolute())
    file = pathlib.Path(annotations).expanduser() if annotations else _annotations(folder)
    if file is None:
        raise UserError(f"--annotations is missing: a file that tells the class of each image in {folder}")
    target = pathlib.Path(out).expanduser().absolute() if out else folder.with_name(folder.name + SORTED)
    if target.exists():
        raise UserError(f"{target} already exists: choose another folder with --out")
    train = next((path for path in (folder.parent / "train", folder.parent / "training") if path.is_dir()), None)
    known = with_images(find_classes(train, LeftOut(train))) if train else []
    found = read_classes(file, images, known, numbers, console)
    strange = sorted({*found.values()} - {*known}) if known else []
    if strange:
        raise UserError(f"{file} names classes that {train} does not have: {first_of(map(printable, strange))}")
    copied = _write(target, found)
    missing = [path for path in images if path not in found]
    if missing:
        say(console, f"not in {file}, and left out: {len(missing)} images ({first_of(map(os.path.basename, missing))})")
    how = f"{copied} of them copied, which takes space" if copied else "by links, which take no space"
    names = sorted({*found.values()}, key=natural_key)
    say(
        console,
        f"{len(found)} images of {len(names)} classes ({first_of(map(printable, names))}) sorted into {target}, {how}",
    )
    if train:
        within = target.name if target.parent == train.parent else str(target)
        data = f"--config.data.name=folder:{shlex.quote(str(train.parent))}"
        data += f" --config.data.test_split={shlex.quote(within)}"
        say(console, f"next: python -m ftwt_jax train --config=folder {data} --workdir=DIR")
    return target


def _find(root: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """The flat folder that a path means, and its images."""
    for folder in (root, *(root / name for name in _USUAL)):
        if folder.is_dir():
            left_out = LeftOut(folder)
            images = flat_images(folder, find_classes(folder, left_out), left_out)
            if images:
                return folder, images
    raise UserError(
        f"nothing to sort in {printable(str(root))}: it should hold images, or a folder {' or '.join(_USUAL)} with "
        "images, that are not in a folder per class"
    )


def _write(target: pathlib.Path, found: Mapping[str, str]) -> int:
    """Makes the folder, whole or not at all; returns how many images had to be copied."""
    copied = 0
    with folder_written_whole(target) as partial:
        for image, name in found.items():
            (partial / name).mkdir(exist_ok=True)
            copied += _link(image, partial / name / os.path.basename(image))
    return copied


def _link(source: str, target: pathlib.Path) -> bool:
    """Links a file, or copies it where that cannot be, as between file systems; returns whether it was copied."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES, errno.ENOSYS):
            raise
        shutil.copyfile(source, target)
        return True
    return False
