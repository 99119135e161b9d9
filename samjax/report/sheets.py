"""Drawing figures with Pillow: a sheet for images and text, a color scale, and smooth outlines of label images."""

from __future__ import annotations

import math
import unicodedata
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from samjax.io.images import oklch_to_srgb

Uint8 = NDArray[np.uint8]
Color = tuple[int, int, int]

INK, MUTED, LINE, PAPER, PANEL = (27, 31, 36), (96, 103, 112), (214, 218, 224), (255, 255, 255), (237, 243, 251)

# Pillow's built-in font has few characters beyond ASCII, but it has these.
_DRAWN = frozenset("·°…“”’")
_SPELLED = {"–": "-", "—": "-", "−": "-", "×": "x", "≤": "<=", "≥": ">=", "→": "->", "ß": "ss", "ø": "o", "Ø": "O"}


class Box(NamedTuple):
    """Bounding box of a "text" or "image" on a sheet, in pixels; right and bottom are exclusive."""

    kind: str
    left: float
    top: float
    right: float
    bottom: float


def printable(text: str) -> str:
    """`text` in the characters of Pillow's built-in font: accents are dropped, others are spelled out or become "?"."""
    shown = []
    for letter in " ".join(text.split()):
        known = letter if letter in _DRAWN else _SPELLED.get(letter)
        for part in known or unicodedata.normalize("NFKD", letter):
            if part.isascii() or part in _DRAWN:
                shown.append(part if part.isprintable() else "?")
            elif not unicodedata.combining(part):
                shown.append("?")
    return "".join(shown)


def heat(values: ArrayLike, high: float) -> Uint8:
    """Maps values from 0 to `high` to colors from dark blue through red to light yellow, uint8 [..., 3].

    Lightness rises evenly (in Oklch), so that the scale can be read in grayscale and by color-blind readers.
    """
    ramp = np.linspace(0, 1, 256)
    chroma = 0.08 + 0.11 * np.sin(np.pi * ramp) ** 0.7
    table = oklch_to_srgb(np.stack([0.22 + 0.71 * ramp, chroma, np.deg2rad(280 + 180 * ramp)], -1))
    index = np.nan_to_num(np.asarray(values, np.float64) / high, nan=1.0)
    return table[np.rint(np.clip(index, 0, 1) * 255).astype(np.int32)]


def resize(image: Uint8, height: int, width: int) -> Uint8:
    """Resizes `image` [h, w, 3]: bicubic when enlarging, Lanczos when reducing."""
    if image.shape[:2] == (height, width):
        return image
    enlarged = height * width > image.shape[0] * image.shape[1]
    filter_ = Image.Resampling.BICUBIC if enlarged else Image.Resampling.LANCZOS
    return np.array(Image.fromarray(image).resize((width, height), filter_))


def smooth_labels(labels: NDArray[np.integer], height: int, width: int) -> NDArray[np.int32]:
    """Resizes a label image [h, w] with smooth outlines rather than the staircase of nearest neighbors."""
    scale_y, scale_x = height / labels.shape[0], width / labels.shape[1]
    margin = 3 + math.ceil(4 * max(1.0, 1 / scale_y, 1 / scale_x))  # reach of the filters around a pixel
    best = np.zeros((height, width), np.float32)
    chosen = np.full((height, width), labels.flat[0], np.int32)
    for label in np.unique(labels):
        # Only around the label: there can be hundreds.
        inside = labels == label
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        y0, x0 = max(0, int(rows[0]) - 2 * margin), max(0, int(columns[0]) - 2 * margin)
        mask = Image.fromarray(inside[y0 : rows[-1] + 1 + 2 * margin, x0 : columns[-1] + 1 + 2 * margin])
        # Rounds off steps of one pixel, but keeps lines of one pixel.
        mask = mask.convert("L").filter(ImageFilter.GaussianBlur(0.7))
        top, left = (
            max(0, math.floor((rows[0] - margin) * scale_y)),
            max(0, math.floor((columns[0] - margin) * scale_x)),
        )
        bottom = min(height, math.ceil((rows[-1] + 1 + margin) * scale_y))
        right = min(width, math.ceil((columns[-1] + 1 + margin) * scale_x))
        box = (left / scale_x - x0, top / scale_y - y0, right / scale_x - x0, bottom / scale_y - y0)
        box = (box[0], box[1], min(box[2], mask.width), min(box[3], mask.height))
        part = mask.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box=box)
        cover, area = np.asarray(part, np.float32), (slice(top, bottom), slice(left, right))
        better = cover > best[area]
        best[area][better], chosen[area][better] = cover[better], label
    return chosen


