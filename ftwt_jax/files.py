"""Files that appear whole or not at all, on a file system or in a bucket."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from ftwt_jax.errors import UserError, os_reason, storage_errors

if TYPE_CHECKING:
    from etils import epath

# A path of the file system, or one of `workdir.bucket.open_bucket`, which takes the same calls.
AnyPath: TypeAlias = Union[pathlib.Path, "epath.Path"]


def in_bucket(path: AnyPath) -> bool:
    """Whether a path lies in a bucket, where a file is written as a whole and folders exist while files are in them."""
    return not isinstance(path, pathlib.Path)


@contextlib.contextmanager
def written_whole(path: AnyPath) -> Iterator[pathlib.Path]:
    """Yields a temporary file to write to; it becomes `path` if all goes well, else it is removed.

    A reader sees the old file or the new one, never half of one.

    Raises:
      UserError: the operating system or the bucket refuses, as when the disk is full. What was at `path` is unchanged.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=None if in_bucket(path) else path.parent, prefix=f".{path.name}.")
        temporary = pathlib.Path(name)
        os.close(handle)
        yield temporary
        if isinstance(path, pathlib.Path):
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        else:
            path.write_bytes(temporary.read_bytes())
    except storage_errors() as error:
        if isinstance(error, OSError) and error.errno is None and not in_bucket(path):  # The caller's own.
            raise
        unchanged = "; the previous file is intact" if isinstance(path, pathlib.Path) and path.is_file() else ""
        raise UserError(f"cannot write {path}: {os_reason(error)}{unchanged}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_whole(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder to write into; it becomes `folder` if all goes well, else it is removed.

    Raises:
      UserError: the operating system refuses, as when the disk is full.
    """
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {os_reason(error)}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[pathlib.Path]:
    """A file of the file system with the contents of `path`: itself, unless it is in a bucket."""
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        yield copy


def is_utf8(name: str) -> bool:
    """Whether the bytes of a file's name are UTF-8; Python stands in surrogates for others."""
    return not any("\udc80" <= sign <= "\udcff" for sign in name)


def as_text(name: str) -> str:
    """The name of a file as text that is the same on all systems: composed (NFC), bytes that are not UTF-8 escaped."""
    return unicodedata.normalize("NFC", name.encode(errors="backslashreplace").decode())


def list_folder(folder: AnyPath) -> list[Any]:
    """What is in a folder, in order of names; nothing if it is missing."""
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove_folder(folder: AnyPath, ignore_errors: bool = False) -> None:
    """Removes a folder and all that is in it."""
    if isinstance(folder, pathlib.Path):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(*(storage_errors() if ignore_errors else (FileNotFoundError,))):
        folder.rmtree()
