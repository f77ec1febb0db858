"""Decoding of image files: JPEG by libjpeg-turbo, at a reduced scale where that is enough; the rest by Pillow."""

import contextlib
import io
import pathlib

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from ftwt_jax.errors import one_line

GREY = 1
# What may be opened: Pillow knows other formats, some of which run programs of their own.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# A JPEG with several images, as some cameras write it, counts as its first.
JPEGS = ("JPEG", "MPO")
# Scales at which libjpeg-turbo decodes with less work.
REDUCTIONS = (8, 4, 2)
# EXIF orientation: (quarter turns counter-clockwise, then mirrored left to right).
_ORIENTATIONS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class BrokenImageError(Exception):
    """An image that cannot be decoded; the message says why."""


class LazyImage:
    """An image whose size is known, upright, and whose pixels are decoded when they are asked for.

    Args:
      image: uint8 [H, W, channels], the bytes of a file, or its path.
      channels: 1 for grey, 3 for RGB; whatever the file has is converted. Transparency is dropped.

    Raises:
      BrokenImageError: there is no image.
    """

    def __init__(self, image: np.ndarray | bytes | pathlib.Path, channels: int):
        self._channels, self._turns, self._mirrored = channels, 0, False
        self._encoded: bytes | None = None
        self._pixels: np.ndarray | None = None
        if isinstance(image, np.ndarray):
            self._pixels = image
            height, width = image.shape[:2]
        else:
            try:
                if isinstance(image, pathlib.Path):
                    image = image.read_bytes()
                header = Image.open(io.BytesIO(image), formats=FORMATS)
                if header.format in JPEGS and header.mode in ("L", "RGB"):
                    # The pixels wait until it is known how large they must be.
                    orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
                    self._turns, self._mirrored = _ORIENTATIONS.get(orientation, (0, False))
                    self._encoded = image
                    width, height = header.size
                else:
                    self._pixels = _by_pillow(header, channels)
                    height, width = self._pixels.shape[:2]
            except Exception as error:
                # Codecs fail in as many ways as files do.
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
          reduction: 1, 2, 4 or 8: a JPEG may be decoded at this fraction of its size; others come whole.
          fast: spread a JPEG's colours over its pixels the quick way, without smoothing: good enough to train on.

        Raises:
          BrokenImageError: the file is cut off or damaged.
        """
        if self._encoded is None:
            assert self._pixels is not None
            return self._pixels
        height, width = self._stored
        try:
            try:
                kind = "GRAY" if self._channels == GREY else "RGB"
                least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
                pixels = simplejpeg.decode_jpeg(self._encoded, kind, fastupsample=fast, **least)
            except ValueError:
                # What strict decoding refuses may still be whole.
                pixels = _to_array(Image.open(io.BytesIO(self._encoded)), self._channels)
        except Exception as error:
            raise BrokenImageError(_reason(error)) from None
        pixels = np.rot90(pixels, self._turns)
        return pixels[:, ::-1] if self._mirrored else pixels


def _by_pillow(image: Image.Image, channels: int) -> np.ndarray:
    image.load()
    with contextlib.suppress(Exception):  # Damaged EXIF data say nothing of the pixels.
        image = ImageOps.exif_transpose(image)
    return _to_array(image, channels)


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode in _SIXTEEN_BIT:
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert("L" if channels == GREY else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image"
    return one_line(error)
