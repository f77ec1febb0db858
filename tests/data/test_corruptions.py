"""Corruptions agree with their definitions and with other libraries, whatever batch an image is in."""

import colorsys
import io

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image

from ftwt_jax.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corrupt_batch, gaussian_blur

SIDES = {"CIFAR-10-C": 32, "ImageNet-C": 80}
# As published, by severity.
NOISE = {"CIFAR-10-C": (0.04, 0.06, 0.08, 0.09, 0.10), "ImageNet-C": (0.08, 0.12, 0.18, 0.26, 0.38)}
BLUR = {"CIFAR-10-C": (0.4, 0.6, 0.7, 0.8, 1.0), "ImageNet-C": (1, 2, 3, 4, 6)}
CONTRAST = {"CIFAR-10-C": (0.75, 0.5, 0.4, 0.3, 0.15), "ImageNet-C": (0.4, 0.3, 0.2, 0.1, 0.05)}
BRIGHTNESS = {"CIFAR-10-C": (0.05, 0.1, 0.15, 0.2, 0.3), "ImageNet-C": (0.1, 0.2, 0.3, 0.4, 0.5)}
QUALITY = {"CIFAR-10-C": (80, 65, 58, 50, 40), "ImageNet-C": (25, 18, 15, 10, 7)}

each_set = pytest.mark.parametrize("published", SIDES)
each_kind = pytest.mark.parametrize("channels", [1, 3], ids=["grey", "RGB"])
each_corruption = pytest.mark.parametrize("corruption", CORRUPTIONS)


def photograph(side: int, channels: int, seed: int = 0) -> np.ndarray:
    """Soft shapes that differ between channels, neither black nor white anywhere; uint8 [side, side, channels]."""
    noise = np.random.default_rng(seed).normal(size=(side, side, channels))
    soft = scipy.ndimage.gaussian_filter(noise, (side / 12, side / 12, 0), mode="wrap")
    return np.rint(128 + 40 * np.tanh(soft / soft.std((0, 1)))).astype(np.uint8)


def severities(image: np.ndarray, corruption: str, index: int = 0) -> list[np.ndarray]:
    return [corrupt(image, corruption, severity, seed=0, index=index) for severity in SEVERITIES]


@each_set
@each_kind
def test_noise_has_the_published_deviation(published, channels):
    flat = np.full((SIDES[published], SIDES[published], channels), 128, np.uint8)
    normal = scipy.stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000)
    for severity, deviation in zip(SEVERITIES, NOISE[published], strict=True):
        found = np.stack([corrupt(flat, "gaussian_noise", severity, 0, index) for index in range(20)]) / 255
        expected = (128 / 255 + deviation * normal).clip(0, 1)
        assert found.std() == pytest.approx(expected.std(), rel=0.02)
        assert found.mean() == pytest.approx(expected.mean(), abs=0.005)


def test_noise_is_independent_between_pixels_channels_and_images():
    flat = np.full((64, 64, 3), 128, np.uint8)
    found = np.stack([corrupt(flat, "gaussian_noise", 3, 0, index)[..., c] for index in range(3) for c in range(3)])
    alike = np.corrcoef(found.reshape(9, -1)) - np.eye(9)
    assert np.abs(alike).max() < 0.1
    assert abs(np.corrcoef(found[0, :, 1:].ravel(), found[0, :, :-1].ravel())[0, 1]) < 0.1


@each_set
@each_kind
def test_blur_is_a_gaussian_with_the_edge_repeated(published, channels):
    image = photograph(SIDES[published], channels)
    for found, deviation in zip(severities(image, "gaussian_blur"), BLUR[published], strict=True):
        wanted = scipy.ndimage.gaussian_filter(image / 255.0, (deviation, deviation, 0), mode="nearest", truncate=4)
        assert np.abs(found - wanted * 255).max() < 0.51


@pytest.mark.parametrize("deviation", [*BLUR["CIFAR-10-C"], *BLUR["ImageNet-C"]])
@each_kind
def test_blur_keeps_the_sum_of_the_values(deviation, channels):
    point = np.zeros((65, 65, channels), np.float32)
    point[32, 32] = 1
    np.testing.assert_allclose(gaussian_blur(point, deviation).sum((0, 1)), 1, rtol=1e-5)


