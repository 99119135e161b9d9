"""What came out of an inversion, for people: its data, and the names, colours and figures by which it is shown."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from samjax.io.images import label_colours
from samjax.io.sheets import Colour, Uint8

PALETTE: Mapping[str, tuple[int, int, int]] = {
    "W+": (0, 98, 155),
    "F4": (116, 118, 120),
    "F6": (252, 137, 0),
    "F8": (97, 129, 57),
    "F10": (255, 205, 0),
}
"""Colours of the latent layers, as in the authors' figures."""

LAYER_MEANINGS: Mapping[str, str] = {
    "W+": "styles only: edits take full effect, unusual detail is lost",
    "F4": "16 x 16 features: edits stay strong",
    "F6": "32 x 32 features: between the two",
    "F8": "64 x 64 features: little detail is lost",
    "F10": "128 x 128 features: faithful, edits fade",
}
"""What each latent layer is good for, in a few words."""

METHOD_CAPTIONS: Mapping[str, str] = {
    "W+": "most editable, loses detail",
    "F4": "one early feature layer",
    "F6": "one middle feature layer",
    "F8": "one late feature layer",
    "F10": "faithful, edits fade",
    "SAM": "each region its own layer",
}
"""What each way of inverting does, in a few words."""

METRICS: Mapping[str, tuple[str, bool, str]] = {
    "MSE": ("mean squared error", False, "{:.4f}"),
    "PSNR": ("peak signal-to-noise ratio, dB", True, "{:.1f}"),
    "SSIM": ("structural similarity", True, "{:.3f}"),
    "LPIPS": ("perceptual distance", False, "{:.3f}"),
}
"""Name of a metric to: what it is, whether higher is better, and its format."""

Image3 = NDArray[np.floating]
Strength = float | int | str

_OTHER_LAYER = (150, 90, 160)


@dataclasses.dataclass(frozen=True)
class SegmentRow:
    """One segment of the picture and the layer chosen for it.

    Attributes:
      label: its value in the label image.
      name: what it shows, if that is known.
      share: of the picture's area, 0 to 1.
      means: mean predicted error in each layer, in the order of `Result.layers`.
      layer: name of the chosen layer.
      forced: whether it was chosen by hand, so that no threshold changes it.
    """

    label: int
    name: str | None
    share: float
    means: tuple[float, ...]
    layer: str
    forced: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """An inversion and its edits; arrays are NumPy's.

    Attributes:
      name: of the picture.
      image: the picture, [H, W, 3], in [-1, 1].
      segments: label of every pixel, [H, W], integers.
      segment_rows: one for each segment.
      layers: names of the latent layers, the most editable first.
      maps: predicted error in each layer, [L, H, W], 0 or more.
      layer_map: index into `layers` of the layer chosen for every pixel, [H, W].
      threshold: greatest mean error at which a layer is taken for a segment.
      reconstructions: method ("W+", "F10", "SAM") to [H, W, 3], in [-1, 1].
      edits: direction to strength to method to [H, W, 3], in [-1, 1].
      metrics: method to "MSE", "PSNR", "SSIM", "LPIPS" to value.
      losses: method to total loss of every step.
      settings: whatever else tells how the result was made.
      thresholds: others, at which the layers are shown too; where none are given, some that choose different layers.
      sweep: what SAM gave at other thresholds: the reconstruction [H, W, 3], in [-1, 1], and its LPIPS.
    """

    name: str
    image: Image3
    segments: NDArray[np.integer]
    segment_rows: Sequence[SegmentRow]
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
        for row in self.segment_rows:
            if row.layer not in self.layers or len(row.means) != len(self.layers):
                raise ValueError(f"the row of segment {row.label} does not fit the layers {', '.join(self.layers)}")


def layer_colour(layer: str) -> tuple[int, int, int]:
    """The palette's colour of a latent layer."""
    return PALETTE.get(layer, _OTHER_LAYER)


def segment_title(row: SegmentRow) -> str:
    """A segment's name, or its number."""
    return row.name or f"segment {row.label}"


def layer_shares(result: Result) -> dict[str, float]:
    """Share of the picture that each layer serves, 0 to 1."""
    counts = np.bincount(np.ravel(result.layer_map), minlength=len(result.layers))
    return {name: float(count) / result.layer_map.size for name, count in zip(result.layers, counts, strict=True)}


