"""The result of an inversion, and its form on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samjax.analysis import Analysis
from samjax.config import Category, InversionConfig
from samjax.errors import UserError, brief
from samjax.inversion import Terms
from samjax.io import files, images
from samjax.latents import LatentLayer
from samjax.layer_selection import Assignment

if TYPE_CHECKING:
    from PIL import Image

Edits = Mapping[str, Mapping[float, Mapping[str, np.ndarray]]]
"""Edited images: direction to strength to method ("SAM", or a baseline such as "W+") to [R, R, 3] in [-1, 1]."""

_FORMAT = "samjax inversion 1"


@dataclasses.dataclass(frozen=True, eq=False)
class Inversion:
    """An inverted image: everything that edits and reports need. All arrays are NumPy's.

    Attributes:
      analysis: the analysis of the image.
      category: the category, with the options of the run.
      config: settings of the optimization.
      measure_steps: steps of each inversion that measured error maps.
      generator: name of the generator.
      fingerprint: fingerprint of the generator's parameters.
      threshold: mean error up to which a segment may use a layer.
      forced: label to layer of the segments whose layer the caller chose.
      assignment: the layer of each segment, for one threshold.
      latents: {"W+": [1, num_ws, w_dim], "F4": [1, 16, 16, C], ...}.
      masks: {"F4": [1, 16, 16, 1], ...} in [0, 1].
      image: [R, R, 3], the generator's image of the latents, in [-1, 1] up to overshoot.
      terms: weighted loss terms of every step, [steps] each.
      metrics: "MSE", "PSNR" (dB), "SSIM" and "LPIPS" (VGG) against the target.
      seconds: duration of the optimization.
      baselines: the inversions in the first and in the last layer alone, by the layer's name, if error maps were
        measured by them; otherwise empty.
    """

    analysis: Analysis
    category: Category
    config: InversionConfig
    measure_steps: int
    generator: str
    fingerprint: str
    threshold: float
    forced: Mapping[int, str]
    assignment: Assignment
    latents: Mapping[str, np.ndarray]
    masks: Mapping[str, np.ndarray]
    image: np.ndarray
    terms: Terms
    metrics: Mapping[str, float]
    seconds: float
    baselines: Mapping[str, Inversion] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        used = sorted(set(self.layers.values()), key=self.analysis.layers.index)
        quality = f"LPIPS {self.metrics['LPIPS']:.3f}"
        return f"<Inversion of {self.analysis.name} at threshold {self.threshold:g}: {quality}, {', '.join(used)}>"

    @property
    def layers(self) -> dict[int, str]:
        """The latent layer of each segment, by the segment's label."""
        chosen = (self.analysis.layers[i] for i in self.assignment.layers[0])
        return {int(label): layer for label, layer in zip(self.assignment.values, chosen, strict=True)}

    @property
    def reconstruction(self) -> Image.Image:
        """The reconstruction at the generator's own size, without the letterbox."""
        return images.to_pil(self.full_size(self.image))

    def full_size(self, image: np.ndarray) -> np.ndarray:
        """A generator's image [R, R, 3] without the rows that letterboxing added; see `losses.full_size`."""
        return self.analysis.full_size(image)

    def save(self, directory: str | Path) -> None:
        """Writes inversion.npz and inversion.json, from which `Pipeline.load` continues.

        Args:
          directory: the directory, which is created if it is missing; an inversion in it is replaced.

        Raises:
          UserError: the directory cannot be written.
        """
        directory = files.output_directory(directory)
        arrays = {name: getattr(self.analysis, name) for name in ("source", "target", "segments", "ws", "maps")}
        arrays |= {f"single_{name}": array for name, array in self.analysis.singles.items()}
        arrays |= {f"latent_{name}": array for name, array in self.latents.items()}
        arrays |= {"terms": np.stack(self.terms)}
        files.write_npz(directory / "inversion.npz", arrays)
        files.write_json(
            directory / "inversion.json",
            {
                "format": _FORMAT,
                "name": self.analysis.name,
                "segment_names": self.analysis.segment_names,
                "segments_from": self.analysis.segments_from,
                "ws_from": self.analysis.ws_from,
                "layers": self.analysis.layers,
                "generator": self.generator,
                "fingerprint": self.fingerprint,
                "category": {k: v for k, v in dataclasses.asdict(self.category).items() if k != "config"},
                "category_config": self.category.config,
                "config": self.config,
                "measure_steps": self.measure_steps,
                "threshold": self.threshold,
                "forced": self.forced,
                "metrics": self.metrics,
                "seconds": self.seconds,
            },
        )