def outlines(labels: NDArray[np.integer], thickness: int) -> NDArray[np.bool_]:
    """Boundaries between labels [H, W], as bands about `thickness` pixels wide (at least 2)."""
    from skimage.morphology import isotropic_dilation
    from skimage.segmentation import find_boundaries

    edges = find_boundaries(labels, mode="thick")
    return isotropic_dilation(edges, thickness / 2 - 1) if edges.any() else edges  # undefined for an empty image


class Sheet:
    """A white canvas for text and images, in pixels from the upper left corner.

    Attributes:
      width, height: size in pixels.
      boxes: bounding boxes of everything drawn so far.
    """

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.boxes: list[Box] = []
        self._image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def _font(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size=size)
        return self._fonts[size]

    def measure(self, text: str, size: int) -> float:
        """Width of `text` in pixels."""
        return self._font(size).getlength(printable(text))

    def shorten(self, text: str, size: int, width: float) -> str:
        """`text`, cut with an ellipsis where it is wider than `width` pixels."""
        text = printable(text)
        if self.measure(text, size) <= width:
            return text
        while text and self.measure(text + "…", size) > width:
            text = text[:-1]
        return text.rstrip() + "…"

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int,
        color: Color = INK,
        *,
        width: float | None = None,
        align: Literal["left", "center", "right"] = "left",
        strong: bool = False,
    ) -> None:
        """Draws a line of text below `y`, cut to `width`; by `align`, `x` is its left edge, middle or right edge."""
        font = self._font(size)
        text = printable(text) if width is None else self.shorten(text, size, width)
        anchor = {"left": "la", "center": "ma", "right": "ra"}[align]
        # The font has no bold weight: the text is drawn twice, slightly apart.
        for shift in (0.0, 0.04 * size) if strong else (0.0,):
            self._draw.text((x + shift, y), text, fill=color, font=font, anchor=anchor)
        if text:
            self.boxes.append(Box("text", *self._draw.textbbox((x, y), text, font=font, anchor=anchor)))

    def paragraph(self, x: float, y: float, text: str, size: int, width: float) -> float:
        """Draws text wrapped to `width`; returns the `y` of the line after it."""
        line = ""
        for word in printable(text).split():
            if line and self.measure(f"{line} {word}", size) > width:
                self.text(x, y, line, size, MUTED, width=width)
                y, line = y + size * 1.3, word
            else:
                line = f"{line} {word}".strip()
        self.text(x, y, line, size, MUTED, width=width)
        return y + size * 1.3

    def image(self, x: int, y: int, image: Uint8) -> None:
        """Draws `image` [h, w, 3] with its upper left corner at (x, y)."""
        height, width = image.shape[:2]
        self._image.paste(Image.fromarray(image), (x, y))
        self.boxes.append(Box("image", x, y, x + width, y + height))

    def panel(self, left: float, top: float, right: float, bottom: float, color: Color, radius: float = 0) -> None:
        """Draws a filled rectangle with corners of `radius` pixels."""
        if radius == 0:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill=color)
            return
        # Pillow does not antialias: draw at four times the size and reduce.
        scale, width, height = 4, round(right - left), round(bottom - top)
        mask = Image.new("L", (width * scale, height * scale))
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), radius * scale, fill=255)
        self._image.paste(color, (round(left), round(top)), mask.reduce(scale))

    def line(self, x0: float, y0: float, x1: float, y1: float, color: Color = LINE, width: int = 1) -> None:
        """Draws a straight line."""
        self._draw.line((x0, y0, x1, y1), fill=color, width=width)

    def array(self) -> Uint8:
        """The sheet as an image, uint8 [H, W, 3]."""
        return np.array(self._image)
