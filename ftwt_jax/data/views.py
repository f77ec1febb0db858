"""What a network is shown of an image of any size: a random region to train on, the central one to be judged by."""

import math

import cv2
import numpy as np
from PIL import Image

from ftwt_jax.data.decoding import REDUCTIONS, LazyImage

# The region's share of the area and its width over its height, as in Szegedy et al. 2015 (section 6).
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
ATTEMPTS = 10
# The side that is cut out of the centre over the shorter side of the resized image: 224 of 256.
CENTRAL = 224 / 256
# From this many times as long as wide on, an image is not resized whole.
THIN = 10

cv2.setNumThreads(1)  # Images are dealt with side by side already.


def random_region(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a region of random area, ratio and place, inside the image."""
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # An image too long for these ratios: the largest central region that has one.
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _reduction(side: float, wanted: int) -> int:
    """The strongest reduction that leaves `side` no shorter than `wanted`."""
    return next((scale for scale in REDUCTIONS if side / scale >= wanted), 1)


def random_view(lazy: LazyImage, size: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """A random region of the image, resized to uint8 [size, size, channels] and, with `flip`, mirrored half the time.

    Whatever shrinks by more than 2 is averaged over whole pixels first, by the decoder where it can; the rest is linear
    interpolation, whose two taps still touch every pixel.
    """
    top, left, height, width = random_region(*lazy.size, rng)
    pixels = lazy.pixels(_reduction(min(height, width), size), fast=True)
    scale_y, scale_x = (now / before for now, before in zip(pixels.shape[:2], lazy.size, strict=True))
    rows = slice(int(top * scale_y), max(int((top + height) * scale_y), int(top * scale_y) + 1))
    columns = slice(int(left * scale_x), max(int((left + width) * scale_x), int(left * scale_x) + 1))
    region = pixels[rows, columns]
    shrinks = min(region.shape[:2]) >= 2 * size
    found = cv2.resize(region, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if flip and rng.random() < 0.5:
        found = cv2.flip(found, 1)
    return found.reshape(size, size, -1)


def central_view(lazy: LazyImage, size: int, central: float = CENTRAL) -> np.ndarray:
    """The centre of the image after its shorter side was resized to `size / central`; uint8 [size, size, channels].

    Resized as Pillow does, and torchvision with it: bilinear and antialiased.
    """
    short = round(size / central)
    height, width = lazy.size
    rows, columns = (short * side // min(height, width) for side in (height, width))
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    # At twice the wanted side, what the decoder averages beforehand makes next to no difference.
    pixels = lazy.pixels(_reduction(min(height, width), 2 * short))
    if pixels.shape[:2] != (rows, columns):
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if max(rows, columns) > THIN * short:
            # The whole of it might be larger than memory, and the centre by itself differs in its rounding alone.
            scale_y, scale_x = pixels.shape[0] / rows, pixels.shape[1] / columns
            box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
            image, top, left = image.resize((size, size), Image.Resampling.BILINEAR, box=box), 0, 0
        else:
            image = image.resize((columns, rows), Image.Resampling.BILINEAR)
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
    return pixels[top : top + size, left : left + size]
