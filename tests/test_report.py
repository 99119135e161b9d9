"""Figures whose text fits, a report that works offline and escapes all names, and the directory of results."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from samjax import layer_selection, losses, report
from samjax.analysis import Analysis
from samjax.config import Category, InversionConfig
from samjax.inversion import Terms
from samjax.io import images
from samjax.report import figures, html, sheets
from samjax.results import Inversion

LAYERS = ("W+", "F4", "F6", "F8", "F10")
NASTY = '<script>alert("x")</script> & <b>bold</b>'


def make(
    size: tuple[int, int] = (64, 64), *, layers: tuple[str, ...] = LAYERS, long: bool = False, segments: int = 4
) -> report.Content:
    """A made-up content: `segments` vertical stripes that take the layers in turn."""
    height, width = size
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    image = np.stack([x, y, -x * y], -1).astype(np.float32)
    stripes = np.broadcast_to(np.arange(width) * segments // width, size).astype(np.int32)
    chosen = np.arange(segments) % len(layers)
    means = [tuple(0.3 if i < c else 0.1 for i in range(len(layers))) for c in chosen]
    maps = np.stack([np.array(means)[:, i][stripes] for i in range(len(layers))]).astype(np.float32)
    rows = [
        report.Segment(
            label=3 * s,
            name=None if s == 1 else f"{'a very long name for a segment of an image ' * long}région {s}",
            share=float((stripes == s).mean()),
            means=means[s],
            layer=layers[chosen[s]],
        )
        for s in range(segments)
    ]
    reconstructions = {name: image * scale for name, scale in (("W+", 0.6), ("F10", 0.9), ("SAM", 0.85))}
    direction = "turn it into something else entirely " * 6 if long else "blue car"
    edits = {
        name: {
            strength: {m: np.clip(x + 0.1 * strength, -1, 1) for m, x in reconstructions.items()}
            for strength in (0, 1.0, 2.5)
        }
        for name in (direction, "日本 Größe")
    }
    metrics = {
        "W+": {"MSE": 0.02, "PSNR": 22.81, "SSIM": 0.71, "LPIPS": 0.3819},
        "F10": {"MSE": 0.003, "PSNR": float("inf"), "SSIM": 0.93, "LPIPS": 0.259},
        "SAM": {"MSE": 0.004, "PSNR": float("nan"), "SSIM": 0.915, "LPIPS": 0.281},
    }
    return report.Content(
        name="scene 3",
        image=image,
        segments=3 * stripes,
        rows=rows,
        layers=layers,
        maps=maps,
        layer_map=chosen[stripes],
        threshold=0.225,
        reconstructions=reconstructions,
        edits=edits,
        metrics=metrics,
        losses={"W+": [2.0, 1.0, 0.5], "SAM": [2.0, float("nan"), 0.0, 0.2]},
        settings={"steps": 300, "seconds": 41.73, "versions": {"jax": "0.10"}, "sizes": (1, 2.5), "none": None},
    )


CASES = {
    "square": make(),
    "wide": make((24, 160)),
    "tall": make((160, 24)),
    "cars": make((192, 256)),
    "long names": make(long=True),
    "many segments": make((64, 128), segments=60),
    "two layers": make(layers=("W+", "F4")),
    "other layers": make(layers=("W", "X1", "X2", "X3", "X4", "X5")),
    "no edits": dataclasses.replace(make(), edits={}, metrics={}, losses=None, settings={}),
    "one method": dataclasses.replace(make(), reconstructions={"W+": make().image}, edits={}),
    "one strength": dataclasses.replace(make(), edits={"blue": {"strong": {"SAM": make().image}}}),
    "thresholds": dataclasses.replace(make(), thresholds=(0.05, 0.1, 0.225, 0.5)),
    "sweep": dataclasses.replace(make(), sweep={0.05: (make().image, 0.1), 0.4: (-make().image, 0.2)}),
}


def drawn(content: report.Content) -> dict[str, sheets.Sheet]:
    drawings = {
        "segments": figures.draw_segments(content),
        "invertibility": figures.draw_invertibility(content),
        "layers": figures.draw_layers(content),
        "comparison": figures.draw_comparison(content),
    }
    return drawings | {f"strip {name}": figures.draw_edit_strip(content, name) for name in content.edits}


@pytest.mark.parametrize("case", CASES)
def test_nothing_in_a_figure_overlaps_or_leaves_it(case: str):
    for name, sheet in drawn(CASES[case]).items():
        array = sheet.array()
        assert array.dtype == np.uint8
        assert array.shape == (sheet.height, sheet.width, 3)
        assert any(box.kind == "text" for box in sheet.boxes), name
        for box in sheet.boxes:
            assert box.left >= 0, (name, box)
            assert box.top >= 0, (name, box)
            assert box.right <= sheet.width, (name, box)
            assert box.bottom <= sheet.height, (name, box)
        for a, b in itertools.combinations(sheet.boxes, 2):
            apart = a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top
            assert apart, (name, a, b)


def test_figures_are_the_drawn_sheets():
    content = CASES["cars"]
    np.testing.assert_array_equal(report.segments_figure(content), figures.draw_segments(content).array())
    np.testing.assert_array_equal(report.invertibility_figure(content), figures.draw_invertibility(content).array())
    np.testing.assert_array_equal(report.layers_figure(content), figures.draw_layers(content).array())
    weaker = report.comparison_figure(content, "blue car", 1.0)
    assert weaker.shape == report.comparison_figure(content).shape
    assert (weaker != report.comparison_figure(content)).any()
    assert report.edit_strip(content, "blue car", ["SAM"]).shape[0] < report.edit_strip(content, "blue car").shape[0]


def test_the_layers_figure_has_the_palette():
    figure = report.layers_figure(CASES["square"])
    for name, color in report.PALETTE.items():
        assert (figure == color).all(-1).sum() > 1000, name


def test_the_layer_overlay_colors_each_segment_by_its_layer():
    content = make((64, 100), segments=5)
    overlay = report.layers_overlay(content, 128, 200).astype(int)
    palette = np.array([report.PALETTE[name] for name in LAYERS])
    for stripe in range(5):
        # Each color has a line of shades; the pixel lies on that of its layer.
        gray = np.linspace(0, 1, 101)[:, None, None]
        shades = palette * (0.7 + 0.3 * gray) * (1 - 0.35 * gray) + 255 * 0.35 * gray
        distance = np.abs(shades - overlay[64, 20 + 40 * stripe]).max(-1).min(0)
        assert distance.argmin() == stripe
        assert distance[stripe] < 3
    # White lines where stripes meet, and only there.
    white = (overlay.min(-1) >= 250).mean(0)
    assert (white[[40, 80, 120, 160]] > 0.9).all()
    assert white[10:30].max() == 0


def test_the_comparison_shows_the_images_themselves():
    content = make((330, 330))
    sheet = figures.draw_comparison(content)
    array = sheet.array()
    boxes = [box for box in sheet.boxes if box.kind == "image"]
    assert len(boxes) == 8
    expected = [content.image, *content.reconstructions.values()]
    for box, image in zip(boxes[:4], expected, strict=True):
        shown = array[int(box.top) : int(box.bottom), int(box.left) : int(box.right)]
        assert np.abs(shown / 127.5 - 1 - image).max() < 0.01


def test_shares_and_scale():
    content = make(segments=5)
    shares = report.layer_shares(content)
    assert list(shares) == list(LAYERS)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["W+"] == pytest.approx((content.layer_map == 0).mean())
    assert report.heat_limit(content) == pytest.approx(0.3)
    assert report.heat_limit(dataclasses.replace(content, threshold=0.9)) == pytest.approx(1.1)
    assert report.heat_limit(dataclasses.replace(content, threshold=0.0, maps=content.maps * 0)) == pytest.approx(0.1)


def test_heat_is_monotonic_in_lightness():
    colors = sheets.heat(np.linspace(-0.1, 0.6, 400), 0.5).astype(float)
    gray = colors @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(gray) > -1.5).all()  # rounding to 8 bits
    assert gray[-1] - gray[0] > 180
    np.testing.assert_array_equal(sheets.heat(np.nan, 1.0), sheets.heat(1.0, 1.0))


def test_smooth_labels():
    labels = np.zeros((40, 40), np.int32)
    labels[10:30, 10:30] = 7
    labels[5, :] = 9  # a line of one pixel stays
    same = sheets.smooth_labels(labels, 40, 40)
    assert (same == labels).mean() > 0.99
    large = sheets.smooth_labels(labels, 160, 160)
    assert set(np.unique(large)) == {0, 7, 9}
    np.testing.assert_array_equal(large[60:100, 60:100], 7)
    assert (large[20:24, 8:-8] == 9).mean() > 0.9
    assert (sheets.smooth_labels(labels, 160, 160) == np.repeat(np.repeat(labels, 4, 0), 4, 1)).mean() > 0.98
    small = sheets.smooth_labels(labels, 20, 10)
    assert small[10, 5] == 7


def test_outlines_are_centered_bands():
    labels = np.zeros((40, 60), np.int32)
    labels[20:, :30] = 1
    for thickness in (2, 4, 6):
        band = sheets.outlines(labels, thickness)
        np.testing.assert_array_equal(np.flatnonzero(band[:, 10]), 20 + np.arange(-thickness // 2, thickness // 2))
        np.testing.assert_array_equal(np.flatnonzero(band[35]), 30 + np.arange(-thickness // 2, thickness // 2))
        assert not band[:15, :].any()
    assert not sheets.outlines(labels * 0, 4).any()


def test_printable():
    assert sheets.printable("Größe – 3 × “ü” ≤ 4…") == "Grosse - 3 x “u” <= 4…"
    assert sheets.printable("日本\n\ta\0") == "?? a?"
    assert sheets.printable("") == ""
    sheet = sheets.Sheet(200, 50)
    assert sheet.shorten("a" * 300, 20, 100).endswith("…")
    assert sheet.measure(sheet.shorten("a" * 300, 20, 100), 20) <= 100
    assert sheet.shorten("abc", 20, 100) == "abc"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"maps": np.zeros((4, 64, 64))}, "maps have shape"),
        ({"layer_map": np.full((64, 64), 5)}, "indices from 0 to 4"),
        ({"segments": np.zeros((64, 64))}, "segments must hold integers"),
        ({"layer_map": np.zeros((64, 32), int)}, "layer_map must hold integers"),
        ({"reconstructions": {"SAM": np.zeros((64, 32, 3))}}, "reconstruction SAM has shape"),
        ({"edits": {"blue": {1: {"SAM": np.zeros((1, 64, 64, 3))}}}}, "edit blue 1 SAM has shape"),
        ({"sweep": {0.5: (np.zeros((64, 3)), 0.1)}}, "sweep 0.5 has shape"),
        ({"thresholds": (0.1, float("nan"))}, "finite"),
        ({"rows": [report.Segment(0, None, 1.0, (0.1,), "W+")]}, "does not fit the layers"),
        ({"rows": [report.Segment(0, None, 1.0, (0.1,) * 5, "F12")]}, "does not fit the layers"),
    ],
)
def test_contents_that_do_not_fit_together(change: dict, says: str):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(make(), **change)


# --- thresholds ---


def test_layers_at_a_threshold_are_those_of_select_layers():
    rng = np.random.default_rng(0)
    means = rng.uniform(0, 1, (5, 40)).astype(np.float32)
    rows = [report.Segment(s, None, 1 / 40, tuple(means[:, s].tolist()), "W+") for s in range(40)]
    content = dataclasses.replace(make(), rows=rows, threshold=-1.0)
    # Including the means themselves, which are admitted, and values that differ in double precision only.
    for threshold in (0.0, 0.1, 0.35, 1.0, *means[:2, 0].tolist(), float(means[1, 3]) - 1e-12):
        expected = np.asarray(layer_selection.select_layers(means, np.float32(threshold)))
        assert report.layers_at(content, threshold) == tuple(LAYERS[index] for index in expected), threshold
    assert set(report.layers_at(content, -1.0)) == {"W+"}  # its own threshold: the layers of its rows


def test_thresholds_shown():
    content = make(segments=5)
    assert report.shown_thresholds(dataclasses.replace(content, thresholds=(0.5, 0.1))) == [0.1, 0.225, 0.5]
    sweep = {0.4: (content.image, 0.1), 0.2: (content.image, 0.1)}
    assert report.shown_thresholds(dataclasses.replace(content, sweep=sweep)) == [0.2, 0.225, 0.4]
    # By default: values that choose different layers, from the last everywhere to the first everywhere.
    shown = report.shown_thresholds(content)
    assert shown == [0.09, 0.225, 0.3]
    chosen = [report.layers_at(content, value) for value in shown]
    assert len(set(chosen)) == 3
    assert set(chosen[0]) == {"F10"}
    assert set(chosen[-1]) == {"W+"}
    many = dataclasses.replace(CASES["many segments"], rows=[
        report.Segment(s, None, 1 / 60, (0.9 - 0.01 * s, 0.5, 0.3, 0.2, 0.1), "F4") for s in range(60)
    ])  # fmt: skip
    assert 7 <= len(report.shown_thresholds(many)) <= 8


# --- the report ---


class Page(HTMLParser):
    """Checks that elements nest, and gathers elements, attributes and text."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr", "line", "polyline"})

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def decoded(uri: str | None) -> np.ndarray:
    assert uri is not None
    match = re.fullmatch(r"data:image/(?:webp|png|jpeg);base64,([A-Za-z0-9+/=]+)", uri)
    assert match
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(match[1]))).convert("RGB"))