def heat_limit(result: Result) -> float:
    """Upper end of the heat maps' common scale: what nearly all pixels stay below, in steps of 0.1."""
    high = float(np.quantile(np.nan_to_num(result.maps), 0.98))
    return max(math.ceil(max(high, result.threshold * 1.2) * 10 - 1e-6) / 10, 0.1)


def fitted(shape: Sequence[int], width: int, height: int) -> tuple[int, int]:
    """Height and width of a picture of `shape` (rows, columns, …) that fits into `width` x `height`."""
    scale = min(width / shape[1], height / shape[0])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def grey_of(image: Uint8) -> NDArray[np.float32]:
    """A picture [H, W, 3] in grey of full contrast, for colours to be laid on; [H, W], 0 to 1."""
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)
    dark, light = np.quantile(grey, (0.02, 0.98))
    return np.clip((grey - dark) / max(float(light - dark), 1.0), 0, 1)


def by_share(result: Result) -> list[SegmentRow]:
    """The segments, the largest first."""
    return sorted(result.segment_rows, key=lambda row: -row.share)


def segment_colours(result: Result) -> dict[int, Colour]:
    """A colour for every label."""
    labels = [row.label for row in result.segment_rows]
    labels += [int(label) for label in np.unique(result.segments) if int(label) not in labels]
    colours = label_colours(len(labels)).tolist()
    return {label: (red, green, blue) for label, (red, green, blue) in zip(labels, colours, strict=True)}


def admits(threshold: float, means: ArrayLike) -> NDArray[np.bool_]:
    """Which mean errors are at most a threshold; in single precision, as `samjax.maps` computes."""
    return np.asarray(means, np.float32) <= np.float32(threshold)


def layers_at(result: Result, threshold: float) -> tuple[str, ...]:
    """The layer that each of `segment_rows` takes: the first whose mean is at most `threshold`, the last if none is;
    where it was forced, that one.

    That is the rule of `samjax.maps.select_layers`. At the result's own threshold it is what the result says.
    """
    if threshold == result.threshold:
        return tuple(row.layer for row in result.segment_rows)
    admitted = admits(threshold, [row.means for row in result.segment_rows]).reshape(-1, len(result.layers))
    admitted[:, -1] = True
    chosen = (result.layers[int(index)] for index in admitted.argmax(1))
    return tuple(row.layer if row.forced else layer for row, layer in zip(result.segment_rows, chosen, strict=True))


def _telling_thresholds(result: Result, most: int = 7) -> list[float]:
    """Some thresholds that choose different layers, from the last layer everywhere to the earliest each can have."""
    # A segment changes its layer at the least of the first means, of the first two, and so on.
    running = np.array([low for row in result.segment_rows for low in itertools.accumulate(row.means[:-1], min)])
    critical = np.unique(np.ceil(running[np.isfinite(running)] * 1000) / 1000).tolist()
    below = [max(0.0, round(critical[0] - 0.01, 3))] if critical else []
    distinct = {layers_at(result, value): value for value in [*below, *critical]}
    distinct[layers_at(result, result.threshold)] = result.threshold
    values = sorted(distinct.values())
    return [values[index] for index in sorted({round(place) for place in np.linspace(0, len(values) - 1, most)})]


def shown_thresholds(result: Result) -> list[float]:
    """The thresholds at which a report shows the layers, ascending; the result's own is among them."""
    others = result.thresholds or ([] if result.sweep else _telling_thresholds(result))
    return sorted({*others, *result.sweep, result.threshold})


def percent(share: float) -> str:
    """A share as text."""
    return "under 1%" if 0 < share < 0.005 else f"{share:.0%}"


def number(metric: str, value: float | None) -> str:
    """The value of one of `METRICS` as text."""
    if value is None or math.isnan(value):
        return "–"
    return METRICS[metric][2].format(value) if math.isfinite(value) else "∞"


def strongest_edit(result: Result, direction: str | None, strength: Strength | None) -> tuple[str, Strength] | None:
    """The edit to show: the one asked for, or the strongest of the first direction; None if there is none."""
    if direction is None:
        direction = next((name for name, strengths in result.edits.items() if strengths), None)
    if direction is None:
        return None
    if strength is None:
        strengths = list(result.edits[direction])
        numbers = [value for value in strengths if not isinstance(value, str)]
        strength = max(numbers, key=abs) if numbers else strengths[-1]
    return direction, strength


def strength_text(strength: Strength) -> str:
    """The strength of an edit as text."""
    return strength if isinstance(strength, str) else f"{strength:g}"
