"""Pictures whose texts fit, and a report that opens offline and hides nothing in its names."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from samjax.io import report, sheets

LAYERS = ("W+", "F4", "F6", "F8", "F10")
NASTY = '<script>alert("x")</script> & <b>bold</b>'


def make(
    size: tuple[int, int] = (64, 64), *, layers: tuple[str, ...] = LAYERS, long: bool = False, segments: int = 4
) -> report.Result:
    """A result drawn by hand: `segments` stripes of the picture, one after another in each layer."""
    height, width = size
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    image = np.stack([x, y, -x * y], -1).astype(np.float32)
    stripes = np.broadcast_to(np.arange(width) * segments // width, size).astype(np.int32)
    chosen = np.arange(segments) % len(layers)
    means = [tuple(0.3 if i < c else 0.1 for i in range(len(layers))) for c in chosen]
    maps = np.stack([np.array(means)[:, i][stripes] for i in range(len(layers))]).astype(np.float32)
    rows = [
        report.SegmentRow(
            label=3 * s,
            name=None if s == 1 else f"{'a very long name for a region of a picture ' * long}région {s}",
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
    return report.Result(
        name="scene 3",
        image=image,
        segments=3 * stripes,
        segment_rows=rows,
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
}


def drawn(result: report.Result) -> dict[str, sheets.Sheet]:
    pictures = {
        "segments": report.draw_segments(result),
        "invertibility": report.draw_invertibility(result),
        "layers": report.draw_layers(result),
        "comparison": report.draw_comparison(result),
    }
    return pictures | {f"strip {name}": report.draw_edit_strip(result, name) for name in result.edits}


@pytest.mark.parametrize("case", CASES)
def test_nothing_in_a_picture_overlaps_or_leaves_it(case: str):
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


def test_functions_that_return_arrays_are_those_drawings():
    result = CASES["cars"]
    np.testing.assert_array_equal(report.segments_picture(result), report.draw_segments(result).array())
    np.testing.assert_array_equal(report.invertibility_picture(result), report.draw_invertibility(result).array())
    np.testing.assert_array_equal(report.layers_picture(result), report.draw_layers(result).array())
    weaker = report.comparison_picture(result, "blue car", 1.0)
    assert weaker.shape == report.comparison_picture(result).shape
    assert (weaker != report.comparison_picture(result)).any()
    assert report.edit_strip(result, "blue car", ["SAM"]).shape[0] < report.edit_strip(result, "blue car").shape[0]


def test_the_layers_picture_has_the_palette():
    picture = report.layers_picture(CASES["square"])
    for name, colour in report.PALETTE.items():
        assert (picture == colour).all(-1).sum() > 1000, name


def test_the_layer_overlay_colours_each_region_by_its_layer():
    result = make((64, 100), segments=5)
    overlay = report.layers_overlay(result, 128, 200).astype(int)
    palette = np.array([report.PALETTE[name] for name in LAYERS])
    for stripe in range(5):
        # Each colour has a line of shades; the pixel lies on that of its layer.
        grey = np.linspace(0, 1, 101)[:, None, None]
        shades = palette * (0.7 + 0.3 * grey) * (1 - 0.35 * grey) + 255 * 0.35 * grey
        distance = np.abs(shades - overlay[64, 20 + 40 * stripe]).max(-1).min(0)
        assert distance.argmin() == stripe
        assert distance[stripe] < 3
    # White lines where stripes meet, and only there.
    white = (overlay.min(-1) >= 250).mean(0)
    assert (white[[40, 80, 120, 160]] > 0.9).all()
    assert white[10:30].max() == 0


def test_the_comparison_shows_the_pictures_themselves():
    result = make((330, 330))
    sheet = report.draw_comparison(result)
    array = sheet.array()
    boxes = [box for box in sheet.boxes if box.kind == "image"]
    assert len(boxes) == 8
    expected = [result.image, *result.reconstructions.values()]
    for box, image in zip(boxes[:4], expected, strict=True):
        shown = array[int(box.top) : int(box.bottom), int(box.left) : int(box.right)]
        assert np.abs(shown / 127.5 - 1 - image).max() < 0.01


def test_shares_and_scale():
    result = make(segments=5)
    shares = report.layer_shares(result)
    assert list(shares) == list(LAYERS)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["W+"] == pytest.approx((result.layer_map == 0).mean())
    assert report.heat_limit(result) == pytest.approx(0.3)
    assert report.heat_limit(dataclasses.replace(result, threshold=0.9)) == pytest.approx(1.1)
    assert report.heat_limit(dataclasses.replace(result, threshold=0.0, maps=result.maps * 0)) == pytest.approx(0.1)


def test_heat_is_monotonous_in_lightness():
    colours = sheets.heat(np.linspace(-0.1, 0.6, 400), 0.5).astype(float)
    grey = colours @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(grey) > -1.5).all()  # rounding to 8 bits
    assert grey[-1] - grey[0] > 180
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
        ({"segment_rows": [report.SegmentRow(0, None, 1.0, (0.1,), "W+")]}, "does not fit the layers"),
        ({"segment_rows": [report.SegmentRow(0, None, 1.0, (0.1,) * 5, "F12")]}, "does not fit the layers"),
    ],
)
def test_results_that_do_not_fit_together(change: dict, says: str):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(make(), **change)


# --- the report ---


class Page(HTMLParser):
    """Checks that elements nest, and gathers elements, attributes and text."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr", "line", "polyline"})

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
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
        if self.open and self.open[-1] != "style":
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


