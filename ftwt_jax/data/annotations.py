"""Files that tell the classes of images: a name and its class on each line, in whatever columns, or a class alone."""

import codecs
import csv
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from rich.console import Console

from ftwt_jax.data.class_folders import first_of, natural_key
from ftwt_jax.errors import UserError, listed, os_reason, printable
from ftwt_jax.files import as_text
from ftwt_jax.printing import say

# A class with boxes in the image, each of four numbers: "n01751748 156 48 272 332 n01751748 42 9 322 285".
_BOXES = re.compile(r"(\S+)(?:\s+-?[\d.]+){4}(?:\s+\1(?:\s+-?[\d.]+){4})*")
# What a column of classes is called, without blanks and underscores.
_TITLES = re.compile(r"(class|label|category)(es|s)?(name)?|target|breed|species|predictionstring")


def read_classes(
    file: pathlib.Path, images: Sequence[str], known: Sequence[str], numbers: str | None, console: Console
) -> dict[str, str]:
    """The class of each image that a file tells, by path.

    Args:
      images: their paths, in order.
      known: the classes that there are; empty if any may be.
      numbers: a file with the class of each number, where `file` gives numbers.

    Raises:
      UserError: the file cannot be read or does not tell the classes, or one image has two, or all have the same.
    """
    found = _read(file, images, known, console)
    classes = {*found.values()}
    if all(name.isdecimal() for name in classes) and (numbers or (known and not classes <= {*known})):
        found = _renamed(found, numbers, known, file, console)
    for path, name in found.items():
        if name in ("", ".", "..") or "/" in name:
            raise UserError(
                f"{file} gives {printable(os.path.basename(path))} a class {name!r}, which cannot be a folder"
            )
    classes = {*found.values()}
    if len(classes) == 1:
        raise UserError(f"{file} gives every image the class {next(iter(classes))!r}: at least two are needed")
    return found


def _lines(file: pathlib.Path) -> list[str]:
    try:
        content = file.read_bytes()
        # Spreadsheets write both.
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {file}: {os_reason(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {file}: it is not text in UTF-8; save it as that") from None
    return [line for line in text.splitlines() if line.strip()]


def _read(file: pathlib.Path, images: Sequence[str], known: Sequence[str], console: Console) -> dict[str, str]:
    lines = _lines(file)
    # The file may give names without extensions.
    names, stems = ({as_text(cut(os.path.basename(path))): path for path in images} for cut in (str, _stem))
    if len(names) < len(images):
        raise UserError(f"two images in {os.path.commonpath(images)} have the same name: their classes cannot be told")
    paths = names if len(stems) < len(images) else {**stems, **names}

    def image(field: str, paths: Mapping[str, str] = paths) -> str | None:
        return paths.get(as_text(os.path.basename(field.strip())))

    rows = [row for row in map(_fields, lines) if len(row) > 1]
    # A number may be a class or an index, and an image's name without its extension too: whole names tell more.
    columns = (
        [index for row in rows for index, field in enumerate(row) if image(field, known_by)]
        for known_by in (names, paths)
    )
    where = next(filter(None, columns), None)
    if where is None:
        return _in_order(file, lines, images, known)
    place = max(sorted({*where}), key=where.count)
    pairs = [(image(row[place]) if place < len(row) else None, row) for row in rows]
    header = None if pairs[0][0] else rows[0]
    at = _class_column(file, header, [row for path, row in pairs if path], place, known)
    found: dict[str, str] = {}
    for path, row in pairs:
        if path and at < len(row) and found.setdefault(path, _class(row[at], known)) != _class(row[at], known):
            raise UserError(f"{file} gives {os.path.basename(path)} two classes")
    strange = len(lines) - sum(path is not None for path, _ in pairs) - (header is not None)
    if strange:
        say(console, f"lines of {file} with the name of no image there: {strange}")
    return found


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _fields(line: str) -> list[str]:
    """The columns of a line: separated by tabs, commas, semicolons or, if there are two, by blanks."""
    if "\t" in line:
        return line.split("\t")
    separator = next((each for each in ",;" if each in line), None)
    return next(csv.reader([line], delimiter=separator)) if separator else line.split(maxsplit=1)


def _class_column(
    file: pathlib.Path, header: Sequence[str] | None, rows: Sequence[Sequence[str]], place: int, known: Sequence[str]
) -> int:
    """The column of the classes, beside that of the images' names."""
    count = max(map(len, rows))
    others = [index for index in range(count) if index != place]
    if len(others) == 1:
        return others[0]
    titles = [re.sub(r"[\s_]", "", title).lower() for title in header or ()]
    fits = [index for index in others if index < len(titles) and _TITLES.fullmatch(titles[index])]
    if not fits:
        columns = {index: {_class(row[index], known) for row in rows if index < len(row)} for index in others}
        fits = [index for index in others if known and columns[index] <= {*known}]
        # As in Tiny ImageNet: name, class and a box, without a header.
        if not fits and header is None and place + 1 in others and not all(map(_is_number, columns[place + 1])):
            fits = [place + 1]
    if len(fits) != 1:
        shown = listed([printable(repr(field)) for field in header or rows[0]], 8, rest=", ...")
        raise UserError(
            f"{file} has {count} columns ({shown}), and which one is the class cannot be told: keep two, the image's "
            "name and its class"
        )
    return fits[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _in_order(file: pathlib.Path, lines: Sequence[str], images: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """The classes from a file with one on each line, in order of the images."""
    if len(lines) != len(images):
        where = os.path.commonpath([os.path.dirname(path) for path in images])
        raise UserError(
            f"{file} does not tell the classes: its {len(lines)} lines neither hold the names of images in {where}, "
            f"nor are they as many as these, {len(images)}; write the name of an image and its class on each line"
        )
    if images != sorted(images, key=natural_key):
        raise UserError(
            f"{file} has a class on each line, but the order of the images is not certain: by bytes, or by the numbers "
            "in their names; put the name of the image before each class"
        )
    return dict(zip(images, (_class(line, known) for line in lines), strict=True))


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
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"cannot read the classes of numbers in {path}: {os_reason(error)}") from None
    lines = [line.strip() for line in _lines(path)]
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
