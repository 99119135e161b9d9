"""Figures of a training run: true and predicted maps, pairs of images, and curves of its metrics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samjax.io.images import to_uint8
from samjax.report.sheets import INK, LINE, MUTED, Sheet, heat, resize

Uint8 = NDArray[np.uint8]

_EDGE, _GAP, _SMALL, _LARGE = 24, 10, 15, 20
_TRAIN, _VAL = (150, 170, 195), (176, 58, 46)


def maps_figure(examples: Sequence[tuple[np.ndarray, ...]], latent_names: Sequence[str]) -> Uint8:
    """Images, each with the true error map of each layer above the predicted one.

    Args:
      examples: (image [h, w, 3] in [-1, 1], predicted maps [L, h, w], true maps [L, h, w]) for each row.
      latent_names: names of the L layers.

    Returns:
      uint8 [H, W, 3]; all maps share one color scale.
    """
    height = 128
    width = round(height * examples[0][0].shape[1] / examples[0][0].shape[0])
    high = max(float(np.max(true)) for _, _, true in examples) or 1.0
    side = 90
    step = width + _GAP
    row = 2 * height + 3 * _GAP
    sheet = Sheet(2 * _EDGE + side + step * (1 + len(latent_names)), 2 * _EDGE + 34 + row * len(examples) + 24)
    for i, name in enumerate(("Image", *latent_names)):
        sheet.text(_EDGE + side + i * step, _EDGE, name, _LARGE, strong=True)
    for r, (image, predicted, true) in enumerate(examples):
        top = _EDGE + 34 + r * row
        sheet.image(_EDGE + side, top, resize(to_uint8(image), height, width))
        for j, (label, maps) in enumerate((("true", true), ("predicted", predicted))):
            y = top + j * (height + _GAP)
            sheet.text(_EDGE, y + height // 2 - 8, label, _SMALL, MUTED)
            for i, one in enumerate(maps):
                sheet.image(_EDGE + side + (i + 1) * step, y, resize(heat(one, high), height, width))
    sheet.text(
        _EDGE + side, sheet.height - _EDGE - 10, f"LPIPS error, from 0 (dark) to {high:.2f} (light)", _SMALL, MUTED
    )
    return sheet.array()


def pairs_figure(first: np.ndarray, second: np.ndarray, names: tuple[str, str], height: int = 160) -> Uint8:
    """Two rows of images, each image of `first` above its counterpart in `second`.

    Args:
      first: images [N, h, w, 3] in [-1, 1].
      second: images [N, h, w, 3] in [-1, 1].
      names: titles of the two rows.
      height: height in pixels of each image in the figure.

    Returns:
      uint8 [H, W, 3].
    """
    width = round(height * first.shape[2] / first.shape[1])
    side = 130
    sheet = Sheet(2 * _EDGE + side + (width + _GAP) * len(first) - _GAP, 2 * _EDGE + 2 * height + _GAP)
    for row, (name, images) in enumerate(zip(names, (first, second), strict=True)):
        y = _EDGE + row * (height + _GAP)
        sheet.text(_EDGE, y + height // 2 - 8, name, _SMALL, MUTED)
        for i, image in enumerate(images):
            sheet.image(_EDGE + side + i * (width + _GAP), y, resize(to_uint8(image), height, width))
    return sheet.array()


def curve_figure(rows: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, str, str]]) -> Uint8:
    """Curves of metrics over the steps of a training run, on logarithmic scales.

    Args:
      rows: metrics by step ("step" and their names), as `samjax.training.checkpoints.Log` holds them.
      panels: (title, name of the training metric, name of the validation metric) for each panel.

    Returns:
      uint8 [H, W, 3].
    """
    width, height, left = 900, 260, 80
    sheet = Sheet(width, 2 * _EDGE + len(panels) * (height + 60))
    last = max((row["step"] for row in rows), default=1)
    for p, (title, *names) in enumerate(panels):
        top = _EDGE + p * (height + 60)
        sheet.text(left, top, title, _LARGE, strong=True)
        series = [[(row["step"], row[name]) for row in rows if row.get(name) is not None] for name in names]
        values = [v for points in series for _, v in points if v > 0 and math.isfinite(v)]
        if not values:
            continue
        low, high = math.floor(math.log10(min(values)) * 4) / 4, math.ceil(math.log10(max(values)) * 4) / 4
        high = max(high, low + 0.25)
        y0, y1 = top + 40, top + height
        place = lambda v: y1 - (math.log10(max(v, 1e-12)) - low) / (high - low) * (y1 - y0)  # noqa: B023, E731
        for i in range(5):
            value = 10 ** (low + (high - low) * i / 4)
            y = place(value)
            sheet.line(left, y, width - _EDGE, y, LINE)
            sheet.text(left - 10, y - 8, f"{value:.2g}", _SMALL, MUTED, align="right")
        for points, color, thick in zip(series, (_TRAIN, _VAL), (2, 3), strict=True):
            at = [(left + step / last * (width - _EDGE - left), place(v)) for step, v in points if math.isfinite(v)]
            for (xa, ya), (xb, yb) in itertools.pairwise(at):
                sheet.line(xa, ya, xb, yb, color, thick)
        for i, (text, color) in enumerate((("training", _TRAIN), ("validation", _VAL))):
            x = width - _EDGE - 230 + i * 110
            sheet.panel(x, top + 6, x + 12, top + 18, color)
            sheet.text(x + 18, top + 3, text, _SMALL, INK)
        sheet.text(width - _EDGE, y1 + 8, f"step {last:,}", _SMALL, MUTED, align="right")
        sheet.text(left, y1 + 8, "step 0", _SMALL, MUTED)
    return sheet.array()
