"""Reading images and segment files, writing PNG files, and converting and resizing images.

Images read from files are uint8 [H, W, 3] whatever their color mode, orientation or bit depth. Networks and losses use
float32 in [-1, 1]; `to_float` and `to_uint8` convert between the two.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from samjax.errors import UserError
from samjax.io import decoding, files, folders

Fit = Literal["stretch", "letterbox", "crop"]
"""How an image is fitted to another aspect ratio: stretched, padded with black bars, or cropped."""

MIN_SIDE = 8
"""Images with a shorter side are rejected: they are too small to invert."""

MAX_PIXELS = 400_000_000
"""Images with more pixels are rejected; 20,000 x 20,000 is the largest square."""

ALWAYS_READ = 51_000_000
"""Images with more pixels are rejected if decoding them needs more than 400 MB and four times the file's size.

What decoding needs depends on the format, see `decoding.memory`: grays, palettes, TIFF files in strips and JPEGs that
are not progressive may have `MAX_PIXELS` whatever the file's size, and PNG files in color 100 million pixels.
"""

REDUCE_ABOVE = 32_000_000
"""Images with more pixels are reduced while being read, by the smallest whole factor that brings them below this."""

MAX_LABELS = 256
"""Segment files with more labels are rejected."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "HEIF")
"""Formats that are read, by Pillow's names; none for which Pillow starts another program, as it does for EPS. HEIF, the
format of HEIC files, only where pillow-heif is installed."""

_READABLE = "PNG, JPEG, WebP, TIFF, GIF, BMP or AVIF"
_ACCEPTED = "a path, a PIL image, or an array [height, width, 3] of uint8 or of floats in [-1, 1]"
_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
_HEIF_HINT = "to read HEIC, pip install pillow-heif"
_OUT_OF_RANGE = 1e-3  # by how much float images may exceed [-1, 1]
_STRIP_PIXELS = 2_000_000  # that are converted at a time
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
_TURNS_OF_ARRAYS: dict[Image.Transpose, Callable[[Uint8], Uint8]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda image: image[:, ::-1],
    Image.Transpose.ROTATE_180: lambda image: image[::-1, ::-1],
    Image.Transpose.FLIP_TOP_BOTTOM: lambda image: image[::-1],
    Image.Transpose.TRANSPOSE: lambda image: image.swapaxes(0, 1),
    Image.Transpose.ROTATE_270: lambda image: np.rot90(image, 3),
    Image.Transpose.TRANSVERSE: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    Image.Transpose.ROTATE_90: lambda image: np.rot90(image),
}
_QUARTER_TURNS = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))

_opening = threading.Lock()


def warn(note: str) -> None:
    """Issues a line for the user as a Python warning, where nobody is to be notified."""
    warnings.warn(note, UserWarning, stacklevel=3)


