"""Decoding of image files: JPEG by libjpeg-turbo, at a reduced scale where that is enough; others by Pillow.

Images that would take too much memory are refused. The libraries are loaded when the first image needs them: sets that
are arrays already do without.
"""

import contextlib
import functools
import io
import os
import pathlib
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ftwt_jax.errors import one_line

if TYPE_CHECKING:
    from PIL import Image

GREY = 1
# Extensions of the files that are read, and Pillow's names of the formats. It knows others, some of which run external
# programs.
EXTENSIONS = {
    **dict.fromkeys((".jpg", ".jpeg"), "JPEG"),
    ".png": "PNG",
    ".webp": "WEBP",
    **dict.fromkeys((".jpe", ".jfif"), "JPEG"),
    ".gif": "GIF",
    ".bmp": "BMP",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    ".avif": "AVIF",
}
FORMATS = tuple(dict.fromkeys(EXTENSIONS.values()))
# Formats that Pillow may have been built without, by their names in `PIL.features`.
OPTIONAL = {"WEBP": "webp", "AVIF": "avif"}
# Most pixels of an image that are decoded at once: at more, Pillow suspects an attack.
MAX_PIXELS = 178_956_970
# MPO: a JPEG with several images, as some cameras write it; the first one is used.
JPEGS = ("JPEG", "MPO")
# Reductions at which libjpeg-turbo decodes faster.
REDUCTIONS = (8, 4, 2)
# EXIF orientation: (quarter turns counter-clockwise, then mirrored left to right).
_ORIENTATIONS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_opening = threading.Lock()


@functools.cache
def opencv() -> Any:
    """OpenCV, on one thread: several images are processed in parallel already."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


def is_readable(name: str) -> bool:
    """Whether files with the extension of this name are read, so far as Pillow was built for it."""
    return _can_decode(EXTENSIONS.get(os.path.splitext(name)[1].lower()))


@functools.cache
def _can_decode(form: str | None) -> bool:
    if form not in OPTIONAL:
        return form is not None
    from PIL import features

    return OPTIONAL[form] in features.get_supported()


class BrokenImageError(Exception):
    """An image that cannot be decoded; the message says why."""


class LazyImage:
    """An upright image: its size is known at once, its pixels are decoded when they are needed.

    Args:
      image: uint8 [H, W, channels], the bytes of a file, or its path.
      channels: 1 for grey, 3 for RGB; the file is converted to it, and transparency dropped.
      max_pixels: an image of more is refused; a JPEG only if what is left of it at its reduced scale has more.

    Raises:
      BrokenImageError: this is not an image, or it is too large.
    """

    def __init__(self, image: np.ndarray | bytes | pathlib.Path, channels: int, max_pixels: int = MAX_PIXELS):
        self._channels, self._turns, self._mirrored = channels, 0, False
        self._max_pixels = max_pixels
        self._encoded: bytes | None = None
        self._pixels: np.ndarray | None = None
        if isinstance(image, np.ndarray):
            self._pixels = image
            height, width = image.shape[:2]
        else:
            from PIL import ExifTags

            try:
                if isinstance(image, pathlib.Path):
                    image = image.read_bytes()
                header = _open(image)
                if header.format in JPEGS and header.mode in ("L", "RGB"):
                    # Decoded later, at the size that is needed by then.
                    orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
                    self._turns, self._mirrored = _ORIENTATIONS.get(orientation, (0, False))
                    self._encoded = image
                    width, height = header.size
                else:
                    self._check_size(*header.size)
                    self._pixels = _by_pillow(header, channels)
                    height, width = self._pixels.shape[:2]
            except BrokenImageError:
                raise
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
          BrokenImageError: the file is truncated or damaged, or the image is too large.
        """
        if self._encoded is None:
            assert self._pixels is not None
            return self._pixels
        import simplejpeg

        height, width = (-(-side // reduction) for side in self._stored)
        self._check_size(width, height)
        try:
            try:
                kind = "GRAY" if self._channels == GREY else "RGB"
                pixels = simplejpeg.decode_jpeg(
                    self._encoded, kind, fastupsample=fast, min_height=height, min_width=width
                )
            except ValueError:
                # Pillow accepts some files that strict decoding refuses.
                header = _open(self._encoded)
                if header.width * header.height > self._max_pixels:
                    header.draft(None, (width, height))
                pixels = _to_array(header, self._channels)
        except Exception as error:
            raise BrokenImageError(_reason(error)) from None
        pixels = np.rot90(pixels, self._turns)
        return pixels[:, ::-1] if self._mirrored else pixels

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise BrokenImageError(
                f"{width}x{height} pixels are more than config.data.max_pixels={self._max_pixels}: raise it where "
                "memory allows, or make the image smaller"
            )


def _open(image: bytes) -> "Image.Image":
    """Pillow's image of a file, whose pixels are not decoded yet."""
    from PIL import Image

    try:
        return Image.open(io.BytesIO(image), formats=FORMATS)
    except Image.DecompressionBombError:
        # Pillow looks at the size of the file; what counts here is the size at which it is decoded.
        with _opening:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(io.BytesIO(image), formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def _by_pillow(image: "Image.Image", channels: int) -> np.ndarray:
    from PIL import ImageOps

    image.load()
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("its pixels are 32-bit numbers, of which black and white are not known: save it with 8 or 16")
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
