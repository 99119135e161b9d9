"""The page in a real browser, as a user uses it: the demo's generator, few steps."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import app
import numpy as np
import pytest
from PIL import Image

from samjax import demo
from samjax.errors import UserError

browser = pytest.mark.browser
ROOT = Path(__file__).parent.parent
SAMPLE = demo.SAMPLES / "scene1.png"
TIMEOUT = 120_000  # ms; includes compilation


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page, served by the program itself."""
    command = [sys.executable, "experiments/app/app.py", "--num_opt_steps", "30"]
    errors = tmp_path_factory.mktemp("app") / "errors"
    with (
        errors.open("w") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"open (http://127\.0\.0\.1:\d+/)", line)
            assert found, f"{line!r}, {errors.read_text()[-500:]}"
            yield found[1]
        finally:
            process.terminate()


@pytest.fixture
def opened(chromium, address):
    """A function that opens the page for another user; no request may leave this machine, no script fail."""
    contexts, outside, failures = [], [], []

    def open_page(width: int = 1400, height: int = 1000):
        context = chromium.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        local = (address, "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(local) or outside.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#file")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert outside == []
    assert failures == []


def says(page, text: str) -> None:
    page.wait_for_function("text => document.querySelector('#status').innerText.includes(text)", arg=text)


def upload(page, path: Path) -> None:
    page.set_input_files("#file input[type=file]", path)


def source(page, name: str) -> str:
    """Address of an image on the page; it changes with the image."""
    return page.locator(f"#{name} img").first.get_attribute("src")


def changed(page, name: str, before: str) -> str:
    page.wait_for_function(
        "([name, before]) => { const img = document.querySelector(`#${name} img`); return img && img.src !== before; }",
        arg=[name, page.evaluate("src => new URL(src, location).href", before)],
    )
    return source(page, name)


def set_slider(page, name: str, value: float) -> None:
    number = page.locator(f"#{name} input[type=number]")
    number.fill(str(value))
    number.press("Enter")


def test_without_gradio_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Gradio: pip install '\.\[app\]'"):
        app.main(app.Arguments())


@pytest.mark.parametrize("port", [99999999, -1, 0])
def test_ports_that_do_not_exist(port):
    with pytest.raises(UserError, match=f"--port must lie between 1 and 65535, not {port}"):
        app.main(app.Arguments(port=port))


@browser
def test_from_an_image_to_an_edit(opened, tmp_path):
    page = opened()
    upload(page, SAMPLE)
    says(page, "Choose layers, then invert")
    for name in ("W+", "F4", "F6", "F8", "F10"):
        assert page.locator(f"[id='map-{name}'] img").count() == 1

    # The threshold changes the map of layers at once.
    before = source(page, "layers")
    set_slider(page, "threshold", 0.1)
    before = changed(page, "layers", before)

    # A click selects a segment, whose layer can then be chosen by hand.
    selected = page.locator("#values tr.selected th")
    largest = selected.inner_text()
    page.locator("#layers img").click(position={"x": 100, "y": 390})
    page.wait_for_function(
        "before => document.querySelector('#values tr.selected th').innerText != before", arg=largest
    )
    assert selected.inner_text().startswith(page.locator("#segment input").input_value())
    page.locator("#layer label", has_text="W+").click()
    changed(page, "layers", before)
    page.wait_for_function("() => document.querySelector('#values tr.selected').innerText.includes('forced')")
    mean = page.locator("#values tr.selected td").first
    assert "chosen" in (mean.get_attribute("class") or "")
    page.locator("#layer label", has_text="by the threshold").click()
    page.wait_for_function("() => !document.querySelector('#values').innerText.includes('forced')")
    set_slider(page, "threshold", 0.35)

    # The inversion shows its loss and an image that improves.
    page.locator("#invert").click()
    says(page, "loss")
    page.wait_for_selector("#result img")
    first = source(page, "result")
    changed(page, "result", first)
    says(page, "Now edit")
    assert re.search(r"LPIPS 0\.\d+", page.locator("#status").inner_text())

    # Several directions at once.
    still = source(page, "edited")
    set_slider(page, "edit-0", 2)
    blue = changed(page, "edited", still)
    set_slider(page, "edit-1", 2)
    changed(page, "edited", blue)

    page.locator("#save").click()
    says(page, "The files are ready")
    links = page.locator("#files a[download]")
    assert links.count() == 4
    got = {}
    for i in range(4):
        with page.expect_download() as download:
            links.nth(i).click()
        got[download.value.suggested_filename] = download.value.path()
    assert set(got) == {f"scene1_{name}" for name in ("latents.npz", "reconstruction.png", "edited.png", "report.html")}
    assert zipfile.is_zipfile(got["scene1_latents.npz"])
    edited, plain = (np.asarray(Image.open(got[f"scene1_{name}.png"]), int) for name in ("edited", "reconstruction"))
    assert np.abs(edited - plain).mean() > 2
    assert "<title>scene1" in got["scene1_report.html"].read_text()


@browser
def test_stop(opened):
    page = opened()
    upload(page, SAMPLE)
    says(page, "Choose layers, then invert")
    page.locator("#invert").click()
    says(page, "step")
    page.locator("#stop").click()
    says(page, "Stopped")
    assert page.locator("#invert").is_enabled()
    assert page.locator("#stop").is_disabled()
    assert page.locator("#save").is_disabled()


@browser
def test_two_users_do_not_mix(opened):
    one, two = opened(), opened()
    upload(one, SAMPLE)
    says(one, "scene1.png: ")
    upload(two, demo.SAMPLES / "scene2.png")
    says(two, "scene2.png: ")
    set_slider(one, "threshold", 0.1)
    one.locator("#invert").click()
    two.locator("#invert").click()
    says(one, "Now edit")
    says(two, "Now edit")
    assert one.locator("#threshold input[type=number]").input_value() == "0.1"
    assert two.locator("#threshold input[type=number]").input_value() == "0.35"
    assert source(one, "result") != source(two, "result")
    assert "scene1" in one.locator("#file").inner_text()
    assert "scene2" in two.locator("#file").inner_text()


@browser
def test_a_scene_of_the_demo_and_its_names(opened):
    page = opened()
    page.locator("#sample input").click()
    page.locator("[role=option]", has_text="scene3").click()
    says(page, "scene3.png: ")
    assert "car" in page.locator("#values").inner_text()


@browser
def test_bad_files_get_a_line(opened, tmp_path):
    (tmp_path / "letter.png").write_text("Dear reader")
    page = opened()
    upload(page, tmp_path / "letter.png")
    says(page, "error: ")
    assert "letter.png" in page.locator("#status [role=alert]").inner_text()
    assert page.locator("#invert").is_disabled()
    page.locator("#file button[aria-label='Remove this file'], #file button[aria-label='Clear']").first.click()
    upload(page, SAMPLE)  # and the page goes on
    says(page, "Choose layers, then invert")


@browser
def test_a_narrow_window(opened):
    page = opened(390, 844)
    upload(page, SAMPLE)
    says(page, "Choose layers, then invert")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("image", "segments", "layers", "threshold", "invert"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= 390, name
