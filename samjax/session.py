"""One image being worked on, from its analysis to its edits: the state behind a page or a notebook.

    session = Session(Pipeline.from_pretrained("demo"), "photo.png")
    session.analyze()
    session.threshold = 0.3
    session.invert()
    session.edit({"blue_car": 2.0})

Any number of sessions share a pipeline. Each belongs to one user and one image.
"""

from __future__ import annotations

import math
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from samjax import driver, editing, latents, layer_selection, losses, report
from samjax.analysis import Analysis
from samjax.errors import UserError
from samjax.io import files, images
from samjax.layer_selection import Assignment
from samjax.pipeline import Pipeline
from samjax.report import Content
from samjax.results import Inversion

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


class StoppedError(Exception):
    """The work was ended by `Session.stop`."""


class ProgressUpdate(NamedTuple):
    """The progress of an analysis or an inversion.

    Attributes:
      task: what is running.
      fraction: fraction of the work done so far, from 0 to 1.
      message: step, loss and time left, in words.
      image: [R, R, 3], the generator's image of the current latents, about once a second during an inversion.
    """

    task: str
    fraction: float
    message: str
    image: np.ndarray | None = None


OnProgress = Callable[[ProgressUpdate], None]


class Session:
    """One image, from opening it to editing it.

    Several threads may use a session at once: the controls of a page change `threshold` and `forced` while an inversion
    runs, which uses the values they had when it started.

    Attributes:
      pipeline: the pipeline that does the work.
      name: name of the image, made safe for the names of files.
      source: uint8 [H, W, 3], the image as it was given.
      target: float32 [h, w, 3] in [-1, 1], the image to reconstruct.
      threshold: mean error up to which a segment may use a layer.
      forced: label to layer of the segments whose layer is chosen by hand; it is replaced, never modified.
      analysis: segments, start of W+ and error maps; None before `analyze`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        image: str | Path | Image.Image | ArrayLike,
        segments: str | Path | ArrayLike | None = None,
        *,
        segment_names: Mapping[int, str] | None = None,
    ) -> None:
        """Opens an image.

        Args:
          pipeline: the pipeline that analyzes, inverts and edits the image.
          image: as in `Pipeline.analyze`.
          segments: as in `Pipeline.analyze`.
          segment_names: label to what the segment shows.

        Raises:
          UserError: the image, or the file of the segments, cannot be used.
        """
        self.pipeline = pipeline
        self.name = files.safe_name(Path(image).stem) if isinstance(image, str | Path) else "image"
        self.source, self.target = pipeline.read_image(image, notify=lambda _: None)  # `analyze` notifies
        if isinstance(segments, str | Path):
            images.image_size(segments)
        self._image, self._segments, self._segment_names = image, segments, segment_names
        self.threshold = pipeline.category.threshold
        self.forced: Mapping[int, str] = {}
        self.analysis: Analysis | None = None
        self._finished: tuple[Inversion, dict[int, Array]] | None = None  # with the features that edits keep
        self._directory = tempfile.TemporaryDirectory(prefix="samjax-", ignore_cleanup_errors=True)
        self._stop = threading.Event()

    @property
    def directory(self) -> Path:
        """A temporary directory of this session; `close` removes it."""
        return Path(self._directory.name)

    @property
    def inversion(self) -> Inversion | None:
        """The last finished inversion; None before `invert`."""
        return None if self._finished is None else self._finished[0]

    def stop(self) -> None:
        """Ends the analysis or inversion that is running, at its next step."""
        self._stop.set()

    def close(self) -> None:
        """Ends what is running, and removes the temporary directory."""
        self.stop()
        self._directory.cleanup()

    # --- analysis and layers ---

    def analyze(self, on_progress: OnProgress | None = None) -> None:
        """Finds segments, where W+ starts, and error maps; see `Pipeline.analyze`.

        Args:
          on_progress: called between chunks of steps, if error maps are measured.

        Raises:
          StoppedError: `stop` was called.
          UserError: the image or its segments cannot be used.
          DivergedError: a loss is not finite.
        """
        self._stop.clear()
        self.analysis = self.pipeline.analyze(
            self._image, segments=self._segments, segment_names=self._segment_names,
            on_progress=self._watch("Measuring the error maps", on_progress, draw=False),
        )  # fmt: skip

    def segment_at(self, x: float, y: float) -> int:
        """The label of the segment at a position, given as fractions of the width and the height from the upper left.

        Raises:
          UserError: the image has not been analyzed yet.
        """
        segments = self._analyzed().segments
        row, column = (min(max(int(v * n), 0), n - 1) for v, n in zip((y, x), segments.shape, strict=True))
        return int(segments[row, column])

    def force(self, label: int, layer: str | None) -> None:
        """Chooses the layer of a segment by hand, or leaves it to the threshold again if `layer` is None."""
        others = {key: value for key, value in self.forced.items() if key != label}
        self.forced = others | ({label: layer} if layer else {})

    def assignment(self) -> Assignment:
        """The layer of each segment, by `threshold` and `forced`.

        Raises:
          UserError: the image has not been analyzed yet.
        """
        known = self._analyzed()
        chosen = layer_selection.assign_layers(known.maps, known.segments, self.threshold)
        indices = {label: known.layers.index(layer) for label, layer in self.forced.items()}
        return layer_selection.force_layers(chosen, known.segments, indices)

    def preview(self) -> Content:
        """What figures show before an inversion: segments, error maps, and the layer of each segment.

        Raises:
          UserError: the image has not been analyzed yet.
        """
        return report.preview(self._analyzed(), self.assignment(), self.threshold, forced=self.forced)

    # --- inversion and edits ---

    def invert(self, on_progress: OnProgress | None = None) -> Inversion:
        """Inverts the image in the layers of `assignment`; see `Pipeline.invert`.

        It also prepares `edit`, so that the first edit is as fast as every other.

        Args:
          on_progress: called between chunks of steps.

        Returns:
          The inversion, which is also `inversion` from now on.

        Raises:
          StoppedError: `stop` was called.
          UserError: the image has not been analyzed yet.
          DivergedError: a loss is not finite.
        """
        self._stop.clear()
        inversion = self.pipeline.invert(
            self._analyzed(), threshold=self.threshold, layers=self.forced,
            on_progress=self._watch("Inverting", on_progress, draw=True),
        )  # fmt: skip
        generator, config = self.pipeline.generator, self.pipeline.config
        _, features = latents.draw(
            generator.config, generator.params, dict(inversion.latents), inversion.masks, noise=config.stored_noise,
            precision=config.matmul_precision,
        )  # fmt: skip
        self._finished = inversion, features
        self.edit(dict.fromkeys(self.pipeline.directions, 1.0))  # compiles
        return inversion

    def summary(self) -> str:
        """One line about the last inversion.

        Raises:
          UserError: there is none yet.
        """
        inversion, _ = self._inverted()
        return f"Inverted in {inversion.seconds:.0f} s: LPIPS {inversion.metrics['LPIPS']:.3f} (0 means identical)."

    def edit(self, strengths: Mapping[str, float]) -> np.ndarray:
        """Edits the last inversion along several directions at once.

        Args:
          strengths: strength by the name of a direction of the pipeline; if all are 0, the result is the
            reconstruction.

        Returns:
          The generator's image, [R, R, 3] in [-1, 1].

        Raises:
          UserError: there is no inversion yet, or no direction of this name.
        """
        inversion, features = self._inverted()
        directions = self.pipeline.directions
        if unknown := [name for name in strengths if name not in directions]:
            raise UserError(f"there is no direction {unknown[0]!r}: choose from {', '.join(directions) or 'none'}")
        if not any(strengths.values()):
            return np.clip(inversion.image, -1, 1)
        generator, config = self.pipeline.generator, self.pipeline.config
        total = sum(strength * directions[name] for name, strength in strengths.items())
        image = editing.apply(
            generator.config, generator.params, jnp.asarray(inversion.latents["W+"]), features, inversion.masks,
            jnp.asarray(total)[None], jnp.ones(1), noise=config.stored_noise, precision=config.matmul_precision,
        )  # fmt: skip
        return np.clip(np.asarray(image[0]), -1, 1)

    def full_size(self, image: np.ndarray) -> np.ndarray:
        """A generator's image [R, R, 3] at its own size, without the letterbox."""
        return losses.full_size(image, *self.pipeline.category.target_size)

    def describe(self) -> Content:
        """What the report shows: the last inversion, its baselines, and each direction at several strengths.

        Raises:
          UserError: there is no inversion yet.
        """
        inversion, _ = self._inverted()
        return report.describe(inversion, edits=self.pipeline.edit_sweep(inversion))

    def save(self, directory: str | Path, strengths: Mapping[str, float]) -> list[Path]:
        """Writes the last inversion: latents, reconstruction, edited image and report.

        The images have the generator's own size, without the letterbox.

        Args:
          directory: where the files are written; created if missing.
          strengths: strengths of the edit, as in `edit`.

        Returns:
          The files: NAME_latents.npz, with "latent_W+" and so on, "loss" [steps] and "layer_map" [h, w];
          NAME_reconstruction.png; NAME_edited.png; NAME_report.html.

        Raises:
          UserError: there is no inversion yet, no direction of this name, or a file cannot be written.
        """
        inversion, _ = self._inverted()
        names = ("latents.npz", "reconstruction.png", "edited.png", "report.html")
        paths = [Path(directory) / f"{self.name}_{name}" for name in names]
        arrays = {f"latent_{name}": latent for name, latent in inversion.latents.items()}
        arrays |= {"loss": np.asarray(inversion.terms.total), "layer_map": inversion.assignment.layer_maps[0]}
        files.write_npz(paths[0], arrays)
        images.save_png(paths[1], self.full_size(inversion.image))
        images.save_png(paths[2], self.full_size(self.edit(strengths)))
        files.write_text(paths[3], report.render_html(self.describe()))
        return paths

    # --- within ---

    def _analyzed(self) -> Analysis:
        if self.analysis is None:
            raise UserError("the image has not been analyzed yet: call analyze")
        return self.analysis

    def _inverted(self) -> tuple[Inversion, dict[int, Array]]:
        if self._finished is None:
            raise UserError("the image has not been inverted yet: call invert")
        return self._finished

    def _watch(self, task: str, on_progress: OnProgress | None, *, draw: bool) -> driver.OnProgress:
        """A callback of the driver that stops, and that reports progress: once a second with an image if `draw`."""
        last = -math.inf

        def watch(progress: driver.Progress) -> None:
            nonlocal last
            if self._stop.is_set():
                raise StoppedError
            if on_progress is None:
                return
            fraction = (progress.group + progress.step / progress.num_steps) / progress.groups
            loss = float(np.mean(progress.terms.total[-1]))
            left = time_left(progress.seconds_left)
            message = f"step {progress.step} of {progress.num_steps}, loss {loss:.3f}, {left}"
            if progress.groups > 1:
                message = f"layer {progress.group + 1} of {progress.groups}, {message}"
            image = None
            if draw and time.perf_counter() - last > 1:
                last = time.perf_counter()
                image = self.pipeline.render(progress.state.latents, progress.masks)[0]
            on_progress(ProgressUpdate(task, fraction, message, image))

        return watch


def stream(work: Callable[[OnProgress], T]) -> Generator[ProgressUpdate, None, T]:
    """Runs work in a thread of its own, and yields its progress.

    If updates arrive faster than they are consumed, those without an image are skipped.

    Args:
      work: called with the function to report progress to, such as `Session.invert`.

    Returns:
      What `work` returns. An error that it raises is raised here.
    """
    events: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    results: list[T] = []

    def run() -> None:
        try:
            results.append(work(lambda update: events.put((False, update))))
            events.put((True, None))
        except BaseException as error:  # raised again in the thread that consumes
            events.put((True, error))

    threading.Thread(target=run, daemon=True).start()
    while True:
        ended, event = events.get()
        while not ended and event.image is None and not events.empty():
            ended, event = events.get()
        if not ended:
            yield event
            continue
        if event is not None:
            raise event
        return results[0]


def time_left(seconds: float) -> str:
    """A duration in words, such as "9 s left" or "3 min left"."""
    return f"{seconds:.0f} s left" if seconds < 90 else f"{seconds / 60:.0f} min left"
