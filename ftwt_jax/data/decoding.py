"""Decoding of image files: JPEG by libjpeg-turbo, at a reduced scale where that is enough; others by Pillow.

The libraries are loaded when the first image needs them: sets that are arrays already do without.
"""

import contextlib
import functools
import io
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ftwt_jax.errors import one_line

if TYPE_CHECKING:
    from PIL import Image

GREY = 1
# Pillow knows other formats, some of which run external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# MPO: a JPEG with several images, as some cameras write it; the first one is used.
JPEGS = ("JPEG", "MPO")
# Reductions at which libjpeg-turbo decodes faster.
REDUCTIONS = (8, 4, 2)
# EXIF orientation: (quarter turns counter-clockwise, then mirrored left to right).
_ORIENTATIONS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


@functools.cache
def opencv() -> Any:
    """OpenCV, on one thread: several images are processed in parallel already."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


class BrokenImageError(Exception):
    """An image that cannot be decoded; the message says why."""


class LazyImage:
    """An upright image: its size is known at once, its pixels are decoded when they are needed.

    Args:
      image: uint8 [H, W, channels], the bytes of a file, or its path.
      channels: 1 for grey, 3 for RGB; the file is converted to it, and transparency dropped.

    Raises:
      BrokenImageError: this is not an image.
    """

    def __init__(self, image: np.ndarray | bytes | pathlib.Path, channels: int):
        self._channels, self._turns, self._mirrored = channels, 0, False
        self._encoded: bytes | None = None
        self._pixels: np.ndarray | None = None
        if isinstance(image, np.ndarray):
            self._pixels = image
            height, width = image.shape[:2]
        else:
            from PIL import ExifTags, Image

            try:
                if isinstance(image, pathlib.Path):
                    image = image.read_bytes()
                header = Image.open(io.BytesIO(image), formats=FORMATS)
                if header.format in JPEGS and header.mode in ("L", "RGB"):
                    # Decoded later, at the size that is needed by then.
                    orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
                    self._turns, self._mirrored = _ORIENTATIONS.get(orientation, (0, False))
                    self._encoded = image
                    width, height = header.size
                else:
                    self._pixels = _by_pillow(header, channels)
                    height, width = self._pixels.shape[:2]
            except Exception as error:
                # Decoders raise many kinds of errors on broken files.
                raise BrokenImageError(_reason(error)) from None
        self._stored = height, width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self._stored
        return (width, height) if self._turns % 2 else (height, width)

    def pixels(self, reduction: int = 1, fast: bool = False) -> np.ndarray:
        """The image, uint8 [H, W, channels].

        Args:
          reduction: 1, 2, 4 or 8: a JPEG may be decoded at 1 / `reduction` of its size; other formats are not reduced.
          fast: upsample a JPEG's colours without smoothing, which is good enough for training.

        Raises:
          BrokenImageError: the file is truncated or damaged.
        """
        if self._encoded is None:
            assert self._pixels is not None
            return self._pixels
        import simplejpeg
        from PIL import Image

        height, width = self._stored
        try:
            try:
                kind = "GRAY" if self._channels == GREY else "RGB"
                least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
                pixels = simplejpeg.decode_jpeg(self._encoded, kind, fastupsample=fast, **least)
            except ValueError:
                # Pillow accepts some files that strict decoding refuses.
                pixels = _to_array(Image.open(io.BytesIO(self._encoded)), self._channels)
        except Exception as error:
            raise BrokenImageError(_reason(error)) from None
        pixels = np.rot90(pixels, self._turns)
        return pixels[:, ::-1] if self._mirrored else pixels


def _by_pillow(image: "Image.Image", channels: int) -> np.ndarray:
    from PIL import ImageOps

    image.load()
    with contextlib.suppress(Exception):  # Damaged EXIF data do not make the pixels unusable.
        image = ImageOps.exif_transpose(image)
    return _to_array(image, channels)


def _to_array(image: "Image.Image", channels: int) -> np.ndarray:
    from PIL import Image

    if image.mode in _SIXTEEN_BIT:
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert("L" if channels == GREY else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _reason(error: Exception) -> str:
    from PIL import Image

    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    return one_line(error)
