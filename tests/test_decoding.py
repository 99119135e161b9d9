"""Images that take much memory or time in Pillow, and those that only claim to."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from samjax.errors import UserError
from samjax.io import decoding, images

HEIGHT, WIDTH = 136, 204


def pattern() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (np.stack([x, y, x * y // 7], -1) % 256).astype(np.uint8)


def ignore(_: str) -> None:
    pass


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_chunks(*chunks: bytes) -> bytes:
    data = saved(Image.fromarray(pattern()), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


# --- TIFF ---

STRIPS = [
    (mode, compression)
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd")
    for mode in ("RGB", "L", "P", "CMYK", "RGBA", "1", "I;16", "F")
    if compression != "jpeg" or mode in ("RGB", "L", "CMYK")
] + [("1", "group4")]


def check_strips(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading in strips gives exactly what reading as a whole does, reduced."""
    whole = images.read_image(path, notify=ignore)
    monkeypatch.setattr(images, "REDUCE_ABOVE", HEIGHT * WIDTH / 4 + 100)
    monkeypatch.setattr(images, "_STRIP_PIXELS", WIDTH * 20)
    with Image.open(path) as image:
        found = decoding.tiff_strips(image, 2, WIDTH * 20)
        assert found is not None
        assert len(list(found[1]())) > 2
    reduced = np.asarray(Image.fromarray(whole).reduce(2))
    np.testing.assert_array_equal(images.read_image(path, notify=ignore), reduced)


@pytest.mark.parametrize(("mode", "compression"), STRIPS)
def test_tiff_strips(tmp_path, monkeypatch, mode, compression):
    if mode == "I;16":
        image = Image.fromarray(pattern()[..., 0].astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(pattern()[..., 0] / np.float32(255))
    else:
        image = Image.fromarray(pattern()).convert(mode)
    image.save(tmp_path / "a.tif", compression=compression, tiffinfo={278: 16, 274: 6})
    check_strips(tmp_path / "a.tif", monkeypatch)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "options",
    [
        {"tile": (32, 48)},
        {"tile": (32, 32), "planarconfig": "separate"},
        {"tile": (64, 64), "compression": "zlib", "predictor": True},
        {"rowsperstrip": 10, "compression": "zlib", "bigtiff": True},
        {"rowsperstrip": 7, "compression": "zlib", "byteorder": ">"},
    ],
)
def test_tiff_tiles_planes_and_orders(tmp_path, monkeypatch, options, dtype):
    array = pattern().astype(dtype) * (257 if dtype == np.uint16 else 1)
    array = np.moveaxis(array, -1, 0) if "planarconfig" in options else array
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", **options)
    check_strips(tmp_path / "a.tif", monkeypatch)


def test_a_tiff_of_one_strip_has_our_limit_only(tmp_path, monkeypatch):
    Image.fromarray(pattern()).save(tmp_path / "a.tif", compression="tiff_lzw", tiffinfo={278: HEIGHT})
    monkeypatch.setattr(images, "REDUCE_ABOVE", 10_000)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 3000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow reads twice as many at most
    assert images.read_image(tmp_path / "a.tif", notify=ignore).shape == (68, 102, 3)
    assert Image.MAX_IMAGE_PIXELS == 10_000


def test_a_strip_that_claims_much_is_not_read(tmp_path, monkeypatch):
    Image.fromarray(pattern()).save(tmp_path / "a.tif", compression="tiff_lzw", tiffinfo={278: 16})
    with Image.open(tmp_path / "a.tif") as image:
        image.tag_v2[279] = (10**9,) * len(image.tag_v2[279])
        _, read = decoding.tiff_strips(image, 1, 5000) or pytest.fail("no strips")
        with pytest.raises(ValueError, match="larger than its pixels"):
            next(read())


# --- sizes ---