@each_set
@each_kind
def test_blur_and_contrast_keep_an_image_of_one_colour(published, channels):
    flat = np.broadcast_to(np.array([7, 130, 251], np.uint8)[:channels], (*[SIDES[published]] * 2, channels)).copy()
    for corruption in ("gaussian_blur", "contrast"):
        for found in severities(flat, corruption):
            np.testing.assert_array_equal(found, flat)


@each_set
@each_kind
def test_contrast_keeps_each_channels_mean_and_scales_its_deviation(published, channels):
    image = photograph(SIDES[published], channels)
    for found, share in zip(severities(image, "contrast"), CONTRAST[published], strict=True):
        np.testing.assert_allclose(found.mean((0, 1)), image.mean((0, 1)), atol=0.3)  # Rounding.
        np.testing.assert_allclose(found.std((0, 1)), share * image.std((0, 1)), atol=0.15)


@each_set
def test_brightness_raises_v_and_leaves_hue_and_saturation(published):
    image = photograph(SIDES[published], 3)
    image[0, :4] = [[0, 0, 0], [255, 255, 255], [250, 10, 130], [1, 0, 0]]
    for found, added in zip(severities(image, "brightness"), BRIGHTNESS[published], strict=True):
        for before, after in zip(image[:2].reshape(-1, 3), found[:2].reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before / 255)
            wanted = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
            assert np.abs(after - 255 * np.array(wanted)).max() < 0.51


@each_set
def test_brightness_is_added_to_grey(published):
    image = photograph(SIDES[published], 1)
    image[0, :2] = [[0], [255]]
    for found, added in zip(severities(image, "brightness"), BRIGHTNESS[published], strict=True):
        assert np.abs(found - (image + 255 * added).clip(0, 255)).max() < 0.51


@each_set
@each_kind
def test_jpeg_is_what_pillow_writes_and_reads(published, channels):
    image = photograph(SIDES[published], channels)
    for found, quality in zip(severities(image, "jpeg_compression"), QUALITY[published], strict=True):
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
        wanted = np.asarray(Image.open(file)).reshape(image.shape)
        # Two builds of one codec.
        assert np.abs(found.astype(int) - wanted).max() <= 2


@each_corruption
@each_set
@each_kind
def test_a_higher_severity_is_further_from_the_clean_image(corruption, published, channels):
    images = [photograph(SIDES[published], channels, seed) for seed in range(8)]
    found = np.array([severities(image, corruption, index) for index, image in enumerate(images)], float)
    distances = np.square(found - np.array(images)[:, None]).mean((0, 2, 3, 4))
    assert (np.diff([0, *distances]) > 0).all(), distances


@each_corruption
@each_kind
@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (20, 65)])
def test_any_shape_is_kept_and_the_input_is_not_changed(corruption, channels, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    before = image.copy()
    for found in severities(image, corruption):
        assert (found.shape, found.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("side", [64, 65])
def test_the_size_decides_between_the_published_constants(side):
    flat = np.full((side, side, 1), 100, np.uint8)
    added = {64: BRIGHTNESS["CIFAR-10-C"], 65: BRIGHTNESS["ImageNet-C"]}[side]
    found = [image[0, 0, 0] for image in severities(flat, "brightness")]
    np.testing.assert_allclose(found, [100 + 255 * value for value in added], atol=0.51)


@each_corruption
def test_an_image_is_corrupted_alike_in_any_batch(corruption):
    images = np.stack([photograph(32, 3, seed) for seed in range(7)])
    whole = corrupt_batch(images, corruption, 3, 5, range(7))
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        part = corrupt_batch(images[start:stop], corruption, 3, 5, range(start, stop))
        np.testing.assert_array_equal(part, whole[start:stop])
    for index in (6, 0):
        np.testing.assert_array_equal(corrupt(images[index], corruption, 3, 5, index), whole[index])


def test_noise_depends_on_seed_severity_and_index():
    image = photograph(32, 3)

    def noise(severity: int, seed: int, index: int) -> np.ndarray:
        deviation = NOISE["CIFAR-10-C"][severity - 1]
        found = corrupt(image, "gaussian_noise", severity, seed, index)
        return (found.astype(float) - image).ravel() / (255 * deviation)

    drawn = np.array([noise(3, 0, 0), noise(3, 0, 1), noise(3, 1, 0), noise(2, 0, 0)])
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.1
