"""Detects damaged checkpoints by a list of their files, written when a checkpoint is complete.

Storage can lose files or truncate them, and Orbax would restore wrong numbers from what is left.
"""

import json
import pathlib
import zlib

from ftwt_jax.files import written_whole

LIST = "files.json"
# A checkpoint without a list (the process was killed just before writing it) must at least have these folders.
PARTS = ("network", "dataset")
MISSING = "is missing"
_CHUNK = 1 << 22


def write_list(folder: pathlib.Path) -> None:
    """Writes the size in bytes and the CRC-32 of every file of a complete checkpoint into the checkpoint."""
    with written_whole(folder / LIST) as temporary:
        temporary.write_text(json.dumps({name: [path.stat().st_size, _crc(path)] for name, path in _files(folder)}))


def damage(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is intact. Reads every file."""
    try:
        listed = {name: (size, crc) for name, (size, crc) in json.loads((folder / LIST).read_text()).items()}
    except FileNotFoundError:
        missing = [part for part in PARTS if not any((folder / part).glob("*"))]
        return f"{missing[0]} {MISSING}" if missing else None
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{LIST} cannot be read"
    try:
        here = dict(_files(folder))
        for name, (size, crc) in listed.items():
            if name not in here:
                return f"{name} {MISSING}"
            found = here[name].stat().st_size
            if found != size:
                return f"{name} is {found} bytes long instead of {size}"
            if _crc(here[name]) != crc:
                return f"the contents of {name} have changed"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def _files(folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    found = ((str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*")) if path.is_file())
    return [(name, path) for name, path in found if name != LIST and not path.name.startswith(f".{LIST}")]


def _crc(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
