"""The report of an inversion: a single interactive HTML file that works offline."""

from __future__ import annotations

import base64
import bisect
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, features

from samjax.io.images import to_uint8
from samjax.report import sheets
from samjax.report.content import (
    LAYER_MEANINGS,
    METHOD_CAPTIONS,
    METRICS,
    Content,
    admits,
    by_share,
    fitted,
    gray_of,
    heat_limit,
    layer_color,
    layers_at,
    number,
    percent,
    segment_colors,
    segment_title,
    shown_thresholds,
    strength_text,
    strongest_edit,
)
from samjax.report.sheets import Uint8

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

_BYTES = 4_500_000
_SIDES = (1024, 768, 512, 384, 256, 192)
_LINES: Mapping[str, tuple[str, str]] = {
    "W+": ("var(--wp)", "7 4"),
    "F10": ("var(--f10)", "2 3"),
    "SAM": ("var(--accent)", "none"),
}
"""Color and dash pattern of a method's curve."""


def css(color: Sequence[int]) -> str:
    """A color (red, green, blue; 0 to 255) as "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*(int(value) for value in color))


def ink_on(color: Sequence[int]) -> str:
    """Black or white, whichever is easier to read on `color`."""
    linear = [(value / 255) ** 2.2 for value in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.18 else "#ffffff"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# --- images: each is in the file once, and shown by reference ---


def _data_uri(image: Uint8) -> str:
    stream = io.BytesIO()
    if features.check("webp"):
        Image.fromarray(image).save(stream, "WEBP", quality=92, method=4)
        kind = "webp"
    else:
        Image.fromarray(image).save(stream, "JPEG", quality=92, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


class _Images:
    """The images of a page; equal images are stored once."""

    def __init__(self) -> None:
        self._images: dict[str, Uint8] = {}

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image: NDArray[Any]) -> str:
        """Adds an image [H, W, 3], uint8 or floats in [-1, 1]; returns its identifier in the page."""
        array = image if image.dtype == np.uint8 else to_uint8(image)
        name = f"p{hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
        self._images.setdefault(name, array)
        return name

    def uris(self, side: int) -> dict[str, str]:
        """Identifier to data URI of every image, reduced to `side` px where larger."""
        uris = {}
        for name, image in self._images.items():
            height, width = fitted(image.shape, side, side)
            uris[name] = _data_uri(sheets.resize(image, height, width) if height < image.shape[0] else image)
        return uris


def _outline(inside: NDArray[np.bool_]) -> str:
    """The outline of a region [H, W] as a smooth SVG path in pixels, accurate to a third of a pixel."""
    from skimage import measure  # slow to import

    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if rows.size == 0:
        return ""
    # Continue the region beyond the image, so that smoothing does not round it at the border.
    margin = 4
    part = np.pad(inside, margin, mode="edge")[rows[0] : rows[-1] + 1 + 2 * margin]
    part = part[:, columns[0] : columns[-1] + 1 + 2 * margin]
    smooth = np.asarray(Image.fromarray(part).convert("L").filter(ImageFilter.GaussianBlur(0.7)), np.float32) / 255
    if smooth.max() <= 0.5:
        smooth = part.astype(np.float32)  # a speck, which smoothing would remove
    loops = measure.find_contours(np.pad(smooth, 1), 0.5)
    corner = np.array([rows[0], columns[0]]) - margin - 0.5
    paths = []
    for loop in loops:
        points = measure.approximate_polygon(loop + corner, 0.33)[:-1]
        if len(points) > 2:
            paths.append("M" + " ".join(f"{x:.1f},{y:.1f}" for y, x in points) + "Z")
    return "".join(paths)


# --- the data of the page ---


def _loss_chart(losses: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """Curves in a chart of 100 x 100 units, on a logarithmic scale; None if there is nothing to draw."""
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
    # Over many powers of ten, label only those powers, or fewer.
    spacing = 1 if last - first <= 10 else 3 * math.ceil((last - first) / 30)
    ticks = [round_numbers[index] for index in range(first, last + 1) if index % spacing == 0]
    steps = max(values.size for values in series.values()) - 1

    def place(value: float) -> float:
        return 100 * (high - math.log10(value)) / (high - low)

    lines = []
    for name, values in series.items():
        # No more points than a screen can show.
        indices = np.flatnonzero(drawn[name])
        kept = indices[np.unique(np.linspace(0, indices.size - 1, min(indices.size, 400)).astype(int))].tolist()
        color, dashes = _LINES.get(name, ("var(--muted)", "none"))
        lines.append(
            {
                "name": name,
                "path": " ".join(f"{100 * index / steps:.2f},{place(float(values[index])):.2f}" for index in kept),
                "points": [[index, float(f"{values[index]:.3g}")] for index in kept],
                "color": color,
                "dashes": dashes,
            }
        )
    return {
        "lines": lines,
        "ticks": [{"y": place(value), "text": f"{value:g}"} for value in ticks],
        "steps": steps,
        "marks": [f"{round(part * steps):,}" for part in (0, 0.5, 1)],
    }


def _metric_rows(content: Content) -> list[dict[str, Any]]:
    best = {}
    for metric, (_, higher, _) in METRICS.items():
        values = [scores[metric] for scores in content.metrics.values() if math.isfinite(scores.get(metric, math.nan))]
        if len(values) > 1:
            best[metric] = max(values) if higher else min(values)
    return [
        {
            "name": name,
            "cells": [
                {
                    "text": number(metric, content.metrics.get(name, {}).get(metric)),
                    "best": metric in best and content.metrics.get(name, {}).get(metric) == best[metric],
                }
                for metric in METRICS
            ],
        }
        for name in content.reconstructions
    ]


def _segment_rows(content: Content) -> list[dict[str, Any]]:
    """The rows of the table of segments, the largest first, with the segments' outlines."""
    colors, high = segment_colors(content), heat_limit(content)
    rows = []
    for row in by_share(content):
        chosen = list(content.layers).index(row.layer)
        cells, admitted = [], admits(content.threshold, row.means)
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
                "color": css(colors[row.label]),
                "outline": _outline(content.segments == row.label),
                "share": percent(row.share),
                "cells": cells,
                "layer": chosen,
                "forced": row.forced,
                "last_resort": not admitted[chosen] and not row.forced,
            }
        )
    return rows


