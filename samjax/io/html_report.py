"""The report: what came out of an inversion in one HTML file that needs no network, to be looked at and operated."""

from __future__ import annotations

import base64
import bisect
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image, ImageFilter, features

from samjax.io import sheets
from samjax.io.images import to_uint8
from samjax.io.results import (
    LAYER_MEANINGS,
    METHOD_CAPTIONS,
    METRICS,
    Result,
    admits,
    by_share,
    fitted,
    grey_of,
    heat_limit,
    layer_colour,
    layers_at,
    number,
    percent,
    segment_colours,
    segment_title,
    shown_thresholds,
    strength_text,
    strongest_edit,
)
from samjax.io.sheets import Uint8

_BYTES = 4_500_000
_SIDES = (1024, 768, 512, 384, 256, 192)
_LINES: Mapping[str, tuple[str, str]] = {
    "W+": ("var(--wp)", "7 4"),
    "F10": ("var(--f10)", "2 3"),
    "SAM": ("var(--accent)", "none"),
}
"""Colour and dashes of a method's loss."""


def css(colour: Sequence[int]) -> str:
    """A colour [3], 0 to 255, as "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*(int(value) for value in colour))


def ink_on(colour: Sequence[int]) -> str:
    """Black or white, whichever is easier to read on the colour."""
    linear = [(value / 255) ** 2.2 for value in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.18 else "#ffffff"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# --- pictures: each is in the file once, and shown by reference ---


def _data_uri(image: Uint8) -> str:
    stream = io.BytesIO()
    if features.check("webp"):
        Image.fromarray(image).save(stream, "WEBP", quality=92, method=4)
        kind = "webp"
    else:
        Image.fromarray(image).save(stream, "JPEG", quality=92, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


class _Pictures:
    """The pictures of a page; those that are equal are one."""

    def __init__(self) -> None:
        self._images: dict[str, Uint8] = {}

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image: NDArray[Any]) -> str:
        """The identifier by which the page shows a picture [H, W, 3]: uint8, or floating point in [-1, 1]."""
        array = image if image.dtype == np.uint8 else to_uint8(image)
        name = f"p{hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
        self._images.setdefault(name, array)
        return name

    def uris(self, side: int) -> dict[str, str]:
        """Every picture by its identifier, reduced to `side` px where it is larger."""
        uris = {}
        for name, image in self._images.items():
            height, width = fitted(image.shape, side, side)
            uris[name] = _data_uri(sheets.resize(image, height, width) if height < image.shape[0] else image)
        return uris


def _outline(inside: NDArray[np.bool_]) -> str:
    """The borders of a region [H, W] as an SVG path in pixels, smooth, to a third of a pixel."""
    from skimage import measure  # slow to import, and needed here only

    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if rows.size == 0:
        return ""
    # Beyond the picture's edge a region goes on, so that smoothing does not round it there.
    margin = 4
    part = np.pad(inside, margin, mode="edge")[rows[0] : rows[-1] + 1 + 2 * margin]
    part = part[:, columns[0] : columns[-1] + 1 + 2 * margin]
    smooth = np.asarray(Image.fromarray(part).convert("L").filter(ImageFilter.GaussianBlur(0.7)), np.float32) / 255
    if smooth.max() <= 0.5:
        smooth = part.astype(np.float32)  # a speck, which smoothing would take away
    loops = measure.find_contours(np.pad(smooth, 1), 0.5)
    corner = np.array([rows[0], columns[0]]) - margin - 0.5
    paths = []
    for loop in loops:
        points = measure.approximate_polygon(loop + corner, 0.33)[:-1]
        if len(points) > 2:
            paths.append("M" + " ".join(f"{x:.1f},{y:.1f}" for y, x in points) + "Z")
    return "".join(paths)


# --- what the page says ---


def _loss_chart(losses: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """Lines of a chart of 100 x 100 units, the loss on a logarithmic scale; None if there is nothing to draw."""
    series = {name: np.asarray(values, np.float64) for name, values in losses.items()}
    drawn = {name: np.isfinite(values) & (values > 0) for name, values in series.items()}
    series = {name: values for name, values in series.items() if values.size > 1 and drawn[name].any()}
    if not series:
        return None
    points = np.concatenate([values[drawn[name]] for name, values in series.items()])
    powers = range(math.floor(math.log10(points.min())), math.ceil(math.log10(points.max())) + 2)
    round_numbers = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(0, bisect.bisect_right(round_numbers, points.min()) - 1)
    last = max(first + 1, bisect.bisect_left(round_numbers, points.max()))
    low, high = math.log10(round_numbers[first]), math.log10(round_numbers[last])
    # Over many powers of ten, every third number, which is such a power, or fewer still.
    spacing = 1 if last - first <= 10 else 3 * math.ceil((last - first) / 30)
    ticks = [round_numbers[index] for index in range(first, last + 1) if index % spacing == 0]
    steps = max(values.size for values in series.values()) - 1

    def place(value: float) -> float:
        return 100 * (high - math.log10(value)) / (high - low)

    lines = []
    for name, values in series.items():
        # A line has no more points than a screen can show.
        indices = np.flatnonzero(drawn[name])
        kept = indices[np.unique(np.linspace(0, indices.size - 1, min(indices.size, 400)).astype(int))].tolist()
        colour, dashes = _LINES.get(name, ("var(--muted)", "none"))
        lines.append(
            {
                "name": name,
                "path": " ".join(f"{100 * index / steps:.2f},{place(float(values[index])):.2f}" for index in kept),
                "points": [[index, float(f"{values[index]:.3g}")] for index in kept],
                "colour": colour,
                "dashes": dashes,
            }
        )
    return {
        "lines": lines,
        "ticks": [{"y": place(value), "text": f"{value:g}"} for value in ticks],
        "steps": steps,
        "marks": [f"{round(part * steps):,}" for part in (0, 0.5, 1)],
    }


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
                    "text": number(metric, result.metrics.get(name, {}).get(metric)),
                    "best": metric in best and result.metrics.get(name, {}).get(metric) == best[metric],
                }
                for metric in METRICS
            ],
        }
        for name in result.reconstructions
    ]


def _segment_rows(result: Result) -> list[dict[str, Any]]:
    """The segments, the largest first: what the table says, and their outlines."""
    colours, high = segment_colours(result), heat_limit(result)
    rows = []
    for row in by_share(result):
        chosen = list(result.layers).index(row.layer)
        cells, admitted = [], admits(result.threshold, row.means)
        for index, mean in enumerate(row.means):
            known = math.isfinite(mean)
            cells.append(
                {
                    "mean": mean if known else "Infinity",
                    "text": f"{mean:.3f}" if known else "–",
                    "state": "chosen" if index == chosen else "below" if admitted[index] else "above",
                    "bar": f"{min(1, max(0, mean / high)) if known else 1:.1%}",
                }
            )
        rows.append(
            {
                "name": segment_title(row),
                "colour": css(colours[row.label]),
                "outline": _outline(result.segments == row.label),
                "share": percent(row.share),
                "cells": cells,
                "layer": chosen,
                "forced": row.forced,
                "last_resort": not admitted[chosen] and not row.forced,
            }
        )
    return rows


def _threshold_states(result: Result, pictures: _Pictures) -> list[dict[str, Any]]:
    """What the layers are at each threshold: of every segment in the table's order, and the shares of each."""
    high, shares = heat_limit(result), [row.share for row in by_share(result)]
    labels = [row.label for row in by_share(result)]
    sweep = dict(result.sweep)
    if sweep and "SAM" in result.reconstructions:
        lpips = result.metrics.get("SAM", {}).get("LPIPS", math.nan)
        sweep.setdefault(result.threshold, (result.reconstructions["SAM"], lpips))
    states = []
    for threshold in shown_thresholds(result):
        taken = dict(zip((row.label for row in result.segment_rows), layers_at(result, threshold), strict=True))
        taken = [taken[label] for label in labels]
        served = []
        for name in result.layers:
            count, share = taken.count(name), math.fsum(s for s, t in zip(shares, taken, strict=True) if t == name)
            text = f"{percent(share)} of the picture, {count} segment{'' if count == 1 else 's'}"
            served.append(
                {
                    "name": name,
                    "share": share,
                    "percent": percent(share),
                    "used": count > 0,
                    "text": text if count else "not used here",
                }
            )
        image, lpips = sweep.get(threshold, (None, None))
        states.append(
            {
                "value": threshold,
                "text": f"{threshold:.4g}",
                "own": threshold == result.threshold,
                "place": f"{min(1, max(0, threshold / high)):.2%}",
                "layers": [list(result.layers).index(name) for name in taken],
                "served": served,
                "summary": _listed([f"{s['percent']} in {s['name']}" for s in served if s["used"]] or ["nothing"]),
                "picture": None if image is None else pictures.add(image),
                "lpips": None if lpips is None else number("LPIPS", lpips),
            }
        )
    return states


