"""Workdirs in buckets of Google Cloud Storage."""

import functools
import logging
import re
from typing import TYPE_CHECKING, Any

from ftwt_jax.errors import UserError, shortened, storage_errors

if TYPE_CHECKING:
    from etils import epath

SCHEME = "gs://"
_LOGIN = "log in with `gcloud auth application-default login`, and check the name and your rights"


@functools.cache
def open_bucket(address: str) -> "epath.Path":
    """A folder in a bucket, which need not be there; only that the bucket can be read is checked.

    Args:
      address: `gs://BUCKET/FOLDER`.

    Raises:
      UserError: it is no such address, or the bucket cannot be read.
    """
    match = re.fullmatch(rf"{SCHEME}([^/]+)/+([^/].*?)/*", address)
    if match is None or not {".", ".."}.isdisjoint(match[2].split("/")):
        raise UserError(f"{address} is not the address of a folder in a bucket, such as gs://BUCKET/run")
    try:
        import fsspec.config
        import gcsfs  # noqa: F401
        from etils import epath
        from google.cloud import storage
    except ImportError:
        raise UserError(f"reading {address} needs gcsfs: pip install -e '.[gcs]'") from None
    # They would log every refused request, with a traceback, besides raising it.
    for name in ("gcsfs", "google.auth", "google.auth._default"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    # Other processes write there too.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        # As Orbax asks, which wants to know the kind of bucket; and as epath does.
        storage.Client().get_bucket(match[1])
        _file_system().call("GET", "b/{}/o", match[1], prefix=f"{match[2]}/", maxResults=1)
    except storage_errors() as error:
        raise UserError(f"cannot read the bucket of {address}: {shortened(error)}; {_LOGIN}") from None
    return epath.Path(f"{SCHEME}{match[1]}") / match[2]


def list_files(folder: "epath.Path") -> dict[str, tuple[int, str]]:
    """Size in bytes and CRC-32C of all files below a folder, by their names there, as the bucket records them."""
    _, _, start = str(folder).partition(SCHEME)
    found = _file_system().find(str(folder), detail=True)
    return {name.removeprefix(f"{start}/"): (int(entry["size"]), entry["crc32c"]) for name, entry in found.items()}


def _file_system() -> Any:
    """The one that epath uses."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)
