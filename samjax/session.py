"""What one person does with one image on the page of app.py, without the page.

A `Studio` is loaded once and shared; a `Session` belongs to one person and one image.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import invert
import jax.numpy as jnp
import networks
import numpy as np

from samjax import api, editing, maps
from samjax.config import InversionConfig
from samjax.inversion import Progress
from samjax.io import files, images, report

T = TypeVar("T")


class Studio(NamedTuple):
    """What all sessions share: the settings, the networks, the directions [num_ws, w_dim] by name, and the threshold
    to begin with."""

    settings: invert.Settings
    nets: networks.Networks
    config: InversionConfig
    models: api.Models
    directions: dict[str, np.ndarray]
    threshold: float

    @property
    def layers(self) -> list[str]:
        return [layer.name for layer in self.models.layers]


def load(settings: invert.Settings) -> Studio:
    """Loads what the settings ask for.

    Raises:
      UserError: as in invert.py.
    """
    nets = networks.load(settings)
    threshold = invert.settle_threshold(settings, nets.category)
    config = invert.settle_config(settings, nets)
    models = api.load_models(nets.generator, config, seed=settings.seed)
    return Studio(settings, nets, config, models, invert.load_directions(settings, nets), threshold)


class StoppedError(Exception):
    """Somebody asked for an end of what was running."""


class Report(NamedTuple):
    """Of something that is running: what, how far it is (0 to 1), in words, and a picture [R, R, 3] where there is
    one."""

    what: str
    share: float
    words: str
    picture: np.ndarray | None = None


Tell = Callable[[Report], None]


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished inversion: the choice of layers it was made with, and its features, from which edits are drawn."""

    threshold: float
    forced: Mapping[int, str]
    assignment: maps.Assignment
    item: invert.Inverted
    features: dict[int, Any]
    seconds: float


