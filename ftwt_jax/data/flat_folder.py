"""Images that lie together in one folder, as in ImageNet's `val/`: sorted by class from a file of annotations."""

import csv
import errno
import os
import pathlib
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence

from rich.console import Console

from ftwt_jax.data.class_folders import Classes, LeftOut, find_classes, first_of, natural_key, with_images
from ftwt_jax.errors import UserError, os_reason, printable
from ftwt_jax.files import as_text
from ftwt_jax.printing import say

# What is added to the folder's name for the sorted one.
SORTED = "_by_class"
# A folder that stands for no class.
PLAIN = {"images", "image", "imgs", "img", "jpegimages"}
# Splits that are looked for in a folder that also holds `train/`.
_USUAL = ("val", "test", "validation")
_ANNOTATIONS = (".txt", ".csv", ".tsv")
# A class with boxes in the image, each of four numbers: "n01751748 156 48 272 332 n01751748 42 9 322 285".
_BOXES = re.compile(r"(\S+)(?:\s+-?[\d.]+){4}(?:\s+\1(?:\s+-?[\d.]+){4})*")


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
      annotations: a file with a name and its class on each line, as in Tiny ImageNet's `val_annotations.txt`; or a
        class on each line, in order of the images' names, as in ImageNet's ground truth. None: the one beside the
        images.
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
    found = _read(file, images, known, console)
    classes = {*found.values()}
    if all(name.isdecimal() for name in classes) and (numbers or (known and not classes <= {*known})):
        found = _renamed(found, numbers, known, file, console)
    strange = sorted({*found.values()} - {*known}) if known else []
    if strange:
        raise UserError(f"{file} names classes that {train} does not have: {first_of(map(printable, strange))}")
    for name in {*found.values()}:
        if name in ("", ".", "..") or "/" in name:
            raise UserError(f"{file} names a class {name!r}, which cannot be a folder")
    copied = _write(target, found)
    missing = [path for path in images if path not in found]
    if missing:
        say(console, f"not in {file}, and left out: {len(missing)} images ({first_of(map(os.path.basename, missing))})")
    how = f"{copied} of them copied, which takes space" if copied else "by links, which take no space"
    say(console, f"{len(found)} images of {len({*found.values()})} classes sorted into {target}, {how}")
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


def _read(file: pathlib.Path, images: Sequence[str], known: Sequence[str], console: Console) -> dict[str, str]:
    """The class of each image that the file tells, by path."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {os_reason(error)}") from None
    # The file may give names without extensions.
    names = [{as_text(cut(os.path.basename(path))): path for path in images} for cut in (str, _without_extension)]
    if len(names[0]) < len(images):
        raise UserError(f"two images in {os.path.commonpath(images)} have the same name: their classes cannot be told")
    paths = names[0] if len(names[1]) < len(images) else {**names[1], **names[0]}
    found: dict[str, str] = {}
    strange = 0
    for row in map(_fields, lines):
        path = paths.get(as_text(os.path.basename(row[0].strip()))) if len(row) > 1 else None
        if path is None:
            strange += 1
        elif found.setdefault(path, _class(row[1], known)) != _class(row[1], known):
            raise UserError(f"{file} gives {os.path.basename(path)} two classes")
    if found:
        if strange > 1:  # One may be a header.
            say(console, f"lines of {file} that begin with the name of no image there: {strange}")
        return found
    if len(lines) != len(images):
        where = os.path.commonpath([os.path.dirname(path) for path in images])
        raise UserError(
            f"{file} does not tell the classes: its {len(lines)} lines neither begin with the names of images in "
            f"{where}, nor are they as many as these, {len(images)}"
        )
    if images != sorted(images, key=natural_key):
        raise UserError(
            f"{file} has a class on each line, but the order of the images is not certain: by bytes, or by the numbers "
            "in their names; put the name of the image before each class"
        )
    return dict(zip(images, (_class(line, known) for line in lines), strict=True))


def _without_extension(name: str) -> str:
    return os.path.splitext(name)[0]


def _fields(line: str) -> list[str]:
    """Name and class of a line: separated by tabs, by commas or by blanks."""
    if "\t" in line:
        return line.split("\t")
    return next(csv.reader([line])) if "," in line else line.split(maxsplit=1)


def _class(text: str, known: Sequence[str]) -> str:
    name = as_text(text.strip())
    boxes = _BOXES.fullmatch(name)
    return boxes[1] if boxes and name not in known else name


def _renamed(
    found: Mapping[str, str], numbers: str | None, known: Sequence[str], file: pathlib.Path, console: Console
) -> dict[str, str]:
    """The classes that numbers stand for."""
    if numbers is None:
        raise UserError(
            f"{file} gives classes as numbers, whose meaning it does not tell: name a file of the classes in the order "
            "of these numbers with --numbers=FILE (ImageNet's is meta.mat)"
        )
    path = pathlib.Path(numbers).expanduser()
    names = _names_of_numbers(path, {int(number) for number in found.values()}, known)
    first = min(names)
    say(console, f"numbers of {path}: {first} is {names[first]}, {max(names)} is {names[max(names)]}")
    strange = sorted({int(number) for number in found.values()} - {*names})
    if strange:
        raise UserError(f"{path} does not tell what the numbers {first_of(map(str, strange))} stand for")
    return {image: names[int(number)] for image, number in found.items()}


def _names_of_numbers(path: pathlib.Path, used: set[int], known: Sequence[str]) -> dict[int, str]:
    try:
        if path.suffix == ".mat":
            from scipy.io import loadmat

            synsets = loadmat(path, squeeze_me=True)["synsets"]
            return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"cannot read the classes of numbers in {path}: {os_reason(error)}") from None
    names = [as_text(line) if line in known else as_text(line.split()[0]) for line in lines]
    words = [line.split() for line in lines]
    if all(len(row) > 1 and row[1].isdigit() for row in words):
        return {int(row[1]): name for row, name in zip(words, names, strict=True)}
    if 0 in used and len(lines) in used:
        raise UserError(f"{path} has {len(lines)} classes, too few for the numbers 0 to {max(used)}")
    if 0 not in used and len(lines) not in used:
        raise UserError(
            f"whether the numbers begin at 0 or at 1 cannot be told: neither 0 nor {len(lines)} is among them; give "
            f"class and number on each line of {path}"
        )
    return dict(enumerate(names, start=0 if 0 in used else 1))


def _write(target: pathlib.Path, found: Mapping[str, str]) -> int:
    """Makes the folder, whole or not at all; returns how many images had to be copied."""
    copied, partial = 0, None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        for image, name in found.items():
            (partial / name).mkdir(exist_ok=True)
            copied += _link(image, partial / name / os.path.basename(image))
        partial.chmod(0o755)
        partial.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {os_reason(error)}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
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
