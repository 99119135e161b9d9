"""The stages of an inversion, compared with the results of the authors' code: differences, tolerances and verdicts."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from reference_job import TERMS

from samjax import Pipeline, analysis, driver, editing, latents, layer_selection, losses, report
from samjax.config import InversionConfig
from samjax.inversion import Items
from samjax.io import images
from samjax.latents import LATENT_NAMES
from samjax.nets import stylegan2
from samjax.report import sheets
from samjax.report.training import pairs_figure

T = TypeVar("T")

STRENGTHS = (0.0, 1.0, 2.0, 3.0)
"""Strengths of the edit, those of the authors' script."""


class Tolerance(NamedTuple):
    """The largest difference with which a stage passes, and its unit."""

    limit: float
    unit: str


SPREAD, PIXELS = "of the spread", "of the pixels"

TOLERANCES: Mapping[str, Tolerance] = {
    "target image": Tolerance(1e-6, "absolute"),
    # Sums of float32 products in another order: about 1e-6 in networks of a hundred layers.
    "encoder code": Tolerance(1e-4, SPREAD),
    "error maps": Tolerance(1e-4, SPREAD),
    # Rounding decides where two classes are equally likely, and which of two similar instances comes first.
    "segments": Tolerance(1e-3, PIXELS),
    "segments (instances)": Tolerance(1e-2, PIXELS),
    "layer map": Tolerance(1e-3, PIXELS),
    "masks": Tolerance(1e-6, "absolute"),
    "prior: mean": Tolerance(1e-4, SPREAD),
    # The inverse magnifies rounding in the directions in which styles vary least; it enters as a term of the loss.
    "prior: inverse covariance": Tolerance(1e-3, SPREAD),
    "first image": Tolerance(1e-4, SPREAD),
    # Adam divides each gradient by its own size: where it is almost zero, rounding decides its sign, and trajectories
    # diverge. With weights filled by rule, ten steps of the authors' own code on one thread and on two differ by 1e-3
    # in a term and by 9e-3 in the image.
    "losses of every step": Tolerance(1e-3, "relative"),
    "image after the steps": Tolerance(1e-2, SPREAD),
    "edit": Tolerance(1e-4, SPREAD),
}
"""By stage, in the table's order."""


# --- differences ---


def absolute(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Largest absolute difference; infinite for arrays of different shapes, NaN if a value is NaN."""
    x, y = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.max(np.abs(x - y))) if x.shape == y.shape else math.inf


def of_spread(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Largest difference, relative to the range of their values."""
    difference, spread = absolute(ours, theirs), float(np.ptp(np.asarray(theirs, np.float64)))
    return difference / spread if spread else math.inf if difference else difference


def each_of_spread(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest `of_spread` along the leading axis."""
    return max(of_spread(x, y) for x, y in zip(ours, theirs, strict=True))


def relative(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Largest difference of two values, relative to theirs; infinite if only theirs is 0."""
    x, y = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if x.shape != y.shape:
        return math.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(x == y, 0.0, np.abs(x - y) / np.abs(y))))


def of_pixels(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Fraction of pixels with different labels."""
    return float(np.mean(np.asarray(ours) != np.asarray(theirs))) if np.shape(ours) == np.shape(theirs) else math.inf


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; seconds are without compilation, which is listed separately."""

    stage: str
    difference: float
    tolerance: Tolerance
    theirs: float
    ours: float
    compilation: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance.limit


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The rows in Markdown."""
    yield "| stage | largest difference | tolerance | verdict | theirs, s | ours, s | compilation, s |"
    yield "|---|--:|--:|---|--:|--:|--:|"
    for row in rows:
        cells = [
            row.stage,
            f"{row.difference:.1e} {row.tolerance.unit}",
            f"{row.tolerance.limit:.0e}",
            "pass" if row.passed else "**fail**",
            *("" if math.isnan(x) else f"{x:.2f}" for x in (row.theirs, row.ours, row.compilation)),
        ]
        yield "| " + " | ".join(cells) + " |"


# --- both sides ---


class Theirs(NamedTuple):
    """Results of the authors' script: arrays in our layout (see `reference_sam`), and the seconds of its stages."""

    arrays: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]

    def masks(self) -> dict[str, Any]:
        """The masks, with a leading axis of 1."""
        return {name: self.arrays[f"mask_{name}"][None] for name in LATENT_NAMES[1:]}

    def latents(self) -> dict[str, Any]:
        """The latents after the steps, with a leading axis of 1."""
        return {name: self.arrays[f"latent_{name}"][None] for name in LATENT_NAMES}

    def weighted_terms(self, settings: InversionConfig) -> dict[str, np.ndarray]:
        """The loss terms of each step times their weights, by the names of `samjax.inversion.Terms`, and the total."""
        terms = self.arrays["terms"]  # [steps, 5]
        found = {name: terms[:, i] * getattr(settings, f"lambda_{name}") for i, name in enumerate(TERMS)}
        return found | {"total": np.sum(list(found.values()), axis=0)}


