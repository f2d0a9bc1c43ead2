"""Pictures are stored the way up, and from the layer and the layout, that a browser shows."""

import io
from typing import Any

import numpy as np
import pillow_heif
import pytest
import simplejpeg
from PIL import Image

from tests.pipelines.data import odd_files
from tests.pipelines.data.picture_server import encode
from tests.pipelines.data.shown import Pixels, shown, tiff

# As the workers do: Pillow warns of odd metadata that does not touch the pixels.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

pillow_heif.register_heif_opener(thumbnails=False)


def corners(width: int = 64, height: int = 48) -> Image.Image:
    """Red, green, blue and yellow quarters, in the order of reading."""
    picture = Image.new("RGB", (width, height), (255, 0, 0))
    picture.paste((0, 255, 0), (width // 2, 0, width, height // 2))
    picture.paste((0, 0, 255), (0, height // 2, width // 2, height))
    picture.paste((255, 255, 0), (width // 2, height // 2, width, height))
    return picture


def corner_letters(pixels: Pixels) -> str:
    """The colours in the middle of the quarters, in the order of reading."""
    names = {(255, 0, 0): "R", (0, 255, 0): "G", (0, 0, 255): "B", (255, 255, 0): "Y"}
    height, width, _ = pixels.shape
    found = ""
    for y, x in ((1, 1), (1, 3), (3, 1), (3, 3)):
        colour = pixels[height * y // 4, width * x // 4]
        found += min(names.items(), key=lambda item: float(np.abs(np.array(item[0]) - colour).sum()))[1]
    return found


# What the eight values mean: where the first row and the first column of what is stored belong.
UPRIGHT = ["RGBY", "GRYB", "YBGR", "BYRG", "RBGY", "BRYG", "YGBR", "GYRB"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "HEIF"])
def test_orientation(orientation: int, image_format: str) -> None:
    options: dict[str, Any] = {"compression": "tiff_lzw"} if image_format == "TIFF" else {}
    exif = Image.Exif()
    exif[0x0112] = orientation
    if image_format == "TIFF":
        options["tiffinfo"] = {0x0112: orientation}
    else:
        options["exif"] = exif.tobytes()
    pixels = shown(encode(corners(), image_format, **options))
    assert pixels.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    assert corner_letters(pixels) == UPRIGHT[orientation - 1]


def test_orientation_of_a_png_that_tells_it_after_its_pixels() -> None:
    rows = [row.tobytes() for row in np.asarray(corners())]
    exif = odd_files.chunk(b"eXIf", odd_files.exif(6))
    assert corner_letters(shown(odd_files.png(64, 48, 8, 2, rows, exif))) == UPRIGHT[5]
    assert corner_letters(shown(odd_files.png(64, 48, 8, 2, rows, after=exif))) == UPRIGHT[5]


def test_orientation_in_xmp_and_damaged_exif_are_passed_over() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert corner_letters(shown(encode(corners(), xmp=xmp))) == "RGBY"
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + odd_files.exif(99)):
        assert corner_letters(shown(encode(corners(), exif=exif))) == "RGBY"


def test_picture_is_not_its_thumbnail() -> None:
    thumbnail = encode(Image.new("RGB", (16, 16), "black"))
    pixels = shown(encode(corners(), exif=b"Exif\0\0" + odd_files.exif(3, thumbnail)))
    assert pixels.shape == (48, 64, 3)
    assert corner_letters(pixels) == UPRIGHT[2]


def test_layouts_of_tiff() -> None:
    picture = np.asarray(corners(96, 64))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "TIFF", save_all=True, append_images=[Image.new("RGB", (5, 5))])
    files = {
        "tiles": tiff(picture, photometric="rgb", tile=(32, 32)),
        "tiles, cut off": tiff(picture[:50, :70], photometric="rgb", tile=(32, 32)),
        "strips": tiff(picture, photometric="rgb", rowsperstrip=7),
        "planes": tiff(np.moveaxis(picture, 2, 0), photometric="rgb", planarconfig="separate"),
        "16 bits": tiff(picture.astype(np.uint16) * 257, photometric="rgb"),
        "pages": buffer.getvalue(),
        **{name: encode(Image.fromarray(picture), "TIFF", compression=name) for name in
           ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")},
    }  # fmt: skip
    for name, body in files.items():
        pixels = shown(body)
        assert pixels.shape == ((50, 70, 3) if "cut off" in name else (64, 96, 3)), name
        assert corner_letters(pixels) == "RGBY", name


PALETTE = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 0])


def test_first_frame_of_a_gif_on_white() -> None:
    second = odd_files.gif_frame(0, 0, 8, 8, 2)
    for disposal in range(4):
        first = odd_files.gif_frame(2, 1, 4, 6, 1, disposal=disposal)
        pixels = shown(odd_files.gif((8, 8), first, second, palette=PALETTE))
        wanted = np.full((8, 8, 3), 255)
        wanted[1:7, 2:6] = (0, 255, 0)
        assert np.array_equal(pixels, wanted)
    clear = odd_files.gif_frame(0, 0, 8, 8, 3, clear=3)
    assert (shown(odd_files.gif((8, 8), clear, palette=PALETTE)) == 255).all()


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "AVIF", "HEIF", "MPO"])
def test_first_picture_of_several(image_format: str) -> None:
    options = {"WEBP": {"lossless": True}}.get(image_format, {})
    others = [Image.new("RGB", (64, 48), "black")]
    body = encode(corners(), image_format, save_all=True, append_images=others, **options)
    assert corner_letters(shown(body)) == "RGBY"


def test_animation_is_shown_and_not_what_stands_in_for_it() -> None:
    stand_in = Image.new("RGB", (64, 48), "black")
    body = encode(stand_in, "PNG", save_all=True, append_images=[corners(), stand_in], default_image=True)
    assert corner_letters(shown(body)) == "RGBY"


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_subsampling_of_jpeg(subsampling: str) -> None:
    body = simplejpeg.encode_jpeg(np.ascontiguousarray(corners()), quality=95, colorsubsampling=subsampling)
    assert corner_letters(shown(body)) == "RGBY"


@pytest.mark.parametrize(
    "options",
    [{"progressive": True}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}, {"keep_rgb": True}],
    ids=str,
)
def test_kinds_of_jpeg(options: dict[str, Any]) -> None:
    assert corner_letters(shown(encode(corners(), **options))) == "RGBY"