def assert_only_our_script_runs(page: Page) -> None:
    """The page has its data and our script, and its security policy allows only that script."""
    assert page.all("script") == [{"type": "application/json", "id": "data"}, {}]
    data, script = page.scripts
    json.loads(data)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|import\(", script)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag not in {"link", "iframe", "object", "embed", "form", "base", "a"}
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)


@pytest.mark.parametrize("case", CASES)
def test_the_report_is_sound_and_offline(case: str):
    html = report.render_html(CASES[case])
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]+\.[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    assert_only_our_script_runs(page)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    stored = page.all("image")
    assert len({image["href"] for image in stored}) == len(stored)  # each is there once
    for image in stored:
        assert decoded(image["href"]).size
    used = {use["href"] for use in page.all("use") if "href" in use}
    assert {f"#{image['id']}" for image in stored} <= used <= {f"#{name}" for name in ids}
    assert len(page.all("h1")) == 1
    for _, attributes in page.elements:
        assert attributes.get("role") != "img" or attributes["aria-label"]
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
    for slider in page.all("input"):
        assert slider["type"] != "range" or slider["aria-label"]
    for left_over in ("{{", "{%", "None", "nan", "Undefined"):
        assert left_over not in page.text.replace("none None", ""), left_over


def test_the_report_contains_names_and_numbers():
    content = make(segments=5)
    page = Page(report.render_html(content))
    text = page.text
    for said in ("scene 3", "0.225", "région 2", "segment 3", "20% in W+", "blue car", "日本 Größe", "strength 2.5"):
        assert said in text, said
    for said in ("22.8", "∞", "–", "0.710", "0.382", "steps 300", "seconds 41.73", "jax: 0.10", "1, 2.5"):
        assert said in text, said
    tables = page.all("table")
    assert len(tables) == 2
    chosen = [attributes for attributes in page.all("td") if attributes.get("class") == "chosen"]
    assert len(chosen) == 5
    # The input, its gray version, 3 methods, 5 maps, and 2 strengths x 3 methods: strength 0 is the reconstruction,
    # and both directions have the same images.
    stored = {image["id"]: image["href"] for image in page.all("image")}
    assert len(stored) == 1 + 1 + 3 + 5 + 6
    shown = [use["href"] for use in page.all("use") if "href" in use]
    first = decoded(stored[(shown[0] or "")[1:]])
    assert first.shape == (64, 64, 3)
    assert np.abs(first / 127.5 - 1 - content.image).mean() < 0.05
    lines = page.all("polyline")
    assert len(lines) == 2
    assert len((lines[1]["points"] or "").split()) == 2  # values that are not finite or not positive are left out


def test_the_report_shows_other_thresholds():
    content = make(segments=5)
    sweep = {0.05: (-content.image, 0.5), 0.4: (content.image * 0.5, 0.25)}
    page = Page(report.render_html(dataclasses.replace(content, thresholds=(0.1,), sweep=sweep)))
    states = json.loads(page.scripts[0])["thresholds"]
    assert [state["text"] for state in states] == ["0.05", "0.1", "0.225", "0.4"]
    assert [state["lpips"] for state in states] == ["0.500", None, "0.281", "0.250"]  # its own: SAM's
    assert [state["layers"] for state in states] == [[4] * 5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0] * 5]
    tiles = [svg["aria-label"] for svg in page.all("svg") if (svg.get("aria-label") or "").startswith("Layers at")]
    assert tiles[0] == "Layers at threshold 0.05: 100% in F10"
    assert tiles[3] == "Layers at threshold 0.4: 100% in W+"
    assert "20% in W+, 20% in F4" in (tiles[1] or "")
    assert page.text.count("used here") == 2  # below the slider, and in the row of maps
    assert "LPIPS 0.500" in page.text