def test_small_files_of_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    """Headers that claim 400 million pixels: as grays they need 400 MB, which is permitted; in color 1,600 MB."""
    for kind, name in ((0, "gray.png"), (2, "color.png")):
        header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, kind, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        (tmp_path / name).write_bytes(data)
    for read in (images.image_size, images.read_image):
        with pytest.raises(UserError, match="is damaged or incomplete"):  # tried, and found to lack its pixels
            read(tmp_path / "gray.png")
        with pytest.raises(UserError, match=r"20,000 x 20,000 pixels in 65 bytes, and decoding it needs 1,600 MB"):
            read(tmp_path / "color.png")


@pytest.mark.parametrize(
    ("kind", "mode", "each"),
    [("PNG", "L", 1), ("PNG", "RGB", 4), ("GIF", "P", 1), ("WEBP", "RGB", 16), ("JPEG2000", "RGB", 25)],
)
def test_memory(kind, mode, each):
    image = Image.open(io.BytesIO(saved(Image.new(mode, (40, 30)), kind)))
    assert decoding.memory(image) == each * 1200
    plain, progressive = (
        Image.open(io.BytesIO(saved(Image.new("RGB", (40, 30)), "JPEG", progressive=kind))) for kind in (False, True)
    )
    assert (decoding.memory(plain), decoding.memory(progressive)) == (0, 7200)


# --- texts ---


@pytest.mark.parametrize("before", [True, False])
def test_png_texts_and_profiles_of_any_size_are_ignored(tmp_path, before):
    large = zlib.compress(bytes(3_000_000))
    chunks = [
        chunk(b"zTXt", b"a\0\0" + large),
        chunk(b"iTXt", b"a\0\1\0\0\0" + large),
        chunk(b"tEXt", b"a\0" + bytes(2_000_000)),
        *([chunk(b"iCCP", b"a\0\0" + large)] if before else []),
    ]
    data = with_chunks(*chunks)
    if not before:  # texts after the pixels
        plain = with_chunks()
        data = plain[:-12] + b"".join(chunks) + plain[-12:]
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="too large"), Image.open(tmp_path / "a.png") as image:
        image.load()
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png", notify=pytest.fail), pattern())


def test_files_without_texts_are_not_copied():
    for kind in ("PNG", "GIF", "JPEG"):
        file = io.BytesIO(saved(Image.fromarray(pattern()), kind))
        assert decoding.without_texts(file) is file
        assert file.tell() == 0


def test_too_many_png_chunks_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_MOST_CHUNKS", 100)
    (tmp_path / "a.png").write_bytes(with_chunks(*[chunk(b"teSt", b"")] * 100))
    with pytest.raises(UserError, match="more than 100 chunks"):
        images.read_image(tmp_path / "a.png")


def test_long_gif_comments_are_left_out(tmp_path):
    """Pillow takes quadratic time for them: hours for this one."""
    frames = [Image.fromarray(pattern() // (i + 1)).quantize(16) for i in range(3)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").write_bytes(data)
    start = 13 + 3 * 2 ** (1 + data[10] % 8)
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * 200_000 + b"\0"
    (tmp_path / "b.gif").write_bytes(data[:start] + comment + data[start:])
    notes: list[str] = []
    plain, commented = (images.read_image(tmp_path / name, notify=notes.append) for name in ("a.gif", "b.gif"))
    np.testing.assert_array_equal(plain, commented)
    assert [note.partition(": ")[2] for note in notes] == ["the first of its frames is used"] * 2


# --- JPEG ---


def test_jpegs_of_many_scans_are_refused(tmp_path):
    """Each scan takes the time of a whole image, and very few bytes."""
    data = saved(Image.fromarray(pattern()), "JPEG", progressive=True)
    (tmp_path / "a.jpg").write_bytes(data)
    images.read_image(tmp_path / "a.jpg")
    last = data.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(data[:last] + data[last:-2] * 100 + data[-2:])
    with pytest.raises(UserError, match="more than 100 scans"):
        images.read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(data + b"\xff\xda\0\2" * 200)  # after its end, as films in photos
    images.read_image(tmp_path / "a.jpg")
