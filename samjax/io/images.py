"""Reading pictures as people have them, and segment files; writing PNGs whole.

A picture from a file becomes uint8 [H, W, 3] whatever its colour mode, rotation or depth. Inside, images are
float32 in [-1, 1]; `to_float` and `to_uint8` are the only way between the two.
"""

from __future__ import annotations

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from samjax.errors import UserError
from samjax.io import files

Fit = Literal["stretch", "letterbox", "crop"]
"""How a picture comes to another shape: stretched, with bars added, or with edges cut off."""

MIN_SIDE = 8
"""Pictures with a shorter side are refused: there is nothing in them to invert."""

MAX_PIXELS = 400_000_000
"""Pictures with more pixels are refused (20,000 x 20,000 is the largest square): decoding one takes up to 2 GB."""

REDUCE_ABOVE = 32_000_000
"""Pictures with more pixels are reduced as they are read, by the smallest whole factor that brings them below."""

MAX_LABELS = 256
"""Segment files with more labels are refused."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
"""Pillow's names of the formats read here: none that starts another program, as Pillow does for EPS."""

_READABLE = "PNG, JPEG, WebP, TIFF, GIF, BMP or AVIF"
_PHOTOGRAPH_LABELS, _PHOTOGRAPH_EDGES = 32, 0.35

Notify = Callable[[str], None]
Uint8 = NDArray[np.uint8]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))

_opening = threading.Lock()


def _warn(note: str) -> None:
    warnings.warn(note, UserWarning, stacklevel=3)


@contextlib.contextmanager
def _no_bomb_check() -> Iterator[None]:
    """Pillow's limit on pixels is a global of its own; `_open` checks ours instead, which has a clearer message."""
    with _opening:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong while `path` is decoded into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's readers, about metadata
            yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: permission denied: make the file readable") from error
    except MemoryError as error:
        raise UserError(f"{path}: not enough memory to decode it: make the picture smaller") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture that can be read here: save it as {_READABLE}") from error
    except Exception as error:  # damaged files make Pillow's readers raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or not whole ({reason}): copy or save the picture again") from error


def _regular_file(path: str | Path) -> Path:
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the path of one picture")
        if not path.exists():
            raise UserError(f"{path} does not exist: give the path of a picture")
        if not path.is_file():
            raise UserError(f"{path} is not a regular file: give the path of a picture")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes): copy or save the picture again")
    except (OSError, ValueError) as error:  # no permission on the way, a name too long, a zero byte in the name
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"cannot read {str(path)!r}: {reason}") from error
    return path


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[Image.Image]:
    """The picture in `path`, its header read and its size checked, its pixels not yet decoded."""
    path = _regular_file(path)
    with _reading(path):
        Image.init()
        formats = [name for name in FORMATS if name in Image.OPEN]
        with _no_bomb_check():
            image = Image.open(path, formats=formats)
        with image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(
                    f"{path} has {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} can be read: "
                    "make the picture smaller"
                )
            yield image


