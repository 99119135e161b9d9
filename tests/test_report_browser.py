"""The report in a browser, offline: by mouse, touch and keyboard, in print, and with scripts off."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import NASTY, make

from samjax import report

pytestmark = pytest.mark.browser

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def results() -> dict[str, report.Content]:
    plain = make((64, 80), segments=5)
    sweep = {0.05: (-plain.image, 0.5), 0.225: (plain.reconstructions["SAM"], 0.281), 0.4: (plain.image * 0.5, 0.25)}
    rows = [dataclasses.replace(row, name=NASTY * 3) for row in plain.rows]
    edited = plain.edits["blue car"]
    edits = {NASTY: {-1: edited[1.0], NASTY: edited[2.5]}, "one": {1: {"SAM": plain.image}}}
    return {
        "plain": dataclasses.replace(plain, edits={"blue car": edited}, sweep=sweep),
        "long": make((64, 80), segments=5, long=True),
        "bare": dataclasses.replace(plain, edits={}, metrics={}, losses=None, settings={}, thresholds=(0.225,)),
        "nasty": dataclasses.replace(plain, name=NASTY, rows=rows, edits=edits, losses={NASTY: [1.0, 0.5]}),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the reports of all `results`."""
    folder = tmp_path_factory.mktemp("reports")
    for name, result in results().items():
        (folder / f"{name}.html").write_text(report.render_html(result), encoding="utf-8")
    return folder


@pytest.fixture
def visit(chromium: Any, folder: Path) -> Iterator[Callable[..., Any]]:
    """Opens a report; at the end, checks that no page made requests, logged messages or opened dialogs."""
    contexts, wrong = [], []

    def asked(request: Any, address: str) -> None:
        if request.url != address and not request.url.startswith("data:"):
            wrong.append(request.url)

    def visit(name: str = "plain", viewport: dict[str, int] = WIDE, **settings: Any) -> Any:
        contexts.append(chromium.new_context(viewport=viewport, offline=True, **settings))
        page = contexts[-1].new_page()
        address = (folder / f"{name}.html").as_uri()
        page.on("request", lambda request: asked(request, address))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        return page

    visit.wrong = wrong
    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def seen(element: Any) -> np.ndarray:
    """A screenshot of an element without its border pixels, which are blended; [H, W, 3], 0 to 255."""
    element.page.mouse.move(0, 0)
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB"), np.float32)[4:-4, 4:-4]


def operated(page: Any) -> bool:
    return page.evaluate("document.documentElement.classList.contains('js')")


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", results())
def test_every_report_fits_its_screen(visit: Any, name: str, viewport: dict[str, int]):
    page = visit(name, viewport)
    assert operated(page)
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    if page.locator("#side-by-side").count():
        page.locator("#side-by-side").check()
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    for control in page.locator("input:visible, button:visible").all():
        box = control.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= viewport["width"]


