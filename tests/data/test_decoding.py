"""Images of every format come upright, as uint8 of the wanted channels; damaged ones raise one kind of exception."""

import contextlib
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ftwt_jax.data.decoding import REDUCTIONS, BrokenImageError, LazyImage
from ftwt_jax.data.views import central_view, random_view
from tests.helpers.images import (
    ORIENTATIONS,
    PROPERTIES,
    assert_close,
    decoded,
    encoded,
    grey,
    noise,
    pillow_upright,
    smooth,
)


def palette_image() -> tuple[Image.Image, np.ndarray]:
    """An image of 5 colours, and its colours pixel by pixel."""
    colours, indices = noise(1, 5)[0], np.random.default_rng(1).integers(0, 5, (7, 11), np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    return image, colours[indices]


def lossless_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files of every lossless format, and the colours that they must decode to."""
    colour, shades = noise(7, 11), noise(7, 11, seed=1)[..., 0]
    alpha = noise(7, 11, seed=2)[..., :1]
    deep = np.random.default_rng(3).integers(0, 2**16, (7, 11), np.uint16)
    deep_colour = np.random.default_rng(4).integers(0, 2**16, (7, 11, 3), np.uint16)
    bits = shades > 127
    palette, palette_colours = palette_image()

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
        "bmp": (encoded(colour, "BMP"), colour),
        "gif": (encoded(palette, "GIF"), palette_colours),
        "tiff": (encoded(colour, "TIFF"), colour),
        "tiff, compressed": (encoded(colour, "TIFF", compression="tiff_lzw"), colour),
        "tiff, 16-bit grey": (encoded(deep, "TIFF"), three(deep >> 8)),
        "ppm": (encoded(colour, "PPM"), colour),
        # Otherwise the encoder may change the colours of transparent pixels.
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
def test_a_lossless_file_keeps_its_values(kind, channels):
    data, colours = LOSSLESS[kind]
    # The luma of a grey is that grey, so one rule holds for both.
    np.testing.assert_array_equal(decoded(data, channels), colours if channels == 3 else grey(colours))


def test_sixteen_bit_greys_are_scaled_not_clipped_to_white():
    values = np.array([[0, 255, 256, 300, 32768, 65535]], np.uint16)
    assert decoded(encoded(values, "PNG"), 1).ravel().tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:0", "optimize": True}],
    ids=["baseline", "progressive", "full colour", "halved colour"],
)
def test_a_jpeg_nearly_keeps_its_values(options, channels):
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
def test_a_cmyk_jpeg_keeps_its_colours(channels):
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
def test_an_image_comes_upright(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(smooth(34, 53), kind, orientation, **options)
    wanted = np.asarray(pillow_upright(data))
    assert LazyImage(data, 3).size == wanted.shape[:2]
    most = 4 if kind == "JPEG" else 0
    assert_close(decoded(data), wanted, most, most)
    # The greys of a JPEG are its stored luma, not computed from its rounded colours.
    assert_close(decoded(data, 1), grey(wanted), most, most)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_reduced_image_comes_upright_and_reports_its_full_size(orientation):
    data = encoded(smooth(34, 53), "JPEG", orientation, quality=95)
    wanted = pillow_upright(data)
    lazy = LazyImage(data, 3)
    found = lazy.pixels(2)
    assert lazy.size == (wanted.height, wanted.width)
    assert found.shape == (-(-wanted.height // 2), -(-wanted.width // 2), 3)
    assert_close(found, np.asarray(wanted.reduce(2)), most=16, on_average=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_do_not_spoil_an_image(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(smooth(34, 53), kind, exif=b"Exif\0\0no directory", **options)
    np.testing.assert_array_equal(decoded(data), decoded(encoded(smooth(34, 53), kind, **options)))


def test_an_array_is_returned_unchanged():
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
    assert LazyImage(odd, channels).size == LazyImage(data, channels).size
    assert_close(decoded(odd, channels), decoded(data, channels), most=4, on_average=1)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"This is not an image.\n" * 40, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"]
)
def test_what_is_not_an_image_is_refused(data):
    with pytest.raises(BrokenImageError) as caught:
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
def test_a_file_that_claims_a_vast_size_is_refused_before_memory_is_taken(kind):
    data = encoded(smooth(9, 13), kind)
    assert claiming(data, 9, 13) == data
    with pytest.raises(BrokenImageError, match=r"60000x60000 pixels are more than config\.data\.max_pixels=178956970"):
        decoded(claiming(data, 60_000, 60_000))
    assert Image.MAX_IMAGE_PIXELS is not None, "other code's limit is as it was"


def test_the_largest_image_is_counted_at_the_size_at_which_it_is_decoded():
    pixels = smooth(400, 600)
    jpeg, png = encoded(pixels, "JPEG", quality=95), encoded(pixels, "PNG")
    large = LazyImage(jpeg, 3, max_pixels=400 * 600 // 4)
    assert large.size == (400, 600)
    assert_close(large.pixels(2), decoded(jpeg, reduction=2), most=0, on_average=0)
    with pytest.raises(BrokenImageError, match=r"600x400 pixels are more than config\.data\.max_pixels=60000: raise"):
        large.pixels()
    with pytest.raises(BrokenImageError, match="600x400 pixels are more"):
        LazyImage(png, 3, max_pixels=400 * 600 - 1)
    np.testing.assert_array_equal(LazyImage(png, 3, max_pixels=400 * 600).pixels(), pixels)


def test_a_jpeg_beyond_pillows_limit_is_seen_as_one_within_it(monkeypatch):
    jpeg = encoded(smooth(900, 1200), "JPEG", quality=95)
    wanted = central_view(LazyImage(jpeg, 3), 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    np.testing.assert_array_equal(central_view(LazyImage(jpeg, 3, max_pixels=900 * 1200 // 4), 64), wanted)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("mode", ["F", "I"])
def test_a_tiff_whose_numbers_have_no_known_white_is_refused(mode):
    with pytest.raises(BrokenImageError, match="32-bit numbers"):
        decoded(encoded(Image.new(mode, (5, 4)), "TIFF"))


def test_a_png_with_a_broken_part_is_refused():
    data = encoded(noise(90, 120), "PNG")
    start = data.rindex(b"IDAT")
    with pytest.raises(BrokenImageError):
        decoded(data[:start] + b"\1\2\3\4" + data[start + 4 :])


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", WHOLE)
def test_a_truncated_file_is_refused(kind, share):
    data = WHOLE[kind]
    for channels in (1, 3):
        with pytest.raises(BrokenImageError):
            decoded(data[: int(share * len(data))], channels)


def test_a_truncated_file_is_refused_at_every_scale():
    data = encoded(noise(90, 120), "JPEG")
    for reduction in (1, *REDUCTIONS):
        with pytest.raises(BrokenImageError):
            LazyImage(data[: len(data) * 3 // 4], 3).pixels(reduction)


@pytest.mark.parametrize("kind", WHOLE)
def test_garbage_in_the_middle_gives_an_image_or_the_one_exception(kind):
    data = bytearray(WHOLE[kind])
    data[len(data) // 2 : len(data) // 2 + 20] = b"\xa5" * 20
    with contextlib.suppress(BrokenImageError):
        assert decoded(bytes(data)).shape == decoded(WHOLE[kind]).shape


@PROPERTIES
@given(
    kind=st.sampled_from(sorted(WHOLE)),
    length=st.none() | st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    channels=st.sampled_from([1, 3]),
    reduction=st.sampled_from([1, *REDUCTIONS]),
)
def test_any_damage_gives_an_image_or_the_one_exception(kind, length, flips, channels, reduction):
    data = bytearray(WHOLE[kind])
    for place, change in flips:
        data[int(place * len(data))] ^= change
    if length is not None:
        data = data[: int(length * len(data))]
    with contextlib.suppress(BrokenImageError):
        decoded(bytes(data), channels, reduction)
        lazy = LazyImage(bytes(data), channels)
        assert random_view(lazy, 8, True, np.random.default_rng(0)).shape == (8, 8, channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(501, 377), (377, 501), (9, 64), (1, 17), (1, 1)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_reduced_jpeg_has_the_side_divided_and_rounded_up(shape, reduction, channels):
    found = decoded(encoded(smooth(*shape), "JPEG"), channels, reduction)
    assert found.shape == (-(-shape[0] // reduction), -(-shape[1] // reduction), channels)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_come_at_full_size_at_every_scale(kind):
    data = encoded(smooth(33, 47), kind)
    for reduction in REDUCTIONS:
        np.testing.assert_array_equal(decoded(data, reduction=reduction), decoded(data))
