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
from samjax.config import Category, InversionConfig, check_threshold, is_finite
from samjax.errors import UserError, brief, escaped, shown
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
        found = ", ".join([f"LPIPS {self.metrics['LPIPS']:.3f}", *used])
        return f"<Inversion of {escaped(self.analysis.name)} at threshold {self.threshold:g}: {found}>"

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
                "maps_from": self.analysis.maps_from,
                "layers": self.analysis.layers,
                "generator": self.generator,
                "fingerprint": self.fingerprint,
                "category": {
                    k: v for k, v in dataclasses.asdict(self.category).items() if k not in ("config", "learned")
                },
                "category_config": self.category.settings,
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
    if not isinstance(directory, str | Path):
        raise UserError(f"give a directory written by Inversion.save, not {shown(directory)}")
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
        category = _dataclass(Category, {**notes["category"], "config": standard})
        taken = {
            **{name: _text(notes[name]) for name in ("name", "segments_from", "generator", "fingerprint")},
            # 0.1 did not write where codes and maps came from.
            "ws_from": _text(notes.get("ws_from", category.start)),
            "maps_from": _text(notes.get("maps_from", category.invertibility)),
            "layers": tuple(map(_text, notes["layers"])),
            "segment_names": {int(label): _text(name) for label, name in notes["segment_names"].items()},
            "forced": {int(label): _text(layer) for label, layer in notes["forced"].items()},
            "config": config,
            "category": category,
            "measure_steps": dataclasses.replace(config, num_opt_steps=notes["measure_steps"]).num_opt_steps,
            "threshold": check_threshold(notes["threshold"]),
            "metrics": {name: math.inf if v is None else _number(v) for name, v in notes["metrics"].items()},
            "seconds": _number(notes["seconds"]),
        }
        if taken["metrics"].keys() != {"MSE", "PSNR", "SSIM", "LPIPS"}:
            raise ValueError("its metrics are not those of an inversion")
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {brief(error)})") from error
    return files.read_npz(directory / "inversion.npz"), taken


def _dataclass(kind: type, values: Mapping[str, Any]) -> Any:
    """A frozen dataclass, which checks its values, from its JSON form, in which tuples are lists."""
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not text")
    return value


def _number(value: Any) -> float:
    if not is_finite(value):
        raise ValueError(f"{shown(value)} is not a number")
    return float(value)


# --- arrays ---


def check_arrays(
    arrays: Mapping[str, np.ndarray], layers: tuple[LatentLayer, ...], target_size: tuple[int, int], where: Path
) -> None:
    """Checks that the arrays of a saved inversion are those of a generator's latent layers.

    Raises:
      UserError: some are missing, or have other shapes, types or values; the message names all of them.
    """
    count = len(layers)
    expected = {
        "source": (*np.shape(arrays.get("source", 0))[:2], 3),
        "target": (*target_size, 3),
        "segments": target_size,
        "ws": layers[0].shape,
        "maps": (count, *target_size),
        **_inversion_shapes(arrays, layers),
    }
    if any(name.startswith("single_") for name in arrays):
        singles = {name.removeprefix("single_"): array for name, array in arrays.items() if name.startswith("single_")}
        expected |= {f"single_{name}": shape for name, shape in _single_shapes(singles, layers).items()}
    if wrong := _wrong(arrays, expected):
        raise UserError(f"{where} does not fit this generator: {', '.join(wrong)}")


def check_kept(
    arrays: Mapping[str, np.ndarray], layers: tuple[LatentLayer, ...], target_size: tuple[int, int], path: Path
) -> None:
    """Checks the arrays of an inversion that a directory keeps.

    Raises:
      UserError: see `check_arrays`.
    """
    _check_kept(arrays, {"layer_map": target_size, "seconds": (), **_inversion_shapes(arrays, layers)}, path)


def check_measured(
    arrays: Mapping[str, np.ndarray], layers: tuple[LatentLayer, ...], target_size: tuple[int, int], path: Path
) -> None:
    """Checks measured maps that a directory keeps, and the inversions that measured them.

    Raises:
      UserError: see `check_arrays`.
    """
    _check_kept(arrays, {"maps": (len(layers), *target_size), **_single_shapes(arrays, layers)}, path)


def _check_kept(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    if wrong := _wrong(arrays, expected):
        raise UserError(f"{path} is damaged ({', '.join(wrong)}): remove it, and it is made again")


def _inversion_shapes(arrays: Mapping[str, np.ndarray], layers: tuple[LatentLayer, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the latents and the loss terms of an inversion, of any number of steps."""
    shapes = {f"latent_{layer.name}": (1, *layer.shape) for layer in layers}
    return {**shapes, "terms": (len(Terms._fields), _steps(arrays))}


def _single_shapes(arrays: Mapping[str, np.ndarray], layers: tuple[LatentLayer, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the latents and the loss terms of the inversions in each layer alone, of any number of steps."""
    count = len(layers)
    shapes = {f"latent_{layer.name}": (count, *layer.shape) for layer in layers}
    seconds = {"seconds": ()} if "seconds" in arrays else {}  # which 0.1 did not write
    return {**shapes, "terms": (len(Terms._fields), _steps(arrays), count), **seconds}


def _steps(arrays: Mapping[str, np.ndarray]) -> int:
    """How many steps the loss terms have."""
    return arrays["terms"].shape[1] if "terms" in arrays and arrays["terms"].ndim > 1 else 1


def _wrong(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of arrays that are missing, not expected, or of other shapes, types or values than expected."""
    wrong = [name for name in arrays if name not in expected]
    return wrong + [name for name, shape in expected.items() if not _is_right(name, arrays.get(name), shape)]


def _is_right(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> bool:
    if array is None or array.shape != shape or 0 in shape:
        return False
    if name == "source":
        return array.dtype == np.uint8
    if name in ("segments", "layer_map"):
        return array.dtype.kind in "iu" and -(2**31) <= int(array.min()) <= int(array.max()) < 2**31
    if array.dtype.kind != "f":
        return False
    if name in ("terms", "single_terms"):  # a loss may grow beyond all bounds in a run that goes on
        return True
    most = 1.001 if name == "target" else float(np.finfo(np.float32).max)
    return bool((np.abs(array) <= most).all())
