"""The page of app.py in Gradio: its elements, and what happens when they are used."""

from __future__ import annotations

import html
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import gradio.themes
import numpy as np

from samjax import Pipeline, UserError, demo, report
from samjax.io import images
from samjax.report import html as report_html
from samjax.report import sheets
from samjax.report.content import Content, by_share
from samjax.session import OnProgress, Session, StoppedError, stream

BY_THRESHOLD = "by the threshold"
SIDE = 512  # pixels of the longer side of images drawn for the page
STRENGTH = 4.0  # end of the sliders of edits

CSS = """
#status { position: fixed; bottom: 0; left: 0; right: 0; z-index: 60; padding: .6rem; }
.gradio-container { padding-bottom: 5rem !important; }
.samjax-status {
  padding: .6rem .9rem; border-radius: 8px; min-height: 2.6rem; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-primary); box-shadow: 0 0 1rem rgb(0 0 0 / .2);
}
.samjax-status progress {
  appearance: none; display: block; width: 100%; height: .5rem; margin-top: .4rem; border: 0; border-radius: .25rem;
  overflow: hidden; background: var(--border-color-primary);
}
.samjax-status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.samjax-status progress::-webkit-progress-value { background: #00629b; }
.samjax-status progress::-moz-progress-bar { background: #00629b; }
.samjax-status.wrong { background: #fdecea; color: #7a1210; font-weight: 600; }
.samjax-values { overflow: auto; max-height: 26rem; }
.samjax-values table {
  border: 0 !important; border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .85rem;
}
.samjax-values th, .samjax-values td {
  padding: .25rem .4rem; text-align: right; white-space: nowrap; border: 0 !important;
}
.samjax-values tr { border: 0 !important; }
.samjax-values thead th { position: sticky; top: 0; background: var(--body-background-fill); }
.samjax-values th:first-child { text-align: left; font-weight: 400; }
.samjax-values .chosen { border-radius: 5px; font-weight: 700; }
.samjax-values tr.selected th { font-weight: 700; box-shadow: inset 3px 0 #b0267a; }
"""


# --- what is shown ---


def status(text: str, fraction: float | None = None) -> str:
    """The line at the bottom of the page, with a progress bar if `fraction` is given."""
    bar = "" if fraction is None else f'<progress max="1" value="{fraction:.3f}" aria-label="progress"></progress>'
    return f'<div class="samjax-status" role="status">{html.escape(text)}{bar}</div>'


def failure(error: UserError) -> str:
    """The same line as on the command line."""
    return f'<div class="samjax-status wrong" role="alert">error: {html.escape(error.shown)}</div>'


def chip(layer: str) -> str:
    """Style of a cell in a layer's color."""
    color = report.layer_color(layer)
    return f"background: {report_html.css(color)}; color: {report_html.ink_on(color)}"


