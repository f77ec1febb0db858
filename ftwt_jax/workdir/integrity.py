"""Detects damaged checkpoints by a list of their files, written when a checkpoint is complete.

Storage can lose files or truncate them, and Orbax would restore wrong numbers from what is left. A bucket knows size
and CRC-32C of every file itself, so that nothing is read back from there.
"""

import json
import pathlib
import zlib
from typing import Any

from ftwt_jax.files import AnyPath, in_bucket, list_folder, written_whole
from ftwt_jax.workdir.bucket import list_files

LIST = "files.json"
# A checkpoint without a list (the process was killed just before writing it) must at least have these folders.
PARTS = ("network", "dataset")
MISSING = "is missing"
_CHUNK = 1 << 22


def write_list(folder: AnyPath) -> None:
    """Writes size in bytes and checksum of every file of a complete checkpoint into the checkpoint.

    The checksum is a CRC-32, a number; in a bucket it is the CRC-32C of the bucket, a string.
    """
    if isinstance(folder, pathlib.Path):
        listed: dict[str, list[Any]] = {
            name: [path.stat().st_size, _crc(path)] for name, path in _files(folder).items()
        }
    else:
        listed = {name: [*found] for name, found in list_files(folder).items() if name != LIST}
    with written_whole(folder / LIST) as temporary:
        temporary.write_text(json.dumps(listed))


def damage(folder: AnyPath) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is intact. On a file system, reads every file."""
    try:
        listed = {name: (size, crc) for name, (size, crc) in json.loads((folder / LIST).read_text()).items()}
    except FileNotFoundError:
        missing = [part for part in PARTS if not list_folder(folder / part)]
        return f"{missing[0]} {MISSING}" if missing else None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and in_bucket(folder):
            raise  # The bucket cannot be reached.
        return f"{LIST} cannot be read"
    if not isinstance(folder, pathlib.Path):
        return _first_difference(listed, list_files(folder))
    try:
        here = _files(folder)
        sizes = {name: (path.stat().st_size, None) for name, path in here.items()}
        found = _first_difference(listed, sizes)
        # One that was downloaded from a bucket has checksums of another kind.
        changed = (name for name, (_, crc) in listed.items() if not isinstance(crc, str) and _crc(here[name]) != crc)
        return found or next((_changed(name) for name in changed), None)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def _first_difference(listed: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first file that is not as it was listed: name to size and, where it is known, checksum."""
    for name, (size, crc) in listed.items():
        if name not in here:
            return f"{name} {MISSING}"
        found, there = here[name]
        if found != size:
            return f"{name} is {found} bytes long instead of {size}"
        if type(crc) is type(there) and crc != there:
            return _changed(name)
    return None


def _changed(name: str) -> str:
    return f"the contents of {name} have changed"


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    found = ((str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: path for name, path in found if name != LIST and not path.name.startswith(f".{LIST}")}


def _crc(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
