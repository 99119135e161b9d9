"""The content of a report: one inversion and its edits as arrays and numbers, with their names and colors."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from samjax import losses
from samjax.analysis import Analysis
from samjax.io.images import label_colors
from samjax.layer_selection import Assignment
from samjax.report.sheets import Color, Uint8
from samjax.results import Edits, Inversion

PALETTE: Mapping[str, tuple[int, int, int]] = {
    "W+": (0, 98, 155),
    "F4": (116, 118, 120),
    "F6": (252, 137, 0),
    "F8": (97, 129, 57),
    "F10": (255, 205, 0),
}
"""Colors of the latent layers, those of the SAM paper's figures."""

LAYER_MEANINGS: Mapping[str, str] = {
    "W+": "styles only: edits have their full effect, but unusual detail is lost",
    "F4": "16 x 16 features: edits stay strong",
    "F6": "32 x 32 features: a compromise",
    "F8": "64 x 64 features: little detail is lost",
    "F10": "128 x 128 features: faithful, edits fade",
}
"""Strengths and weaknesses of each latent layer, in a few words."""

METHOD_CAPTIONS: Mapping[str, str] = {
    "W+": "most editable, loses detail",
    "F4": "an early feature layer",
    "F6": "a middle feature layer",
    "F8": "a late feature layer",
    "F10": "faithful, edits fade",
    "SAM": "a layer for each segment",
}
"""Captions of the inversion methods."""

METRICS: Mapping[str, tuple[str, bool, str]] = {
    "MSE": ("mean squared error", False, "{:.4f}"),
    "PSNR": ("peak signal-to-noise ratio, dB", True, "{:.1f}"),
    "SSIM": ("structural similarity", True, "{:.3f}"),
    "LPIPS": ("perceptual distance", False, "{:.3f}"),
}
"""Metrics: name to (description, whether higher is better, format)."""

Image3 = NDArray[np.floating]
Strength = float | int | str