def values_table(content: Content, selected: int | None) -> str:
    """The mean error of each segment in each layer; the chosen layer has its color."""
    head = "".join(f"<th scope='col'>{name}</th>" for name in content.layers)
    rows = []
    for row in by_share(content):
        cells = []
        for name, mean in zip(content.layers, row.means, strict=True):
            style = f" class='chosen' style='{chip(name)}'" if name == row.layer else ""
            cells.append(f"<td{style}>{mean:.3f}</td>")
        mark = " (forced)" if row.forced else ""
        title = f"{html.escape(report.segment_title(row))}, {row.share:.0%}{mark}"
        rows.append(
            f"<tr{' class=selected' * (row.label == selected)}><th scope='row'>{title}</th>{''.join(cells)}</tr>"
        )
    return (
        f"<div class='samjax-values'><table><thead><tr><th scope='col'>expected error in</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def size(session: Session) -> tuple[int, int]:
    """Height and width of the figures drawn of a session's image."""
    height, width = session.target.shape[:2]
    return round(SIDE * height / max(height, width)), round(SIDE * width / max(height, width))


def shown(session: Session, image: np.ndarray) -> np.ndarray:
    """An image of the session [h, w, 3] in [-1, 1] as the page shows it: uint8, small ones enlarged."""
    pixels = images.to_uint8(image)
    return sheets.resize(pixels, *size(session)) if max(pixels.shape) < SIDE else pixels


def shown_generated(session: Session, image: np.ndarray) -> np.ndarray:
    """`shown` for a generator's image [R, R, 3], without the letterbox."""
    return shown(session, session.full_size(image))


# --- the page ---


class Page:
    """The page's elements and their handlers. Each user's `Session` is the value of the state `self.session`."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        layers, directions = [layer.name for layer in pipeline.layers], list(pipeline.directions)
        embedded = pipeline.category.name == "demo" and pipeline.options.gan_weights is None
        samples = sorted(demo.SAMPLES.glob("scene?.png")) if embedded else []
        self.samples = {path.stem: path for path in samples}
        column: dict[str, Any] = {"min_width": 300}
        with gr.Blocks(
            title="samjax", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
        ) as self.blocks:
            self.session = gr.State(None, delete_callback=lambda session: session and session.close())
            gr.Markdown(
                "# Invert and edit an image\n"
                "Each segment of the image takes the earliest latent layer that can reproduce it: early layers edit "
                "well, late ones are faithful."
            )
            self.status = gr.HTML(status("Drop an image to begin."), elem_id="status")
            gr.Markdown("## 1. The image")
            with gr.Row():
                with gr.Column(**column):
                    self.file = gr.File(label="Drop an image here, or click", height=150, elem_id="file")
                    self.sample = gr.Dropdown(
                        list(self.samples), value=None, label="Or choose a scene of the demo", visible=bool(samples),
                        elem_id="sample",
                    )  # fmt: skip
                with gr.Column(**column):
                    self.image = self._image("Image", "image")
                with gr.Column(**column):
                    self.segments = self._image("Segments", "segments")
            gr.Markdown("## 2. The layer of each segment\nExpected error in each layer; lighter means larger.")
            with gr.Row():
                self.maps = [self._image(f"Error in {name}", f"map-{name}", min_width=110) for name in layers]
            with gr.Row():
                with gr.Column(**column):
                    self.layers = self._image("Layers: click a segment to choose its layer", "layers")
                with gr.Column(**column):
                    self.threshold = gr.Slider(
                        0, 1, pipeline.category.threshold, step=0.005, interactive=False, elem_id="threshold",
                        label="Threshold: error up to which a layer is used",
                    )  # fmt: skip
                    self.segment = gr.Dropdown([], label="Segment", interactive=False, elem_id="segment")
                    self.layer = gr.Radio(
                        [BY_THRESHOLD, *layers], value=BY_THRESHOLD, label="Its layer", interactive=False,
                        elem_id="layer",
                    )  # fmt: skip
                with gr.Column(**column):
                    self.values = gr.HTML("", elem_id="values")
            gr.Markdown("## 3. Inversion and edits")
            with gr.Row():
                with gr.Column(**column):
                    self.result = self._image("Reconstruction", "result")
                with gr.Column(**column):
                    self.edited = self._image("Edited", "edited")
                with gr.Column(**column):
                    with gr.Row():
                        self.invert = gr.Button("Invert", variant="primary", interactive=False, elem_id="invert")
                        self.stop = gr.Button("Stop", interactive=False, elem_id="stop")
                    self.strengths = [
                        gr.Slider(
                            -STRENGTH, STRENGTH, 0, step=0.1, label=name.replace("_", " "), interactive=False,
                            elem_id=f"edit-{i}",
                        )
                        for i, name in enumerate(directions)
                    ]  # fmt: skip
                    if not directions:
                        gr.Markdown("There are no directions. To edit, start the page with `--edits_folder DIRECTORY`.")
                    self.save = gr.Button("Prepare downloads", interactive=False, elem_id="save")
                    self.files = gr.File(
                        label="Latents, images, report", file_count="multiple", interactive=False, visible=False,
                        elem_id="files",
                    )  # fmt: skip
            self._wire()

    @staticmethod
    def _image(label: str, name: str, **options: Any) -> Any:
        buttons: Any = ["download", "fullscreen"]
        return gr.Image(
            label=label, interactive=False, buttons=buttons, format="png", elem_id=name, alt_text=label, **options
        )

    def _wire(self) -> None:
        # Long computations run one after another; everything else answers at once, also while one of them runs.
        work: dict[str, Any] = {"concurrency_id": "work", "concurrency_limit": 1, "show_progress": "hidden"}
        at_once: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "trigger_mode": "always_last"}
        everything = [
            self.session, self.status, self.image, self.segments, *self.maps, self.layers, self.threshold, self.segment,
            self.layer, self.values, self.result, self.edited, self.invert, self.stop, self.save, self.files,
            *self.strengths,
        ]  # fmt: skip
        chosen = [self.layers, self.values]
        on: dict[str, Any] = {"api_visibility": "private"}
        saving = {**work, "concurrency_id": "save"}
        self.file.upload(self.open_file, [self.session, self.file], everything, **work, **on)
        self.sample.input(self.open_sample, [self.session, self.sample], everything, **work, **on)
        self.threshold.input(self.set_threshold, [self.session, self.threshold, self.segment], chosen, **at_once, **on)
        self.layers.select(self.click, [self.session], [self.segment, self.layer, self.values], **at_once, **on)
        self.segment.input(self.select, [self.session, self.segment], [self.layer, self.values], **at_once, **on)
        self.layer.input(self.force, [self.session, self.segment, self.layer], chosen, **at_once, **on)
        self.invert.click(self.run, [self.session], everything, **work, **on)
        self.stop.click(lambda session: session and session.stop(), [self.session], None, queue=False, **on)
        for slider in self.strengths:
            slider.input(self.edit, [self.session, *self.strengths], [self.edited], **at_once, **on)
        self.save.click(
            self.prepare,
            [self.session, *self.strengths],
            [self.status, self.files],
            **saving,
            **on,
        )

    # --- an image ---

    def open_file(self, session: Session | None, path: str) -> Iterator[dict[Any, Any]]:
        yield from self._open(session, Path(path), None)

    def open_sample(self, session: Session | None, name: str) -> Iterator[dict[Any, Any]]:
        path = self.samples[name]
        yield from self._open(session, path, path.with_name(f"{name}_segments.png"))

    def _open(self, before: Session | None, path: Path, segments: Path | None) -> Iterator[dict[Any, Any]]:
        try:
            names = None if segments is None else demo.SEGMENT_NAMES
            session = Session(self.pipeline, path, segments, segment_names=names)
        except UserError as error:
            yield {self.status: failure(error)}
            return
        if before is not None:
            before.close()
        off = gr.update(interactive=False)
        blank = [self.segments, *self.maps, self.layers, self.result, self.edited]
        yield {
            self.session: session,
            self.status: status(f"Analyzing {path.name} …"),
            self.image: shown(session, session.target),
            self.values: "",
            self.files: gr.update(value=None, visible=False),
            self.stop: gr.update(interactive=True),
            **dict.fromkeys([self.threshold, self.segment, self.layer, self.invert, self.save], off),
            **dict.fromkeys(self.strengths, gr.update(value=0, interactive=False)),
            **dict.fromkeys(blank, gr.update(value=None)),
        }
        ended = yield from self._follow(session, session.analyze)
        if ended:
            yield {self.status: ended, self.stop: off}
            return
        content = session.preview()
        high = report.heat_limit(content)
        rows = by_share(content)
        on = gr.update(interactive=True)
        yield {
            self.status: status(f"{path.name}: {len(rows)} segments. Choose layers, then invert."),
            self.segments: report.segments_overlay(content, *size(session)),
            **{
                element: sheets.resize(sheets.heat(values, high), *size(session))
                for element, values in zip(self.maps, content.maps, strict=True)
            },
            self.threshold: gr.update(value=session.threshold, maximum=max(high, session.threshold), interactive=True),
            self.segment: gr.update(
                choices=[(report.segment_title(row), row.label) for row in rows], value=rows[0].label, interactive=True
            ),
            self.layer: gr.update(value=BY_THRESHOLD, interactive=True),
            self.invert: on,
            self.stop: off,
            **self._chosen(session, rows[0].label),
        }

    # --- which layer ---

    def _chosen(self, session: Session, selected: int | None) -> dict[Any, Any]:
        content = session.preview()
        return {
            self.layers: report.layers_overlay(content, *size(session)),
            self.values: values_table(content, selected),
        }

    def set_threshold(self, session: Session | None, value: float, selected: int | None) -> dict[Any, Any]:
        if session is None or session.analysis is None:
            return {self.layers: gr.skip()}
        session.threshold = value
        return self._chosen(session, selected)

    def click(self, session: Session | None, event: gr.SelectData) -> dict[Any, Any]:
        if session is None or session.analysis is None:
            return {self.segment: gr.skip()}
        height, width = size(session)
        label = session.segment_at(event.index[0] / width, event.index[1] / height)
        return {self.segment: label, **self.select(session, label)}

    def select(self, session: Session | None, label: int) -> dict[Any, Any]:
        if session is None or session.analysis is None:
            return {self.layer: gr.skip()}
        return {
            self.layer: session.forced.get(label, BY_THRESHOLD),
            self.values: values_table(session.preview(), label),
        }

    def force(self, session: Session | None, label: int | None, layer: str) -> dict[Any, Any]:
        if session is None or session.analysis is None or label is None:
            return {self.layers: gr.skip()}
        session.force(label, None if layer == BY_THRESHOLD else layer)
        return self._chosen(session, label)

    # --- inversion, edits, downloads ---

    def run(self, session: Session | None) -> Iterator[dict[Any, Any]]:
        if session is None or session.analysis is None:
            yield {self.status: status("Drop an image to begin.")}
            return
        off, on = gr.update(interactive=False), gr.update(interactive=True)
        reset = gr.update(value=0, interactive=False)
        yield {
            self.status: status("Inverting …", 0.0),
            self.invert: off,
            self.stop: on,
            self.save: off,
            self.files: gr.update(value=None, visible=False),
            **dict.fromkeys(self.strengths, reset),
            self.edited: None,
        }
        ended = yield from self._follow(session, session.invert)
        again = gr.update(interactive=session.inversion is not None)
        if ended:
            before = None if session.inversion is None else shown_generated(session, session.edit({}))
            yield {
                self.status: ended, self.invert: on, self.stop: off, self.save: again,
                **dict.fromkeys([self.result, self.edited], before), **dict.fromkeys(self.strengths, again),
            }  # fmt: skip
            return
        image = shown_generated(session, session.edit({}))
        yield {
            self.status: status(f"{session.summary()} You can edit it now."),
            **dict.fromkeys([self.result, self.edited], image),
            self.invert: gr.update(value="Invert again", interactive=True),
            self.stop: off,
            self.save: on,
            **dict.fromkeys(self.strengths, on),
        }

    def _follow(
        self, session: Session, work: Callable[[OnProgress], Any]
    ) -> Generator[dict[Any, Any], None, str | None]:
        """Shows the progress of `work`; returns the status to show if it did not finish, otherwise None."""
        try:
            for update in stream(work):
                image = {} if update.image is None else {self.result: shown_generated(session, update.image)}
                yield {self.status: status(f"{update.task}: {update.message}", update.fraction), **image}
        except StoppedError:
            return status("Stopped.")
        except UserError as error:
            return failure(error)
        return None

    def edit(self, session: Session | None, *strengths: float) -> Any:
        if session is None or session.inversion is None:
            return gr.skip()
        return shown_generated(session, session.edit(self._named(strengths)))

    def prepare(self, session: Session | None, *strengths: float) -> Iterator[dict[Any, Any]]:
        if session is None or session.inversion is None:
            yield {self.status: status("Invert an image first.")}
            return
        yield {self.status: status("Writing latents, images and the report …")}
        try:
            paths = session.save(session.directory, self._named(strengths))
        except UserError as error:
            yield {self.status: failure(error)}
            return
        yield {
            self.status: status("The files are ready."),
            self.files: gr.update(value=[str(path) for path in paths], visible=True),
        }

    def _named(self, strengths: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.pipeline.directions, strengths, strict=True))


def launch(pipeline: Pipeline, *, listen: bool, port: int | None, open_browser: bool) -> tuple[gr.Blocks, str]:
    """Serves the page in threads of its own.

    Args:
      pipeline: the pipeline shared by all users.
      listen: whether other machines can open the page.
      port: port of the page; if None, the first free port starting at 7860.
      open_browser: whether to open it in this machine's browser.

    Returns:
      The page and its address.

    Raises:
      UserError: the port cannot be used.
    """
    theme = gradio.themes.Default(  # with the system's own fonts, so that the page loads nothing from other servers
        font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    )
    blocks = Page(pipeline).blocks.queue()
    try:
        _, address, _ = blocks.launch(
            server_name="0.0.0.0" if listen else "127.0.0.1", server_port=port, share=False, quiet=True,
            inbrowser=open_browser, prevent_thread_lock=True, theme=theme, css=CSS, footer_links=[],
            max_file_size="200mb",
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            "no port from 7860 on is free: give one with --port"
            if port is None
            else f"--port {port} cannot be used, perhaps because another program uses it: give another, or leave it out"
        ) from error
    return blocks, address