def test_outlines_match_their_regions():
    y, x = np.mgrid[:90, :120]
    disc = (y - 40) ** 2 + (x - 50) ** 2 < 30**2
    ring = disc & ((y - 40) ** 2 + (x - 50) ** 2 > 12**2)
    corner = (y > 70) & (x > 80)
    speck = (y == 10) & (x == 100)
    for region in (disc, ring, corner, corner | disc, speck):
        canvas = Image.new("1", (1200, 900))
        for loop in html._outline(region).strip("MZ").split("ZM"):
            points = [(10 * float(px), 10 * float(py)) for px, py in (point.split(",") for point in loop.split())]
            one = Image.new("1", canvas.size)
            ImageDraw.Draw(one).polygon(points, fill=1)
            canvas = Image.fromarray(np.asarray(canvas) ^ np.asarray(one))  # holes are left out
        drawn = np.asarray(canvas.convert("L").resize((120, 90), Image.Resampling.BOX)) >= 127
        assert (drawn != region).sum() <= 0.01 * region.sum(), region.sum()


def test_the_chart_has_round_numbers_and_every_line_inside():
    for values in ([3.0, 0.07], [1.0, 1.0], [1e-9, 1e9], [5.0, 2.0]):
        chart = html._loss_chart({"SAM": values})
        assert chart is not None
        assert 2 <= len(chart["ticks"]) <= 11
        assert all(0 <= tick["y"] <= 100 for tick in chart["ticks"])
        heights = [float(point.split(",")[1]) for point in chart["lines"][0]["path"].split()]
        assert all(0 <= height <= 100 for height in heights)
    assert html._loss_chart({"SAM": [float("nan"), 0.0, -1.0], "W+": [1.0]}) is None