@contextlib.contextmanager
def _no_bomb_check() -> Iterator[None]:
    """Disables Pillow's global limit on pixels; `_check_largest` checks ours instead, with a clearer message."""
    with _opening:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _reading(name: str | Path) -> Iterator[None]:
    """Turns any error while decoding the image called `name` into a UserError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from Pillow's readers, about metadata
            yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{name}: permission denied: make the file readable") from error
    except MemoryError as error:
        raise UserError(f"{name}: not enough memory to decode it: make the image smaller") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image that can be read: save it as {_READABLE}") from error
    except Exception as error:  # Pillow's readers raise almost anything for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is damaged or incomplete ({reason}): copy or save the image again") from error


def _regular_file(path: str | Path) -> Path:
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory: give the path of an image")
        if not path.exists():
            raise UserError(f"{path} does not exist: give the path of an image")
        if not path.is_file():
            raise UserError(f"{path} is not a regular file: give the path of an image")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes): copy or save the image again")
    except (OSError, ValueError) as error:  # permission denied, a name too long, a null byte in the name
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"cannot read {str(path)!r}: {reason}") from error
    return path


def _formats() -> list[str]:
    """The formats of `FORMATS` that this installation reads."""
    Image.init()
    if "HEIF" not in Image.OPEN and importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def _is_heif(path: Path) -> bool:
    """Whether a file has the container of HEIC, which AVIF has too."""
    with path.open("rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:] not in (b"avif", b"avis")


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[Image.Image]:
    """Opens the image in `path`: reads its header and checks its size, without decoding its pixels."""
    path = _regular_file(path)
    with _reading(path):
        formats, heif = _formats(), _is_heif(path)
        with path.open("rb") as file:
            copy = decoding.without_texts(file)
        with _no_bomb_check():
            try:
                image = Image.open(path if copy is file else copy, formats=formats)
            except UnidentifiedImageError as error:
                if heif and "HEIF" not in formats:
                    raise UserError(f"{path} is a HEIC image: {_HEIF_HINT}, or save it as {_READABLE}") from error
                raise
        with image:
            _check_largest(image, path)
            _check_memory(image, path)
            yield image


def _check_largest(image: Image.Image, name: str | Path) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name} has {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} can be read: make the image smaller"
        )


def _check_memory(image: Image.Image, path: Path) -> None:
    """Raises a UserError for small files that would fill the memory."""
    if image.width * image.height <= ALWAYS_READ or decoding.tiff_strips(image, 1, _STRIP_PIXELS) is not None:
        return
    needed, limit = decoding.memory(image), 400_000_000 + 4 * path.stat().st_size
    if needed > limit:
        raise UserError(
            f"{path} has {image.width:,} x {image.height:,} pixels in {path.stat().st_size:,} bytes, and decoding it"
            f" needs {needed // 10**6:,} MB: make the image smaller"
        )


def _check_smallest(width: int, height: int, name: str | Path) -> None:
    if min(width, height) < MIN_SIDE:
        raise UserError(
            f"{name} has only {width} x {height} pixels: give an image of at least {MIN_SIDE} x {MIN_SIDE} pixels"
        )


def _orientation(image: Image.Image) -> Image.Transpose | None:
    return _TURNS.get(image.getexif().get(0x0112, 1))


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of the image in a file, with its EXIF orientation, from the file's header.

    Images of more than `REDUCE_ABOVE` pixels are smaller once `read_image` has read them.

    Args:
      path: path of the image.

    Returns:
      (height, width).

    Raises:
      UserError: the file cannot be read, is not an image, or has too many pixels.
    """
    with _open(path) as image:
        width, height = image.size
        # For TIFF files, Pillow's size already takes the orientation into account.
        lying = image.format != "TIFF" and _orientation(image) in _QUARTER_TURNS
        return (width, height) if lying else (height, width)


def _is_wide(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _gray_scale(image: Image.Image, strips: _Strips) -> tuple[float, float]:
    """The values of black and white in a gray image of more than 8 bits.

    16-bit images use their full range. Otherwise the values decide: integers up to 65,535 are taken as 16 bits, floats
    from 0 to 1, 255 or 65,535 as such; any other range is stretched from its minimum to its maximum.
    """
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    # Not `getextrema`, which is wrong where there are NaNs.
    ends: list[float] = []
    for strip in strips.read():
        values = np.asarray(strip)
        if (finite := values[np.isfinite(values)]).size:
            ends += [float(finite.min()), float(finite.max())]
    low, high = (min(ends), max(ends)) if ends else (0.0, 0.0)
    if low >= 0:
        for white in (65535.0,) if image.mode == "I" else (1.0, 255.0, 65535.0):
            if high <= white:
                return 0.0, white
    return low, high if high > low else low + 1


def _srgb_transform(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """The conversion from the image's embedded color profile to sRGB; None if it is sRGB already or unusable."""
    data = image.info.get("icc_profile")
    if not data or image.mode not in ("RGB", "CMYK"):
        return None
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(data))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return None
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), image.mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # a damaged or unsuitable profile: fall back on Pillow's conversion
    return lambda part: ImageCms.applyTransform(part, transform) or part.convert("RGB")


