"""Images that cannot be decoded: each is named once and counted, and too many stop the run."""

import threading
import warnings
from collections.abc import Iterable

from ftwt_jax.data.decoding import MAX_PIXELS
from ftwt_jax.errors import SkippedImageWarning, UserError, listed, printable

MOST_SKIPPED = 0.01


class Skipped:
    """The images of one data set that could not be decoded.

    Args:
      total: number of images in all splits; skipping more than 1 % of them is a `UserError`.
      max_pixels: images of more pixels are not decoded, see `LazyImage`.
    """

    def __init__(self, total: int = 0, max_pixels: int = MAX_PIXELS):
        self.max_pixels = max_pixels
        self._total, self._names = total, dict[str, str]()
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the images, in the order in which they were found."""
        return tuple(self._names)

    def summary(self) -> str:
        """Their number, on one line."""
        return f"{len(self._names)} of {self._total} images cannot be decoded and were skipped"

    def merge(self, names: Iterable[str]) -> None:
        """Counts images that other processes have found, and warned about, as well."""
        with self._lock:
            for name in names:
                self._names.setdefault(name, "")

    def add(self, name: str, reason: str) -> None:
        """Counts an image, and warns about it the first time.

        Raises:
          UserError: more than 1 % of all images cannot be decoded.
        """
        name = printable(name)
        with self._lock:
            if name in self._names:
                return
            self._names[name] = reason
            count = len(self._names)
        warnings.warn(f"{name} cannot be decoded and is skipped: {reason}", SkippedImageWarning, stacklevel=2)
        if count > MOST_SKIPPED * self._total:
            raise UserError(
                f"{count} of {self._total} images cannot be decoded, more than {MOST_SKIPPED:.0%}: "
                f"{listed(self.names, 3, rest=', ...')} ({reason}); repair or delete them"
            )
