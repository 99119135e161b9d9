"""Figures of an inversion: its segments, error maps, layers, reconstructions and edits, as images with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samjax.io.images import to_uint8
from samjax.report import sheets
from samjax.report.content import (
    LAYER_MEANINGS,
    METHOD_CAPTIONS,
    Content,
    Strength,
    by_share,
    fitted,
    gray_of,
    heat_limit,
    layer_color,
    layer_shares,
    number,
    percent,
    segment_colors,
    segment_title,
    strength_text,
    strongest_edit,
)
from samjax.report.sheets import INK, MUTED, PANEL, Sheet, Uint8

# --- overlays ---


def _painted(image: Uint8, labels: NDArray[np.integer], colors: Uint8, regions: NDArray[np.integer]) -> Uint8:
    """`colors[labels]`, shaded by a gray version of `image` [H, W, 3], with white lines between `regions`."""
    height, width = image.shape[:2]
    # Drawn at twice the size and reduced, so that the outlines are smooth.
    labels = sheets.smooth_labels(labels, 2 * height, 2 * width)
    regions = sheets.smooth_labels(regions, 2 * height, 2 * width)
    gray = gray_of(sheets.resize(image, 2 * height, 2 * width))[..., None]
    # Only the shade follows the image: layers are told apart by hue.
    pure = colors[labels].astype(np.float32)
    mixed = pure * (0.7 + 0.3 * gray) * (1 - 0.35 * gray) + 255 * 0.35 * gray
    mixed[sheets.outlines(regions, max(4, round(width / 110)))] = 255
    return np.array(Image.fromarray(np.rint(mixed).astype(np.uint8)).reduce(2))


def segments_overlay(content: Content, height: int, width: int) -> Uint8:
    """The image in gray, overlaid with a color per segment; uint8 [height, width, 3], no text."""
    colors = segment_colors(content)
    labels, index = np.unique(content.segments, return_inverse=True)
    index = index.reshape(content.segments.shape)
    table = np.array([colors[int(label)] for label in labels], np.uint8)
    return _painted(sheets.resize(to_uint8(content.image), height, width), index, table, index)


def layers_overlay(content: Content, height: int, width: int) -> Uint8:
    """The image in gray, overlaid with the colors of the chosen layers; uint8 [height, width, 3], no text."""
    table = np.array([layer_color(name) for name in content.layers], np.uint8)
    image = sheets.resize(to_uint8(content.image), height, width)
    return _painted(image, content.layer_map, table, content.segments)


# --- figures ---

_MARGIN, _GAP = 28, 16


def draw_segments(content: Content) -> Sheet:
    """The sheet of `segments_figure`."""
    height, width = fitted(content.image.shape, 520, 640)
    cell = max(width, 200)
    rows, legend = by_share(content), 380
    colors = segment_colors(content)
    body = max(height, 36 * min(len(rows), 8))
    room = (body + 10) // 36
    hidden = len(rows) - (room - 1) if len(rows) > room else 0  # the last line gives their number
    rows = rows[: len(rows) - hidden]
    sheet = Sheet(2 * cell + 2 * _GAP + legend + 2 * _MARGIN, body + 40 + 2 * _MARGIN)
    top = _MARGIN + 40
    for column, (title, image) in enumerate(
        (
            ("Input", sheets.resize(to_uint8(content.image), height, width)),
            ("Segments", segments_overlay(content, height, width)),
        )
    ):
        x = _MARGIN + column * (cell + _GAP)
        sheet.text(x, _MARGIN, title, 26, strong=True, width=cell)
        sheet.image(x, top, image)
    x, y = _MARGIN + 2 * (cell + _GAP) + 8, top
    sheet.text(x, _MARGIN, "Share of the image", 20, MUTED, width=legend)
    for row in rows:
        sheet.panel(x, y, x + 26, y + 26, colors[row.label], 5)
        sheet.text(x + 38, y + 1, segment_title(row), 21, width=legend - 150)
        sheet.text(x + legend - 8, y + 1, percent(row.share), 21, MUTED, align="right")
        y += 36
    if hidden:
        sheet.text(x, y, f"and {hidden} smaller segments", 21, MUTED, width=legend)
    return sheet


def segments_figure(content: Content) -> Uint8:
    """The input, its segments in color, and a legend with their names and shares; uint8 [h, w, 3]."""
    return draw_segments(content).array()


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high`, at most 8."""
    power = 10 ** math.floor(math.log10(high / 7))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if high / (power * factor) <= 7.001)
    return [step * index for index in range(math.floor(high / step + 1e-6) + 1)]