def test_segments_that_no_layer_fits_are_marked():
    content = make()
    row = dataclasses.replace(content.rows[0], means=(0.5,) * 5, layer="F10")
    page = Page(report.render_html(dataclasses.replace(content, rows=[row, *content.rows[1:]])))
    notes = [attributes for attributes in page.all("span") if attributes.get("class") == "last"]
    assert sum("hidden" not in attributes for attributes in notes) == 1
    assert len(notes) == 4
    # A mean in single precision is admitted by a threshold of the same value, though float32(0.3) > 0.3.
    row = dataclasses.replace(content.rows[0], means=(0.9,) * 4 + (float(np.float32(0.3)),), layer="F10")
    exact = dataclasses.replace(content, rows=[row, *content.rows[1:]], threshold=0.3)
    notes = [
        attributes for attributes in Page(report.render_html(exact)).all("span") if attributes.get("class") == "last"
    ]
    assert all("hidden" in attributes for attributes in notes)


def test_layers_chosen_by_hand_stay():
    content = make()
    row = dataclasses.replace(content.rows[2], layer="F10", forced=True)
    forced = dataclasses.replace(content, rows=[*content.rows[:2], row, *content.rows[3:]])
    assert report.layers_at(forced, 10.0) == ("W+", "W+", "F10", "W+")
    assert report.layers_at(content, 10.0) == ("W+",) * 4
    html = report.render_html(forced)
    assert html.count("chosen by hand</span>") == 1
    assert html.count("data-forced") == 1
    assert "data-forced" not in report.render_html(content)