def _edits(result: Result, pictures: _Pictures) -> list[dict[str, Any]]:
    edits = []
    for direction, strengths in result.edits.items():
        strongest = strongest_edit(result, direction, None) if strengths else None
        if strongest is None:
            continue
        methods = [name for name in result.reconstructions if any(name in images for images in strengths.values())]
        plain: Mapping[str, Any] = strengths.get(0, {})
        edits.append(
            {
                "name": direction,
                "strengths": [strength_text(strength) for strength in strengths],
                "start": list(strengths).index(strongest[1]),
                "rows": [
                    {
                        "name": name,
                        "caption": METHOD_CAPTIONS.get(name, ""),
                        "unedited": pictures.add(plain.get(name, result.reconstructions[name])),
                        "pictures": [pictures.add(x[name]) if name in x else None for x in strengths.values()],
                    }
                    for name in methods
                ],
            }
        )
    return edits


def _methods(result: Result, pictures: _Pictures) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "caption": METHOD_CAPTIONS.get(name, ""),
            "picture": pictures.add(image),
            "lpips": number("LPIPS", result.metrics.get(name, {}).get("LPIPS")),
            "shown": name == ("SAM" if "SAM" in result.reconstructions else list(result.reconstructions)[-1]),
        }
        for name, image in result.reconstructions.items()
    ]


