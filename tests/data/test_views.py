"""What a network sees: random regions in training; in evaluation the centre, as Pillow and torchvision crop it."""

import math
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from ftwt_jax.data.decoding import REDUCTIONS, LazyImage
from ftwt_jax.data.views import AREA, CENTRAL, RATIO, central_view, random_region, random_view
from tests.helpers.images import PROPERTIES, assert_close, decoded, encoded, noise, pillow_upright, smooth


@pytest.fixture
def jpegs_decoded(monkeypatch) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Shape and options of every JPEG that is decoded from now on."""
    seen: list[tuple[tuple[int, ...], dict[str, Any]]] = []
    decode = simplejpeg.decode_jpeg

    def spy(*arguments: Any, **options: Any) -> np.ndarray:
        pixels = decode(*arguments, **options)
        seen.append((pixels.shape, options))
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    return seen


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_random_view_decodes_at_the_smallest_scale_that_is_enough(jpegs_decoded, orientation):
    size, used = 24, set()
    lazy = LazyImage(encoded(smooth(377, 501), "JPEG", orientation), 3)
    for seed in range(40):
        _, _, height, width = random_region(*lazy.size, np.random.default_rng(seed))
        random_view(lazy, size, True, np.random.default_rng(seed))
        (shape, _) = jpegs_decoded.pop()
        scale = round(377 / shape[0])
        used.add(scale)
        assert shape == (-(-377 // scale), -(-501 // scale), 3)
        assert min(height, width) / scale >= size or scale == 1
        assert min(height, width) / (2 * scale) < size or scale == max(REDUCTIONS)
    assert used == {4, 8}, "these regions have sides from about 100 to 377"


def test_only_training_uses_the_decoders_fast_paths(jpegs_decoded):
    lazy = LazyImage(encoded(smooth(377, 501), "JPEG"), 3)
    random_view(lazy, 24, True, np.random.default_rng(0))
    central_view(lazy, 24)
    (_, training), (_, evaluation) = jpegs_decoded
    assert training["fastupsample"]
    assert not evaluation.get("fastupsample")
    assert not any(options.get("fastdct") for options in (training, evaluation)), "it would tint what is trained on"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("orientation", [1, 4, 6])
def test_a_random_view_of_a_reduced_image_is_nearly_that_of_the_whole(orientation, channels):
    data = encoded(smooth(377, 501), "JPEG", orientation, quality=95)
    reduced, whole = LazyImage(data, channels), LazyImage(decoded(data, channels), channels)
    for seed in range(20):
        found, wanted = (random_view(p, 24, True, np.random.default_rng(seed)) for p in (reduced, whole))
        # One pixel of an eighth of the image is a step of 5.4 on this slope, and places are rounded to such pixels.
        assert_close(found, wanted, most=12, on_average=6)


@pytest.mark.parametrize("size", [6, 40, 150])
def test_a_random_view_shows_its_region_and_nothing_else(size):
    pixels = smooth(90, 130)
    for seed in range(20):
        top, left, height, width = random_region(90, 130, np.random.default_rng(seed))
        region = Image.fromarray(pixels[top : top + height, left : left + width])
        # Enlarged, reduced or much reduced: every way of resizing keeps a slope.
        wanted = np.asarray(region.resize((size, size), Image.Resampling.BILINEAR))
        found = random_view(LazyImage(encoded(pixels, "PNG"), 3), size, False, np.random.default_rng(seed))
        assert_close(found, wanted, most=6, on_average=1.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_mirroring_is_exact_and_happens_half_the_time(channels):
    lazy = LazyImage(noise(40, 50)[..., :channels], channels)
    mirrored = 0
    for seed in range(400):
        plain, flipped = (random_view(lazy, 8, flip, np.random.default_rng(seed)) for flip in (False, True))
        if not np.array_equal(plain, flipped):
            np.testing.assert_array_equal(flipped, plain[:, ::-1])
            mirrored += 1
    # Four standard deviations of 400 throws.
    assert 160 <= mirrored <= 240


@PROPERTIES
@given(height=st.integers(1, 1200), width=st.integers(1, 1200), seed=st.integers(0, 2**32))
def test_a_random_region_has_the_promised_area_and_ratio(height, width, seed):
    # A longer image has no region of 8 % of its area and a ratio up to 4/3.
    assume(max(height, width) <= RATIO[1] / AREA[0] * min(height, width))
    top, left, h, w = random_region(height, width, np.random.default_rng(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    # Each side was rounded by at most a half.
    (least_h, most_h), (least_w, most_w) = ((side - 0.5, side + 0.5) for side in (h, w))
    assert most_h * most_w >= AREA[0] * height * width
    assert least_h * least_w <= AREA[1] * height * width
    assert most_w / least_h >= RATIO[0]
    assert least_w / most_h <= RATIO[1]


@PROPERTIES
@given(height=st.integers(1, 600), width=st.integers(1, 600), seed=st.integers(0, 2**32), turned=st.booleans())
def test_a_random_region_lies_inside_even_the_longest_image(height, width, seed, turned):
    shape = (1, width) if turned else (height, 1)
    top, left, h, w = random_region(*shape, np.random.default_rng(seed))
    assert min(h, w) >= 1
    assert 0 <= top <= top + h <= shape[0]
    assert 0 <= left <= left + w <= shape[1]


def test_random_regions_cover_every_area_ratio_and_position():
    rng = np.random.default_rng(0)
    top, left, height, width = np.asarray([random_region(300, 300, rng) for _ in range(4000)]).T
    shares, ratios = height * width / 300**2, width / height
    assert shares.min() < 0.09
    assert shares.max() > 0.95
    # Uniform, except that some of the largest do not fit.
    assert 0.45 < shares.mean() < 0.55
    assert ratios.min() < 0.76
    assert ratios.max() > 1.32
    np.testing.assert_allclose(np.log(ratios).mean(), 0, atol=0.02)
    for before, length in ((top, height), (left, width)):
        after = 300 - before - length
        np.testing.assert_allclose((before - after).mean(), 0, atol=6)
        # Those that fill a side touch both ends anyway.
        movable = length < 200
        assert before[movable].min() == after[movable].min() == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1), (2, 3), (499, 3), (224, 224)])
def test_a_random_view_of_any_shape_has_the_wanted_one(shape, kind, channels):
    for orientation in (1, 5, 7):
        lazy = LazyImage(encoded(smooth(*shape), kind, orientation), channels)
        for seed in range(8):
            found = random_view(lazy, 16, True, np.random.default_rng(seed))
            assert found.shape == (16, 16, channels)
            assert found.dtype == np.uint8


def reference_central_view(image: Image.Image, size: int, short: int) -> np.ndarray:
    """Torchvision's `Resize(short)` and `CenterCrop(size)` of a Pillow image."""
    if image.width <= image.height:
        resized = image.resize((short, int(short * image.height / image.width)), Image.Resampling.BILINEAR)
    else:
        resized = image.resize((int(short * image.width / image.height), short), Image.Resampling.BILINEAR)
    top, left = round((resized.height - size) / 2.0), round((resized.width - size) / 2.0)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [(224, 224), (256, 256), (256, 301), (301, 256), (300, 401), (513, 257), (255, 700), (100, 63), (63, 101), (1, 7)],
)
def test_a_central_view_is_that_of_pillow_and_torchvision_bit_for_bit(shape, channels):
    image = Image.fromarray(noise(*shape)).convert("L" if channels == 1 else "RGB")
    found = central_view(LazyImage(encoded(image, "PNG"), channels), 224)
    assert found.shape == (224, 224, channels)
    np.testing.assert_array_equal(found, reference_central_view(image, 224, 256).reshape(found.shape))


