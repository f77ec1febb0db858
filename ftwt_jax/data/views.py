"""The part of an image of any size that a network sees: a random region in training, the centre in evaluation."""

import math

import numpy as np

from ftwt_jax.data.decoding import REDUCTIONS, LazyImage, opencv

# Ranges of the region's share of the area and of its width over its height (Szegedy et al. 2015, section 6).
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
ATTEMPTS = 10
# Side of the central crop over the shorter side of the resized image.
CENTRAL = 224 / 256
# An image more than this many times as long as wide is not resized whole.
THIN = 10


def random_region(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a region of random area, aspect ratio and position."""
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # The image is too long for these ratios: take the largest central region that has one.
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _reduction(side: float, wanted: int) -> int:
    """The strongest reduction that leaves `side` no shorter than `wanted`."""
    return next((scale for scale in REDUCTIONS if side / scale >= wanted), 1)


def random_view(image: LazyImage, size: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """A random region of the image, resized to uint8 [size, size, channels] and, with `flip`, mirrored half the time.

    A reduction by more than 2 averages pixels, in the decoder where it can; the rest is linear interpolation, whose two
    taps still read every pixel.
    """
    cv2 = opencv()
    top, left, height, width = random_region(*image.size, rng)
    pixels = image.pixels(_reduction(min(height, width), size), fast=True)
    scale_y, scale_x = (now / before for now, before in zip(pixels.shape[:2], image.size, strict=True))
    rows = slice(int(top * scale_y), max(int((top + height) * scale_y), int(top * scale_y) + 1))
    columns = slice(int(left * scale_x), max(int((left + width) * scale_x), int(left * scale_x) + 1))
    region = pixels[rows, columns]
    shrinks = min(region.shape[:2]) >= 2 * size
    found = cv2.resize(region, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if flip and rng.random() < 0.5:
        found = cv2.flip(found, 1)
    return found.reshape(size, size, -1)


def central_view(image: LazyImage, size: int, central: float = CENTRAL) -> np.ndarray:
    """The centre of the image, its shorter side resized to `size / central`; uint8 [size, size, channels].

    Bilinear and antialiased, as in Pillow and torchvision.
    """
    short = round(size / central)
    height, width = image.size
    rows, columns = (short * side // min(height, width) for side in (height, width))
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    # At twice the wanted side or more, the decoder's reduction makes next to no difference.
    pixels = image.pixels(_reduction(min(height, width), 2 * short))
    if pixels.shape[:2] != (rows, columns):
        from PIL import Image

        resized = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if max(rows, columns) > THIN * short:
            # The whole resized image might exceed memory; resizing only the centre differs in rounding alone.
            scale_y, scale_x = pixels.shape[0] / rows, pixels.shape[1] / columns
            box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
            resized, top, left = resized.resize((size, size), Image.Resampling.BILINEAR, box=box), 0, 0
        else:
            resized = resized.resize((columns, rows), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized).reshape(resized.height, resized.width, -1)
    return pixels[top : top + size, left : left + size]