def test_names_are_escaped():
    content = make()
    rows = [dataclasses.replace(row, name=NASTY) for row in content.rows]
    edits = {NASTY: {NASTY: content.edits["blue car"][1.0]}}
    reconstructions = {**content.reconstructions, NASTY: content.image}
    nasty = dataclasses.replace(
        content,
        name=NASTY,
        rows=rows,
        edits=edits,
        reconstructions=reconstructions,
        losses={NASTY: [1.0, 0.5]},
        settings={NASTY: NASTY},
    )
    html = report.render_html(nasty)
    page = Page(html)
    assert_only_our_script_runs(page)
    assert html.count("<script") == html.count("</script") == 2
    assert "<b>bold" not in html
    assert json.loads(page.scripts[0])["losses"][0]["name"] == NASTY
    assert "<" not in page.scripts[0]
    assert page.text.count(NASTY) >= 8
    labels = [svg.get("aria-label") or "" for svg in page.all("svg")]
    assert any(NASTY in label for label in labels)
    assert [row["data-name"] for row in page.all("tr") if "data-name" in row] == [NASTY] * 4


def test_large_results_stay_small():
    """Noise, the worst case of all, in 36 edits at 256 px."""
    rng = np.random.default_rng(0)
    content = make((256, 256))
    noise = rng.uniform(-1, 1, (36, 256, 256, 3)).astype(np.float32)
    edits = {
        f"d{i}": {s: dict(zip(("W+", "F10", "SAM"), noise[12 * i + 3 * s :], strict=False)) for s in range(4)}
        for i in range(3)
    }
    html = report.render_html(dataclasses.replace(content, edits=edits))
    assert len(html) < 5_000_000
    stored = [decoded(image["href"]) for image in Page(html).all("image")]
    assert len(stored) > 36
    assert all(image.shape[0] >= 192 for image in stored)


