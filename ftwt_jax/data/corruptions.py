"""Images made worse in five ways at five severities: noise, blur, contrast, brightness, JPEG.

After Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to Common Corruptions and Perturbations*, ICLR
2019 (arXiv 1903.12261). How severe a severity is says `SMALL`, the constants of their CIFAR-10-C, for images up to 64
pixels high and wide, and `LARGE`, those of their ImageNet-C, for others; either as in the code from which its authors
made the set. Three things differ. Here a value is rounded where they cut its fraction off. Nothing is kept as a JPEG
file, which in ImageNet-C compresses every image once more. And the noise is drawn for each image by itself.
"""

import concurrent.futures
import zlib
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from ftwt_jax.data.build import threads

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64
# By severity: the deviation of the noise and what is added to the brightness, of values in [0, 1]; the deviation of
# the blur in pixels; the share of the contrast that is kept; the JPEG quality.
SMALL: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "jpeg_compression": (80, 65, 58, 50, 40),
}
LARGE: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "jpeg_compression": (25, 18, 15, 10, 7),
}
CORRUPTIONS = tuple(SMALL)
# How tables call images that are corrupted here, images that are not, and the mean over all corruptions.
APPLIED, CLEAN, ALL = "applied", "clean", "all corruptions"
# How many deviations the kernel of a blur reaches to either side, as in the authors' library.
REACH = 4


def corrupt(image: np.ndarray, corruption: str, severity: int, seed: int, index: int) -> np.ndarray:
    """An image made worse.

    Args:
      image: uint8 [H, W, channels], grey or RGB.
      corruption: one of `CORRUPTIONS`.
      severity: 1 to 5.
      seed, index: what is random follows from them, the corruption and the severity, and from nothing else.

    Returns:
      uint8 [H, W, channels].
    """
    constant = (SMALL if max(image.shape[:2]) <= SMALL_SIDE else LARGE)[corruption][severity - 1]
    if corruption == "jpeg_compression":
        return jpeg_compression(image, int(constant))
    values = image.astype(np.float32) / 255
    if corruption == "gaussian_noise":
        draw = np.random.default_rng([seed, zlib.crc32(corruption.encode()), severity, index])
        values = gaussian_noise(values, constant, draw)
    else:
        values = _PLAIN[corruption](values, constant)
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def corrupt_batch(images: np.ndarray, corruption: str, severity: int, seed: int, indices: Sequence[int]) -> np.ndarray:
    """`corrupt` for uint8 [B, H, W, channels] with an index for each, on all cores."""
    found, workers = np.empty_like(images), threads()

    def work(part: int) -> None:
        for place in range(part, len(images), workers):
            found[place] = corrupt(images[place], corruption, severity, seed, int(indices[place]))

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, part) for part in range(workers)]:
            done.result()
    return found


def gaussian_noise(values: np.ndarray, deviation: float, draw: np.random.Generator) -> np.ndarray:
    """Normal noise of this deviation on every value of float32 [H, W, channels]."""
    return values + deviation * draw.standard_normal(values.shape, np.float32)


def gaussian_blur(values: np.ndarray, deviation: float) -> np.ndarray:
    """Float32 [H, W, channels] under a Gaussian of this deviation in pixels; beyond the edge, the edge's value."""
    side = 2 * int(REACH * deviation + 0.5) + 1
    blurred = cv2.GaussianBlur(values, (side, side), deviation, borderType=cv2.BORDER_REPLICATE)
    return blurred.reshape(values.shape)


def contrast(values: np.ndarray, share: float) -> np.ndarray:
    """Float32 [H, W, channels] with this share of each value's distance from the mean of its channel."""
    mean = values.mean((0, 1), keepdims=True)
    return mean + share * (values - mean)


def brightness(values: np.ndarray, added: float) -> np.ndarray:
    """Float32 [H, W, channels] with this much more of V, up to 1; hue and saturation stay.

    V is the largest of a pixel's channels. Where these two stay, all channels grow as V does; black becomes grey.
    """
    before = values.max(-1, keepdims=True)
    after = np.minimum(before + added, 1)
    return np.where(before > 0, values * (after / np.where(before > 0, before, 1)), after)


def jpeg_compression(image: np.ndarray, quality: int) -> np.ndarray:
    """Uint8 [H, W, channels], stored as JPEG of this quality, colours at half the resolution, and read again."""
    # What OpenCV calls colour is BGR.
    _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)).reshape(image.shape)[..., ::-1]


_PLAIN: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "gaussian_blur": gaussian_blur,
    "contrast": contrast,
    "brightness": brightness,
}
