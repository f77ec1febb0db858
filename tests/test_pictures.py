"""Pictures of every kind come upright, as uint8 of the wanted channels; damaged ones are refused by one exception.

And what a network is shown of them: random regions to train on, the central one, exactly as Pillow and torchvision cut
it, to be judged by.
"""

import contextlib
import io
import math
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from ftwt_jax.data.pictures import REDUCTIONS, BrokenPictureError, Picture
from ftwt_jax.data.views import AREA, CENTRAL, RATIO, central_view, random_region, random_view

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
    """The pixels, after it was checked that they are what was announced."""
    picture = Picture(data, channels)
    height, width = picture.size
    pixels = picture.pixels(reduction)
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


def palette_picture() -> tuple[Image.Image, np.ndarray]:
    """A picture of 5 colours, and its colours pixel by pixel."""
    colours, indices = noise(1, 5)[0], np.random.default_rng(1).integers(0, 5, (7, 11), np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    return image, colours[indices]


def lossless_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files of every kind that keeps its values, beside the colours that they must give."""
    colour, shades = noise(7, 11), noise(7, 11, seed=1)[..., 0]
    alpha = noise(7, 11, seed=2)[..., :1]
    deep = np.random.default_rng(3).integers(0, 2**16, (7, 11), np.uint16)
    deep_colour = np.random.default_rng(4).integers(0, 2**16, (7, 11, 3), np.uint16)
    bits = shades > 127
    palette, palette_colours = palette_picture()

    def three(values: np.ndarray) -> np.ndarray:
        return np.repeat(values.astype(np.uint8)[..., None], 3, axis=-1)

    rgba, la = np.concatenate([colour, alpha], -1), np.concatenate([shades[..., None], alpha], -1)
    return {
        "png": (encoded(colour, "PNG"), colour),
        "png, grey": (encoded(shades, "PNG"), three(shades)),
        "png, 16-bit grey": (encoded(deep, "PNG"), three(deep >> 8)),
        "png, 16-bit colour": (
            cv2.imencode(".png", deep_colour[..., ::-1])[1].tobytes(),
            (deep_colour >> 8).astype(np.uint8),
        ),
        "png, palette": (encoded(palette, "PNG"), palette_colours),
        "png, palette, one colour clear": (encoded(palette, "PNG", transparency=2), palette_colours),
        "png, palette, colours half clear": (encoded(palette, "PNG", transparency=b"\0\x50\xff"), palette_colours),
        "png, with alpha": (encoded(rgba, "PNG"), colour),
        "png, grey with alpha": (encoded(la, "PNG"), three(shades)),
        "png, 1 bit": (encoded(Image.fromarray(bits), "PNG"), three(bits * 255)),
        "webp": (encoded(colour, "WEBP", lossless=True), colour),
        # Else the encoder is free to change the colours of what nobody sees.
        "webp, with alpha": (encoded(rgba, "WEBP", lossless=True, exact=True), colour),
    }


LOSSLESS = lossless_files()
# Small files to be damaged.
WHOLE = {
    "jpeg": encoded(smooth(37, 53), "JPEG", orientation=6),
    "progressive": encoded(smooth(37, 53), "JPEG", progressive=True),
    "grey": encoded(smooth(37, 53)[..., 0], "JPEG"),
    "cmyk": encoded(Image.fromarray(smooth(37, 53)).convert("CMYK"), "JPEG"),
    "png": encoded(noise(13, 17), "PNG", orientation=6),
    "palette": encoded(Image.fromarray(noise(24, 31)).quantize(16), "PNG"),
    "webp": encoded(noise(13, 17), "WEBP", orientation=6),
    "webp, lossless": encoded(noise(13, 17), "WEBP", lossless=True),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_lossless_file_gives_its_own_values(kind, channels):
    data, colours = LOSSLESS[kind]
    # Equal shares of grey are that grey again, so that one rule holds for both.
    np.testing.assert_array_equal(decoded(data, channels), colours if channels == 3 else grey(colours))


def test_deep_greys_are_scaled_not_clipped_to_white():
    values = np.array([[0, 255, 256, 300, 32768, 65535]], np.uint16)
    assert decoded(encoded(values, "PNG"), 1).ravel().tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:0", "optimize": True}],
    ids=["baseline", "progressive", "full colour", "halved colour"],
)
def test_a_jpeg_gives_nearly_its_own_values(options, channels):
    wanted = smooth(41, 67)
    found = decoded(encoded(wanted, "JPEG", quality=95, **options), channels)
    assert_close(found, wanted if channels == 3 else grey(wanted), most=16, on_average=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_jpeg_is_the_same_grey_in_every_channel(channels):
    wanted = smooth(41, 67)[..., :1]
    found = decoded(encoded(wanted[..., 0], "JPEG", quality=95), channels)
    assert_close(found, np.repeat(wanted, channels, axis=-1), most=6, on_average=1)
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_of_printing_colours_keeps_them(channels):
    colours = np.array([[[200, 30, 40], [20, 180, 60]], [[30, 60, 210], [240, 230, 220]]], np.uint8)
    wanted = colours.repeat(24, axis=0).repeat(24, axis=1)
    found = decoded(encoded(Image.fromarray(wanted).convert("CMYK"), "JPEG", quality=95), channels)
    wanted = wanted if channels == 3 else grey(wanted)
    for rows in (slice(4, 20), slice(28, 44)):
        for columns in (slice(4, 20), slice(28, 44)):
            means = (pixels[rows, columns].mean((0, 1)) for pixels in (found, wanted))
            np.testing.assert_allclose(*means, atol=6)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_comes_upright(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(smooth(34, 53), kind, orientation, **options)
    wanted = np.asarray(pillow_upright(data))
    assert Picture(data, 3).size == wanted.shape[:2]
    most = 4 if kind == "JPEG" else 0
    assert_close(decoded(data), wanted, most, most)
    # Greys of a JPEG are those it holds, not those of its rounded colours.
    assert_close(decoded(data, 1), grey(wanted), most, most)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_reduced_picture_comes_upright_and_its_size_stays_that_of_the_whole(orientation):
    data = encoded(smooth(34, 53), "JPEG", orientation, quality=95)
    wanted = pillow_upright(data)
    picture = Picture(data, 3)
    found = picture.pixels(2)
    assert picture.size == (wanted.height, wanted.width)
    assert found.shape == (-(-wanted.height // 2), -(-wanted.width // 2), 3)
    assert_close(found, np.asarray(wanted.reduce(2)), most=16, on_average=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_note_on_the_orientation_spoils_no_picture(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(smooth(34, 53), kind, exif=b"Exif\0\0no directory", **options)
    np.testing.assert_array_equal(decoded(data), decoded(encoded(smooth(34, 53), kind, **options)))


def test_an_array_is_taken_as_it_is():
    pixels = noise(5, 9)
    for reduction in (1, *REDUCTIONS):
        np.testing.assert_array_equal(decoded(pixels, reduction=reduction), pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_jpeg_that_only_a_strict_decoder_refuses_is_decoded(orientation, channels):
    data = encoded(smooth(34, 53), "JPEG", orientation)
    before, mark, after = data.partition(b"\xff\xdb")
    odd = before + b"\0\0\0" + mark + after
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(odd)
    assert Picture(odd, channels).size == Picture(data, channels).size
    assert_close(decoded(odd, channels), decoded(data, channels), most=4, on_average=1)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"This is no picture.\n" * 40, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"]
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(BrokenPictureError) as caught:
        decoded(data)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def claiming(data: bytes, height: int, width: int) -> bytes:
    """A PNG or JPEG with another size in its header."""
    if data.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_file_that_claims_to_be_vast_is_refused_before_memory_is_taken(kind):
    data = encoded(smooth(9, 13), kind)
    assert claiming(data, 9, 13) == data
    with pytest.raises(BrokenPictureError, match="exceeds limit"):
        decoded(claiming(data, 60_000, 60_000))


def test_a_png_with_a_broken_part_is_refused():
    data = encoded(noise(90, 120), "PNG")
    start = data.rindex(b"IDAT")
    with pytest.raises(BrokenPictureError):
        decoded(data[:start] + b"\1\2\3\4" + data[start + 4 :])


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_cut_off_is_refused(kind, share):
    data = WHOLE[kind]
    for channels in (1, 3):
        with pytest.raises(BrokenPictureError):
            decoded(data[: int(share * len(data))], channels)


def test_a_file_cut_off_is_refused_at_every_scale():
    data = encoded(noise(90, 120), "JPEG")
    for reduction in (1, *REDUCTIONS):
        with pytest.raises(BrokenPictureError):
            Picture(data[: len(data) * 3 // 4], 3).pixels(reduction)


@pytest.mark.parametrize("kind", WHOLE)
def test_garbage_in_the_middle_gives_a_picture_or_the_one_exception(kind):
    data = bytearray(WHOLE[kind])
    data[len(data) // 2 : len(data) // 2 + 20] = b"\xa5" * 20
    with contextlib.suppress(BrokenPictureError):
        assert decoded(bytes(data)).shape == decoded(WHOLE[kind]).shape


@PROPERTIES
@given(
    kind=st.sampled_from(sorted(WHOLE)),
    length=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    channels=st.sampled_from([1, 3]),
    reduction=st.sampled_from([1, *REDUCTIONS]),
)
def test_no_damage_gives_anything_but_a_picture_or_the_one_exception(kind, length, flips, channels, reduction):
    data = bytearray(WHOLE[kind])
    for place, change in flips:
        data[int(place * len(data))] ^= change
    if length is not None:
        data = data[: int(length * len(data))]
    with contextlib.suppress(BrokenPictureError):
        decoded(bytes(data), channels, reduction)
        picture = Picture(bytes(data), channels)
        assert random_view(picture, 8, True, np.random.default_rng(0)).shape == (8, 8, channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(501, 377), (377, 501), (9, 64), (1, 17), (1, 1)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_reduced_jpeg_has_the_side_divided_and_rounded_up(shape, reduction, channels):
    found = decoded(encoded(smooth(*shape), "JPEG"), channels, reduction)
    assert found.shape == (-(-shape[0] // reduction), -(-shape[1] // reduction), channels)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_no_jpeg_comes_whole_at_every_scale(kind):
    data = encoded(smooth(33, 47), kind)
    for reduction in REDUCTIONS:
        np.testing.assert_array_equal(decoded(data, reduction=reduction), decoded(data))


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
    picture = Picture(encoded(smooth(377, 501), "JPEG", orientation), 3)
    for seed in range(40):
        _, _, height, width = random_region(*picture.size, np.random.default_rng(seed))
        random_view(picture, size, True, np.random.default_rng(seed))
        (shape, _) = jpegs_decoded.pop()
        scale = round(377 / shape[0])
        used.add(scale)
        assert shape == (-(-377 // scale), -(-501 // scale), 3)
        assert min(height, width) / scale >= size or scale == 1
        assert min(height, width) / (2 * scale) < size or scale == max(REDUCTIONS)
    assert used == {4, 8}, "these regions have sides from about 100 to 377"


def test_only_training_takes_the_decoder_s_short_cuts(jpegs_decoded):
    picture = Picture(encoded(smooth(377, 501), "JPEG"), 3)
    random_view(picture, 24, True, np.random.default_rng(0))
    central_view(picture, 24)
    (_, training), (_, evaluation) = jpegs_decoded
    assert training["fastdct"]
    assert not evaluation.get("fastdct")
    assert not evaluation.get("fastupsample")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("orientation", [1, 4, 6])
def test_a_random_view_of_a_reduced_picture_is_nearly_that_of_the_whole(orientation, channels):
    data = encoded(smooth(377, 501), "JPEG", orientation, quality=95)
    reduced, whole = Picture(data, channels), Picture(decoded(data, channels), channels)
    for seed in range(20):
        found, wanted = (random_view(p, 24, True, np.random.default_rng(seed)) for p in (reduced, whole))
        # One pixel of an eighth of the picture is a step of 5.4 on this slope, and places are rounded to such pixels.
        assert_close(found, wanted, most=12, on_average=6)


@pytest.mark.parametrize("size", [6, 40, 150])
def test_a_random_view_shows_its_region_and_nothing_else(size):
    pixels = smooth(90, 130)
    for seed in range(20):
        top, left, height, width = random_region(90, 130, np.random.default_rng(seed))
        region = Image.fromarray(pixels[top : top + height, left : left + width])
        # Larger, smaller or much smaller: of a slope, every way of resizing makes the same.
        wanted = np.asarray(region.resize((size, size), Image.Resampling.BILINEAR))
        found = random_view(Picture(encoded(pixels, "PNG"), 3), size, False, np.random.default_rng(seed))
        assert_close(found, wanted, most=6, on_average=1.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_mirroring_is_exact_and_happens_half_the_time(channels):
    picture = Picture(noise(40, 50)[..., :channels], channels)
    mirrored = 0
    for seed in range(400):
        plain, flipped = (random_view(picture, 8, flip, np.random.default_rng(seed)) for flip in (False, True))
        if not np.array_equal(plain, flipped):
            np.testing.assert_array_equal(flipped, plain[:, ::-1])
            mirrored += 1
    # Four standard deviations of 400 throws.
    assert 160 <= mirrored <= 240


@PROPERTIES
@given(height=st.integers(1, 1200), width=st.integers(1, 1200), seed=st.integers(0, 2**32))
def test_a_random_region_has_the_promised_area_and_ratio(height, width, seed):
    # A longer picture has no region of 8 % of its area and a ratio up to 4/3.
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
def test_a_random_region_lies_inside_even_the_longest_picture(height, width, seed, turned):
    shape = (1, width) if turned else (height, 1)
    top, left, h, w = random_region(*shape, np.random.default_rng(seed))
    assert min(h, w) >= 1
    assert 0 <= top <= top + h <= shape[0]
    assert 0 <= left <= left + w <= shape[1]


def test_random_regions_are_of_every_area_ratio_and_place():
    rng = np.random.default_rng(0)
    top, left, height, width = np.asarray([random_region(300, 300, rng) for _ in range(4000)]).T
    shares, ratios = height * width / 300**2, width / height
    assert shares.min() < 0.09
    assert shares.max() > 0.95
    # Uniform, less what does not fit of the largest ones.
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
        picture = Picture(encoded(smooth(*shape), kind, orientation), channels)
        for seed in range(8):
            found = random_view(picture, 16, True, np.random.default_rng(seed))
            assert found.shape == (16, 16, channels)
            assert found.dtype == np.uint8


def reference_central_view(image: Image.Image, size: int, short: int) -> np.ndarray:
    """Torchvision's `Resize(short)` and `CenterCrop(size)` of a Pillow picture."""
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
    found = central_view(Picture(encoded(image, "PNG"), channels), 224)
    assert found.shape == (224, 224, channels)
    np.testing.assert_array_equal(found, reference_central_view(image, 224, 256).reshape(found.shape))


@pytest.mark.parametrize("shape", [(45, 32), (32, 32), (33, 90), (20, 31)])
def test_a_central_view_of_everything_has_the_shorter_side_whole(shape):
    pixels = noise(*shape)
    found = central_view(Picture(pixels, 3), 32, central=1)
    np.testing.assert_array_equal(found, reference_central_view(Image.fromarray(pixels), 32, 32))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_central_view_of_a_large_jpeg_is_nearly_that_of_the_whole(jpegs_decoded, orientation):
    data = encoded(smooth(377, 501), "JPEG", orientation, quality=95)
    found = central_view(Picture(data, 3), 56)
    assert [shape for shape, _ in jpegs_decoded] == [(95, 126, 3)], "a quarter: the shorter side must give 64"
    assert_close(found, reference_central_view(pillow_upright(data), 56, 64), most=8, on_average=2)


def test_a_central_view_of_a_hair_thin_picture_takes_no_more_memory_than_others(monkeypatch):
    """Resized as a whole, a file of 100 bytes, 1x6000 pixels, would fill 4 GiB to yield 224x224."""
    made, resize = [], Image.Image.resize

    def spy(image: Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        made.append(math.prod(size))
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    # At this size the whole, 37x148000, is harmless to try.
    assert central_view(Picture(smooth(1, 4000), 3), 32).shape == (32, 32, 3)
    assert sum(made) <= 4 * round(32 / CENTRAL) ** 2