# --- from inversions ---

SIZE, HEIGHT, WIDTH = 512, 192, 256


def inverted(threshold: float = 0.225, forced: dict[int, str] | None = None, *, predicted: bool = False) -> Inversion:
    """A made-up inversion: a generator of 512 px and a target of 192 x 256 px with segments 3, 5 and 9."""
    rng = np.random.default_rng(0)
    target = rng.uniform(-1, 1, (HEIGHT, WIDTH, 3)).astype(np.float32)
    segments = np.repeat(np.array([3, 5, 9]), [64, 64, 128])[None].repeat(HEIGHT, 0)
    maps = np.stack([np.where(segments == 3, 0.1, 0.5), np.where(segments == 9, 0.4, 0.2), 0.1 + 0 * segments])
    layers = ("W+", "F4", "F6")
    assignment = layer_selection.assign_layers(maps, segments, threshold)
    indices = {label: layers.index(name) for label, name in (forced or {}).items()}
    steps = np.linspace(3, 1, 4, dtype=np.float32)
    inversion = Inversion(
        analysis=Analysis(
            name="scene 3",
            source=rng.integers(0, 256, (300, 500, 3), np.uint8),
            target=target,
            segments=segments,
            segment_names={3: "road"},
            segments_from="given",
            ws=np.zeros((10, 8), np.float32),
            layers=layers,
            maps=maps.astype(np.float32),
            singles={} if predicted else {"loss": np.zeros((4, 3))},
        ),
        category=Category("cars", SIZE, target_size=(HEIGHT, WIDTH)),
        config=InversionConfig(num_opt_steps=4),
        measure_steps=3,
        generator="tiny",
        threshold=threshold,
        forced=forced or {},
        assignment=layer_selection.force_layers(assignment, segments, indices),
        latents={},
        masks={},
        image=rng.uniform(-1.2, 1.2, (SIZE, SIZE, 3)).astype(np.float32),
        terms=Terms(steps, steps, steps, steps, steps, total=5 * steps),
        metrics={"MSE": 0.5, "PSNR": 9.0, "SSIM": 0.25, "LPIPS": 0.125},
        seconds=1.5,
        fingerprint="0" * 16,
    )
    if predicted:
        return inversion
    baselines = {
        name: dataclasses.replace(inversion, image=inversion.image * s) for name, s in (("W+", 0.5), ("F6", 0.9))
    }
    return dataclasses.replace(inversion, baselines=baselines)


