"""Images for tests, and how Pillow encodes and decodes them."""

import io
from typing import Any

import numpy as np
from hypothesis import settings
from PIL import ExifTags, Image, ImageOps

from ftwt_jax.data.decoding import LazyImage

PROPERTIES = settings(max_examples=100, deadline=None)
ORIENTATIONS = range(1, 9)


def smooth(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards, blue to the upper right: no two corners are alike."""
    down, right = np.mgrid[:height, :width] / np.maximum([height - 1, width - 1], 1)[:, None, None]
    return (255 * np.stack([right, down, (right + 1 - down) / 2], axis=-1)).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str, orientation: int | None = None, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes | np.ndarray, channels: int = 3, reduction: int = 1) -> np.ndarray:
    """The decoded pixels; checks that their size is the announced one."""
    lazy = LazyImage(data, channels)
    height, width = lazy.size
    pixels = lazy.pixels(reduction)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[-1] == channels
    if reduction == 1:
        assert pixels.shape[:2] == (height, width)
    return pixels


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def assert_close(found: np.ndarray, wanted: np.ndarray, most: float, on_average: float) -> None:
    assert found.shape == wanted.shape
    away = np.abs(found.astype(int) - wanted.astype(int))
    assert away.max() <= most
    assert away.mean() <= on_average


def pillow_upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