def _orientation(image: Image.Image) -> Image.Transpose | None:
    return _TURNS.get(image.getexif().get(0x0112, 1))


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the picture in the file, after EXIF rotation and before `read_image` reduces anything.

    Raises:
      UserError: as `read_image`, of what the header shows.
    """
    with _open(path) as image:
        width, height = image.size
        # Of TIFF files, Pillow's size is that of the upright picture already.
        lying = image.format != "TIFF" and _orientation(image) in _QUARTER_TURNS
        return (width, height) if lying else (height, width)


def _is_wide(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _grey_scale(image: Image.Image) -> tuple[float, float]:
    """Black and white of a picture of one wide channel: 16 bits in full; others by what their values show.

    Integers up to 65,535 count as 16 bits; floats from 0 to 1, or to 255, as such; any other range is stretched.
    """
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    # Not `getextrema`, which takes NaN for a number.
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low >= 0:
        for white in (65535.0,) if image.mode == "I" else (1.0, 255.0, 65535.0):
            if high <= white:
                return 0.0, white
    return low, high if high > low else low + 1


def _srgb_transform(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """From the colour profile that the file carries to sRGB, or None where that would change nothing or fails."""
    data = image.info.get("icc_profile")
    if not data or image.mode not in ("RGB", "CMYK"):
        return None
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(data))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return None
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), image.mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # a damaged profile, or one of another kind of picture: the plain conversion still serves
    return lambda part: ImageCms.applyTransform(part, transform) or part.convert("RGB")


class _Converter:
    """From any mode of the decoded picture `image`, or of a part of it, to RGB; keeps notes of what was lost."""

    def __init__(self, image: Image.Image):
        self.notes: set[str] = set()
        self._black, self._white = _grey_scale(image) if _is_wide(image) else (0.0, 255.0)
        self._to_srgb = _srgb_transform(image)

    def __call__(self, part: Image.Image) -> Image.Image:
        if _is_wide(part):
            values = np.asarray(part).astype(np.float64)
            values = np.nan_to_num(values, nan=self._black, posinf=self._white, neginf=self._black)
            grey = np.clip((values - self._black) / (self._white - self._black), 0, 1) * 255
            return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
        if part.has_transparency_data:
            part = part.convert("RGBA")
            if np.asarray(part.getchannel("A")).min() < 255:
                self.notes.add("its transparent parts are laid on white")
            part = Image.alpha_composite(Image.new("RGBA", part.size, (255, 255, 255, 255)), part)
        return part.convert("RGB") if self._to_srgb is None else self._to_srgb(part)


def _decode(image: Image.Image) -> tuple[Image.Image, set[str]]:
    """The first frame in RGB, upright, reduced if it is very large; and notes."""
    width, height = image.size
    factor = max(1, math.ceil(math.sqrt(width * height / REDUCE_ABOVE)))
    if factor > 1:
        # JPEGs can be decoded at a half, a quarter or an eighth: less time and memory.
        image.draft("", (math.ceil(width / factor), math.ceil(height / factor)))
        factor = max(1, math.ceil(math.sqrt(image.width * image.height / REDUCE_ABOVE)))
    image.load()
    turn, convert = _orientation(image), _Converter(image)
    if factor == 1:
        upright = convert(image)
    else:
        # By strips, so that only the decoded picture is ever held at its full size.
        rows = factor * max(1, 4_000_000 // (image.width * factor))
        upright = Image.new("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            upright.paste(convert(strip).reduce(factor), (0, top // factor))
    if turn is not None:
        upright = upright.transpose(turn)
    if upright.width * upright.height < width * height:
        convert.notes.add(f"its {width:,} x {height:,} pixels are reduced to {upright.width:,} x {upright.height:,}")
    return upright, convert.notes


def read_image(path: str | Path, *, notify: Notify = _warn) -> Uint8:
    """Reads the picture in a file as a person sees it.

    Rotated as its EXIF data say; 16-bit greys in full range; CMYK and wide colour spaces through the colour profile
    in the file, where there is one; alpha laid on white; the first frame of an animation. A picture of more than
    `REDUCE_ABOVE` pixels is reduced as it is read.

    Args:
      path: of a picture in one of `FORMATS`.
      notify: called with one line for each thing that was left out or changed; a Python warning by default.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UserError: there is no such file, it is no picture or not a whole one, it has a side below `MIN_SIDE` or
        more than `MAX_PIXELS` pixels.
    """
    with _open(path) as image:
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise UserError(
                f"{path} has only {width} x {height} pixels: give a picture of at least {MIN_SIDE} x {MIN_SIDE}"
            )
        # Two pictures in an MPO are two views of one photograph, no animation.
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        upright, notes = _decode(image)
        pixels = np.array(upright)
    if frames > 1:
        notes.add(f"the first of its {frames} frames is used")
    for note in sorted(notes):
        notify(f"{path}: {note}")
    return pixels


def content_box(shape: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """Where `fit` with "letterbox" puts a picture of `shape` (rows, columns): first row, first column, rows, columns.

    `fitted[top:top + rows, left:left + columns]` is the picture without its bars.
    """
    scale = min(height / shape[0], width / shape[1])
    rows = min(height, max(1, round(shape[0] * scale)))
    columns = min(width, max(1, round(shape[1] * scale)))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _resize(image: Image.Image, height: int, width: int, mode: Fit, filter_: Image.Resampling, fill: Any):
    if mode == "stretch":
        return image.resize((width, height), filter_)
    if mode == "crop":
        scale = min(image.height / height, image.width / width)
        rows, columns = height * scale, width * scale
        left, top = (image.width - columns) / 2, (image.height - rows) / 2
        return image.resize((width, height), filter_, box=(left, top, left + columns, top + rows))
    if mode == "letterbox":
        top, left, rows, columns = content_box((image.height, image.width), height, width)
        canvas = Image.new(image.mode, (width, height), fill)
        canvas.paste(image.resize((columns, rows), filter_), (left, top))
        return canvas
    raise ValueError(f"mode must be 'stretch', 'letterbox' or 'crop', not {mode!r}")


def fit(image: Uint8, height: int, width: int, mode: Fit = "stretch") -> Uint8:
    """Brings `image` to `height` x `width` by Pillow's Lanczos filter on uint8.

    "stretch" is what the authors do. "letterbox" keeps the proportions and fills up with black, in equal bars
    (`content_box` tells where). "crop" keeps the proportions and the middle.

    Args:
      image: uint8 [h, w, 3].
      height: rows of the result.
      width: columns of the result.
      mode: see above.

    Returns:
      uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"expected a uint8 array [H, W, 3], not {image.dtype} {list(image.shape)}")
    return np.array(_resize(Image.fromarray(image), height, width, mode, Image.Resampling.LANCZOS, 0))