def edited(inversion: Inversion) -> dict[str, dict[float, dict[str, np.ndarray]]]:
    methods = {**inversion.baselines, "SAM": inversion}
    return {"up": {s: {name: item.image + 0.1 * s for name, item in methods.items()} for s in (0.0, 2.0)}}


def test_describe():
    inversion = inverted(forced={5: "F6"})
    edits = edited(inversion)
    content = report.describe(inversion, edits=edits)
    assert content.rows == [
        report.Segment(3, "road", 0.25, tuple(np.float32([0.1, 0.2, 0.1]).tolist()), "W+"),
        report.Segment(5, None, 0.25, tuple(np.float32([0.5, 0.2, 0.1]).tolist()), "F6", forced=True),
        report.Segment(9, None, 0.5, tuple(np.float32([0.5, 0.4, 0.1]).tolist()), "F6"),
    ]
    assert list(content.reconstructions) == list(content.metrics) == ["W+", "F6", "SAM"]
    for made, image in (
        (content.reconstructions["SAM"], inversion.image),
        (content.reconstructions["W+"], inversion.baselines["W+"].image),
        (content.edits["up"][2.0]["F6"], edits["up"][2.0]["F6"]),
    ):
        expected = losses.comparable(image[None], WIDTH, HEIGHT, WIDTH)[0]
        np.testing.assert_array_equal(made, expected)
    assert content.losses == dict.fromkeys(("W+", "F6", "SAM"), inversion.terms.total.tolist())
    assert content.settings | {"device": ""} == {
        "generator": "tiny", "steps": 4, "error maps": "measured in 3 steps", "start": "W+ at the mean style",
        "segments": "given", "loss": "LPIPS-VGG", "device": "",
    }  # fmt: skip
    assert content.thresholds == inversion.category.sweep()
    assert content.sweep == {}
    predicted = report.describe(inverted(predicted=True))
    assert list(predicted.reconstructions) == ["SAM"]
    assert predicted.settings["error maps"] == "predicted"


def test_describe_a_sweep():
    inversion, other = inverted(), inverted(0.4)
    assert report.describe(inversion, sweep=[inversion]).sweep == {}
    sweep = report.describe(inversion, sweep=[inversion, other]).sweep
    assert list(sweep) == [0.225, 0.4]
    assert sweep[0.4][1] == 0.125


def test_preview_shows_what_is_known_before_the_inversion():
    inversion = inverted(forced={5: "F6"})
    content = report.preview(inversion.analysis, inversion.assignment, 0.225, forced=inversion.forced)
    assert content.rows == report.describe(inversion).rows
    assert content.reconstructions == {}
    for figure in (report.segments_figure, report.layers_figure, report.invertibility_figure):
        np.testing.assert_array_equal(figure(content), figure(report.describe(inversion)))