class _Converter:
    """Converts the decoded `image`, or a part of it, from any mode to RGB; `notes` says what was lost."""

    def __init__(self, image: Image.Image, strips: _Strips):
        self.notes: set[str] = set()
        self._black, self._white = _gray_scale(image, strips) if _is_wide(image) else (0.0, 255.0)
        self._to_srgb = _srgb_transform(image)

    def __call__(self, part: Image.Image) -> Image.Image:
        if _is_wide(part):
            values = np.asarray(part).astype(np.float64)
            values = np.nan_to_num(values, nan=self._black, posinf=self._white, neginf=self._black)
            gray = np.clip((values - self._black) / (self._white - self._black), 0, 1) * 255
            return Image.fromarray(np.rint(gray).astype(np.uint8)).convert("RGB")
        if part.has_transparency_data:
            part = part.convert("RGBA")
            if np.asarray(part.getchannel("A")).min() < 255:
                self.notes.add("its transparent areas are placed on white")
            part = Image.alpha_composite(Image.new("RGBA", part.size, (255, 255, 255, 255)), part)
        return part.convert("RGB") if self._to_srgb is None else self._to_srgb(part)


def _factor(pixels: int) -> int:
    """By how much an image of so many pixels is reduced in height and width."""
    return max(1, math.ceil(math.sqrt(pixels / REDUCE_ABOVE)))


def _decode(image: Image.Image) -> tuple[Uint8, set[str]]:
    """The current frame in RGB [H, W, 3], upright, reduced if it is very large; and notes of what was changed."""
    size = image.size
    if _factor(math.prod(size)) > 1:
        # JPEGs can be decoded at 1/2, 1/4 or 1/8 of their size, which saves time and memory.
        factor = _factor(math.prod(size))
        image.draft("", (math.ceil(size[0] / factor), math.ceil(size[1] / factor)))
    factor = _factor(image.width * image.height)
    # In strips, so that no converted copy of the full size is needed.
    parts = decoding.tiff_strips(image, factor, _STRIP_PIXELS) if factor > 1 else None
    if parts is None:
        _load(image)
    strips = _crops(image, factor) if parts is None else _Strips(*parts)
    (width, height), turn, convert = strips.size, _orientation(image), _Converter(image, strips)
    upright = np.empty((math.ceil(height / factor), math.ceil(width / factor), 3), np.uint8)
    top = 0
    for strip in strips.read():
        part = np.asarray(convert(strip).reduce(factor))
        upright[top : top + len(part)] = part
        top += len(part)
    if turn is not None:
        upright = np.ascontiguousarray(_TURNS_OF_ARRAYS[turn](upright))
    if upright.size < 3 * math.prod(size):
        shown = f"{upright.shape[1]:,} x {upright.shape[0]:,}"
        convert.notes.add(f"its {size[0]:,} x {size[1]:,} pixels are reduced to {shown}")
    return upright, convert.notes


def _load(image: Image.Image) -> None:
    """Decodes an image as a whole."""
    if image.format in ("JPEG", "MPO") and getattr(image, "tile", None):
        decoding.check_scans(image.fp)  # type: ignore[attr-defined]
    # TIFF files have Pillow's limit when they are decoded, too.
    with _no_bomb_check() if image.width * image.height > REDUCE_ABOVE else contextlib.nullcontext():
        image.load()


class _Strips(NamedTuple):
    """An image as strips of full width, top to bottom.

    Attributes:
      size: (width, height) of the image, without its EXIF orientation.
      read: returns the strips; each but the last has a number of rows that the image's reduction divides.
    """

    size: tuple[int, int]
    read: Callable[[], Iterator[Image.Image]]


