"""Image files that belong to no data set, prepared as the held-out images of one are."""

import concurrent.futures
import os
import pathlib
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftwt_jax.data import other_options
from ftwt_jax.data.class_folders import LeftOut, find_images
from ftwt_jax.data.decoding import MAX_PIXELS, BrokenImageError, LazyImage
from ftwt_jax.data.views import CENTRAL, central_view
from ftwt_jax.errors import os_reason
from ftwt_jax.parallel.processes import cpu_count

# From the path of a file to its image, uint8 [H, W, channels]; raises `BrokenImageError`.
Reader = Callable[[str], np.ndarray]
# Batches that are prepared ahead.
AHEAD = 2


class Place(NamedTuple):
    """The path of an image file, or of a folder that gives none and why."""

    path: str
    error: str = ""


class FileBatch(NamedTuple):
    """Images of some files.

    Attributes:
      images: uint8 [B, H, W, channels]; zeros where there is none, and behind the last.
      errors: for each file, why it could not be read; empty if it was.
    """

    images: np.ndarray
    errors: tuple[str, ...]


def find_files(places: Iterable[str]) -> list[Place]:
    """The files that paths stand for: a folder for all images in it and in the folders within it, in order of path.

    A file need not exist. What is left out of a folder is told by a `SkippedImageWarning`.
    """
    found: list[Place] = []
    for place in places:
        if not os.path.isdir(place):
            found.append(Place(place))
            continue
        left_out, unread = LeftOut(pathlib.Path(place)), list[OSError]()
        images = [Place(path) for path in find_images(place, left_out, unread.append)]
        left_out.warn()
        failed = [Place(str(error.filename), os_reason(error)) for error in unread]
        found += [*images, *failed] or [Place(place, "no images in this folder")]
    return found


def file_reader(options: Mapping[str, Any], image_shape: tuple[int, int, int]) -> Reader:
    """What reads one file as a folder of images would be read for evaluation, in place of the data set.

    Args:
      options: those of `config.data`.
      image_shape: (H, W, channels) of the network's input.
    """
    prepared = other_options(options, "folder:", image_shape)
    central = CENTRAL if prepared["augment"] == "resized_crop" else 1.0
    max_pixels = prepared.get("max_pixels") or MAX_PIXELS

    def read(path: str) -> np.ndarray:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise BrokenImageError("not a regular file")
            encoded = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise BrokenImageError(os_reason(error)) from None
        if not encoded:
            raise BrokenImageError("the file is empty")
        return central_view(LazyImage(encoded, image_shape[-1], max_pixels), image_shape[0], central)

    return read


def file_batches(
    files: Sequence[str], read: Reader, image_shape: tuple[int, int, int], batch_size: int
) -> Iterator[FileBatch]:
    """The images of files in batches of one size, `AHEAD` of them read by threads before they are asked for."""

    def attempt(path: str) -> np.ndarray | str:
        try:
            return read(path)
        except BrokenImageError as error:
            return str(error)

    pool = concurrent.futures.ThreadPoolExecutor(cpu_count())
    waiting: deque[list[concurrent.futures.Future[np.ndarray | str]]] = deque()
    starts = iter(range(0, len(files), batch_size))

    def submit() -> None:
        for start in starts:
            waiting.append([pool.submit(attempt, path) for path in files[start : start + batch_size]])
            return

    try:
        for _ in range(AHEAD):
            submit()
        while waiting:
            submit()
            images = np.zeros((batch_size, *image_shape), np.uint8)
            errors = []
            for place, future in enumerate(waiting.popleft()):
                image = future.result()
                errors.append(image if isinstance(image, str) else "")
                if not isinstance(image, str):
                    images[place] = image
            yield FileBatch(images, tuple(errors))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