def test_save_writes_one_file(tmp_path: Path):
    inversion = inverted()
    report.save(inversion, tmp_path / "a" / "report.html", edits=edited(inversion), sweep=[inversion, inverted(0.4)])
    page = Page((tmp_path / "a" / "report.html").read_text("utf-8"))
    assert_only_our_script_runs(page)
    for said in ("scene 3", "road", "strength 2", "threshold 0.225", "LPIPS 0.125", "generator tiny"):
        assert said in page.text, said
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "report.html"]


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_images_are_saved_at_the_generators_own_size(tmp_path: Path):
    inversion = inverted()
    edits = edited(inversion)
    report.save_inversion(tmp_path, inversion, edits)
    assert names(tmp_path) == {
        "layers_T0.225.png", "reconstruction_T0.225.png", "edits/up/T0.225.png", "edits/up/T0.225_mul0.png",
        "edits/up/T0.225_mul2.png",
    }  # fmt: skip
    # 512 px without the letterbox of a 3:4 image, not the target's 192 x 256.
    for name, image in (
        ("reconstruction_T0.225", inversion.image),
        ("edits/up/T0.225_mul0", inversion.image),
        ("edits/up/T0.225_mul2", edits["up"][2.0]["SAM"]),
    ):
        np.testing.assert_array_equal(images.read_image(tmp_path / f"{name}.png"), images.to_uint8(image[64:448]))
    # The strip has the size of the figure, which is not affected.
    strip = report.edit_strip(report.describe(inversion, edits=edits), "up")
    np.testing.assert_array_equal(images.read_image(tmp_path / "edits/up/T0.225.png"), strip)


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
def test_images_are_pasted_back_from_the_generators_own_size(tmp_path: Path, fit: images.Fit):
    inversion = inverted()
    edits = edited(inversion)
    report.save_inversion(tmp_path, inversion, edits, paste_back=True, fit=fit)
    pasted = {name for name in names(tmp_path) if name.startswith("pasted")}
    assert pasted == {"pasted/reconstruction_T0.225.png", "pasted/up/T0.225_mul0.png", "pasted/up/T0.225_mul2.png"}
    for name, image in (("reconstruction_T0.225", inversion.image), ("up/T0.225_mul2", edits["up"][2.0]["SAM"])):
        expected = images.paste_back(inversion.analysis.source, images.to_uint8(image[64:448]), fit)
        np.testing.assert_array_equal(images.read_image(tmp_path / "pasted" / f"{name}.png"), expected)
        assert expected.shape == (300, 500, 3)


def test_the_summary_of_a_directory(tmp_path: Path):
    inversions = [inverted(), inverted(0.4)]
    content = report.save_summary(
        tmp_path, inversions, inversions[1], edited(inversions[1]), seed=7, seconds={"sam": 1.25}
    )
    assert content.threshold == 0.4
    assert list(content.sweep) == [0.225, 0.4]
    assert names(tmp_path) == {"segments.png", "invertibility.png", "comparison.png", "metrics.json", "report.html"}
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert list(summary) == [
        "image", "thresholds", "layers", "steps", "seconds", "settings", "seed", "device", "versions", "command",
    ]  # fmt: skip
    assert summary["image"] == "scene 3"
    assert list(summary["thresholds"]) == ["0.225", "0.400"]
    first = summary["thresholds"]["0.225"]
    assert set(first["metrics"]) == {"W+", "F6", "SAM"}
    assert [(row["label"], row["layer"]) for row in first["segments"]] == [(3, "W+"), (5, "F4"), (9, "F6")]
    assert [row["layer"] for row in summary["thresholds"]["0.400"]["segments"]] == ["W+", "F4", "F4"]
    assert summary["steps"] == {"sam": 4, "single_layers": 3}
    assert summary["settings"]["num_opt_steps"] == 4
    assert summary["seconds"] == {"sam": 1.25}
    newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "report.html"


def test_table():
    lines = report.table(report.describe(inverted())).splitlines()
    assert lines[0].split() == ["LPIPS", "PSNR", "SSIM"]
    assert [line.split() for line in lines[1:4]] == [[name, "0.125", "9.00", "0.250"] for name in ("W+", "F6", "SAM")]
    assert lines[4] == "layers at threshold 0.225: road W+, segment 5 F4, segment 9 F6"