def test_before_and_after_by_keys(visit: Any):
    page = visit()
    widget = page.locator("#compare")
    divide, stage = widget.locator(".divide"), widget.locator(".stage")
    divide.focus()
    page.keyboard.press("ArrowRight")
    assert divide.input_value() == "51"
    page.keyboard.press("End")
    assert divide.get_attribute("aria-valuetext") == "100% input"
    before = seen(stage)
    page.keyboard.press("Home")
    after = seen(stage)
    divide.fill("50")
    both = seen(stage)
    height, width = both.shape[:2]
    top, left, right = slice(0, height // 2), slice(0, width // 2 - 5), slice(width // 2 + 5, width)
    assert np.abs(before - after).mean() > 5
    assert np.abs(both[top, left] - before[top, left]).max() <= 1
    assert np.abs(both[top, right] - after[top, right]).max() <= 1

    # The other methods, by the arrow keys of the radio buttons.
    widget.get_by_role("radio", name="SAM").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert widget.locator(".tag.end").inner_text() == "W+"
    assert widget.get_by_role("img", name="Reconstruction by W+").is_visible()
    assert not widget.get_by_role("img", name="Reconstruction by SAM").is_visible()
    other = seen(stage)
    assert np.abs(other[top, left] - before[top, left]).max() <= 1
    assert np.abs(other[top, right] - after[top, right]).mean() > 5


def test_before_and_after_by_mouse_and_touch(visit: Any):
    page = visit()
    divide, stage = page.locator("#compare .divide"), page.locator("#compare .stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    y = box["y"] + box["height"] / 3
    page.mouse.move(box["x"] + 0.5 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.2 * box["width"], y, steps=4)
    page.mouse.up()
    assert divide.input_value() == "20"
    page.mouse.move(box["x"] + 0.9 * box["width"], y)
    assert divide.input_value() == "20"

    phone = visit(viewport=NARROW, has_touch=True, is_mobile=True)
    stage = phone.locator("#compare .stage")
    box = stage.bounding_box()
    stage.tap(position={"x": 0.75 * box["width"], "y": 40})
    assert phone.locator("#compare .divide").input_value() == "75"


def said(page: Any) -> str:
    """The text of the panel about the current segment."""
    return " ".join(page.locator("#segment").inner_text().split())


def test_a_segment_shows_how_its_layer_was_chosen(visit: Any):
    page = visit()
    regions = page.locator("#map [role=option]")
    assert regions.count() == 5
    shown = results()["plain"].rows
    rows = page.locator("#segments tbody tr")

    regions.nth(3).hover()
    text = said(page)
    assert text.startswith("région 3 20% of the image, inverted in F8")
    for name, mean in zip(("W+", "F4", "F6", "F8", "F10"), shown[3].means, strict=True):
        assert f"{name} {mean:.3f}" in text
    assert "F8 is the first layer whose error is at most the threshold of 0.225." in text
    assert "current" in rows.nth(3).get_attribute("class")
    assert page.locator("#map .halo.thin").get_attribute("href") == "#region-3"

    # Conversely, a row of the table marks its segment.
    rows.nth(1).hover()
    assert said(page).startswith("segment 3 ")
    assert page.locator("#map .halo.thin").get_attribute("href") == "#region-1"

    # By keyboard: one Tab stop for the map, arrow keys within it.
    page.get_by_role("radio", name="SAM").focus()
    page.keyboard.press("Tab")  # the table of metrics does not scroll, so it is not a stop
    assert regions.nth(1).evaluate("region => region === document.activeElement")
    assert said(page).startswith("segment 3 ")
    page.keyboard.press("ArrowRight")
    assert regions.nth(2).evaluate("region => region === document.activeElement")
    assert regions.nth(2).get_attribute("aria-selected") == "true"
    assert regions.nth(2).get_attribute("aria-label") == "région 2"
    assert "inverted in F6" in said(page)
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert said(page).startswith("région 4 ")
    assert page.locator("#map").evaluate("map => getComputedStyle(map).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    assert not page.locator("#map").evaluate("map => map.contains(document.activeElement)")

    phone = visit(viewport=NARROW, has_touch=True, is_mobile=True)
    phone.locator("#map [role=option]").nth(4).tap()
    assert said(phone).startswith("région 4 ")


def test_thresholds_by_keys(visit: Any):
    page = visit()
    slider, rows = page.locator("#threshold"), page.locator("#segments tbody tr")
    layer_map = page.locator("#map")
    own = seen(layer_map)
    tiles = page.locator(".strip > li")
    assert tiles.count() == 3
    assert "used here" in tiles.nth(1).inner_text()
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "0.4"
    assert page.locator("#shares-text").inner_text() == "100% in W+"
    assert rows.locator(".chip").all_inner_texts() == ["W+"] * 5
    assert rows.nth(4).locator("td.chosen").inner_text() == f"{0.3:.3f}"
    assert "inverted in W+" in said(page)
    assert "0.4" in page.locator("section[aria-labelledby=layers] strong.threshold-text").inner_text()
    assert page.locator("dl.layers .served").first.inner_text() == "100% of the image, 5 segments"
    assert tiles.nth(2).get_attribute("aria-current") == "true"
    assert page.locator("#layers-at").get_by_role("img", name="Reconstruction at threshold 0.4").is_visible()
    assert page.locator("#layers-at .lpips").inner_text() == "0.250"
    moved = seen(layer_map)
    assert np.abs(moved - own).mean() > 10

    # Below all means, no layer meets the threshold.
    page.keyboard.press("Home")
    assert rows.locator(".chip").all_inner_texts() == ["F10"] * 5
    assert rows.nth(0).locator(".last").is_visible()
    assert "No layer's error is at most the threshold of 0.05" in said(page)
    page.locator("#back").click()
    assert page.locator("#back").is_disabled()
    assert slider.evaluate("slider => slider === document.activeElement")
    assert rows.locator(".chip").all_inner_texts() == ["W+", "F4", "F6", "F8", "F10"]
    tiles.nth(2).click()
    assert slider.input_value() == "2"
    page.locator("#segments tbody tr").nth(0).hover()
    assert np.abs(seen(layer_map) - moved).max() <= 1


def test_strengths_of_an_edit_by_keys(visit: Any):
    page = visit()
    block = page.locator(".edit-block")
    strength, stage = block.locator(".strength"), block.locator(".stage").last
    assert strength.get_attribute("aria-valuetext") == "2.5"
    strong = seen(stage)
    strength.focus()
    page.keyboard.press("ArrowLeft")
    assert strength.get_attribute("aria-valuetext") == "1"
    assert block.locator("output").inner_text() == "1"
    assert block.get_by_role("img", name="blue car at strength 1 by SAM").is_visible()
    assert not block.get_by_role("img", name="blue car at strength 2.5 by SAM").is_visible()
    weak = seen(stage)
    assert np.abs(strong - weak).mean() > 5
    page.keyboard.press("Home")
    plain = seen(stage)

    # Compared with the unedited image.
    page.keyboard.press("End")
    block.locator(".divide").focus()
    page.keyboard.press("End")
    assert np.abs(seen(stage) - plain).max() <= 1
    block.locator(".divide").fill("50")
    both = seen(stage)
    middle = both.shape[1] // 2
    assert np.abs(both[:, : middle - 5] - plain[:, : middle - 5]).max() <= 1
    assert np.abs(both[:, middle + 5 :] - strong[:, middle + 5 :]).max() <= 1

    page.locator("#side-by-side").check()
    assert all(image.is_visible() for image in block.locator(".after").all())
    assert not block.locator(".divide").is_visible()


def test_losses_at_a_step(visit: Any):
    page = visit()
    slider, values = page.locator("#step"), page.locator(".key .value")
    assert values.all_inner_texts() == ["0.5", "0.2"]
    slider.focus()
    page.keyboard.press("Home")
    assert values.all_inner_texts() == ["2", "2"]
    assert slider.get_attribute("aria-valuetext") == "step 0: W+ 2, SAM 2"
    plot = page.locator(".plot")
    plot.hover(position={"x": plot.bounding_box()["width"] - 2, "y": 40})
    assert values.all_inner_texts() == ["0.5", "0.2"]


def contrast(page: Any, selector: str) -> float:
    """Contrast of an element's text with its background, as WCAG defines it."""
    colors = page.locator(selector).first.evaluate(
        """element => {
          const behind = (e) => { const c = getComputedStyle(e).backgroundColor;
            return c === "rgba(0, 0, 0, 0)" && e.parentElement ? behind(e.parentElement) : c; };
          return [getComputedStyle(element).color, behind(element)];
        }"""
    )
    lights = []
    for color in colors:
        values = np.array([float(value) for value in color[color.index("(") + 1 : -1].split(",")[:3]]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ (0.2126, 0.7152, 0.0722)))
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(visit: Any, scheme: str):
    page = visit(color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    for selector in (
        "h1", ".lead", "figcaption", ".segment .muted", ".strip .note", ".chip", "td.best", "td.above", "thead th",
        ".ends", "footer p", ".tag", ".choice small", "button", ".ours figcaption",
    ):  # fmt: skip
        assert contrast(page, selector) >= 4.5, selector


def test_the_focus_is_visible(visit: Any):
    page = visit()
    stops = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => { const e = document.activeElement;
              const shown = e.closest("#map") ?? e;
              return e === document.body ? null
                : [e.id || e.getAttribute("class") || e.tagName, getComputedStyle(shown).outlineStyle]; }"""
        )
        if stop is None:
            break
        stops.add(stop[0])
        assert stop[1] == "solid", stop
    assert {"threshold", "divide", "strength", "side-by-side", "step"} <= stops


def test_without_scripts_everything_is_there(visit: Any):
    page = visit(java_script_enabled=False)
    assert page.locator("input:visible, button:visible, #segment:visible, .split:visible, .tag:visible").count() == 0
    for name in (
        "The input image, scene 3", "Reconstruction by W+", "Reconstruction by F10", "Reconstruction by SAM",
        "The segments of the image in different colors", "Layers at threshold 0.05: 100% in F10",
        "Layers at threshold 0.4: 100% in W+", "Reconstruction at threshold 0.05", "Error map of F6",
    ):  # fmt: skip
        assert any(image.is_visible() for image in page.get_by_role("img", name=name).all()), name
    for strength in ("0", "1", "2.5"):
        for method in ("W+", "F10", "SAM"):
            assert page.get_by_role("img", name=f"blue car at strength {strength} by {method}").is_visible()
        assert page.get_by_text(f"strength {strength}", exact=True).is_visible()
    assert page.locator("#segments").is_visible()
    assert page.locator("#map [data-segment] title").count() == 5
    assert page.locator(".plot polyline").count() == 2
    strip = page.locator(".strip").inner_text()
    assert "used here" in strip
    assert "LPIPS 0.500" in strip


def test_on_paper_everything_is_there(visit: Any):
    page = visit()
    page.locator(".strength").fill("0")
    page.emulate_media(media="print")
    assert page.locator("input:visible, button:visible, #segment:visible").count() == 0
    for strength in ("0", "1", "2.5"):
        assert page.get_by_role("img", name=f"blue car at strength {strength} by SAM").is_visible()


def test_names_are_shown_as_text(visit: Any):
    page = visit("nasty")
    assert operated(page)
    assert page.locator("h1").inner_text().startswith(NASTY)
    assert page.locator("script").count() == 2
    page.locator("#map [role=option]").first.hover()
    assert said(page).startswith(NASTY)
    strength = page.locator(".strength").first
    strength.fill("1")
    assert page.locator(".edit-block output").first.inner_text() == NASTY
    assert page.locator(".edit-block .strength").count() == 1  # a single strength has no slider
    # The page's policy blocks any other script.
    ran = page.evaluate(
        """() => { const script = document.createElement("script"); script.textContent = "window.ran = true";
          document.body.append(script); return Boolean(window.ran); }"""
    )
    assert not ran
    assert len(visit.wrong) == 1
    assert "Content Security Policy" in visit.wrong.pop()