def _threshold_states(content: Content, images: _Images) -> list[dict[str, Any]]:
    """The layers at each threshold: that of every segment, in the table's order, and the share of each layer."""
    high, shares = heat_limit(content), [row.share for row in by_share(content)]
    labels = [row.label for row in by_share(content)]
    sweep = dict(content.sweep)
    if sweep and "SAM" in content.reconstructions:
        lpips = content.metrics.get("SAM", {}).get("LPIPS", math.nan)
        sweep.setdefault(content.threshold, (content.reconstructions["SAM"], lpips))
    states = []
    for threshold in shown_thresholds(content):
        taken = dict(zip((row.label for row in content.rows), layers_at(content, threshold), strict=True))
        taken = [taken[label] for label in labels]
        served = []
        for name in content.layers:
            count, share = taken.count(name), math.fsum(s for s, t in zip(shares, taken, strict=True) if t == name)
            text = f"{percent(share)} of the image, {count} segment{'' if count == 1 else 's'}"
            served.append(
                {
                    "name": name,
                    "share": share,
                    "percent": percent(share),
                    "used": count > 0,
                    "text": text if count else "not used",
                }
            )
        image, lpips = sweep.get(threshold, (None, None))
        states.append(
            {
                "value": threshold,
                "text": f"{threshold:.4g}",
                "own": threshold == content.threshold,
                "place": f"{min(1, max(0, threshold / high)):.2%}",
                "layers": [list(content.layers).index(name) for name in taken],
                "served": served,
                "summary": _listed([f"{s['percent']} in {s['name']}" for s in served if s["used"]] or ["nothing"]),
                "image": None if image is None else images.add(image),
                "lpips": None if lpips is None else number("LPIPS", lpips),
            }
        )
    return states


