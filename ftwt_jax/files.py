"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from ftwt_jax.errors import UserError, os_reason


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary file beside `path` to write to; it is renamed to `path` if all goes well, else removed.

    A reader sees the old file or the new one, never half of one.

    Raises:
      UserError: the operating system refuses, as when the disk is full. What was at `path` is unchanged.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = pathlib.Path(name)
        os.close(handle)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None:  # The caller's own, not the system's.
            raise
        unchanged = "; the previous file is intact" if path.is_file() else ""
        raise UserError(f"cannot write {path}: {os_reason(error)}{unchanged}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