def test_kinds_of_bmp() -> None:
    rgb = np.asarray(corners(8, 8)).astype(np.uint16)
    bgr, upside_down = rgb[..., ::-1].astype(np.uint8), rgb[::-1].astype(np.uint8)
    short = (rgb[..., 0] >> 3 << 11 | rgb[..., 1] >> 2 << 5 | rgb[..., 2] >> 3).astype("<u2")
    masks = np.array([0xF800, 0x07E0, 0x001F], "<u4").tobytes()
    palette = b"".join(bytes([*colour[::-1], 0]) for colour in np.frombuffer(PALETTE, np.uint8).reshape(4, 3).tolist())
    numbers = np.repeat(np.repeat([[2, 3], [0, 1]], 4, axis=0), 4, axis=1).astype(np.uint8)  # from the bottom up
    runs = b"".join(bytes([4, row[0], 4, row[4], 0, 0]) for row in numbers.tolist()) + b"\0\1"
    files = {
        "24 bits": odd_files.bmp(8, 8, 24, 0, upside_down[..., ::-1].tobytes()),
        "from the top": odd_files.bmp(8, -8, 24, 0, bgr.tobytes()),
        "16 bits with masks": odd_files.bmp(8, 8, 16, 3, short[::-1].tobytes(), masks),
        "8 bits": odd_files.bmp(8, 8, 8, 0, numbers.tobytes(), palette),
        "8 bits in runs": odd_files.bmp(8, 8, 8, 1, runs, palette),
        "4 bits": odd_files.bmp(8, 8, 4, 0, (numbers[:, ::2] << 4 | numbers[:, 1::2]).tobytes(), palette),
    }
    for name, body in files.items():
        assert corner_letters(shown(body)) == "RGBY", name


@pytest.mark.parametrize(("image_format", "options"), [("JPEG2000", {}), ("JPEG2000", {"no_jp2": True}), ("HEIF", {})])
def test_formats_of_cameras_and_films(image_format: str, options: dict[str, Any]) -> None:
    assert corner_letters(shown(encode(corners(), image_format, **options))) == "RGBY"