def draw_invertibility(content: Content) -> Sheet:
    """The sheet of `invertibility_figure`."""
    tiles = len(content.layers) + 1
    columns = tiles if tiles <= 4 else 3
    height, width = fitted(content.image.shape, 400, 480)
    cell, high, step = max(width, 250), heat_limit(content), height + 70
    sheet_width = columns * cell + (columns - 1) * _GAP + 2 * _MARGIN
    sheet = Sheet(sheet_width, math.ceil(tiles / columns) * step + 132 + _MARGIN)
    for tile in range(tiles):
        x, y = _MARGIN + tile % columns * (cell + _GAP), _MARGIN + tile // columns * step
        if tile == 0:
            title, note, image = "Input", "", to_uint8(content.image)
        else:
            title, values = content.layers[tile - 1], content.maps[tile - 1]
            note, image = f"mean {np.nanmean(values):.2f}", sheets.heat(values, high)
        sheet.text(x, y, title, 26, strong=True, width=cell / 2 - 8)
        sheet.text(x + cell, y + 4, note, 21, MUTED, align="right", width=cell / 2 - 8)
        sheet.image(x, y + 38, sheets.resize(image, height, width))
    left, right = _MARGIN, sheet_width - _MARGIN
    top = _MARGIN + math.ceil(tiles / columns) * step - 8
    bar = sheets.heat(np.linspace(0, high, right - left)[None], high)
    title = "Error at each pixel if the image is inverted in that layer alone (LPIPS)"
    sheet.text(left, top, title, 22, width=right - left)
    place = left + min(1.0, content.threshold / high) * (right - left)
    sheet.image(left, top + 62, np.repeat(bar, 26, 0))
    sheet.line(place, top + 54, place, top + 94, INK, 3)
    mark = f"threshold {content.threshold:g}"
    half = sheet.measure(mark, 20) / 2
    sheet.text(min(max(place, left + half), right - half), top + 30, mark, 20, MUTED, align="center")
    for value in _ticks(high):
        align = "left" if value == 0 else "right" if value > 0.97 * high else "center"
        sheet.text(left + (right - left) * value / high, top + 96, f"{value:.3g}", 20, MUTED, align=align)
    return sheet


def invertibility_figure(content: Content) -> Uint8:
    """The input and the error map of each layer, with a color bar of their common scale; uint8 [h, w, 3]."""
    return draw_invertibility(content).array()


def draw_layers(content: Content) -> Sheet:
    """The sheet of `layers_figure`."""
    height, width = fitted(content.image.shape, 520, 640)
    shares, legend, cell = layer_shares(content), 420, max(width, 330)
    body = max(height + 40, 40 + len(content.layers) * 92)
    sheet = Sheet(2 * cell + 2 * _GAP + legend + 2 * _MARGIN, body + 2 * _MARGIN)
    top = _MARGIN + 40
    sheet.text(_MARGIN, _MARGIN, "Input", 26, strong=True, width=cell)
    sheet.image(_MARGIN, top, sheets.resize(to_uint8(content.image), height, width))
    x = _MARGIN + cell + _GAP
    sheet.text(x, _MARGIN, "Layer of each segment", 26, strong=True, width=cell * 0.6 - 8)
    sheet.text(x + cell, _MARGIN + 4, f"threshold {content.threshold:g}", 21, MUTED, align="right", width=cell * 0.4)
    sheet.image(x, top, layers_overlay(content, height, width))
    x, y = x + cell + _GAP + 8, top
    for name in content.layers:
        used = shares[name] > 0
        sheet.panel(x, y, x + 40, y + 40, layer_color(name), 7)
        sheet.text(x + 54, y, name, 24, INK if used else MUTED, strong=used, width=120)
        share = f"{percent(shares[name])} of the image" if used else "not used"
        sheet.text(x + legend - 8, y + 3, share, 19, MUTED, align="right", width=220)
        sheet.paragraph(x + 54, y + 32, LAYER_MEANINGS.get(name, ""), 19, legend - 66)
        y += 92 + max(0, height - 92 * len(content.layers)) // max(1, len(content.layers))
    return sheet


def layers_figure(content: Content) -> Uint8:
    """The input, the layer of each segment in the palette's colors, and a legend; uint8 [h, w, 3]."""
    return draw_layers(content).array()