@pytest.mark.parametrize("shape", [(45, 32), (32, 32), (33, 90), (20, 31)])
def test_a_central_view_of_everything_has_the_shorter_side_whole(shape):
    pixels = noise(*shape)
    found = central_view(LazyImage(pixels, 3), 32, central=1)
    np.testing.assert_array_equal(found, reference_central_view(Image.fromarray(pixels), 32, 32))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_central_view_of_a_large_jpeg_is_nearly_that_of_the_whole(jpegs_decoded, orientation):
    data = encoded(smooth(377, 501), "JPEG", orientation, quality=95)
    found = central_view(LazyImage(data, 3), 56)
    assert [shape for shape, _ in jpegs_decoded] == [(189, 251, 3)], "half: the shorter side must give twice 64"
    assert_close(found, reference_central_view(pillow_upright(data), 56, 64), most=8, on_average=2)


def test_a_central_view_of_a_very_thin_image_takes_no_more_memory_than_others(monkeypatch):
    """Resized as a whole, a file of 100 bytes, 1x6000 pixels, would fill 4 GiB to yield 224x224."""
    made, resize = [], Image.Image.resize

    def spy(image: Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        made.append(math.prod(size))
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    # At this size the whole image, 37x148000, would not fill memory.
    assert central_view(LazyImage(smooth(1, 4000), 3), 32).shape == (32, 32, 3)
    assert sum(made) <= 4 * round(32 / CENTRAL) ** 2
