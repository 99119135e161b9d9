"""What came out of an inversion, for people: pictures, and a report in one HTML file that needs no network."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from samjax.io import sheets
from samjax.io.images import label_colours, to_uint8
from samjax.io.sheets import INK, MUTED, PANEL, Sheet, Uint8

PALETTE: Mapping[str, tuple[int, int, int]] = {
    "W+": (0, 98, 155),
    "F4": (116, 118, 120),
    "F6": (252, 137, 0),
    "F8": (97, 129, 57),
    "F10": (255, 205, 0),
}
"""Colours of the latent layers, as in the authors' figures."""

LAYER_MEANINGS: Mapping[str, str] = {
    "W+": "styles only: edits take full effect, unusual detail is lost",
    "F4": "16 x 16 features: edits stay strong",
    "F6": "32 x 32 features: between the two",
    "F8": "64 x 64 features: little detail is lost",
    "F10": "128 x 128 features: faithful, edits fade",
}
"""What each latent layer is good for, in a few words."""

METHOD_CAPTIONS: Mapping[str, str] = {
    "W+": "most editable, loses detail",
    "F4": "one early feature layer",
    "F6": "one middle feature layer",
    "F8": "one late feature layer",
    "F10": "faithful, edits fade",
    "SAM": "each region its own layer",
}
"""What each way of inverting does, in a few words."""

METRICS: Mapping[str, tuple[str, bool, str]] = {
    "MSE": ("mean squared error", False, "{:.4f}"),
    "PSNR": ("peak signal-to-noise ratio, dB", True, "{:.1f}"),
    "SSIM": ("structural similarity", True, "{:.3f}"),
    "LPIPS": ("perceptual distance", False, "{:.3f}"),
}
"""Name of a metric to: what it is, whether higher is better, and its format."""

Image3 = NDArray[np.floating]
Strength = float | int | str

_OTHER_LAYER = (150, 90, 160)
_BYTES = 4_500_000
_SIDES = (1024, 768, 512, 384, 256, 192)


@dataclasses.dataclass(frozen=True)
class SegmentRow:
    """One segment of the picture and the layer chosen for it.

    Attributes:
      label: its value in the label image.
      name: what it shows, if that is known.
      share: of the picture's area, 0 to 1.
      means: mean predicted error in each layer, in the order of `Result.layers`.
      layer: name of the chosen layer.
    """

    label: int
    name: str | None
    share: float
    means: tuple[float, ...]
    layer: str


@dataclasses.dataclass(frozen=True)
class Result:
    """An inversion and its edits; arrays are NumPy's.

    Attributes:
      name: of the picture.
      image: the picture, [H, W, 3], in [-1, 1].
      segments: label of every pixel, [H, W], integers.
      segment_rows: one for each segment.
      layers: names of the latent layers, the most editable first.
      maps: predicted error in each layer, [L, H, W], 0 or more.
      layer_map: index into `layers` of the layer chosen for every pixel, [H, W].
      threshold: greatest mean error at which a layer is taken for a segment.
      reconstructions: method ("W+", "F10", "SAM") to [H, W, 3], in [-1, 1].
      edits: direction to strength to method to [H, W, 3], in [-1, 1].
      metrics: method to "MSE", "PSNR", "SSIM", "LPIPS" to value.
      losses: method to total loss of every step.
      settings: whatever else tells how the result was made.
    """

    name: str
    image: Image3
    segments: NDArray[np.integer]
    segment_rows: Sequence[SegmentRow]
    layers: Sequence[str]
    maps: NDArray[np.floating]
    layer_map: NDArray[np.integer]
    threshold: float
    reconstructions: Mapping[str, Image3]
    edits: Mapping[str, Mapping[Strength, Mapping[str, Image3]]] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    losses: Mapping[str, Sequence[float]] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.image.shape[:2]
        images = {"image": self.image, **{f"reconstruction {name}": x for name, x in self.reconstructions.items()}}
        for direction, strengths in self.edits.items():
            for strength, methods in strengths.items():
                images |= {f"edit {direction} {strength} {name}": x for name, x in methods.items()}
        for name, image in images.items():
            if image.shape != (*size, 3):
                raise ValueError(f"{name} has shape {list(image.shape)}, not {[*size, 3]}")
        for name, labels in (("segments", self.segments), ("layer_map", self.layer_map)):
            if labels.shape != size or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(f"{name} must hold integers {list(size)}, not {labels.dtype} {list(labels.shape)}")
        if self.maps.shape != (len(self.layers), *size):
            raise ValueError(f"maps have shape {list(self.maps.shape)}, not {[len(self.layers), *size]}")
        if self.layer_map.min() < 0 or self.layer_map.max() >= len(self.layers):
            raise ValueError(f"layer_map must hold indices from 0 to {len(self.layers) - 1}")
        for row in self.segment_rows:
            if row.layer not in self.layers or len(row.means) != len(self.layers):
                raise ValueError(f"the row of segment {row.label} does not fit the layers {', '.join(self.layers)}")