def _edits(content: Content, images: _Images) -> list[dict[str, Any]]:
    edits = []
    for direction, strengths in content.edits.items():
        strongest = strongest_edit(content, direction, None) if strengths else None
        if strongest is None:
            continue
        methods = [name for name in content.reconstructions if any(name in made for made in strengths.values())]
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
                        "unedited": images.add(plain.get(name, content.reconstructions[name])),
                        "images": [images.add(x[name]) if name in x else None for x in strengths.values()],
                    }
                    for name in methods
                ],
            }
        )
    return edits


def _methods(content: Content, images: _Images) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "caption": METHOD_CAPTIONS.get(name, ""),
            "image": images.add(image),
            "lpips": number("LPIPS", content.metrics.get(name, {}).get("LPIPS")),
            "shown": name == ("SAM" if "SAM" in content.reconstructions else list(content.reconstructions)[-1]),
        }
        for name, image in content.reconstructions.items()
    ]


def _plain_setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain_setting(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain_setting(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _context(content: Content, images: _Images) -> dict[str, Any]:
    """The variables of the template, except for the images themselves, which it refers to by identifier."""
    high = heat_limit(content)
    gray = np.repeat(np.rint(255 * gray_of(to_uint8(content.image)))[..., None], 3, -1).astype(np.uint8)
    states = _threshold_states(content, images)
    chart = _loss_chart(content.losses) if content.losses else None
    return {
        "content": content,
        "height": content.image.shape[0],
        "width": content.image.shape[1],
        "input": images.add(content.image),
        "gray": images.add(gray),
        "layers": [
            {
                "name": name,
                "color": css(layer_color(name)),
                "ink": ink_on(layer_color(name)),
                "meaning": LAYER_MEANINGS.get(name, ""),
                "map": images.add(sheets.heat(content.maps[index], high)),
                "mean": f"{np.nanmean(content.maps[index]):.3f}",
            }
            for index, name in enumerate(content.layers)
        ],
        "thresholds": states,
        "own": next(index for index, state in enumerate(states) if state["own"]),
        "swept": bool(content.sweep),
        "high": f"{high:g}",
        "scale": ", ".join(css(color) for color in sheets.heat(np.linspace(0, high, 33), high)),
        "segments": _segment_rows(content),
        "methods": _methods(content, images),
        "metrics": [
            {"name": name, "what": what, "better": "higher" if higher else "lower"}
            for name, (what, higher, _) in METRICS.items()
        ],
        "metric_rows": _metric_rows(content) if content.metrics else [],
        "edits": _edits(content, images),
        "chart": chart,
        "settings": {str(key): _plain_setting(value) for key, value in content.settings.items()},
        "data": {
            "layers": list(content.layers),
            "thresholds": states,
            "losses": [{"name": line["name"], "points": line["points"]} for line in chart["lines"]] if chart else [],
        },
    }


def _source(environment: jinja2.Environment, name: str) -> Markup:
    """A template file as it is, with the line endings for which a browser computes its digest."""
    from markupsafe import Markup

    assert environment.loader is not None
    return Markup("\n".join(environment.loader.get_source(environment, name)[0].splitlines()))


def render_html(content: Content) -> str:
    """Renders a report as one HTML file of at most about 5 MB that works offline.

    Images are embedded with sides of at most 1,024 px, or smaller where many images would make the file too large. The
    page's security policy allows only the page's own script, by its digest; without scripts the page shows everything
    at once.

    Args:
      content: what to show, as `describe` returns it.

    Returns:
      The HTML.
    """
    import jinja2  # slow to import

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("samjax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    script = _source(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    images = _Images()
    context = _context(content, images)
    # A pixel takes about a third of a byte; skip sizes that cannot fit.
    sides = [side for side in _SIDES if side <= max(_SIDES[-1], math.sqrt(4 * _BYTES / len(images)))]
    html = ""
    for side in sides:
        html = template.render(
            context,
            images=images.uris(side),
            style=_source(environment, "report.css"),
            script=script,
            digest=digest,
        )
        if len(html) <= _BYTES:
            break
    return html