_OTHER_LAYER = (150, 90, 160)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One segment of the image and the layer chosen for it.

    Attributes:
      label: its value in the label image.
      name: what it shows, where known.
      share: fraction of the image's area, 0 to 1.
      means: mean error in each layer, in the order of `Content.layers`.
      layer: name of the chosen layer.
      forced: whether the layer was chosen by hand, so that it is the same at every threshold.
    """

    label: int
    name: str | None
    share: float
    means: tuple[float, ...]
    layer: str
    forced: bool = False


@dataclasses.dataclass(frozen=True)
class Content:
    """What a report shows of one inversion and its edits; all arrays are NumPy arrays.

    Images are float, [H, W, 3], in [-1, 1].

    Attributes:
      name: name of the image.
      image: the target.
      segments: label of every pixel, [H, W], integers.
      rows: one entry per segment.
      layers: names of the latent layers, the most editable first.
      maps: error of every pixel in each layer (LPIPS), [L, H, W], non-negative.
      layer_map: index into `layers` of the layer chosen for every pixel, [H, W].
      threshold: largest mean error at which a segment may use a layer.
      reconstructions: method ("W+", "F10", "SAM") to image.
      edits: direction to strength to method to image.
      metrics: method to "MSE", "PSNR", "SSIM", "LPIPS" to value.
      losses: method to the total loss of every step.
      settings: further settings of the inversion, listed at the end of the report.
      thresholds: other thresholds at which the layers are shown; if empty, some that choose different layers.
      sweep: SAM at other thresholds: threshold to (reconstruction, its LPIPS).
    """

    name: str
    image: Image3
    segments: NDArray[np.integer]
    rows: Sequence[Segment]
    layers: Sequence[str]
    maps: NDArray[np.floating]
    layer_map: NDArray[np.integer]
    threshold: float
    reconstructions: Mapping[str, Image3]
    edits: Mapping[str, Mapping[Strength, Mapping[str, Image3]]] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    losses: Mapping[str, Sequence[float]] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    thresholds: Sequence[float] = ()
    sweep: Mapping[float, tuple[Image3, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.image.shape[:2]
        images = {"image": self.image, **{f"reconstruction {name}": x for name, x in self.reconstructions.items()}}
        for direction, strengths in self.edits.items():
            for strength, methods in strengths.items():
                images |= {f"edit {direction} {strength} {name}": x for name, x in methods.items()}
        images |= {f"sweep {threshold:g}": x for threshold, (x, _) in self.sweep.items()}
        for name, image in images.items():
            if image.shape != (*size, 3):
                raise ValueError(f"{name} has shape {list(image.shape)}, not {[*size, 3]}")
        for name, labels in (("segments", self.segments), ("layer_map", self.layer_map)):
            if labels.shape != size or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(f"{name} must hold integers {list(size)}, not {labels.dtype} {list(labels.shape)}")
        if self.maps.shape != (len(self.layers), *size):
            raise ValueError(f"maps have shape {list(self.maps.shape)}, not {[len(self.layers), *size]}")
        if self.layer_map.min() < 0 or self.layer_map.max() >= len(self.layers):
            raise ValueError(f"layer_map must hold indices from 0 to {len(self.layers) - 1}")
        if not np.isfinite([self.threshold, *self.thresholds, *self.sweep]).all():
            raise ValueError("thresholds must be finite numbers")
        for row in self.rows:
            if row.layer not in self.layers or len(row.means) != len(self.layers):
                raise ValueError(f"the row of segment {row.label} does not fit the layers {', '.join(self.layers)}")


# --- from an inversion ---


def preview(
    analysis: Analysis,
    assignment: Assignment,
    threshold: float,
    *,
    forced: Collection[int] = (),
    thresholds: Sequence[float] = (),
) -> Content:
    """The content known before an inversion: segments, error maps and the chosen layers.

    Args:
      analysis: the analyzed image.
      assignment: the layer of each segment; its first threshold is shown.
      threshold: that threshold.
      forced: labels of segments whose layer was chosen by hand.
      thresholds: other thresholds to show.

    Returns:
      A content without reconstructions.
    """
    segments = [
        Segment(
            label=int(value),
            name=analysis.segment_names.get(int(value)),
            share=float(np.mean(analysis.segments == value)),
            means=tuple(float(mean) for mean in assignment.means[:, s]),
            layer=analysis.layers[int(assignment.layers[0, s])],
            forced=int(value) in forced,
        )
        for s, value in enumerate(assignment.values)
    ]
    return Content(
        name=analysis.name,
        image=analysis.target,
        segments=analysis.segments,
        rows=segments,
        layers=analysis.layers,
        maps=analysis.maps,
        layer_map=assignment.layer_maps[0],
        threshold=threshold,
        reconstructions={},
        thresholds=thresholds,
    )


def describe(inversion: Inversion, *, edits: Edits | None = None, sweep: Sequence[Inversion] = ()) -> Content:
    """The content of an inversion's report.

    Args:
      inversion: the inversion, at one threshold; its baselines are shown beside it.
      edits: direction to strength to method to image [R, R, 3], as `Pipeline.edit_sweep` returns them.
      sweep: inversions of the same image at other thresholds, as `Pipeline.sweep` returns them.

    Returns:
      The content, its images reduced to the target's size.
    """
    analysis = inversion.analysis
    height, width = analysis.target.shape[:2]

    def reduced(image: ArrayLike) -> Image3:
        batch = jnp.asarray(image, jnp.float32)[None]
        return np.asarray(losses.comparable(batch, max(height, width), height, width))[0]

    methods = {**inversion.baselines, "SAM": inversion}
    swept = {item.threshold: (reduced(item.image), item.metrics["LPIPS"]) for item in sweep}
    return dataclasses.replace(
        preview(
            analysis,
            inversion.assignment,
            inversion.threshold,
            forced=inversion.forced,
            thresholds=inversion.category.sweep(),
        ),
        reconstructions={name: reduced(item.image) for name, item in methods.items()},
        edits={
            direction: {
                strength: {name: reduced(image) for name, image in images.items()}
                for strength, images in strengths.items()
            }
            for direction, strengths in (edits or {}).items()
        },
        metrics={name: dict(item.metrics) for name, item in methods.items()},
        losses={name: np.asarray(item.terms.total).tolist() for name, item in methods.items()},
        settings=_settings(inversion),
        sweep=swept if swept.keys() - {inversion.threshold} else {},
    )


_STARTS = {
    "given": "W+ at a given code",
    "mean": "W+ at the mean style",
    "best": "W+ at the best of some samples",
    "encoder": "W+ at the encoder's code",
    "learned": "all layers learned",
}


def _settings(inversion: Inversion) -> dict[str, Any]:
    analysis, config = inversion.analysis, inversion.config
    final = min(config.final_steps, config.num_opt_steps)
    networks = {"vgg": "LPIPS-VGG", "alex": "LPIPS-AlexNet", "none": "squared error"}
    first = networks[config.lpips_type] if config.num_opt_steps > final else ""
    last = f"{first and ', '}LPIPS-VGG in the last {final} steps" if final else ""
    return {
        "generator": inversion.generator,
        "steps": config.num_opt_steps,
        "error maps": f"measured in {inversion.measure_steps} steps" if analysis.singles else analysis.maps_from,
        "start": _STARTS.get(analysis.ws_from, analysis.ws_from),
        "segments": analysis.segments_from,
        "loss": first + last or "none",
        "device": jax.devices()[0].device_kind,
    }


# --- names, colors, numbers ---


def layer_color(layer: str) -> tuple[int, int, int]:
    """The palette's color of a latent layer."""
    return PALETTE.get(layer, _OTHER_LAYER)


def segment_title(row: Segment) -> str:
    """A segment's name, or else its label."""
    return row.name or f"segment {row.label}"