@pytest.mark.parametrize("case", CASES)
def test_the_report_is_sound_and_offline(case: str):
    html = report.render_html(CASES[case])
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]+\.[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    assert page.all("script") == []
    assert page.all("link") == []
    for image in page.all("img"):
        assert image["alt"]
        assert decoded(image["src"]).size
    assert len(page.all("h1")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
    for left_over in ("{{", "{%", "None", "nan", "Undefined"):
        assert left_over not in page.text.replace("none None", ""), left_over


def test_the_report_tells_what_happened():
    result = make(segments=5)
    page = Page(report.render_html(result))
    text = page.text
    for said in ("scene 3", "0.225", "région 2", "segment 3", "20% in W+", "blue car", "日本 Größe", "strength 2.5"):
        assert said in text, said
    for said in ("22.8", "∞", "–", "0.710", "0.382", "steps 300", "seconds 41.73", "jax: 0.10", "1, 2.5"):
        assert said in text, said
    tables = page.all("table")
    assert len(tables) == 2
    chosen = [attributes for attributes in page.all("td") if attributes.get("class") == "chosen"]
    assert len(chosen) == 5
    # 1 hero + 3 methods, 3 layers, 6 maps, 1 scale, 2 directions x 3 strengths x 3 methods.
    assert len(page.all("img")) == 4 + 3 + 6 + 1 + 18
    assert decoded(page.all("img")[0]["src"]).shape == (64, 64, 3)
    assert np.abs(decoded(page.all("img")[0]["src"]) / 127.5 - 1 - result.image).mean() < 0.05
    lines = page.all("polyline")
    assert len(lines) == 2
    assert len((lines[1]["points"] or "").split()) == 2  # what is not finite or not above 0 is left out


def test_the_last_resort_is_said():
    result = make()
    row = dataclasses.replace(result.segment_rows[0], means=(0.5,) * 5, layer="F10")
    html = report.render_html(dataclasses.replace(result, segment_rows=[row, *result.segment_rows[1:]]))
    assert html.count("none is low enough") == 1


def test_names_are_escaped():
    result = make()
    rows = [dataclasses.replace(row, name=NASTY) for row in result.segment_rows]
    edits = {NASTY: {NASTY: result.edits["blue car"][1.0]}}
    reconstructions = {**result.reconstructions, NASTY: result.image}
    nasty = dataclasses.replace(
        result,
        name=NASTY,
        segment_rows=rows,
        edits=edits,
        reconstructions=reconstructions,
        losses={NASTY: [1.0, 0.5]},
        settings={NASTY: NASTY},
    )
    page = Page(report.render_html(nasty))
    assert page.all("script") == []
    assert page.text.count(NASTY) >= 8
    assert any(NASTY in (image["alt"] or "") for image in page.all("img"))


def test_large_results_stay_small():
    """Noise, the worst case of all, in 36 edits at 256 px."""
    rng = np.random.default_rng(0)
    result = make((256, 256))
    noise = rng.uniform(-1, 1, (256, 256, 3)).astype(np.float32)
    edits = {f"d{i}": {s: {"W+": noise, "F10": noise, "SAM": noise} for s in range(4)} for i in range(3)}
    html = report.render_html(dataclasses.replace(result, edits=edits))
    assert len(html) < 5_000_000
    shown = decoded(Page(html).all("img")[-1]["src"])
    assert shown.shape[0] >= 192