class Session:
    """One image, from opening to edits.

    Not frozen: the page's controls reach it from several threads, each changes its own part, and no one's change may
    be lost when another's run ends.

    Attributes:
      studio: what it works with.
      photograph: the image.
      folder: of its own, for downloads; goes with `close`.
      threshold: mean error up to which a segment may use a layer.
      forced: label of a segment to the layer that it gets whatever the threshold; replaced, never changed.
      looked: segments, start and error maps; None until `look`.
      done: the last inversion; None until `invert`.
    """

    def __init__(self, studio: Studio, photograph: invert.Photograph):
        self.studio = studio
        self.photograph = photograph
        self.threshold = studio.threshold
        self.forced: dict[int, str] = {}
        self.looked: invert.Looked | None = None
        self.done: Done | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="samjax-", ignore_cleanup_errors=True)
        self._stop = threading.Event()

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    def stop(self) -> None:
        """Ends what is running, at its next step."""
        self._stop.set()

    def close(self) -> None:
        """Stops, and removes its files."""
        self.stop()
        self._folder.cleanup()

    # --- the image ---

    def look(self, tell: Tell) -> None:
        """Finds segments, start and error maps.

        Raises:
          StoppedError: see `stop`.
          DivergedError: a loss that is not finite.
        """
        studio, target = self.studio, self.photograph.target
        self._stop.clear()
        segments, ws = invert.first_look(studio.settings, studio.nets, self.photograph, studio.models)
        if studio.nets.predictor is not None:
            error_maps = networks.predicted_maps(studio.nets, target, studio.config.latent_names)
            self.looked = invert.Looked(segments, ws, error_maps, [])
            return
        measured = api.measure(
            studio.models, target, ws, num_opt_steps=invert.measure_steps(studio.settings, studio.config),
            seed=studio.settings.seed, on_progress=self._watch("Measuring the error maps", tell),
        )  # fmt: skip
        latents = {name: np.asarray(value[0]) for name, value in measured.latents.items()}
        singles = invert.single_inversions(studio.models, latents, np.asarray(measured.terms.total)[:, 0])
        self.looked = invert.Looked(segments, ws, measured.maps[0], singles)

    def segment_at(self, x: float, y: float) -> int:
        """Label of the segment at a place of the image, both 0 to 1 from the upper left."""
        assert self.looked is not None
        height, width = self.looked.segments.shape
        row, column = (min(max(int(v * n), 0), n - 1) for v, n in ((y, height), (x, width)))
        return int(self.looked.segments[row, column])

    def force(self, label: int, layer: str | None) -> None:
        """Gives a segment a layer whatever the threshold, or leaves it to the threshold again."""
        self.forced = {k: v for k, v in self.forced.items() if k != label} | ({label: layer} if layer else {})

    def assignment(self) -> maps.Assignment:
        """The layer of each segment, by the threshold and by force."""
        assert self.looked is not None
        chosen = maps.assign_layers(self.looked.maps, self.looked.segments, self.threshold)
        indices = {label: self.studio.layers.index(name) for label, name in self.forced.items()}
        return maps.force_layers(chosen, self.looked.segments, indices)

    def preview(self) -> report.Result:
        """What is known before an inversion, for pictures."""
        return self._describe(self.threshold, self.forced, self.assignment(), {}, {})

    # --- inversion and edits ---

    def invert(self, tell: Tell) -> None:
        """Inverts the image with the layers chosen now.

        Raises:
          StoppedError: see `stop`.
          DivergedError: a loss that is not finite.
        """
        assert self.looked is not None
        studio, threshold, forced, assignment = self.studio, self.threshold, self.forced, self.assignment()
        self._stop.clear()
        began = time.perf_counter()
        masks = maps.stack_masks(assignment.layer_maps, studio.models.layers)
        result = api.invert_layers(
            studio.models, self.photograph.target, assignment.layer_maps, self.looked.ws, seed=studio.settings.seed,
            on_progress=self._watch("Inverting", tell, masks),
        )  # fmt: skip
        item = invert.Inverted(result.latents, result.masks, result.images[0], np.asarray(result.terms.total)[:, 0])
        generator, precision = studio.models.generator, studio.config.matmul_precision
        features = editing.record(
            generator.config,
            generator.params,
            item.latents,
            item.masks,
            noise=studio.config.stored_noise,
            precision=precision,
        )
        self.done = Done(threshold, forced, assignment, item, features, time.perf_counter() - began)
        self.edit(dict.fromkeys(studio.directions, 1.0))  # compiles, so that the first edit is as fast as the next

    def summary(self) -> str:
        """One line about the last inversion."""
        assert self.done is not None
        distance = api.distances(self.studio.models, self.done.item.image[None], self.photograph.target)[0]
        return f"Inverted in {self.done.seconds:.0f} s: LPIPS {distance:.3f} (0 is equal)."

    def edit(self, strengths: Mapping[str, float]) -> np.ndarray:
        """The inverted image with several directions at once, each with its strength; [R, R, 3] in [-1, 1].

        Without any, the reconstruction itself.
        """
        assert self.done is not None
        studio, item = self.studio, self.done.item
        if not any(strengths.values()):
            return np.clip(item.image, -1, 1)
        generator = studio.models.generator
        way = sum(strength * studio.directions[name] for name, strength in strengths.items())
        image = editing.apply(
            generator.config, generator.params, jnp.asarray(item.latents["W+"]), self.done.features, item.masks,
            jnp.asarray(way)[None], jnp.ones(1), noise=studio.config.stored_noise, precision=studio.config.matmul_precision,
        )  # fmt: skip
        return np.clip(np.asarray(image[0]), -1, 1)

    def result(self) -> report.Result:
        """The inversion and its edits, for the report."""
        assert self.looked is not None
        assert self.done is not None
        models, methods = self.studio.models, {"SAM": self.done.item}
        if self.looked.singles:
            singles = self.looked.singles
            methods = {"W+": singles[0], models.layers[-1].name: singles[-1], **methods}
        job = self._job(self.done.threshold)
        edited = {name: invert.edit(job, models, item) for name, item in methods.items()}
        return self._describe(self.done.threshold, self.done.forced, self.done.assignment, methods, edited)

    def full_size(self, image: np.ndarray) -> np.ndarray:
        """A generator's image [R, R, 3] without the rows of its letterbox."""
        return invert.full_size(self._job(self.threshold), image)

    def save(self, folder: Path, strengths: Mapping[str, float]) -> list[Path]:
        """Writes latents (as invert.py does), reconstruction, edited image and report into a folder; the files."""
        assert self.done is not None
        item, stem = self.done.item, self.photograph.path.stem
        paths = [
            folder / f"{stem}_{name}" for name in ("latents.npz", "reconstruction.png", "edited.png", "report.html")
        ]
        latents = {f"latent_{name}": np.asarray(value) for name, value in item.latents.items()}
        files.write_npz(paths[0], latents | {"loss": item.loss, "layer_map": self.done.assignment.layer_maps[0]})
        images.save_png(paths[1], self.full_size(item.image))
        images.save_png(paths[2], self.full_size(self.edit(strengths)))
        files.write_text(paths[3], report.render_html(self.result()))
        return paths

    # --- within ---

    def _watch(self, what: str, tell: Tell, masks: Any = None) -> Callable[[Progress], None]:
        """Tells how far it is, once a second with a picture where there are masks to draw it with."""
        last = -math.inf

        def watch(progress: Progress) -> None:
            nonlocal last
            if self._stop.is_set():
                raise StoppedError
            share = (progress.group + progress.step / progress.num_steps) / progress.groups
            loss = float(np.mean(progress.terms.total[-1]))
            words = f"step {progress.step} of {progress.num_steps}, loss {loss:.3f}, {time_left(progress.seconds_left)}"
            if progress.groups > 1:
                words = f"layer {progress.group + 1} of {progress.groups}, {words}"
            picture = None
            if masks is not None and time.perf_counter() - last > 1:
                last = time.perf_counter()
                picture = api.render(self.studio.models, progress.state.latents, masks)[0]
            tell(Report(what, share, words, picture))

        return watch

    def _job(self, threshold: float) -> invert.Job:
        studio = self.studio
        return invert.Job(
            nets=studio.nets,
            category=studio.nets.category,
            config=studio.config,
            photograph=self.photograph,
            folder=self.folder,
            thresholds=[threshold],
            main_threshold=threshold,
            measure_steps=invert.measure_steps(studio.settings, studio.config),
            directions=studio.directions,
            strengths=studio.settings.edit_strengths,
            generator_name=invert.generator_name(studio.settings, studio.nets),
        )

    def _describe(
        self, threshold: float, forced: Mapping[int, str], assignment: maps.Assignment, methods: Any, edited: Any
    ) -> report.Result:
        assert self.looked is not None
        job, models = self._job(threshold), self.studio.models
        return invert.describe(job, models, self.looked, assignment, 0, methods, edited, forced)


def open_image(studio: Studio, path: Path, segments_path: Path | None = None) -> Session:
    """A session with an image of one's own, or with a sample of the demo and its segments.

    Raises:
      UserError: not to be used as an image.
    """
    picture = images.read_image(path)
    return Session(studio, invert.fitted(path, picture, studio.nets.category, studio.settings.fit, segments_path))


def stream(work: Callable[[Tell], T]) -> Generator[Report, None, T]:
    """Runs `work` in a thread of its own, and gives what it tells on the way; reports that nobody took in time are
    passed over, pictures are not."""
    news: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    outcome: list[T] = []

    def run() -> None:
        try:
            outcome.append(work(lambda told: news.put((False, told))))
            news.put((True, None))
        except BaseException as error:  # handed on to whoever waits
            news.put((True, error))

    threading.Thread(target=run, daemon=True).start()
    while True:
        ended, told = news.get()
        while not ended and told.picture is None and not news.empty():
            ended, told = news.get()
        if not ended:
            yield told
            continue
        if told is not None:
            raise told
        return outcome[0]


def time_left(seconds: float) -> str:
    """ "9 s left", "3 min left"."""
    return f"{seconds:.0f} s left" if seconds < 90 else f"{seconds / 60:.0f} min left"
