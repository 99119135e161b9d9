"""Images of every kind become uint8 RGB, or one clear line says why not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms

from samjax.errors import UserError
from samjax.io import images

RNG = np.random.default_rng(0)


def smooth(height: int = 24, width: int = 36) -> np.ndarray:
    """A uint8 image [H, W, 3] without noise, so that lossy formats hardly change it."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return (np.stack([x, y, 0.5 * (1 - x) + 0.25], -1) * 255).astype(np.uint8)


def corners() -> Image.Image:
    """36 x 24, each quarter in a different color, so that all eight rotations and reflections differ."""
    array = np.zeros((24, 36, 3), np.uint8)
    array[:12, :18], array[:12, 18:], array[12:, :18], array[12:, 18:] = (
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    )  # fmt: skip
    return Image.fromarray(array)


def save(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def read_quietly(path: Path) -> np.ndarray:
    def fail(note: str) -> None:
        raise AssertionError(f"unexpected note: {note}")

    return images.read_image(path, notify=fail)


# --- color modes ---


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr"])
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp", "bmp", "gif"])
def test_modes_and_formats(tmp_path: Path, mode: str, ending: str):
    image = Image.fromarray(smooth())
    wanted = np.asarray(image.convert(mode).convert("RGB"), np.int32)
    options = {"compression": "jpeg"} if mode == "YCbCr" else {}  # raw, Pillow reads its own again from 13 on only
    try:
        path = save(image.convert(mode), tmp_path / f"a.{ending}", **(options if ending == "tif" else {}))
    except (OSError, ValueError):  # a mode that the format does not support
        path = save(image.convert(mode), tmp_path / "a.tif", **options)
    array = read_quietly(path)
    assert array.dtype == np.uint8
    assert array.shape == (24, 36, 3)
    assert array.flags.writeable
    # JPEG and WebP lose a little, and more for dithered images.
    tolerance = 0 if path.suffix in (".png", ".bmp") else 12
    if mode not in ("1", "P") or path.suffix not in (".jpg", ".webp"):
        assert np.abs(array - wanted).mean() <= tolerance


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L"])
def test_alpha_is_placed_on_white(tmp_path: Path, mode: str):
    alpha = Image.fromarray(np.repeat(np.repeat(np.array([[0, 255]], np.uint8), 10, 0), 6, 1))
    gray = Image.new("L", alpha.size, 40)
    path = tmp_path / "a.png"
    if mode in ("P", "L"):  # one index or level is transparent
        base = Image.fromarray(np.where(np.asarray(alpha) == 0, 7, 40).astype(np.uint8))
        if mode == "P":
            base.putpalette([v for i in range(256) for v in (i, i, i)])
        base.save(path, transparency=7)
    elif mode == "PA":
        path = tmp_path / "a.gif"
        image = gray.convert("RGBA")
        image.putalpha(alpha)
        image.save(path)
    else:
        image = gray.convert(mode)
        image.putalpha(alpha)
        image.save(path)
    notes: list[str] = []
    array = images.read_image(path, notify=notes.append)
    np.testing.assert_array_equal(array[:, :6], 255)
    np.testing.assert_array_equal(array[:, 6:], 40)
    assert len(notes) == 1
    assert "placed on white" in notes[0]


def test_half_transparent_and_opaque_alpha(tmp_path: Path):
    half = save(Image.new("RGBA", (10, 10), (0, 100, 200, 128)), tmp_path / "half.png")
    array = images.read_image(half, notify=lambda _: None)
    np.testing.assert_allclose(array[0, 0], np.array([0, 100, 200]) * 128 / 255 + 127, atol=1)
    opaque = save(Image.new("RGBA", (10, 10), (0, 100, 200, 255)), tmp_path / "opaque.png")
    np.testing.assert_array_equal(read_quietly(opaque)[0, 0], (0, 100, 200))


@pytest.mark.parametrize(("ending", "dtype"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", ">u2")])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path, ending: str, dtype: str):
    values = np.linspace(0, 65535, 240).reshape(12, 20).astype(dtype)
    path = tmp_path / f"a.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 20 12 65535\n" + values.tobytes())
    elif dtype == ">u2":
        Image.frombytes("I;16B", (20, 12), values.tobytes()).save(path)
    else:
        Image.fromarray(values.astype("<u2")).save(path)
    array = read_quietly(path)
    np.testing.assert_array_equal(array, np.repeat(np.rint(values / 257.0).astype(np.uint8)[..., None], 3, -1))
    assert array.min() == 0
    assert array.max() == 255


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_color(tmp_path: Path):
    values = RNG.integers(0, 65536, (10, 12, 3)).astype(">u2")
    path = tmp_path / "a.png"
    path.write_bytes(png(12, 10, 16, 2, b"".join(b"\0" + row.tobytes() for row in values)))
    assert np.abs(read_quietly(path) - values / 257.0).max() <= 1  # Pillow keeps the upper byte


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_float_tiff(tmp_path: Path, white: float):
    values = np.linspace(0, white, 200, dtype=np.float32).reshape(10, 20)
    path = save(Image.fromarray(values), tmp_path / "a.tif")
    np.testing.assert_allclose(read_quietly(path)[..., 0], values / white * 255, atol=0.51)


def test_float_tiff_of_another_range_and_with_gaps(tmp_path: Path):
    values = np.linspace(-3, 5, 200, dtype=np.float32).reshape(10, 20)
    values[0, 0] = np.nan
    values[0, 1] = np.inf
    array = read_quietly(save(Image.fromarray(values), tmp_path / "a.tif"))
    assert array[0, 0, 0] == 0
    assert array[0, 1, 0] == 255
    assert array[-1, -1, 0] == 255
    assert array[0, 2, 0] <= 2
    flat = read_quietly(save(Image.fromarray(np.full((10, 20), -1, np.float32)), tmp_path / "b.tif"))
    assert flat.max() == 0


def test_cmyk_jpeg_with_a_broken_profile_still_reads(tmp_path: Path):
    path = save(Image.fromarray(smooth()).convert("CMYK"), tmp_path / "a.jpg", icc_profile=b"nothing")
    assert np.abs(read_quietly(path).astype(int) - smooth()).mean() < 8


def test_a_color_profile_is_applied_but_srgb_changes_nothing(tmp_path: Path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = save(Image.fromarray(smooth()), tmp_path / "a.png", icc_profile=srgb)
    np.testing.assert_array_equal(read_quietly(path), smooth())
    # The same profile with red and blue primaries swapped, under another name: the colors must be swapped.
    data = bytearray(srgb)
    tags = {bytes(data[i : i + 4]): i for i in range(132, 132 + 12 * struct.unpack(">I", data[128:132])[0], 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    other = bytes(data).replace("sRGB".encode("utf-16-be"), "odd!".encode("utf-16-be"))
    path = save(Image.fromarray(smooth()), tmp_path / "b.png", icc_profile=other)
    assert np.abs(read_quietly(path).astype(int) - smooth()[..., ::-1]).max() <= 3


# --- rotation, animation, size ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_exif_rotation(tmp_path: Path, orientation: int, ending: str):
    upright = corners()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if ending == "jpg" else {}
    path = save(stored, tmp_path / f"a.{ending}", exif=exif, **options)
    array = read_quietly(path)
    assert array.shape == (24, 36, 3)
    assert np.abs(array.astype(int) - np.asarray(upright)).mean() < 8
    assert images.image_size(path) == (24, 36)


def test_the_first_frame_of_an_animation(tmp_path: Path):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "green", "blue")]
    for ending in ("gif", "png", "webp", "tif"):
        path = tmp_path / f"a.{ending}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        with pytest.warns(UserWarning, match="first of its frames"):
            array = images.read_image(path)
        assert np.abs(array[5, 5].astype(int) - (255, 0, 0)).max() <= 3


def test_small_images_are_refused(tmp_path: Path):
    for width, height in ((1, 1), (7, 300), (300, 7)):
        path = save(Image.new("RGB", (width, height)), tmp_path / "a.png")
        with pytest.raises(UserError, match=f"only {width} x {height} pixels.*at least 8 x 8"):
            images.read_image(path)
    assert read_quietly(save(Image.new("RGB", (8, 8)), tmp_path / "b.png")).shape == (8, 8, 3)


def test_an_image_20000_pixels_wide(tmp_path: Path):
    path = save(Image.fromarray(np.repeat(smooth(16, 2000), 10, 1)), tmp_path / "a.png")
    assert images.image_size(path) == (16, 20_000)
    array = read_quietly(path)
    assert array.shape == (16, 20_000, 3)
    assert images.fit(array, 64, 64).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("ending", "mode"), [("jpg", "RGB"), ("jpg", "CMYK"), ("png", "P"), ("png", "RGBA"), ("png", "1"), ("tif", "F")]
)
def test_very_large_images_are_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, mode: str):
    """With a lower limit, so that the test is quick: 300 x 200 pixels are reduced to a third or less."""
    monkeypatch.setattr(images, "REDUCE_ABOVE", 300 * 200 / 8)
    image = Image.fromarray(smooth(200, 300))
    stored = image.convert("L").convert("F") if mode == "F" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(stored, tmp_path / f"a.{ending}", exif=exif) if mode != "F" else save(stored, tmp_path / "a.tif")
    notes: list[str] = []
    array = images.read_image(path, notify=notes.append)
    height, width = array.shape[:2]
    assert height * width <= 300 * 200 / 8
    assert "300 x 200 pixels are reduced to" in notes[0]
    expected = image.convert("1" if mode == "1" else "L" if mode == "F" else "RGB").convert("RGB")
    if mode != "F":
        expected = expected.transpose(Image.Transpose.ROTATE_270)
    assert (height > width) == (mode != "F")
    whole = np.asarray(expected.resize((width, height), Image.Resampling.BOX), int)
    assert np.abs(array - whole).mean() < (12 if mode == "1" else 5)


def test_the_limit_on_pixels(tmp_path: Path):
    """A header that claims 100,000 x 100,000 pixels is refused without decoding any."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(100_000, 100_000, 8, 2, b"\0"))
    for read in (images.read_image, images.image_size):
        with pytest.raises(UserError, match="100,000 x 100,000 pixels; at most 400,000,000 can be read"):
            read(path)
    assert Image.MAX_IMAGE_PIXELS is not None


# --- bad files ---


def encoded(ending: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(stream, ending)
    return stream.getvalue()


@pytest.mark.parametrize("ending", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("kept", [0.03, 0.5, 0.9])
def test_truncated_images(tmp_path: Path, ending: str, kept: float):
    data = encoded(ending)
    path = tmp_path / "a.png"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError) as caught:
        images.read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["PNG", "WEBP", "TIFF"])
def test_damaged_images_never_end_in_a_traceback(tmp_path: Path, ending: str):
    data = encoded(ending)
    path = tmp_path / "a.png"
    for _ in range(60):
        damaged = bytearray(data)
        for position in RNG.integers(0, len(data), 8):
            damaged[position] = RNG.integers(0, 256)
        damaged[RNG.integers(0, 64)] ^= 0xFF
        path.write_bytes(bytes(damaged))
        line = ""
        try:
            images.read_image(path, notify=lambda _: None)  # some damage changes pixels only
        except UserError as error:
            line = str(error)
        assert "\n" not in line


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("hello, I am not an image"), "not an image that can be read"),
        (lambda path: path.write_bytes(bytes(range(256)) * 40), "not an image that can be read"),
        (lambda path: path.write_text('<svg xmlns="x"></svg>'), "not an image that can be read"),
        (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not an image"),
        (lambda path: path.write_bytes(b"\x93NUMPY" + bytes(200)), "not an image that can be read"),
    ],
)
def test_files_that_are_not_images(tmp_path: Path, make, says: str):
    path = tmp_path / "a.png"
    make(path)
    for read in (images.read_image, images.image_size, lambda p: images.read_segments(p, 8, 8, (8, 8))):
        with pytest.raises(UserError, match=says) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_paths_that_are_not_files(tmp_path: Path):
    with pytest.raises(UserError, match="not a regular file"):
        images.read_image("/dev/zero")
    with pytest.raises(UserError, match="cannot read"):
        images.read_image(tmp_path / ("n" * 300))
    with pytest.raises(UserError, match=r"null|does not exist"):
        images.read_image("a\0b")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(Image.new("RGB", (9, 9)), tmp_path / "a.png")

    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match="permission denied"):
        images.read_image(path)


# --- sizes and values ---


def test_fit_stretches_as_pillow_does():
    image = RNG.integers(0, 256, (30, 50, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((24, 40), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(images.fit(image, 40, 24), expected)
    np.testing.assert_array_equal(images.fit(image, 30, 50), image)


def test_letterbox_and_crop():
    image = np.full((30, 60, 3), 200, np.uint8)
    boxed = images.fit(image, 40, 40, "letterbox")
    assert images.content_box((30, 60), 40, 40) == (10, 0, 20, 40)
    np.testing.assert_array_equal(boxed[10:30], 200)
    assert boxed[:10].max() == boxed[30:].max() == 0
    striped = np.concatenate([np.zeros((30, 15, 3)), np.full((30, 30, 3), 90), np.zeros((30, 15, 3))], 1).astype(
        np.uint8
    )
    np.testing.assert_array_equal(images.fit(striped, 60, 60, "crop")[:, 8:-8], 90)
    assert images.fit(image, 1, 200, "letterbox").shape == (1, 200, 3)
    with pytest.raises(ValueError, match="'stretch', 'letterbox' or 'crop'"):
        images.fit(image, 9, 9, "squeeze")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="uint8 array"):
        images.fit(image.astype(np.float32), 9, 9)


def test_floats_and_back():
    levels = np.arange(256, dtype=np.uint8)
    values = images.to_float(levels)
    assert values.dtype == np.float32
    assert (values[0], values[-1]) == (-1, 1)
    np.testing.assert_array_equal(images.to_uint8(values), levels)
    np.testing.assert_array_equal(images.to_uint8([-3.0, -1, 0.0, 1, 2, np.inf]), [0, 0, 128, 255, 255, 255])
    with pytest.raises(ValueError, match="not numbers"):
        images.to_uint8([0.0, np.nan])
    with pytest.raises(ValueError, match="uint8"):
        images.to_float(values)  # pyright: ignore[reportArgumentType]


def test_save_png(tmp_path: Path):
    array = RNG.integers(0, 256, (9, 11, 3), np.uint8)
    images.save_png(tmp_path / "a.png", array)
    np.testing.assert_array_equal(read_quietly(tmp_path / "a.png"), array)
    images.save_png(tmp_path / "b.png", images.to_float(array))
    np.testing.assert_array_equal(read_quietly(tmp_path / "b.png"), array)
    images.save_png(tmp_path / "c.png", array[..., 0])
    np.testing.assert_array_equal(read_quietly(tmp_path / "c.png")[..., 1], array[..., 0])
    for wrong in (array.astype(np.int32), array[None], array[..., :2]):
        with pytest.raises(ValueError, match="expected"):
            images.save_png(tmp_path / "d.png", wrong)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_to_pil():
    array = RNG.integers(0, 256, (9, 11, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(images.to_pil(array)), array)
    np.testing.assert_array_equal(np.asarray(images.to_pil(images.to_float(array))), array)
    assert images.to_pil(array).size == (11, 9)
    assert images.to_pil(array[..., 0]).mode == "L"
    with pytest.raises(ValueError, match="expected"):
        images.to_pil(array.astype(np.int64))


# --- what users may pass ---


def as_image_quietly(image) -> np.ndarray:
    def fail(note: str) -> None:
        raise AssertionError(f"unexpected note: {note}")

    return images.as_image(image, notify=fail)


SHAPES = st.tuples(st.integers(8, 12), st.integers(8, 12), st.just(3))
# Without a deadline, which a busy machine exceeds now and then.
brief = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@brief
@given(hnp.arrays(np.uint8, SHAPES))
def test_uint8_arrays_are_copied(array: np.ndarray):
    made = as_image_quietly(array)
    np.testing.assert_array_equal(made, array)
    assert not np.shares_memory(made, array)
    np.testing.assert_array_equal(as_image_quietly(Image.fromarray(array)), array)
    floats = images.to_float(array) - np.float32(5e-4)  # within the tolerance
    np.testing.assert_array_equal(images.as_image(floats, notify=lambda _: None), array)
    np.testing.assert_array_equal(as_image_quietly(array.transpose(1, 0, 2)), array.transpose(1, 0, 2))


@brief
@given(hnp.arrays(st.sampled_from([np.float16, np.float32, np.float64]), SHAPES, elements=st.floats(-1, 1, width=16)))
def test_floats_become_the_nearest_levels(array: np.ndarray):
    made = images.as_image(array, notify=lambda _: None)
    assert made.dtype == np.uint8
    assert np.abs(made / 127.5 - 1 - array.astype(np.float64)).max() <= 0.5 / 127.5 + 1e-6


ANY_DTYPE = hnp.scalar_dtypes() | hnp.datetime64_dtypes() | hnp.unicode_string_dtypes() | st.just(np.dtype(object))
ODD = (
    None,
    True,
    3,
    2.5,
    1j,
    b"x",
    bytearray(9),
    memoryview(b"x"),
    [],
    [[1], [2, 3]],
    {},
    {1},
    (),
    ...,
    object(),
    len,
    int,
)
ANY_SHAPE = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)


@brief
@given(hnp.arrays(ANY_DTYPE, ANY_SHAPE | SHAPES) | st.sampled_from(ODD) | st.text(max_size=3))
def test_anything_is_an_image_or_one_clear_line(value):
    try:
        made = images.as_image(value, notify=lambda _: None)
    except UserError as error:
        made, line = None, str(error)
        assert "\n" not in line
    assert made is None or (made.dtype == np.uint8 and made.shape == np.shape(value))


BASE = np.zeros((16, 16, 3), np.float32)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (BASE + 255, r"floats from 255 to 255, outside \[-1, 1\]; most likely 0 to 255: convert it to uint8"),
        (np.where(np.arange(3) > 0, BASE + 1.5, BASE), "most likely 0 to 255"),
        (BASE - 1.002, r"floats from -1.002 to -1.002, outside \[-1, 1\]"),
        (BASE + 1.002, "outside"),
        (BASE * np.nan, "not finite"),
        (BASE - np.inf, "not finite"),
        (BASE.astype(np.int64), "values of type int64: give uint8, or floats"),
        (BASE.astype(np.uint16), "values of type uint16"),
        (BASE.astype(bool), "values of type bool"),
        (BASE.astype(complex), "values of type complex128"),
        (BASE[..., 0], r"shape \[16, 16\], not \[height, width, 3\]: repeat a gray image's values"),
        (BASE[..., :2], r"shape \[16, 16, 2\]"),
        (np.zeros((16, 16, 4), np.uint8), "transparency"),
        (np.zeros((3, 16, 16), np.uint8), "move the channels to the last axis"),
        (BASE[None], "remove the batch axis"),
        (np.zeros((2, 16, 16, 3)), "one image at a time"),
        (np.zeros((0, 16, 3), np.uint8), "is empty"),
        (np.zeros((7, 16, 3), np.uint8), "only 16 x 7 pixels"),
        (Image.new("RGB", (16, 7)), "only 16 x 7 pixels"),
        (None, "has type NoneType: give a path, a PIL image"),
        (3.5, "has type float: give a path"),
        ([[1, 2], [3]], "has type list: give a path"),
        (np.array([None]), "has values of type object: give a path"),
        ("nowhere.png", "nowhere.png does not exist"),
    ],
)
def test_arrays_that_are_not_images(value, says: str):
    with pytest.raises(UserError, match=says) as caught:
        images.as_image(value)
    assert "\n" not in str(caught.value)


def test_values_just_outside_the_range_are_clipped():
    np.testing.assert_array_equal(as_image_quietly(BASE - 1.0009), 0)
    with pytest.warns(UserWarning, match="none is below 0"):
        np.testing.assert_array_equal(images.as_image(BASE + 1.0009), 255)


def test_jax_arrays():
    array = RNG.uniform(-1, 1, (9, 11, 3)).astype(np.float32)
    np.testing.assert_array_equal(as_image_quietly(jnp.asarray(array)), images.to_uint8(array))
    half = jnp.asarray(array, jnp.bfloat16)
    np.testing.assert_array_equal(as_image_quietly(half), images.to_uint8(np.asarray(half, np.float32)))


def test_paths_and_pil_images_are_read_alike(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.linspace(0, 65535, 240).reshape(12, 20).astype("<u2")
    alpha = Image.new("RGBA", (10, 12), (0, 100, 200, 128))
    for name, image, options in (
        ("turned.jpg", corners(), {"exif": exif}),
        ("turned.tif", corners(), {"exif": exif}),
        ("wide.png", Image.fromarray(wide), {}),
        ("alpha.png", alpha, {}),
        ("cmyk.jpg", corners().convert("CMYK"), {}),
        ("palette.gif", corners().convert("P"), {}),
        ("moving.gif", corners(), {"save_all": True, "append_images": [Image.new("RGB", (36, 24))]}),
    ):
        path = save(image, tmp_path / name, **options)
        notes: dict[str, list[str]] = {"read": [], "path": [], "opened": []}
        expected = images.read_image(path, notify=notes["read"].append)
        np.testing.assert_array_equal(images.as_image(str(path), notify=notes["path"].append), expected)
        with Image.open(path) as opened:
            made = images.as_image(opened, notify=notes["opened"].append)
            np.testing.assert_array_equal(made, expected)
            np.testing.assert_array_equal(images.as_image(opened, notify=lambda _: None), expected)  # still usable
        assert notes["path"] == notes["read"]
        assert notes["opened"] == [note.replace(str(path), "the image") for note in notes["read"]]
    np.testing.assert_array_equal(images.as_image(Image.fromarray(wide)), images.read_image(tmp_path / "wide.png"))


def test_another_frame_of_an_animation(tmp_path: Path):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as image:
        image.seek(2)
        np.testing.assert_array_equal(as_image_quietly(image)[0, 0], (0, 0, 255))


def test_pil_images_that_cannot_be_decoded(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG")[:2000])
    with Image.open(path) as image, pytest.raises(UserError, match="the image is damaged or incomplete"):
        images.as_image(image)
    with pytest.raises(UserError, match="the image is damaged or incomplete"):
        images.as_image(image)  # closed


# --- segments ---

LABELS = np.repeat(np.repeat(np.array([[0, 3, 3], [2, 2, 9]], np.int32), 8, 0), 8, 1)  # [16, 24]


def test_labels_saved_and_read_back(tmp_path: Path):
    path = tmp_path / "segments.png"
    images.save_segments(path, LABELS)
    read = images.read_segments(path, 16, 24, (16, 24))
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, LABELS)
    with Image.open(path) as image:
        assert image.mode == "P"
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) == 4
    for wrong in (LABELS - 1, LABELS + 250, LABELS[0]):
        with pytest.raises(ValueError, match="labels from 0 to 255"):
            images.save_segments(path, wrong)


@pytest.mark.parametrize("kind", ["L", "I;16", "I", "1", "RGB", "RGBA"])
def test_segment_files_of_every_kind(tmp_path: Path, kind: str):
    labels, expected, ending = LABELS, LABELS, "png"
    if kind == "1":
        labels = expected = (LABELS > 2).astype(np.int32)
        image = Image.fromarray(labels.astype(bool))
    elif kind == "I;16":
        labels = expected = LABELS * 1000
        image = Image.fromarray(labels.astype(np.uint16))
    elif kind == "I":
        labels = expected = LABELS * 100_000
        image, ending = Image.fromarray(labels), "tif"
    elif kind in ("RGB", "RGBA"):
        colors = np.array([[200, 0, 0, 255], [0, 9, 0, 255], [0, 10, 1, 255], [0, 10, 0, 255]], np.uint8)
        names = {0: 0, 2: 1, 3: 2, 9: 3}
        rank = np.array([3, 0, 2, 1])  # by red, then green, then blue
        index = np.vectorize(names.get)(LABELS)
        image, expected = Image.fromarray(colors[index][..., : len(kind)]), rank[index]
    else:
        image = Image.fromarray(LABELS.astype(np.uint8))
    path = save(image, tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(images.read_segments(path, 16, 24, (16, 24)), expected)


def test_segments_are_resized_like_their_image(tmp_path: Path):
    path = tmp_path / "a.png"
    images.save_segments(path, LABELS)
    np.testing.assert_array_equal(images.read_segments(path, 8, 12, (16, 24)), LABELS[::2, ::2])
    boxed = images.read_segments(path, 24, 24, (16, 24), mode="letterbox")
    np.testing.assert_array_equal(boxed[4:20], LABELS)
    assert (boxed[:4] == -1).all()
    assert (boxed[20:] == -1).all()
    np.testing.assert_array_equal(images.fit_labels(LABELS, 24, 24, "letterbox"), boxed)
    cropped = images.read_segments(path, 16, 16, (16, 24), mode="crop")
    np.testing.assert_array_equal(cropped, LABELS[:, 4:20])
    np.testing.assert_array_equal(images.fit_labels(LABELS, 16, 16, "crop"), cropped)
    # Black bars add no label to colors, even if one of them is black.
    colors = np.array([[0, 0, 0], [255, 0, 0]], np.uint8)[(LABELS > 2).astype(int)]
    path = save(Image.fromarray(colors), tmp_path / "b.png")
    assert set(np.unique(images.read_segments(path, 24, 24, (16, 24), mode="letterbox"))) == {-1, 0, 1}


def test_label_arrays_have_the_rules_of_files():
    many = np.arange(64 * 64).reshape(64, 64)
    with pytest.raises(UserError, match="give one for each segment, at most 256"):
        images.fit_labels(many, 64, 64)
    with pytest.raises(UserError, match="do not look like labels"):
        images.fit_labels(many % 200, 64, 64)  # few enough, but scattered
    assert len(np.unique(images.fit_labels(many // 16, 64, 64, "letterbox"))) == 256
    for label in (np.uint64(2**40), np.int64(-(2**31) - 1)):
        with pytest.raises(UserError, match="integers of 32 bits"):
            images.fit_labels(np.full((8, 8), label), 64, 64)


def test_a_segment_file_of_another_size(tmp_path: Path):
    path = tmp_path / "a.png"
    images.save_segments(path, LABELS)
    with pytest.raises(UserError, match=r"has 24 x 16 pixels but the image has 640 x 480"):
        images.read_segments(path, 256, 256, (480, 640))


def test_a_rotated_segment_file(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(
        Image.fromarray(LABELS.astype(np.uint8)).transpose(Image.Transpose.ROTATE_90), tmp_path / "a.png", exif=exif
    )
    np.testing.assert_array_equal(images.read_segments(path, 16, 24, (16, 24)), LABELS)


@pytest.mark.parametrize("kind", ["color", "gray", "float", "wide", "jpeg"])
def test_a_photo_is_not_a_segment_file(tmp_path: Path, kind: str):
    noise = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / "a.png"
    if kind == "gray":
        save(Image.fromarray(noise[..., 0]), path)
    elif kind == "float":
        path = save(Image.fromarray(noise[..., 0].astype(np.float32)), tmp_path / "a.tif")
    elif kind == "wide":
        save(Image.fromarray(noise[..., 0].astype(np.uint16) * 256 + noise[..., 1]), path)
    elif kind == "jpeg":
        colors = RNG.integers(0, 256, (8, 8, 3), np.uint8)
        path = save(Image.fromarray(np.repeat(np.repeat(colors, 8, 0), 8, 1)), tmp_path / "a.jpg", quality=60)
    else:
        save(Image.fromarray(noise), path)
    with pytest.raises(UserError, match=r"does not look like labels.*one flat color for each segment, at most 256"):
        images.read_segments(path, 64, 64, (64, 64))


def test_many_labels_are_accepted(tmp_path: Path):
    labels = np.repeat(np.repeat(np.arange(150).reshape(10, 15), 8, 0), 8, 1)
    path = tmp_path / "a.png"
    images.save_segments(path, labels)
    np.testing.assert_array_equal(images.read_segments(path, 80, 120, (80, 120)), labels)


@pytest.mark.parametrize("mode", ["stretch", "letterbox", "crop"])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (33, 71)])
def test_paste_back_reverses_fit(mode, shape):
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    smooth = np.stack([128 + 60 * np.sin(x / 15), 128 + 60 * np.cos(y / 12), 100 + x / 2 + y / 2], -1)
    image = smooth.astype(np.uint8)
    fitted = images.fit(image, 96, 128, mode)
    back = images.paste_back(image, fitted, mode)
    assert back.shape == image.shape
    # Forward and backward through two Lanczos filters, and a crop that is off by up to half a pixel.
    assert np.abs(back.astype(int) - image).max() <= (12 if mode == "crop" else 8)
    # A new image replaces everything except what a crop left out.
    white = images.paste_back(image, np.ones((192, 256, 3), np.float32), mode)
    changed = (white == 255).all(-1)
    rows, columns = (min(n, m) for n, m in zip(shape, (shape[1] * 3 / 4, shape[0] * 4 / 3), strict=True))
    expected = rows * columns if mode == "crop" else shape[0] * shape[1]
    assert abs(int(changed.sum()) - expected) <= max(shape)
