"""Image corruptions of five kinds at five severities: noise, blur, contrast, brightness, JPEG.

After Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to Common Corruptions and Perturbations*, ICLR
2019 (arXiv 1903.12261), with the constants of the code that made their sets: those of CIFAR-10-C (`SMALL`) for images
of up to 64x64 pixels, those of ImageNet-C (`LARGE`) for others. Three things differ: values are rounded, not truncated;
results are not stored as JPEG files, which in ImageNet-C compresses every image once more; and the noise is rngn for
each image separately.
"""

import concurrent.futures
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from ftwt_jax.data.decoding import opencv
from ftwt_jax.parallel.processes import cpu_count

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64
# By severity, for values in [0, 1]: standard deviation of the noise; standard deviation of the blur in pixels; share of
# the contrast that is kept; what is added to the brightness; JPEG quality.
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
# The blur's kernel extends this many standard deviations to either side, as in the authors' library.
REACH = 4


def corrupt(image: np.ndarray, corruption: str, severity: int, seed: int, index: int) -> np.ndarray:
    """Corrupts an image.

    Args:
      image: uint8 [H, W, channels], grey or RGB.
      corruption: one of `CORRUPTIONS`.
      severity: 1 to 5.
      seed, index: with the corruption and the severity they determine everything random.

    Returns:
      uint8 [H, W, channels].
    """
    constant = (SMALL if max(image.shape[:2]) <= SMALL_SIDE else LARGE)[corruption][severity - 1]
    if corruption == "jpeg_compression":
        return jpeg_compression(image, int(constant))
    values = image.astype(np.float32) / 255
    if corruption == "gaussian_noise":
        rng = np.random.default_rng([seed, zlib.crc32(corruption.encode()), severity, index])
        values = gaussian_noise(values, constant, rng)
    else:
        values = _DETERMINISTIC[corruption](values, constant)
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def corrupt_batch(images: np.ndarray, corruption: str, severity: int, seed: int, indices: Sequence[int]) -> np.ndarray:
    """`corrupt` for uint8 [B, H, W, channels] with an index for each, on all cores."""
    corrupted, workers = np.empty_like(images), cpu_count()

    def work(part: int) -> None:
        for place in range(part, len(images), workers):
            corrupted[place] = corrupt(images[place], corruption, severity, seed, int(indices[place]))

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work, part) for part in range(workers)]:
            done.result()
    return corrupted


def gaussian_noise(values: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Adds normal noise of this standard deviation to float32 [H, W, channels]."""
    return values + deviation * rng.standard_normal(values.shape, np.float32)


def gaussian_blur(values: np.ndarray, deviation: float) -> np.ndarray:
    """Blurs float32 [H, W, channels] with a Gaussian of this deviation in pixels; edge values continue outwards."""
    side = 2 * int(REACH * deviation + 0.5) + 1
    cv2 = opencv()
    blurred = cv2.GaussianBlur(values, (side, side), deviation, borderType=cv2.BORDER_REPLICATE)
    return blurred.reshape(values.shape)


def contrast(values: np.ndarray, share: float) -> np.ndarray:
    """Keeps this share of each value's distance from the mean of its channel; float32 [H, W, channels]."""
    mean = values.mean((0, 1), keepdims=True)
    return mean + share * (values - mean)


def brightness(values: np.ndarray, added: float) -> np.ndarray:
    """Raises V of HSV by this much, up to 1; hue and saturation stay; float32 [H, W, channels].

    V is the largest of a pixel's channels, so all channels are scaled as V is; black becomes grey.
    """
    before = values.max(-1, keepdims=True)
    after = np.minimum(before + added, 1)
    return np.where(before > 0, values * (after / np.where(before > 0, before, 1)), after)


def jpeg_compression(image: np.ndarray, quality: int) -> np.ndarray:
    """Encodes uint8 [H, W, channels] as JPEG of this quality, colours at half the resolution, and decodes it."""
    cv2 = opencv()
    # OpenCV's order of colours is BGR.
    _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)).reshape(image.shape)[..., ::-1]


_DETERMINISTIC: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "gaussian_blur": gaussian_blur,
    "contrast": contrast,
    "brightness": brightness,
}