def draw_comparison(content: Content, direction: str | None = None, strength: Strength | None = None) -> Sheet:
    """The sheet of `comparison_figure`."""
    edit, methods = strongest_edit(content, direction, strength), list(content.reconstructions)
    height, width = fitted(content.image.shape, 330, 420)
    cell = max(width, 330)
    step, head, foot = cell + 2 * _GAP, 76, 44
    sheet_width = 2 * _MARGIN + cell + len(methods) * step
    tops = [_MARGIN + head]
    if edit:  # a line above the second row names the edit
        tops.append(tops[0] + height + foot + 22 + 36)
    sheet = Sheet(sheet_width, tops[-1] + height + (foot if edit is None else 40) + _MARGIN)

    def place(column: int) -> int:
        return _MARGIN + column * step

    if "SAM" in methods:
        x = place(1 + methods.index("SAM"))
        sheet.panel(x - 14, _MARGIN - 14, x + cell + 14, sheet.height - 14, PANEL, 14)
    for column, name in enumerate(["Input", *methods]):
        sheet.text(place(column), _MARGIN, name, 28, strong=True, width=cell)
        caption = "the image to invert" if column == 0 else METHOD_CAPTIONS.get(name, "")
        sheet.text(place(column), _MARGIN + 37, caption, 21, MUTED, width=cell)

    def show(column: int, top: int, image: Uint8) -> None:
        sheet.image(place(column) + (cell - width) // 2, top, sheets.resize(image, height, width))

    show(0, tops[0], to_uint8(content.image))
    sheet.text(place(0), tops[0] + height + 9, "LPIPS: lower is better", 21, MUTED, width=cell)
    for column, name in enumerate(methods, 1):
        show(column, tops[0], to_uint8(content.reconstructions[name]))
        lpips = content.metrics.get(name, {}).get("LPIPS")
        if lpips is not None:
            sheet.text(place(column), tops[0] + height + 9, f"LPIPS {number('LPIPS', lpips)}", 21, width=cell)
    if edit is None:
        return sheet
    direction, strength = edit
    show(0, tops[1], layers_overlay(content, height, width))
    sheet.text(place(0), tops[1] - 34, "Layer of each segment in SAM", 22, width=cell)
    x, y = place(0), tops[1] + height + 10
    for name in content.layers:
        sheet.panel(x, y + 2, x + 20, y + 22, layer_color(name), 4)
        sheet.text(x + 26, y, name, 21, MUTED)
        x += 26 + sheet.measure(name, 21) + 12
    for column, name in enumerate(methods, 1):
        image = content.edits[direction][strength].get(name)
        if image is not None:
            show(column, tops[1], to_uint8(image))
            label = f"Edit: {direction}, strength {strength_text(strength)}"
            sheet.text(place(column), tops[1] - 34, label, 22, width=cell)
    return sheet


def comparison_figure(content: Content, direction: str | None = None, strength: Strength | None = None) -> Uint8:
    """The input beside the reconstruction of each method, with its LPIPS; below, the layers and an edit by each method.

    Args:
      content: the content to show.
      direction: direction of the edit; by default the first.
      strength: strength of the edit; by default the greatest.

    Returns:
      uint8 [h, w, 3].
    """
    return draw_comparison(content, direction, strength).array()


def draw_edit_strip(content: Content, direction: str, methods: Sequence[str] | None = None) -> Sheet:
    """The sheet of `edit_strip`."""
    strengths = content.edits[direction]
    if methods is None:
        methods = [name for name in content.reconstructions if any(name in images for images in strengths.values())]
    height, width = fitted(content.image.shape, 300, 380)
    cell, side, head = max(width, 150), 150, 84
    sheet_width = 2 * _MARGIN + side + len(strengths) * (cell + _GAP) - _GAP
    row_height = max(height, 130)  # room for the method's name and caption
    sheet = Sheet(max(sheet_width, 480), 2 * _MARGIN + head + len(methods) * (row_height + _GAP) - _GAP)
    sheet.text(_MARGIN, _MARGIN, f"Edit: {direction}", 28, strong=True, width=sheet_width - 2 * _MARGIN)
    for column, (strength, images) in enumerate(strengths.items()):
        x = _MARGIN + side + column * (cell + _GAP)
        sheet.text(x, _MARGIN + 46, f"strength {strength_text(strength)}", 22, MUTED, width=cell)
        for row, name in enumerate(methods):
            if name in images:
                y = _MARGIN + head + row * (row_height + _GAP)
                sheet.image(x + (cell - width) // 2, y, sheets.resize(to_uint8(images[name]), height, width))
    for row, name in enumerate(methods):
        y = _MARGIN + head + row * (row_height + _GAP)
        sheet.text(_MARGIN, y, name, 28, strong=True, width=side - 14)
        sheet.paragraph(_MARGIN, y + 40, METHOD_CAPTIONS.get(name, ""), 20, side - 14)
    return sheet


def edit_strip(content: Content, direction: str, methods: Sequence[str] | None = None) -> Uint8:
    """One direction at each strength, with a row for each method; uint8 [h, w, 3]."""
    return draw_edit_strip(content, direction, methods).array()