def layer_shares(content: Content) -> dict[str, float]:
    """Fraction of the image that each layer is used for, 0 to 1."""
    counts = np.bincount(np.ravel(content.layer_map), minlength=len(content.layers))
    return {name: float(count) / content.layer_map.size for name, count in zip(content.layers, counts, strict=True)}


def heat_limit(content: Content) -> float:
    """Upper end of the error maps' common color scale.

    The 98th percentile of the errors or 1.2 times the threshold, whichever is larger, rounded up to a multiple of 0.1.
    """
    high = float(np.quantile(np.nan_to_num(content.maps), 0.98))
    return max(math.ceil(max(high, content.threshold * 1.2) * 10 - 1e-6) / 10, 0.1)


def fitted(shape: Sequence[int], width: int, height: int) -> tuple[int, int]:
    """Height and width at which an image of `shape` (rows, columns, …) fits into `width` x `height`."""
    scale = min(width / shape[1], height / shape[0])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def gray_of(image: Uint8) -> NDArray[np.float32]:
    """A gray version of an image [H, W, 3] with full contrast, to be overlaid with colors; [H, W], 0 to 1."""
    gray = np.asarray(Image.fromarray(image).convert("L"), np.float32)
    dark, light = np.quantile(gray, (0.02, 0.98))
    return np.clip((gray - dark) / max(float(light - dark), 1.0), 0, 1)


def by_share(content: Content) -> list[Segment]:
    """The segments, the largest first."""
    return sorted(content.rows, key=lambda row: -row.share)


def segment_colors(content: Content) -> dict[int, Color]:
    """A color for each label."""
    labels = [row.label for row in content.rows]
    labels += [int(label) for label in np.unique(content.segments) if int(label) not in labels]
    colors = label_colors(len(labels)).tolist()
    return {label: (red, green, blue) for label, (red, green, blue) in zip(labels, colors, strict=True)}


def admits(threshold: float, means: ArrayLike) -> NDArray[np.bool_]:
    """Which mean errors are at most a threshold, in single precision as in `samjax.layer_selection`."""
    return np.asarray(means, np.float32) <= np.float32(threshold)


def layers_at(content: Content, threshold: float) -> tuple[str, ...]:
    """The layer of each segment in `content.rows` at a threshold.

    The rule is that of `samjax.layer_selection.select_layers`: the first layer whose mean error is at most `threshold`,
    or the last layer if there is none. Layers chosen by hand stay. At the content's own threshold, the layers are those
    of `content.rows`.
    """
    if threshold == content.threshold:
        return tuple(row.layer for row in content.rows)
    admitted = admits(threshold, [row.means for row in content.rows]).reshape(-1, len(content.layers))
    admitted[:, -1] = True
    chosen = (content.layers[int(index)] for index in admitted.argmax(1))
    return tuple(row.layer if row.forced else layer for row, layer in zip(content.rows, chosen, strict=True))


def _distinct_thresholds(content: Content) -> list[float]:
    """At most seven thresholds that choose different layers, from the most faithful choice to the most editable."""
    # A segment changes its layer at its first mean, at the smaller of its first two, and so on.
    running = np.array([low for row in content.rows for low in itertools.accumulate(row.means[:-1], min)])
    critical = np.unique(np.ceil(running[np.isfinite(running)] * 1000) / 1000).tolist()
    below = [max(0.0, round(critical[0] - 0.01, 3))] if critical else []
    distinct = {layers_at(content, value): value for value in [*below, *critical]}
    distinct[layers_at(content, content.threshold)] = content.threshold
    values = sorted(distinct.values())
    return [values[index] for index in sorted({round(place) for place in np.linspace(0, len(values) - 1, 7)})]


def shown_thresholds(content: Content) -> list[float]:
    """The thresholds at which a report shows the layers, ascending, including the content's own."""
    others = content.thresholds or ([] if content.sweep else _distinct_thresholds(content))
    return sorted({*others, *content.sweep, content.threshold})


def percent(share: float) -> str:
    """A fraction as text, in percent."""
    return "under 1%" if 0 < share < 0.005 else f"{share:.0%}"


def number(metric: str, value: float | None) -> str:
    """The value of a metric as text, formatted as in `METRICS`."""
    if value is None or math.isnan(value):
        return "–"
    return METRICS[metric][2].format(value) if math.isfinite(value) else "∞"


def strongest_edit(content: Content, direction: str | None, strength: Strength | None) -> tuple[str, Strength] | None:
    """The given edit, by default the first direction at its greatest strength; None if there are no edits."""
    if direction is None:
        direction = next((name for name, strengths in content.edits.items() if strengths), None)
    if direction is None:
        return None
    if strength is None:
        strengths = list(content.edits[direction])
        numbers = [value for value in strengths if not isinstance(value, str)]
        strength = max(numbers, key=abs) if numbers else strengths[-1]
    return direction, strength


def strength_text(strength: Strength) -> str:
    """The strength of an edit, as text."""
    return strength if isinstance(strength, str) else f"{strength:g}"