def paste_back(picture: Uint8, image: ArrayLike, mode: Fit = "stretch") -> Uint8:
    """The reverse of `fit`: brings what was made of a fitted picture back to the picture's own size and shape.

    Args:
      picture: the original, uint8 [h, w, 3].
      image: uint8, or floats in [-1, 1], [H, W, 3] with the proportions of the fitted picture, of any size.
      mode: how the picture was fitted. What "crop" left out is the picture's own.

    Returns:
      uint8 [h, w, 3].
    """
    array = np.asarray(image)
    made = Image.fromarray(array if array.dtype == np.uint8 else to_uint8(array))
    height, width = picture.shape[:2]
    if mode == "crop":
        scale = min(height / made.height, width / made.width)
        rows, columns = round(made.height * scale), round(made.width * scale)
        canvas = Image.fromarray(picture)
        where = ((width - columns) // 2, (height - rows) // 2)
        canvas.paste(made.resize((columns, rows), Image.Resampling.LANCZOS), where)
        return np.array(canvas)
    if mode == "letterbox":
        top, left, rows, columns = content_box((height, width), made.height, made.width)
        made = made.crop((left, top, left + columns, top + rows))
    return np.array(made.resize((width, height), Image.Resampling.LANCZOS))


def fit_labels(
    labels: NDArray[np.integer], height: int, width: int, mode: Fit = "stretch", fill: int = -1
) -> NDArray[np.int32]:
    """Brings a label image [h, w] to int32 [H, W] by the nearest label, placed as `fit` places a picture.

    Args:
      labels: integers [h, w].
      height: rows of the result.
      width: columns of the result.
      mode: as in `fit`.
      fill: label of the bars of a letterbox.
    """
    image = Image.fromarray(np.asarray(labels, np.int32))
    return np.array(_resize(image, height, width, mode, Image.Resampling.NEAREST, fill))


def to_float(image: Uint8) -> NDArray[np.float32]:
    """From uint8 to float32 in [-1, 1], rounded as the authors' `(x / 255 - 0.5) / 0.5` is."""
    if np.asarray(image).dtype != np.uint8:
        raise ValueError(f"expected a uint8 array, not {np.asarray(image).dtype}")
    half = np.float32(0.5)
    return (np.asarray(image).astype(np.float32) / np.float32(255) - half) / half


def to_uint8(image: ArrayLike) -> Uint8:
    """From floats in [-1, 1], clipped, to the nearest uint8.

    The authors' code cuts (x + 1) / 2 x 255 off instead, half a level darker on average; with rounding,
    `to_uint8(to_float(x))` is `x`.

    Raises:
      ValueError: a value is not a number.
    """
    values = np.asarray(image, np.float32)
    if np.isnan(values).any():
        raise ValueError("the image holds values that are not numbers")
    return np.rint((np.clip(values, -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)


def save_png(path: str | Path, image: ArrayLike) -> None:
    """Writes `image`, uint8 or floats in [-1, 1], [H, W, 3] or [H, W], to `path` as a PNG, whole.

    Raises:
      UserError: as `files.whole_file`.
      ValueError: the array has another shape or dtype.
    """
    array = np.asarray(image)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] != 3):
        raise ValueError(f"expected an image [H, W, 3] or [H, W], not {list(array.shape)}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"expected uint8, or floats in [-1, 1], not {array.dtype}")
        array = to_uint8(array)
    with files.whole_file(path) as file:
        Image.fromarray(array).save(file, "PNG")


def label_colours(count: int) -> Uint8:
    """Colours [count, 3] for labels: easy to tell apart, of about one lightness, the same for the same label."""
    # Steps of the golden angle never come back to a hue; three rings tell neighbours on the circle apart.
    turns = (np.arange(count) * 0.6180339887 + 0.58) % 1 * 2 * np.pi
    ring = np.arange(count) % 3
    lightness = np.array([0.70, 0.80, 0.60])[ring]
    chroma = np.array([0.13, 0.10, 0.12])[ring]
    return oklch_to_srgb(np.stack([lightness, chroma, turns], -1))


def oklch_to_srgb(colours: ArrayLike) -> Uint8:
    """From Oklch (lightness 0 to 1, chroma, hue in radians) [..., 3] to sRGB, clipped to its gamut.

    Oklab: Björn Ottosson, "A perceptual color space for image processing", 2020.
    """
    lightness, chroma, hue = np.moveaxis(np.asarray(colours, np.float64), -1, 0)
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cones = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        -1,
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(cones**3 @ to_linear.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255).astype(np.uint8)


def save_segments(path: str | Path, labels: NDArray[np.integer]) -> None:
    """Writes a label image [H, W] as a PNG in colours whose palette indices are the labels, whole.

    A person sees the segments; `read_segments` reads the labels back.

    Raises:
      UserError: as `files.whole_file`.
      ValueError: a label is below 0 or above 255.
    """
    array = np.asarray(labels)
    if array.ndim != 2 or array.min() < 0 or array.max() > 255:
        raise ValueError("expected labels from 0 to 255, [H, W]")
    image = Image.fromarray(array.astype(np.uint8))
    image.putpalette(label_colours(256).tobytes())
    with files.whole_file(path) as file:
        image.save(file, "PNG")


def _labels_of(image: Image.Image) -> NDArray[np.int32] | None:
    """The labels [H, W] that the picture's values mean, or None: colours are numbered in ascending order."""
    values = np.asarray(image)
    if image.mode == "F":
        return None
    if values.ndim == 2:
        return values.astype(np.int32)
    packed = np.zeros(values.shape[:2], np.int64)
    for channel in np.moveaxis(values, -1, 0):
        packed = packed * 256 + channel
    colours, labels = np.unique(packed, return_inverse=True)
    return labels.reshape(packed.shape).astype(np.int32) if len(colours) <= MAX_LABELS else None


def read_segments(
    path: str | Path, height: int, width: int, image_size: tuple[int, int], mode: Fit = "stretch", fill: int = -1
) -> NDArray[np.int32]:
    """Reads a segment file: one label, or one flat colour, for each segment.

    Values of grey and palette files are the labels themselves; colours are numbered from 0 in ascending order of
    red, then green, then blue.

    Args:
      path: of the file, of the same size as the picture that it belongs to.
      height: rows of the result, the working size.
      width: columns of the result.
      image_size: (height, width) of the picture as its file has it, as `image_size` gives it.
      mode: as `fit` placed the picture.
      fill: label of the bars of a letterbox.

    Returns:
      int32 [H, W].

    Raises:
      UserError: the file cannot be read, has another size, or is a photograph rather than labels.
    """
    with _open(path) as image:
        lying = image.format != "TIFF" and _orientation(image) in _QUARTER_TURNS
        columns, rows = image.size[::-1] if lying else image.size
        if (rows, columns) != tuple(image_size):
            raise UserError(
                f"{path} has {columns} x {rows} pixels but the picture has {image_size[1]} x {image_size[0]}: "
                "give a segment file of the picture's own size"
            )
        image.load()
        turn = _orientation(image)
        upright = image if turn is None else image.transpose(turn)
        # Bars are added to labels, not to colours: black may be one of the colours.
        top, left, rows, columns = (0, 0, height, width)
        if mode == "letterbox":
            top, left, rows, columns = content_box(image_size, height, width)
        placing: Fit = "crop" if mode == "crop" else "stretch"
        labels = _labels_of(_resize(upright, rows, columns, placing, Image.Resampling.NEAREST, None))
    if labels is None or _is_photograph(labels):
        raise UserError(
            f"{path} looks like a photograph, or has soft edges as JPEGs have: give a PNG with one label "
            f"or one flat colour for each segment, at most {MAX_LABELS}"
        )
    framed = np.full((height, width), fill, np.int32)
    framed[top : top + rows, left : left + columns] = labels
    return framed


def _is_photograph(labels: NDArray[np.int32]) -> bool:
    """Whether labels are too many, or so many and so scattered that no one can have meant segments."""
    count = len(np.unique(labels))
    if count > MAX_LABELS:
        return True
    edges = np.mean(labels[:, 1:] != labels[:, :-1]) if labels.shape[1] > 1 else 0.0
    return count > _PHOTOGRAPH_LABELS and bool(edges > _PHOTOGRAPH_EDGES)