def _crops(image: Image.Image, factor: int) -> _Strips:
    """Strips of a decoded image."""
    width, height = image.size
    rows = factor * max(1, _STRIP_PIXELS // (width * factor))

    def read() -> Iterator[Image.Image]:
        for top in range(0, height, rows):
            yield image.crop((0, top, width, min(top + rows, height)))

    return _Strips(image.size, read)


def _upright(image: Image.Image, name: str | Path) -> tuple[Uint8, list[str]]:
    """Decodes an open image, which messages call `name`, to uint8 [H, W, 3]; also notes of what was changed."""
    _check_smallest(*image.size, name)
    # The two images in an MPO file are two views of the same scene, not an animation.
    # Not `n_frames`, for which Pillow walks through all of them.
    several = image.format != "MPO" and getattr(image, "is_animated", False) and image.tell() == 0
    upright, notes = _decode(image)
    if several:
        notes.add("the first of its frames is used")
    return upright, [f"{name}: {note}" for note in sorted(notes)]


def read_image(path: str | Path, *, notify: Notify = warn) -> Uint8:
    """Reads an image file as an image viewer shows it.

    The EXIF orientation is applied; 16-bit grays are scaled to 8 bits; CMYK and other color spaces are converted to
    sRGB by the embedded color profile, if there is one; transparent areas are placed on white; of an animation, the
    first frame is read. An image of more than `REDUCE_ABOVE` pixels is reduced while being read.

    Args:
      path: path of an image in one of `FORMATS`.
      notify: called with one line for each thing that was dropped or changed; by default, issues a Python warning.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UserError: the file does not exist, is not an image or is damaged, has a side below `MIN_SIDE`, or has more than
        `MAX_PIXELS` pixels.
    """
    with _open(path) as image:
        pixels, notes = _upright(image, path)
    for note in notes:
        notify(note)
    return pixels


def as_image(image: str | Path | Image.Image | ArrayLike, *, notify: Notify = warn) -> Uint8:
    """Converts anything that users may pass as an image to uint8 [H, W, 3].

    Args:
      image: one of: a path, read as by `read_image`; a PIL image of any mode, converted in the same way; or an array
        [H, W, 3], either uint8 or floats in [-1, 1].
      notify: called with one line for each thing that was dropped or changed; by default, issues a Python warning.

    Returns:
      uint8 [H, W, 3]; a copy.

    Raises:
      UserError: the file or PIL image cannot be read; the array has another shape or dtype, values that are not finite
        or outside [-1, 1]; or the image has a side below `MIN_SIDE`.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image, notify=notify)
    if isinstance(image, Image.Image):
        with _reading("the image"):
            _check_largest(image, "the image")
            image.load()  # decoding it at a lower resolution would change the user's own object
            pixels, notes = _upright(image, "the image")
        for note in notes:
            notify(note)
        return pixels
    try:
        array: NDArray[Any] = np.asarray(image)
    except Exception as error:  # ragged lists, and objects with conversions of their own
        raise UserError(f"the image has type {type(image).__name__}: give {_ACCEPTED}") from error
    if array.dtype.name == "bfloat16":
        array = np.asarray(array, np.float32)
    if array.dtype.kind not in "biufc" or array.ndim == 0:
        what = f"values of type {array.dtype}" if isinstance(image, np.ndarray) else f"type {type(image).__name__}"
        raise UserError(f"the image has {what}: give {_ACCEPTED}")
    _check_array(array)
    if array.dtype == np.uint8:
        return np.array(array, np.uint8, order="C")
    if array.min() >= 0 and array.max() > 0.5:
        notify("the image: its floats are taken as [-1, 1], but none is below 0: if 0 is black, pass 2 * image - 1")
    return to_uint8(array)


def _check_array(array: NDArray[Any]) -> None:
    """Raises a UserError unless `array` is an image, uint8 or floats in [-1, 1], [H, W, 3]."""
    shape = list(array.shape)
    if array.size == 0:
        raise UserError(f"the image is empty: its shape is {shape}, not [height, width, 3]")
    if array.ndim != 3 or array.shape[-1] != 3:
        hint = ""
        if array.ndim == 2:
            hint = ": repeat a gray image's values in three channels"
        elif array.ndim == 4 and len(array) == 1:
            hint = ": remove the batch axis"
        elif array.ndim == 4:
            hint = ": pass one image at a time"
        elif array.ndim == 3 and array.shape[0] in (1, 3):
            hint = ": move the channels to the last axis"
        elif array.ndim == 3 and array.shape[-1] == 4:
            hint = ": pass an image with transparency as a PIL image, or drop its fourth channel"
        raise UserError(f"the image has shape {shape}, not [height, width, 3]{hint}")
    _check_smallest(array.shape[1], array.shape[0], "the image")
    if array.dtype == np.uint8:
        return
    if array.dtype.kind != "f":
        raise UserError(f"the image has values of type {array.dtype}: give uint8, or floats in [-1, 1]")
    if not np.isfinite(array).all():
        raise UserError("the image has values that are not finite (NaN or infinity): give floats in [-1, 1]")
    low, high = float(array.min()), float(array.max())
    if low < -1 - _OUT_OF_RANGE or high > 1 + _OUT_OF_RANGE:
        likely = "most likely 0 to 255: convert it to uint8" if low >= 0 else "give floats in [-1, 1], or uint8"
        raise UserError(f"the image has floats from {low:.4g} to {high:.4g}, outside [-1, 1]; {likely}")


def content_box(shape: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """Where `fit` with "letterbox" places an image.

    Args:
      shape: (height, width) of the image.
      height: height of the result of `fit`.
      width: width of the result of `fit`.

    Returns:
      (top, left, rows, columns): `fitted[top : top + rows, left : left + columns]` is the image without its bars.

    >>> content_box((300, 400), 256, 256)
    (32, 0, 192, 256)
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
    """Resizes `image` to `height` x `width` by Pillow's Lanczos filter on uint8.

    Args:
      image: uint8 [h, w, 3].
      height: height of the result.
      width: width of the result.
      mode: what to do if the aspect ratios differ: "stretch", as the authors' code does; "letterbox", keep the whole
        image and pad it with equal black bars (see `content_box`); "crop", keep the center of the image.

    Returns:
      uint8 [height, width, 3].

    Raises:
      ValueError: `image` has another shape or dtype, or `mode` is unknown.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"expected a uint8 array [H, W, 3], not {image.dtype} {list(image.shape)}")
    return np.array(_resize(Image.fromarray(image), height, width, mode, Image.Resampling.LANCZOS, 0))


def paste_back(original: Uint8, image: ArrayLike, mode: Fit = "stretch") -> Uint8:
    """Reverses `fit`: brings an image made from a fitted one back to the size and shape of the original.

    Args:
      original: the original image, uint8 [h, w, 3].
      image: uint8 or floats in [-1, 1], [H, W, 3], of any size with the aspect ratio of the fitted image.
      mode: how `original` was fitted. With "crop", what was cut off is taken from `original`.

    Returns:
      uint8 [h, w, 3].
    """
    array = np.asarray(image)
    made = Image.fromarray(array if array.dtype == np.uint8 else to_uint8(array))
    height, width = original.shape[:2]
    if mode == "crop":
        scale = min(height / made.height, width / made.width)
        rows, columns = round(made.height * scale), round(made.width * scale)
        canvas = Image.fromarray(original)
        where = ((width - columns) // 2, (height - rows) // 2)
        canvas.paste(made.resize((columns, rows), Image.Resampling.LANCZOS), where)
        return np.array(canvas)
    if mode == "letterbox":
        top, left, rows, columns = content_box((height, width), made.height, made.width)
        made = made.crop((left, top, left + columns, top + rows))
    return np.array(made.resize((width, height), Image.Resampling.LANCZOS))


def fit_labels(labels: NDArray[np.integer], height: int, width: int, mode: Fit = "stretch") -> NDArray[np.int32]:
    """Resizes a label image to the nearest labels, placed as `fit` places its image.

    Args:
      labels: integers [h, w].
      height: height of the result.
      width: width of the result.
      mode: as in `fit`.

    Returns:
      int32 [height, width]; -1 in the bars of a letterbox.

    Raises:
      UserError: there are no labels, or some beyond int32; or there are as many, or as scattered, as no segments are,
        by the rule of `read_segments`.
    """
    limits = np.iinfo(np.int32)
    if labels.size == 0 or not limits.min <= int(labels.min()) <= int(labels.max()) <= limits.max:
        raise UserError("segments must have labels that are integers of 32 bits")
    fitted = _fit_labels(Image.fromarray(np.asarray(labels, np.int32)), height, width, mode, -1)
    if fitted is None:
        raise UserError(f"segments do not look like labels: give one for each segment, at most {MAX_LABELS}")
    return fitted


def to_gray(image: Uint8) -> Uint8:
    """Images [..., H, W, 3] in gray, with three equal channels, by Pillow's luminance (ITU-R 601)."""
    if image.ndim > 3:
        return np.stack([to_gray(one) for one in image])
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def to_float(image: Uint8) -> NDArray[np.float32]:
    """Converts uint8 to float32 in [-1, 1], with the rounding of the authors' `(x / 255 - 0.5) / 0.5`.

    Raises:
      ValueError: `image` has another dtype.
    """
    if np.asarray(image).dtype != np.uint8:
        raise ValueError(f"expected a uint8 array, not {np.asarray(image).dtype}")
    half = np.float32(0.5)
    return (np.asarray(image).astype(np.float32) / np.float32(255) - half) / half


def to_uint8(image: ArrayLike) -> Uint8:
    """Converts floats in [-1, 1] to uint8: clips and rounds to the nearest level, so that it inverts `to_float`.

    The authors' code truncates instead of rounding, which is half a level darker on average.

    Raises:
      ValueError: a value is NaN.
    """
    values = np.asarray(image, np.float32)
    if np.isnan(values).any():
        raise ValueError("the image has values that are not numbers")
    return np.rint((np.clip(values, -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)


def to_pil(image: ArrayLike) -> Image.Image:
    """Converts an image, uint8 or floats in [-1, 1], [H, W], [H, W, 3] or [H, W, 4], to a PIL image.

    Floats outside [-1, 1] are clipped.

    Raises:
      ValueError: `image` has another shape or dtype, or contains NaNs.
    """
    array = np.asarray(image)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"expected an image [H, W], [H, W, 3] or [H, W, 4], not {list(array.shape)}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"expected uint8, or floats in [-1, 1], not {array.dtype}")
        array = to_uint8(array)
    return Image.fromarray(array)


def save_png(path: str | Path, image: ArrayLike) -> None:
    """Writes an image as a PNG file, completely or not at all.

    Args:
      path: path of the file; an existing file is replaced.
      image: uint8 or floats in [-1, 1], [H, W], [H, W, 3] or [H, W, 4].

    Raises:
      UserError: the file cannot be written; see `files.whole_file`.
      ValueError: `image` has another shape or dtype.
    """
    made = to_pil(image)
    with files.whole_file(path) as file:
        made.save(file, "PNG")


def label_colors(count: int) -> Uint8:
    """Colors for labels 0 to `count` - 1, easy to tell apart and of similar lightness; uint8 [count, 3].

    A label's color does not depend on `count`.
    """
    # Steps of the golden angle never repeat a hue; three lightnesses separate neighboring hues.
    turns = (np.arange(count) * 0.6180339887 + 0.58) % 1 * 2 * np.pi
    ring = np.arange(count) % 3
    lightness = np.array([0.70, 0.80, 0.60])[ring]
    chroma = np.array([0.13, 0.10, 0.12])[ring]
    return oklch_to_srgb(np.stack([lightness, chroma, turns], -1))


def oklch_to_srgb(colors: ArrayLike) -> Uint8:
    """Converts colors [..., 3] from Oklch (lightness 0 to 1, chroma, hue in radians) to sRGB, clipped to its gamut.

    Björn Ottosson, "A perceptual color space for image processing", 2020.
    """
    lightness, chroma, hue = np.moveaxis(np.asarray(colors, np.float64), -1, 0)
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
    """Writes a label image as a PNG file with a palette, completely or not at all.

    The palette's indices are the labels, which `read_segments` reads back; image viewers show a color per label.

    Args:
      path: path of the file; an existing file is replaced.
      labels: integers [H, W], 0 to 255.

    Raises:
      UserError: the file cannot be written; see `files.whole_file`.
      ValueError: `labels` has another shape, or values below 0 or above 255.
    """
    array = np.asarray(labels)
    if array.ndim != 2 or array.min() < 0 or array.max() > 255:
        raise ValueError("expected labels from 0 to 255, [H, W]")
    image = Image.fromarray(array.astype(np.uint8))
    image.putpalette(label_colors(256).tobytes())
    with files.whole_file(path) as file:
        image.save(file, "PNG")


def _labels_of(image: Image.Image) -> NDArray[np.int32] | None:
    """The labels [H, W] of an image's values or, numbered in ascending order, of its colors; None for other images."""
    values = np.asarray(image)
    if image.mode == "F":
        return None
    if values.ndim == 2:
        return values.astype(np.int32)
    packed = np.zeros(values.shape[:2], np.int64)
    for channel in np.moveaxis(values, -1, 0):
        packed = packed * 256 + channel
    colors, labels = np.unique(packed, return_inverse=True)
    return labels.reshape(packed.shape).astype(np.int32) if len(colors) <= MAX_LABELS else None


def check_segments_size(path: str | Path, size: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Raises a UserError if a segment file does not have the size, (height, width), of its image."""
    if tuple(size) != tuple(image_size):
        raise UserError(
            f"{path} has {size[1]} x {size[0]} pixels but the image has {image_size[1]} x {image_size[0]}: "
            "give a segment file of the image's own size"
        )


def read_segments(
    path: str | Path, height: int, width: int, image_size: tuple[int, int], mode: Fit = "stretch", fill: int = -1
) -> NDArray[np.int32]:
    """Reads a segment file, in which each segment has one label or one flat color.

    Values of gray and palette files are the labels; colors are numbered from 0 in ascending order of red, then green,
    then blue.

    Args:
      path: path of the file, which has the size of the image that it belongs to.
      height: height of the result.
      width: width of the result.
      image_size: (height, width) of the image, as `image_size` returns it.
      mode: how the image was fitted; see `fit`.
      fill: label of the bars of a letterbox.

    Returns:
      int32 [height, width].

    Raises:
      UserError: the file cannot be read, has another size, or does not look like labels.
    """
    with _open(path) as image:
        lying = image.format != "TIFF" and _orientation(image) in _QUARTER_TURNS
        columns, rows = image.size[::-1] if lying else image.size
        check_segments_size(path, (rows, columns), image_size)
        _load(image)
        turn = _orientation(image)
        labels = _fit_labels(image if turn is None else image.transpose(turn), height, width, mode, fill)
    if labels is None:
        raise UserError(
            f"{path} does not look like labels (a photo, or edges blurred by JPEG?): give a PNG with one label "
            f"or one flat color for each segment, at most {MAX_LABELS}"
        )
    return labels


def _fit_labels(image: Image.Image, height: int, width: int, mode: Fit, fill: int) -> NDArray[np.int32] | None:
    """The labels of an image [h, w], placed as `fit` places its image; None if they do not look like labels."""
    # Bars are added to the labels: black bars could match one of the colors.
    top, left, rows, columns = (0, 0, height, width)
    if mode == "letterbox":
        top, left, rows, columns = content_box((image.height, image.width), height, width)
    placing: Fit = "crop" if mode == "crop" else "stretch"
    labels = _labels_of(_resize(image, rows, columns, placing, Image.Resampling.NEAREST, None))
    if labels is None or _is_not_labels(labels):
        return None
    framed = np.full((height, width), fill, np.int32)
    framed[top : top + rows, left : left + columns] = labels
    return framed


def _is_not_labels(labels: NDArray[np.int32]) -> bool:
    """Whether there are too many labels, or so many and so scattered that they cannot be segments."""
    count = len(np.unique(labels))
    if count > MAX_LABELS:
        return True
    edges = np.mean(labels[:, 1:] != labels[:, :-1]) if labels.shape[1] > 1 else 0.0
    return count > _PHOTOGRAPH_LABELS and bool(edges > _PHOTOGRAPH_EDGES)


def list_images(directory: Path, *, notify: Notify = warn) -> list[Path]:
    """The images of a directory that `read_image` reads, by their suffixes; hidden files are passed over.

    Args:
      directory: directory of the images.
      notify: called with a line about files with other suffixes; by default, issues a Python warning.

    Returns:
      The paths, sorted; label images, NAME_segments.png, are not among them.

    Raises:
      UserError: there are none, or two names differ only in their suffixes, which the names of results lack.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give a directory of images")
    formats = _formats()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    found, others = folders.list_files(directory, suffixes)
    found = [path for path in found if not path.stem.endswith("_segments")]
    if "HEIF" not in formats and any(f" {suffix}" in others for suffix in _HEIF_SUFFIXES):
        others += f"; {_HEIF_HINT}"
    if not found:
        raise UserError(f"{directory} holds no images ({_READABLE}){others and '; '}{others}")
    if others:
        notify(others)
    seen: dict[str, Path] = {}
    for path in found:
        if path.stem in seen:
            raise UserError(f"{seen[path.stem]} and {path.name} would have the same results: rename one")
        seen[path.stem] = path
    return found