def read(directory: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the files of `Inversion.save`.

    Returns:
      The arrays by name, and everything else by key, with checked types.

    Raises:
      UserError: the files are missing, damaged, or of another kind.
    """
    directory = Path(directory)
    path = directory / "inversion.json"
    try:
        notes = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} holds no saved inversion: give a directory written by Inversion.save") from None
    except NotADirectoryError:
        raise UserError(f"{directory} is a file: give a directory written by Inversion.save") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {brief(error)}") from error
    if not isinstance(notes, dict) or notes.get("format") != _FORMAT:
        raise UserError(f"{path} is not an inversion saved by this version")
    try:
        config = _dataclass(InversionConfig, notes["config"])
        standard = _dataclass(InversionConfig, notes["category_config"])
        taken = {
            **{name: str(notes[name]) for name in ("name", "segments_from", "generator", "fingerprint")},
            "ws_from": str(notes.get("ws_from", notes["category"]["start"])),  # which 0.1 did not write
            "layers": tuple(map(str, notes["layers"])),
            "segment_names": {int(label): str(name) for label, name in notes["segment_names"].items()},
            "forced": {int(label): str(layer) for label, layer in notes["forced"].items()},
            "config": config,
            "category": _dataclass(Category, {**notes["category"], "config": standard}),
            "measure_steps": int(notes["measure_steps"]),
            "threshold": float(notes["threshold"]),
            "metrics": {str(name): math.inf if v is None else float(v) for name, v in notes["metrics"].items()},
            "seconds": float(notes["seconds"]),
        }
        if taken["metrics"].keys() != {"MSE", "PSNR", "SSIM", "LPIPS"}:
            raise ValueError("its metrics are not those of an inversion")
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {brief(error)})") from error
    return files.read_npz(directory / "inversion.npz"), taken


def _dataclass(kind: type, values: Any) -> Any:
    """A frozen dataclass from its JSON form: lists become tuples, and types must be those of the defaults."""
    defaults = kind("", 256) if kind is Category else kind()
    taken = {}
    for name, value in values.items():
        default = getattr(defaults, name)
        value = tuple(value) if isinstance(value, list) else value
        value = float(value) if isinstance(default, float) and type(value) is int else value
        if default is not None and type(value) is not type(default):
            raise TypeError(f"{name} is a {type(value).__name__}")
        taken[name] = value
    return kind(**taken)


def _steps(arrays: Mapping[str, np.ndarray], name: str) -> int:
    """How many steps the loss terms called `name` have, at least 1."""
    return max(arrays[name].shape[1], 1) if name in arrays and arrays[name].ndim > 1 else 1


def _kinds(name: str) -> str:
    return "iu" if name == "segments" else "f"


def check_arrays(
    arrays: Mapping[str, np.ndarray], layers: tuple[LatentLayer, ...], target_size: tuple[int, int], where: Path
) -> None:
    """Checks that saved arrays have the shapes of a generator's latent layers.

    Raises:
      UserError: some have other shapes or values that are not finite; the message names all of them.
    """
    count = len(layers)
    expected: dict[str, tuple[int, ...]] = {
        "target": (*target_size, 3),
        "segments": target_size,
        "ws": layers[0].shape,
        "maps": (count, *target_size),
        **{f"latent_{layer.name}": (1, *layer.shape) for layer in layers},
    }
    if any(name.startswith("single_") for name in arrays):
        expected |= {f"single_latent_{layer.name}": (count, *layer.shape) for layer in layers}
        expected["single_terms"] = (len(Terms._fields), _steps(arrays, "single_terms"), count)
    expected["terms"] = (len(Terms._fields), _steps(arrays, "terms"))
    numbers = {name: array for name, array in arrays.items() if array.dtype.kind in "fiu"}
    wrong = [name for name, shape in expected.items() if name not in numbers or numbers[name].shape != shape]
    wrong += [
        name for name in numbers if not np.isfinite(numbers[name]).all() and name not in ("terms", "single_terms")
    ]
    wrong += [name for name in expected if name in numbers and numbers[name].dtype.kind not in _kinds(name)]
    source = numbers.get("source")
    if source is None or source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3 or 0 in source.shape:
        wrong.append("source")
    if "target" in numbers and "target" not in wrong and np.abs(numbers["target"]).max() > 1.001:
        wrong.append("target")
    if wrong:
        raise UserError(f"{where} does not fit this generator: {', '.join(dict.fromkeys(wrong))}")