def layer_colour(layer: str) -> tuple[int, int, int]:
    """The palette's colour of a latent layer."""
    return PALETTE.get(layer, _OTHER_LAYER)


def segment_title(row: SegmentRow) -> str:
    """A segment's name, or its number."""
    return row.name or f"segment {row.label}"


def layer_shares(result: Result) -> dict[str, float]:
    """Share of the picture that each layer serves, 0 to 1."""
    counts = np.bincount(np.ravel(result.layer_map), minlength=len(result.layers))
    return {name: float(count) / result.layer_map.size for name, count in zip(result.layers, counts, strict=True)}


def heat_limit(result: Result) -> float:
    """Upper end of the heat maps' common scale: what nearly all pixels stay below, in steps of 0.1."""
    high = float(np.quantile(np.nan_to_num(result.maps), 0.98))
    return max(math.ceil(max(high, result.threshold * 1.2) * 10 - 1e-6) / 10, 0.1)


# --- overlays ---


def _fitted(shape: Sequence[int], width: int, height: int) -> tuple[int, int]:
    """Height and width of a picture of `shape` (rows, columns, …) that fits into `width` x `height`."""
    scale = min(width / shape[1], height / shape[0])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _painted(image: Uint8, labels: NDArray[np.integer], colours: Uint8, regions: NDArray[np.integer]) -> Uint8:
    """`colours[labels]`, shaded by a grey version of `image` [H, W, 3], and white lines where regions meet."""
    height, width = image.shape[:2]
    # At twice the size and then reduced, so that the outlines are smooth.
    labels = sheets.smooth_labels(labels, 2 * height, 2 * width)
    regions = sheets.smooth_labels(regions, 2 * height, 2 * width)
    grey = np.asarray(Image.fromarray(sheets.resize(image, 2 * height, 2 * width)).convert("L"), np.float32)
    dark, light = np.quantile(grey, (0.02, 0.98))
    grey = np.clip((grey - dark) / max(float(light - dark), 1.0), 0, 1)[..., None]
    # From a dark to a light shade of the colour: the hue, by which layers are told apart, stays.
    pure = colours[labels].astype(np.float32)
    mixed = pure * (0.7 + 0.3 * grey) * (1 - 0.35 * grey) + 255 * 0.35 * grey
    mixed[sheets.outlines(regions, max(4, round(width / 110)))] = 255
    return np.array(Image.fromarray(np.rint(mixed).astype(np.uint8)).reduce(2))


def _segment_colours(result: Result) -> dict[int, Uint8]:
    labels = [row.label for row in result.segment_rows]
    labels += [int(label) for label in np.unique(result.segments) if int(label) not in labels]
    return dict(zip(labels, label_colours(len(labels)), strict=True))


def segments_overlay(result: Result, height: int, width: int) -> Uint8:
    """The segments in colours over the grey picture, [height, width, 3], no text."""
    colours = _segment_colours(result)
    labels, index = np.unique(result.segments, return_inverse=True)
    index = index.reshape(result.segments.shape)
    table = np.stack([colours[int(label)] for label in labels])
    return _painted(sheets.resize(to_uint8(result.image), height, width), index, table, index)