class Ours:
    """Runs our stages, each on the authors' results of the stages before it.

    Attributes:
      made: results of our stages, by the keys of their stages' seconds.
    """

    def __init__(self, sam: Pipeline, theirs: Theirs) -> None:
        self.sam, self.theirs = sam, theirs
        self.made: dict[str, Any] = {}
        self.config, self.params, _ = sam.generator
        self.target = theirs.arrays["image"]
        self.layers = latents.latent_layers(self.config)
        self.start = latents.init_latents(self.layers, jnp.asarray(theirs.arrays["code"][None]))

    def row(
        self, stage: str, key: str, make: Callable[[], T], compare: Callable[[T], float], name: str | None = None
    ) -> Row:
        """The row of one stage.

        Args:
          stage: key of `TOLERANCES`.
          key: key of their stage's seconds.
          make: runs our stage. It runs twice, because the first run compiles.
          compare: returns the difference of its result from theirs.
          name: name in the table. Default: `stage`.
        """
        began = time.perf_counter()
        made = make()
        once = time.perf_counter() - began
        jax.block_until_ready(make())
        again = time.perf_counter() - began - once
        self.made[key] = made
        theirs = self.theirs.seconds.get(key, math.nan)
        return Row(name or stage, compare(made), TOLERANCES[stage], theirs, again, max(once - again, 0.0))

    def rows(self, image: np.ndarray, direction: np.ndarray, settings: InversionConfig) -> Iterator[Row]:
        """The rows of all stages.

        Args:
          image: [h, w, 3] uint8, as the authors' code reads it.
          direction: [num_ws, w_dim].
          settings: settings of the optimization.
        """
        arrays, instances = self.theirs.arrays, self.sam.category.segmenter == "mask_rcnn"
        assert self.sam.segmenter is not None
        segment = self.sam.segmenter
        yield self.row("target image", "", lambda: images.to_float(image), lambda x: absolute(x, self.target))
        yield self.row("encoder code", "code", self.code, lambda x: of_spread(x, arrays["code"]))
        yield self.row("error maps", "maps", self.maps, lambda x: each_of_spread(x, arrays["maps"]))
        yield self.row(
            "segments (instances)" if instances else "segments",
            "segments",
            lambda: segment(self.target),
            lambda x: of_pixels(x, arrays["segments"]),
            name="segments",
        )
        yield self.row(
            "layer map",
            "layer_map",
            lambda: layer_selection.assign_layers(arrays["maps"], arrays["segments"], float(arrays["threshold"])),
            lambda x: of_pixels(x.layer_maps[0], arrays["layer_map"]),
        )
        yield self.row(
            "masks",
            "masks",
            lambda: layer_selection.soft_masks(arrays["layer_map"], self.layers),
            lambda x: max(absolute(x[name], arrays[f"mask_{name}"]) for name in LATENT_NAMES[1:]),
        )
        yield from self.prior()
        yield self.row("first image", "first", lambda: self.render(self.start), lambda x: of_spread(x, arrays["first"]))
        yield from self.optimization(settings)
        yield self.row(  # from their latents after the steps; each image against its own spread
            "edit",
            "edits",
            lambda: self.edit(direction),
            lambda x: each_of_spread(x, arrays["edits"]),
            name=f"edit at {len(STRENGTHS)} strengths",
        )

    def code(self) -> np.ndarray:
        """The encoder's code [num_ws, w_dim]."""
        assert self.sam.encoder is not None
        return analysis.encode(self.sam.encoder.config, self.sam.encoder.params, self.target[None])[0]

    def maps(self) -> np.ndarray:
        """The predicted error maps [L, h, w]."""
        assert self.sam.predictor is not None
        config, params, _ = self.sam.predictor
        found = analysis.predict_maps(config, params, self.target[None])[0]
        return found[[config.latent_names.index(name) for name in LATENT_NAMES]]

    def render(self, chosen: Mapping[str, Any]) -> np.ndarray:
        """The generator's image [R, R, 3] of latents, with their masks."""
        return self.sam.render(chosen, self.theirs.masks())[0]

    def edit(self, direction: np.ndarray) -> np.ndarray:
        """The edits [S, R, R, 3] of their latents."""
        start = {name: jnp.asarray(value) for name, value in self.theirs.latents().items()}
        return editing.edit(
            self.config, self.params, start, self.theirs.masks(), direction[None], STRENGTHS, batch_size=1
        )[0]

    def prior(self) -> Iterator[Row]:
        """The statistics of W+, from the samples of the authors' code; the seconds of both rows are in the first."""
        arrays = self.theirs.arrays

        @jax.jit
        def styles(params: Any, z: jax.Array) -> jax.Array:
            with jax.default_matmul_precision("highest"):
                return stylegan2.map_z(self.config, params, z)[:, 0]

        yield self.row(
            "prior: mean",
            "prior",
            lambda: losses.fit_prior(styles(self.params, jnp.asarray(arrays["z"]))),
            lambda x: max(of_spread(getattr(x, key), arrays[f"prior_{key}"]) for key in ("mean_w", "mean_v")),
        )
        stage, root = "prior: inverse covariance", np.asarray(self.made["prior"].whitening, np.float64)
        difference = of_spread(root @ root.T, arrays["prior_inv_cov_v"])
        yield Row(stage, difference, TOLERANCES[stage], math.nan, math.nan, math.nan)

    def optimization(self, settings: InversionConfig) -> Iterator[Row]:
        """The loss terms of every step, and the image after the steps, from their start, masks and prior."""
        arrays, steps = self.theirs.arrays, settings.num_opt_steps
        settings = dataclasses.replace(settings, loss_resolution=max(self.target.shape))
        root = np.linalg.cholesky(arrays["prior_inv_cov_v"])
        prior = losses.Prior(
            *(jnp.asarray(x, jnp.float32) for x in (arrays["prior_mean_w"], arrays["prior_mean_v"], root))
        )
        networks = self.sam.networks._replace(prior=prior)
        items = Items(self.target[None], self.theirs.masks(), self.start, np.zeros(1, np.int64))
        ticks = [time.perf_counter()]
        found, terms = driver.run(
            self.config, networks, items, settings, on_progress=lambda _: ticks.append(time.perf_counter())
        )
        step = (ticks[-1] - ticks[1]) / (steps - 1)
        weighted = self.theirs.weighted_terms(settings)
        ours = np.stack([np.asarray(getattr(terms, name), np.float64)[:, 0] for name in weighted], axis=1)
        yield Row(
            f"losses of {steps} steps",
            relative(ours, np.stack(list(weighted.values()), axis=1)),
            TOLERANCES["losses of every step"],
            self.theirs.seconds["losses"],
            step * steps,
            max(ticks[1] - ticks[0] - step, 0.0),
        )
        yield self.row(
            "image after the steps",
            "final",
            lambda: self.render(found),
            lambda x: of_spread(x, arrays["final"]),
            name=f"image after {steps} steps",
        )