def _plain_setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain_setting(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain_setting(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _context(result: Result, pictures: _Pictures) -> dict[str, Any]:
    """All that the template needs but the pictures themselves, which it names only."""
    high = heat_limit(result)
    grey = np.repeat(np.rint(255 * grey_of(to_uint8(result.image)))[..., None], 3, -1).astype(np.uint8)
    states = _threshold_states(result, pictures)
    chart = _loss_chart(result.losses) if result.losses else None
    return {
        "result": result,
        "height": result.image.shape[0],
        "width": result.image.shape[1],
        "input": pictures.add(result.image),
        "grey": pictures.add(grey),
        "layers": [
            {
                "name": name,
                "colour": css(layer_colour(name)),
                "ink": ink_on(layer_colour(name)),
                "meaning": LAYER_MEANINGS.get(name, ""),
                "map": pictures.add(sheets.heat(result.maps[index], high)),
                "mean": f"{np.nanmean(result.maps[index]):.3f}",
            }
            for index, name in enumerate(result.layers)
        ],
        "thresholds": states,
        "own": next(index for index, state in enumerate(states) if state["own"]),
        "swept": bool(result.sweep),
        "high": f"{high:g}",
        "scale": ", ".join(css(colour) for colour in sheets.heat(np.linspace(0, high, 33), high)),
        "segment_rows": _segment_rows(result),
        "methods": _methods(result, pictures),
        "metrics": [
            {"name": name, "what": what, "better": "higher" if higher else "lower"}
            for name, (what, higher, _) in METRICS.items()
        ],
        "metric_rows": _metric_rows(result) if result.metrics else [],
        "edits": _edits(result, pictures),
        "chart": chart,
        "settings": {str(key): _plain_setting(value) for key, value in result.settings.items()},
        "data": {
            "layers": list(result.layers),
            "thresholds": states,
            "losses": [{"name": line["name"], "points": line["points"]} for line in chart["lines"]] if chart else [],
        },
    }


def _source(environment: jinja2.Environment, name: str) -> Markup:
    """One of our own files as it is, with the line ends by which a browser computes its digest."""
    assert environment.loader is not None
    return Markup("\n".join(environment.loader.get_source(environment, name)[0].splitlines()))


def render_html(result: Result) -> str:
    """The report: one HTML file that opens offline, images inside it, at most about 5 MB.

    Images are shown at up to 1,024 px a side, fewer where there are so many that the file would grow too large. The
    page's only program is its own, which its security policy names by digest; without it everything is shown at once.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("samjax.io"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    script = _source(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    pictures = _Pictures()
    context = _context(result, pictures)
    # A pixel takes about a third of a byte; sides that cannot fit are not tried.
    likely = [side for side in _SIDES if side <= max(_SIDES[-1], math.sqrt(4 * _BYTES / len(pictures)))]
    html = ""
    for side in likely:
        html = template.render(
            context,
            pictures=pictures.uris(side),
            style=_source(environment, "report.css"),
            script=script,
            digest=digest,
        )
        if len(html) <= _BYTES:
            break
    return html