def layers_overlay(result: Result, height: int, width: int) -> Uint8:
    """The chosen layers in the palette's colours over the grey picture, [height, width, 3], no text."""
    table = np.array([layer_colour(name) for name in result.layers], np.uint8)
    image = sheets.resize(to_uint8(result.image), height, width)
    return _painted(image, result.layer_map, table, result.segments)


# --- pictures ---

_MARGIN, _GAP = 28, 16


def _percent(share: float) -> str:
    return "under 1%" if 0 < share < 0.005 else f"{share:.0%}"


def _number(metric: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return METRICS[metric][2].format(value) if math.isfinite(value) else "∞"


def draw_segments(result: Result) -> Sheet:
    """See `segments_picture`."""
    height, width = _fitted(result.image.shape, 520, 640)
    cell = max(width, 200)
    rows, legend = sorted(result.segment_rows, key=lambda row: -row.share), 380
    colours = _segment_colours(result)
    content = max(height, 36 * min(len(rows), 8))
    room = (content + 10) // 36
    hidden = len(rows) - (room - 1) if len(rows) > room else 0  # the last line says how many
    rows = rows[: len(rows) - hidden]
    sheet = Sheet(2 * cell + 2 * _GAP + legend + 2 * _MARGIN, content + 40 + 2 * _MARGIN)
    top = _MARGIN + 40
    for column, (title, image) in enumerate(
        (
            ("Input", sheets.resize(to_uint8(result.image), height, width)),
            ("Segments", segments_overlay(result, height, width)),
        )
    ):
        x = _MARGIN + column * (cell + _GAP)
        sheet.text(x, _MARGIN, title, 26, strong=True, width=cell)
        sheet.image(x, top, image)
    x, y = _MARGIN + 2 * (cell + _GAP) + 8, top
    sheet.text(x, _MARGIN, "Share of the picture", 20, MUTED, width=legend)
    for row in rows:
        sheet.panel(x, y, x + 26, y + 26, _colour(colours[row.label]), 5)
        sheet.text(x + 38, y + 1, segment_title(row), 21, width=legend - 150)
        sheet.text(x + legend - 8, y + 1, _percent(row.share), 21, MUTED, align="right")
        y += 36
    if hidden:
        sheet.text(x, y, f"and {hidden} smaller ones", 21, MUTED, width=legend)
    return sheet


def segments_picture(result: Result) -> Uint8:
    """The input, its segments in colours, and a legend with their names and shares; uint8 [h, w, 3]."""
    return draw_segments(result).array()


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high`, at most 8."""
    power = 10 ** math.floor(math.log10(high / 7))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if high / (power * factor) <= 7.001)
    return [step * index for index in range(math.floor(high / step + 1e-6) + 1)]


def draw_invertibility(result: Result) -> Sheet:
    """See `invertibility_picture`."""
    tiles = len(result.layers) + 1
    columns = tiles if tiles <= 4 else 3
    height, width = _fitted(result.image.shape, 400, 480)
    cell, high, step = max(width, 250), heat_limit(result), height + 70
    sheet_width = columns * cell + (columns - 1) * _GAP + 2 * _MARGIN
    sheet = Sheet(sheet_width, math.ceil(tiles / columns) * step + 132 + _MARGIN)
    for tile in range(tiles):
        x, y = _MARGIN + tile % columns * (cell + _GAP), _MARGIN + tile // columns * step
        if tile == 0:
            title, note, image = "Input", "", to_uint8(result.image)
        else:
            title, values = result.layers[tile - 1], result.maps[tile - 1]
            note, image = f"mean {np.nanmean(values):.2f}", sheets.heat(values, high)
        sheet.text(x, y, title, 26, strong=True, width=cell / 2 - 8)
        sheet.text(x + cell, y + 4, note, 21, MUTED, align="right", width=cell / 2 - 8)
        sheet.image(x, y + 38, sheets.resize(image, height, width))
    left, right = _MARGIN, sheet_width - _MARGIN
    top = _MARGIN + math.ceil(tiles / columns) * step - 8
    bar = sheets.heat(np.linspace(0, high, right - left)[None], high)
    sheet.text(left, top, "Error to expect in each layer, pixel by pixel (LPIPS)", 22, width=right - left)
    place = left + min(1.0, result.threshold / high) * (right - left)
    sheet.image(left, top + 62, np.repeat(bar, 26, 0))
    sheet.line(place, top + 54, place, top + 94, INK, 3)
    mark = f"threshold {result.threshold:g}"
    half = sheet.measure(mark, 20) / 2
    sheet.text(min(max(place, left + half), right - half), top + 30, mark, 20, MUTED, align="centre")
    for value in _ticks(high):
        align = "left" if value == 0 else "right" if value > 0.97 * high else "centre"
        sheet.text(left + (right - left) * value / high, top + 96, f"{value:.3g}", 20, MUTED, align=align)
    return sheet


def invertibility_picture(result: Result) -> Uint8:
    """The input and one heat map for each layer, on a common scale with its bar; uint8 [h, w, 3]."""
    return draw_invertibility(result).array()


def draw_layers(result: Result) -> Sheet:
    """See `layers_picture`."""
    height, width = _fitted(result.image.shape, 520, 640)
    shares, legend, cell = layer_shares(result), 420, max(width, 330)
    content = max(height + 40, 40 + len(result.layers) * 92)
    sheet = Sheet(2 * cell + 2 * _GAP + legend + 2 * _MARGIN, content + 2 * _MARGIN)
    top = _MARGIN + 40
    sheet.text(_MARGIN, _MARGIN, "Input", 26, strong=True, width=cell)
    sheet.image(_MARGIN, top, sheets.resize(to_uint8(result.image), height, width))
    x = _MARGIN + cell + _GAP
    sheet.text(x, _MARGIN, "Layer by region", 26, strong=True, width=cell * 0.6 - 8)
    sheet.text(x + cell, _MARGIN + 4, f"threshold {result.threshold:g}", 21, MUTED, align="right", width=cell * 0.4)
    sheet.image(x, top, layers_overlay(result, height, width))
    x, y = x + cell + _GAP + 8, top
    for name in result.layers:
        used = shares[name] > 0
        sheet.panel(x, y, x + 40, y + 40, layer_colour(name), 7)
        sheet.text(x + 54, y, name, 24, INK if used else MUTED, strong=used, width=120)
        share = f"{_percent(shares[name])} of the picture" if used else "not used here"
        sheet.text(x + legend - 8, y + 3, share, 19, MUTED, align="right", width=220)
        sheet.paragraph(x + 54, y + 32, LAYER_MEANINGS.get(name, ""), 19, legend - 66)
        y += 92 + max(0, height - 92 * len(result.layers)) // max(1, len(result.layers))
    return sheet


def layers_picture(result: Result) -> Uint8:
    """The input, the layer of each region in the palette's colours, and a legend; uint8 [h, w, 3]."""
    return draw_layers(result).array()


def _strongest(result: Result, direction: str | None, strength: Strength | None) -> tuple[str, Strength] | None:
    """The edit to show: the one asked for, or the strongest of the first direction; None if there is none."""
    if direction is None:
        direction = next((name for name, strengths in result.edits.items() if strengths), None)
    if direction is None:
        return None
    if strength is None:
        strengths = list(result.edits[direction])
        numbers = [value for value in strengths if not isinstance(value, str)]
        strength = max(numbers, key=abs) if numbers else strengths[-1]
    return direction, strength


def _strength_text(strength: Strength) -> str:
    return strength if isinstance(strength, str) else f"{strength:g}"


def draw_comparison(result: Result, direction: str | None = None, strength: Strength | None = None) -> Sheet:
    """See `comparison_picture`."""
    edit, methods = _strongest(result, direction, strength), list(result.reconstructions)
    height, width = _fitted(result.image.shape, 330, 420)
    cell = max(width, 330)
    step, head, foot = cell + 2 * _GAP, 76, 44
    sheet_width = 2 * _MARGIN + cell + len(methods) * step
    tops = [_MARGIN + head]
    if edit:  # a line above the second row says what it is
        tops.append(tops[0] + height + foot + 22 + 36)
    sheet = Sheet(sheet_width, tops[-1] + height + (foot if edit is None else 40) + _MARGIN)

    def place(column: int) -> int:
        return _MARGIN + column * step

    if "SAM" in methods:
        x = place(1 + methods.index("SAM"))
        sheet.panel(x - 14, _MARGIN - 14, x + cell + 14, sheet.height - 14, PANEL, 14)
    for column, name in enumerate(["Input", *methods]):
        sheet.text(place(column), _MARGIN, name, 28, strong=True, width=cell)
        caption = "the picture to invert" if column == 0 else METHOD_CAPTIONS.get(name, "")
        sheet.text(place(column), _MARGIN + 37, caption, 21, MUTED, width=cell)

    def show(column: int, top: int, image: Uint8) -> None:
        sheet.image(place(column) + (cell - width) // 2, top, sheets.resize(image, height, width))

    show(0, tops[0], to_uint8(result.image))
    sheet.text(place(0), tops[0] + height + 9, "LPIPS: distance, 0 is equal", 21, MUTED, width=cell)
    for column, name in enumerate(methods, 1):
        show(column, tops[0], to_uint8(result.reconstructions[name]))
        lpips = result.metrics.get(name, {}).get("LPIPS")
        if lpips is not None:
            sheet.text(place(column), tops[0] + height + 9, f"LPIPS {_number('LPIPS', lpips)}", 21, width=cell)
    if edit is None:
        return sheet
    direction, strength = edit
    show(0, tops[1], layers_overlay(result, height, width))
    sheet.text(place(0), tops[1] - 34, "Layer of each region in SAM", 22, width=cell)
    x, y = place(0), tops[1] + height + 10
    for name in result.layers:
        sheet.panel(x, y + 2, x + 20, y + 22, layer_colour(name), 4)
        sheet.text(x + 26, y, name, 21, MUTED)
        x += 26 + sheet.measure(name, 21) + 12
    for column, name in enumerate(methods, 1):
        image = result.edits[direction][strength].get(name)
        if image is not None:
            show(column, tops[1], to_uint8(image))
            label = f"Edit: {direction}, strength {_strength_text(strength)}"
            sheet.text(place(column), tops[1] - 34, label, 22, width=cell)
    return sheet


def comparison_picture(result: Result, direction: str | None = None, strength: Strength | None = None) -> Uint8:
    """The input beside every method's reconstruction, with its LPIPS; below, the layers and one edit of each.

    Args:
      result: what to show.
      direction: of the edit; the first one if None.
      strength: of the edit; the strongest if None.

    Returns:
      uint8 [h, w, 3].
    """
    return draw_comparison(result, direction, strength).array()


def draw_edit_strip(result: Result, direction: str, methods: Sequence[str] | None = None) -> Sheet:
    """See `edit_strip`."""
    strengths = result.edits[direction]
    if methods is None:
        methods = [name for name in result.reconstructions if any(name in images for images in strengths.values())]
    height, width = _fitted(result.image.shape, 300, 380)
    cell, side, head = max(width, 150), 150, 84
    sheet_width = 2 * _MARGIN + side + len(strengths) * (cell + _GAP) - _GAP
    row_height = max(height, 130)  # room for the method's name and caption
    sheet = Sheet(max(sheet_width, 480), 2 * _MARGIN + head + len(methods) * (row_height + _GAP) - _GAP)
    sheet.text(_MARGIN, _MARGIN, f"Edit: {direction}", 28, strong=True, width=sheet_width - 2 * _MARGIN)
    for column, (strength, images) in enumerate(strengths.items()):
        x = _MARGIN + side + column * (cell + _GAP)
        sheet.text(x, _MARGIN + 46, f"strength {_strength_text(strength)}", 22, MUTED, width=cell)
        for row, name in enumerate(methods):
            if name in images:
                y = _MARGIN + head + row * (row_height + _GAP)
                sheet.image(x + (cell - width) // 2, y, sheets.resize(to_uint8(images[name]), height, width))
    for row, name in enumerate(methods):
        y = _MARGIN + head + row * (row_height + _GAP)
        sheet.text(_MARGIN, y, name, 28, strong=True, width=side - 14)
        sheet.paragraph(_MARGIN, y + 40, METHOD_CAPTIONS.get(name, ""), 20, side - 14)
    return sheet


def edit_strip(result: Result, direction: str, methods: Sequence[str] | None = None) -> Uint8:
    """One edit at each strength, one row for each method; uint8 [h, w, 3]."""
    return draw_edit_strip(result, direction, methods).array()


def _colour(values: Uint8) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


# --- the report ---


def _data_uri(image: Uint8) -> str:
    stream = io.BytesIO()
    if features.check("webp"):
        Image.fromarray(image).save(stream, "WEBP", quality=92, method=4)
        kind = "webp"
    else:
        Image.fromarray(image).save(stream, "JPEG", quality=92, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _css(colour: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(int(value) for value in colour))


def _ink_on(colour: Sequence[int]) -> str:
    """Black or white, whichever is easier to read on the colour."""
    linear = [(value / 255) ** 2.2 for value in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.18 else "#ffffff"


_LINES = {"W+": "var(--wp)", "F10": "var(--f10)", "SAM": "var(--accent)"}


def _chart(losses: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """Lines of a chart of 640 x 240 units, the loss on a logarithmic scale; None if there is nothing to draw."""
    series = {name: np.asarray(values, np.float64) for name, values in losses.items()}
    series = {name: values for name, values in series.items() if values.size > 1}
    finite = [values[np.isfinite(values) & (values > 0)] for values in series.values()]
    points = np.concatenate([*finite, np.zeros(0)])
    if points.size == 0:
        return None
    low, high = math.log10(points.min()), math.log10(points.max())
    if high - low < 0.05:
        low, high = low - 0.05, high + 0.05
    steps = max(values.size for values in series.values()) - 1
    left, right, top, bottom = 56.0, 632.0, 10.0, 206.0

    def place(value: float) -> float:
        return bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    lines = []
    for name, values in series.items():
        # A line has no more points than a screen can show.
        chosen = np.unique(np.linspace(0, values.size - 1, min(values.size, 400)).astype(int))
        kept = [int(index) for index in chosen if np.isfinite(values[index]) and values[index] > 0]
        path = " ".join(f"{left + index / steps * (right - left):.1f},{place(values[index]):.1f}" for index in kept)
        lines.append({"name": name, "points": path, "colour": _LINES.get(name, "var(--muted)")})
    ticks = [
        {"y": place(value), "text": f"{value:g}"}
        for power in range(math.floor(low), math.ceil(high) + 1)
        for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if low <= math.log10(value) <= high
    ]
    steps_text = [{"x": left + part * (right - left), "text": f"{round(part * steps):,}"} for part in (0, 0.5, 1)]
    return {"lines": lines, "ticks": ticks, "steps": steps_text, "left": left, "right": right, "bottom": bottom}


def _metric_rows(result: Result) -> list[dict[str, Any]]:
    best = {}
    for metric, (_, higher, _) in METRICS.items():
        values = [scores[metric] for scores in result.metrics.values() if math.isfinite(scores.get(metric, math.nan))]
        if len(values) > 1:
            best[metric] = max(values) if higher else min(values)
    return [
        {
            "name": name,
            "cells": [
                {
                    "text": _number(metric, result.metrics.get(name, {}).get(metric)),
                    "best": metric in best and result.metrics.get(name, {}).get(metric) == best[metric],
                }
                for metric in METRICS
            ],
        }
        for name in result.reconstructions
    ]


def _segment_table(result: Result) -> list[dict[str, Any]]:
    colours, high = _segment_colours(result), heat_limit(result)
    rows = []
    for row in sorted(result.segment_rows, key=lambda row: -row.share):
        chosen = list(result.layers).index(row.layer)
        cells = []
        for index, mean in enumerate(row.means):
            state = "chosen" if index == chosen else "above" if mean > result.threshold else "below"
            cells.append({"text": f"{mean:.3f}", "state": state, "bar": f"{min(1, max(0, mean / high)):.1%}"})
        rows.append(
            {
                "name": segment_title(row),
                "colour": _css(_colour(colours[row.label])),
                "share": _percent(row.share),
                "cells": cells,
                "layer": row.layer,
                "last_resort": row.means[chosen] > result.threshold,
            }
        )
    return rows


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _plain_setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain_setting(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain_setting(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _context(result: Result, side: int) -> dict[str, Any]:
    height, width = _fitted(result.image.shape, side, side)
    # Overlays have outlines and want some size; other images are not enlarged.
    overlay = _fitted(result.image.shape, max(512, side // 2), max(512, side // 2))

    def uri(image: Image3) -> str:
        array = to_uint8(image)
        smaller = height < array.shape[0]
        return _data_uri(sheets.resize(array, height, width) if smaller else array)

    high, shares = heat_limit(result), layer_shares(result)
    edits = []
    for direction, strengths in result.edits.items():
        methods = [name for name in result.reconstructions if any(name in images for images in strengths.values())]
        rows = [
            {
                "name": name,
                "caption": METHOD_CAPTIONS.get(name, ""),
                "images": [
                    {"strength": _strength_text(strength), "uri": uri(images[name]) if name in images else None}
                    for strength, images in strengths.items()
                ],
            }
            for name in methods
        ]
        edits.append({"name": direction, "strengths": [_strength_text(s) for s in strengths], "rows": rows})
    layers = [
        {
            "name": name,
            "colour": _css(layer_colour(name)),
            "ink": _ink_on(layer_colour(name)),
            "meaning": LAYER_MEANINGS.get(name, ""),
            "share": _percent(shares[name]),
            "used": shares[name] > 0,
            "count": sum(row.layer == name for row in result.segment_rows),
            "map": _data_uri(_within(sheets.heat(result.maps[index], high), height, width)),
            "mean": f"{np.nanmean(result.maps[index]):.3f}",
        }
        for index, name in enumerate(result.layers)
    ]
    used = [f"{layer['share']} in {layer['name']}" for layer in layers if layer["used"]]
    return {
        "result": result,
        "ratio": f"{result.image.shape[1]} / {result.image.shape[0]}",
        "input": uri(result.image),
        "segments": _data_uri(segments_overlay(result, *overlay)),
        "layer_map": _data_uri(layers_overlay(result, *overlay)),
        "layers": layers,
        "by_layer": {layer["name"]: layer for layer in layers},
        "used": _listed(used),
        "threshold": f"{result.threshold:g}",
        "threshold_place": f"{min(1, result.threshold / high):.2%}",
        "high": f"{high:g}",
        "bar": _data_uri(np.repeat(sheets.heat(np.linspace(0, high, 512)[None], high), 8, 0)),
        "segment_rows": _segment_table(result),
        "methods": [
            {
                "name": name,
                "caption": METHOD_CAPTIONS.get(name, ""),
                "uri": uri(image),
                "lpips": _number("LPIPS", result.metrics.get(name, {}).get("LPIPS")),
            }
            for name, image in result.reconstructions.items()
        ],
        "metrics": [
            {"name": name, "what": what, "better": "higher" if higher else "lower"}
            for name, (what, higher, _) in METRICS.items()
        ],
        "metric_rows": _metric_rows(result) if result.metrics else [],
        "edits": edits,
        "chart": _chart(result.losses) if result.losses else None,
        "settings": {str(key): _plain_setting(value) for key, value in result.settings.items()},
    }


def _within(image: Uint8, height: int, width: int) -> Uint8:
    return sheets.resize(image, height, width) if height < image.shape[0] else image


def render_html(result: Result) -> str:
    """The report: one HTML file without scripts that opens offline, images inside it, at most about 5 MB.

    Images are shown at up to 1,024 px a side, fewer where there are so many that the file would grow too large.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("samjax.io"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    count = 6 + len(result.layers) + len(result.reconstructions)
    count += sum(len(methods) for strengths in result.edits.values() for methods in strengths.values())
    # A pixel takes about a third of a byte; sides that cannot fit are not tried.
    likely = [side for side in _SIDES if side <= max(_SIDES[-1], math.sqrt(4 * _BYTES / count))]
    html = ""
    for side in likely:
        html = template.render(_context(result, side))
        if len(html) <= _BYTES:
            break
    return html