def figures(theirs: Mapping[str, np.ndarray], made: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Figures of the authors' results above ours, by name; uint8 [H, W, 3] each.

    `images` shows the target, the first image and the one after the steps; `maps` the error maps, dark for 0; `layers`
    the segments and the layer of each; `edits` the edit at all strengths.

    Args:
      theirs: `Theirs.arrays`.
      made: `Ours.made`, after all stages.
    """
    ours = {**made, "layer_map": made["layer_map"].layer_maps[0]}
    target, high = theirs["image"], float(np.max(theirs["maps"])) or 1.0
    height, width = target.shape[:2]
    palette = np.array([report.layer_color(name) for name in LATENT_NAMES], np.uint8)

    def reduced(full: ArrayLike) -> np.ndarray:
        full = jnp.asarray(full, jnp.float32)
        return np.nan_to_num(losses.comparable(full, max(height, width), height, width))

    def rows(side: Mapping[str, Any]) -> dict[str, np.ndarray]:
        segments = images.label_colors(int(np.max(side["segments"])) + 1)[side["segments"]]
        return {
            "images": np.concatenate([target[None], reduced(np.stack([side["first"], side["final"]]))]),
            "maps": images.to_float(sheets.heat(side["maps"], high)),
            "layers": images.to_float(np.stack([segments, palette[side["layer_map"]]])),
            "edits": reduced(side["edits"]),
        }

    pairs = zip(rows(theirs).items(), rows(ours).values(), strict=True)
    return {name: pairs_figure(x, y, ("PyTorch", "samjax"), height=192) for (name, x), y in pairs}
