"""Pictures of every mode come out upright, in the right colours and on white; bad ones raise the right reason."""

from __future__ import annotations

import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pictures_on_disk import COLOURS, colour_of, encoded, picture
from PIL import Image

from dalle_mini_impl.config import DataConfig
from dalle_mini_impl.data.pictures import PictureError, open_picture, to_rgb, to_square

CONFIG = DataConfig(image_size=16)


def png_header(width: int, height: int) -> bytes:
    """A well-formed PNG of one bit a pixel that claims a size; its pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def through_file(image: Image.Image, form: str = "PNG", **options: object) -> np.ndarray:
    """The RGB pixels of a picture that was saved and opened again."""
    return np.asarray(to_rgb(open_picture(encoded(image, form, **options), CONFIG)))


def quadrants(top_left: int, top_right: int, bottom_left: int, bottom_right: int) -> np.ndarray:
    rows = np.array([[top_left, top_right], [bottom_left, bottom_right]])
    return rows.repeat(16, axis=0).repeat(16, axis=1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_transparent_pixels_become_white_not_black(mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    if mode in ("La", "RGBa"):
        converted = image.convert("LA").convert("La") if mode == "La" else image.convert("RGBa")
    else:
        converted = image.convert(mode)
    pixels = np.asarray(to_rgb(converted))
    assert pixels[8, 4].tolist() == [0, 0, 0]
    assert pixels[8, 28].tolist() == [255, 255, 255]


def test_half_transparent_red_on_white_is_pink() -> None:
    pixels = through_file(Image.new("RGBA", (20, 20), (255, 0, 0, 128)))
    assert pixels[0, 0].tolist() == pytest.approx([255, 127, 127], abs=1)


def test_palettes_with_and_without_transparency() -> None:
    image = picture("red").quantize(4)
    assert colour_of(through_file(image)) == "red"
    two = Image.new("P", (20, 20), 0)
    two.putpalette([9, 9, 9, 200, 30, 20])
    two.paste(1, (10, 0, 20, 20))
    for transparency in (0, b"\x00\xff"):
        pixels = through_file(two, transparency=transparency)
        assert pixels[5, 2].tolist() == [255, 255, 255]
        assert pixels[5, 15].tolist() == [200, 30, 20]


def test_transparent_colour_of_an_rgb_png_becomes_white() -> None:
    pixels = through_file(picture("red"), transparency=COLOURS["red"])
    assert pixels.min() == 255


def test_cmyk_keeps_its_colours() -> None:
    assert colour_of(through_file(picture("red").convert("CMYK"), "JPEG", quality=95)) == "red"


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (32_896, 128), (65_535, 255), (257, 1)])
def test_sixteen_bits_are_scaled_not_clipped_to_white(value: int, expected: int) -> None:
    deep = Image.fromarray(np.full((20, 20), value, dtype=np.uint16))
    assert deep.mode.startswith("I;16")
    assert through_file(deep)[0, 0].tolist() == [expected] * 3
    assert through_file(deep, "TIFF")[0, 0].tolist() == [expected] * 3
    assert np.asarray(to_rgb(deep.convert("I")))[0, 0].tolist() == [expected] * 3


@pytest.mark.parametrize("highest", [1.0, 255.0, 65_535.0])
def test_float_pictures_are_scaled_by_their_range(highest: float) -> None:
    values = np.array([[0.0, highest / 2, highest, float("nan")]], dtype=np.float32).repeat(20, 0).repeat(8, 1)
    pixels = np.asarray(to_rgb(Image.fromarray(values)))
    assert [int(pixels[0, column, 0]) for column in (0, 8, 16, 24)] == pytest.approx([0, 128, 255, 0], abs=1)


def test_one_bit_grey_and_ycbcr() -> None:
    assert np.unique(through_file(Image.fromarray(quadrants(0, 255, 0, 255) > 0))).tolist() == [0, 255]
    assert colour_of(through_file(Image.new("L", (20, 20), 128))) == "grey"
    assert colour_of(to_rgb(picture("blue").convert("YCbCr"))) == "blue"


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_give_their_first_frame(form: str) -> None:
    frames = [picture("blue"), picture("red"), picture("green")]
    pixels = through_file(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    assert colour_of(pixels) == "blue"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.fromarray(quadrants(0, 80, 160, 240).astype(np.uint8)).resize((32, 48), Image.Resampling.NEAREST)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose values that store the picture as each says
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = through_file(stored.convert("RGB"), "JPEG", exif=exif, quality=95)
    assert pixels.shape == (48, 32, 3)
    corners = [int(pixels[y, x, 0]) for y in (4, 43) for x in (4, 27)]
    assert corners == pytest.approx([0, 80, 160, 240], abs=4)


def test_broken_exif_doesnt_cost_the_picture() -> None:
    broken = encoded(picture("green"), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    assert colour_of(to_rgb(open_picture(broken, CONFIG))) == "green"


@pytest.mark.parametrize("data", [b"", b"no picture", encoded(picture("red"), "JPEG")[:-300], png_header(20, 20)])
def test_broken_files_are_unreadable(data: bytes) -> None:
    with pytest.raises(PictureError) as raised:
        open_picture(data, CONFIG)
    assert raised.value.reason == "unreadable"


def test_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="unreadable"):
        open_picture(tmp_path / "none.png", CONFIG)


def test_bombs_are_told_from_the_header_and_pillow_is_left_as_it_was() -> None:
    before, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    bombs = [png_header(20_000, 20_000), png_header(12_000, 10_000), encoded(Image.new("1", (11_000, 10_000)))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in bombs:
            with pytest.raises(PictureError) as raised:
                open_picture(data, CONFIG)
            assert raised.value.reason == "bomb"
    assert before == Image.MAX_IMAGE_PIXELS and filters == list(warnings.filters)


def test_many_threads_leave_pillows_limit_as_it_was() -> None:
    before, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    data = encoded(picture("red"))
    with ThreadPoolExecutor(8) as pool:
        colours = set(pool.map(lambda _: colour_of(to_rgb(open_picture(data, CONFIG))), range(200)))
    assert colours == {"red"}
    assert before == Image.MAX_IMAGE_PIXELS and filters == list(warnings.filters)


def test_limit_above_pillows_own_is_honoured() -> None:
    large = encoded(Image.new("1", (11_000, 10_000), 1))
    config = CONFIG.model_copy(update={"max_megapixels": 120.0})
    assert open_picture(large, config).size == (11_000, 10_000)


def test_tiny_pictures_have_their_own_reason() -> None:
    with pytest.raises(PictureError) as raised:
        open_picture(encoded(picture("red", (15, 200))), CONFIG)
    assert raised.value.reason == "tiny"
    assert open_picture(encoded(picture("red", (16, 200))), CONFIG).size == (16, 200)


def test_squares_by_crop_pad_and_stretch() -> None:
    wide = Image.new("RGB", (96, 32), COLOURS["red"])
    wide.paste(COLOURS["blue"], (32, 0, 64, 32))
    crop, pad, stretch = (to_square(wide, 24, fit) for fit in ("crop", "pad", "stretch"))
    assert crop.shape == pad.shape == stretch.shape == (24, 24, 3) and crop.dtype == np.uint8
    assert colour_of(crop) == "blue"
    assert pad[:8].min() == pad[16:].min() == 255 and colour_of(pad[10:14, 10:14]) == "blue"
    assert colour_of(stretch[:, :6]) == "red" and colour_of(stretch[:, 10:14]) == "blue"
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert colour_of(to_square(tall, 24, "crop")) == "blue"


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    stripes = np.zeros((640, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    shrunk = to_square(Image.fromarray(stripes), 20, "crop")
    assert shrunk.min() > 120 and shrunk.max() < 135
