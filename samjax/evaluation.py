"""Tables over many images: SAM against inversion in each single layer, and learned networks against measured maps.

sam = evaluation.load(Options())
rows = {example.name: evaluation.evaluate(sam, example) for example in evaluation.hard_scenes(32, seed=1)}
print(evaluation.table(rows, "32 hard scenes"))
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from samjax import analysis, demo, layer_selection, losses, metrics
from samjax.analysis import Analysis
from samjax.config import Options, resolve_category, with_preset
from samjax.driver import Progress
from samjax.errors import UserError
from samjax.io import directions, files, images, provenance
from samjax.pipeline import Pipeline
from samjax.results import Inversion

Result = TypeVar("Result")


class Example(NamedTuple):
    """An image to evaluate on.

    Attributes:
      name: name of the image, and of the file with its results.
      image: a path, or uint8 [h, w, 3].
      segments: a label image: a path, or integers [h, w]; the segmenter finds them if None.
      region: [h, w] bool, in which the effect of an edit is measured; everywhere if None.
    """

    name: str
    image: Path | np.ndarray
    segments: Path | np.ndarray | None = None
    region: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of `table`: one method, on one image or as a mean.

    Attributes:
      psnr, ssim, lpips: metrics of the reconstruction; PSNR in dB, LPIPS by VGG.
      edit: change of color by the edit; NaN without an edit.
      seconds: duration of the inversion.
    """

    psnr: float
    ssim: float
    lpips: float
    edit: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class LearnedRow:
    """Results of the learned networks on one image, which `learned_table` averages.

    Attributes:
      same_layer: fraction of the area whose segments get the layer that the measured maps give.
      segment_error: mean absolute error of segment means, weighted by area.
      wanted: fraction of the area that the measured maps give to each layer.
      lpips_measured, lpips_predicted: LPIPS of SAM's reconstruction with measured and with predicted maps.
      mean_w, half_w: final loss in W+ from the mean style in all steps, and from the encoder's code in half of them.
      mean_sam, half_sam: the same with SAM.
    """

    same_layer: float
    segment_error: float
    wanted: Sequence[float]
    lpips_measured: float
    lpips_predicted: float
    mean_w: float
    half_w: float
    mean_sam: float
    half_sam: float


# --- examples ---


def load_examples(options: Options, directory: Path | None, scenes: int, scene_seed: int) -> list[Example]:
    """The images of a directory, or hard scenes of the demo.

    Args:
      options: the user's options; they determine whether the generator is the demo's.
      directory: directory of images; see `directory_examples`.
      scenes: number of hard scenes, if no directory is given.
      scene_seed: seed of the scenes; see `hard_scenes`.

    Raises:
      UserError: there are no images in the directory, or none is given for a generator other than the demo's.
    """
    if directory is not None:
        return directory_examples(directory)
    if options.gan_weights is not None or options.image_category not in (None, "demo"):
        raise UserError("--images is missing: give a directory of images; hard scenes need the demo's generator")
    if scenes < 1:
        raise UserError(f"--scenes must be at least 1, not {scenes}")
    return hard_scenes(scenes, scene_seed)


def directory_examples(directory: Path) -> list[Example]:
    """The images of a directory, each with the label image NAME_segments.png beside it if there is one.

    Raises:
      UserError: no images, or names that differ only in their suffixes.
    """
    labels = {path: path.with_name(f"{path.stem}_segments.png") for path in images.list_images(directory, notify=print)}
    return [Example(path.stem, path, beside if beside.exists() else None) for path, beside in labels.items()]


def hard_scenes(count: int, seed: int) -> list[Example]:
    """Hard scenes of the demo, with their true segments; an edit should act on the visible part of the car."""
    drawn = demo.hard_scenes(count, key=jax.random.key(seed))
    labels = np.asarray(drawn.labels)
    return [
        Example(f"scene{seed}_{i:03d}", images.to_uint8(drawn.image[i]), labels[i], labels[i] == demo.scenes.CAR)
        for i in range(count)
    ]


# --- SAM against single layers ---


def load(options: Options, *, segments_given: bool = False, notify: Callable[[str], None] | None = None) -> Pipeline:
    """A pipeline that measures maps by inversions as long as SAM's, so that the two can be compared.

    Args:
      options: the user's options.
      segments_given: see `Pipeline.from_options`.
      notify: see `Pipeline`.

    Raises:
      UserError: as `Pipeline.from_options`.
    """
    schedule = with_preset(resolve_category(options), options.preset)
    choices = (options.invertibility_steps, options.num_opt_steps, schedule.num_opt_steps)
    options = dataclasses.replace(options, invertibility_steps=next(steps for steps in choices if steps is not None))
    return Pipeline.from_options(options, segments_given=segments_given, notify=notify)


def load_direction(pipeline: Pipeline, direction: str | None = None) -> np.ndarray | None:
    """The direction whose effect is measured.

    Args:
      pipeline: the pipeline, whose directions have names.
      direction: the name of one, or a file; "blue_car" if None.

    Returns:
      [num_ws, w_dim], or None if `direction` is None and the pipeline does not have "blue_car".

    Raises:
      UserError: `direction` is neither a known name nor a file of a direction.
    """
    if direction is None or direction in pipeline.directions:
        return pipeline.directions.get(direction or "blue_car")
    if not Path(direction).is_file():
        known = ", ".join(pipeline.directions) or "none"
        raise UserError(f"--edit {direction!r} is neither a file nor the name of a direction: there are {known}")
    return directions.read_one(direction, *pipeline.layers_shape)


def evaluate(
    pipeline: Pipeline,
    example: Example,
    thresholds: Sequence[float] = (),
    steps: Sequence[int] = (),
    *,
    single_layers: bool = False,
    direction: np.ndarray | None = None,
    strength: float = 2.0,
) -> dict[str, Row]:
    """The rows of one image: inversion in each layer alone, SAM at each threshold, and SAM with other numbers of steps
    at the first threshold.

    Measured error maps come from the same inversions in single layers with which SAM is compared.

    Args:
      pipeline: as returned by `load`.
      example: the image.
      thresholds: thresholds of SAM; the category's if empty.
      steps: numbers of steps, in addition to the usual one; 0 for the start alone.
      single_layers: whether to invert in each layer alone even if maps are predicted.
      direction: [num_ws, w_dim] of the edit whose effect is measured; None for no edit.
      strength: strength of the edit.

    Raises:
      UserError: an image or segments that cannot be used.
      DivergedError: a loss is not finite.
    """
    known = _analyze(pipeline, example)
    found = pipeline.single_layers(known)
    if single_layers and not found:
        for layer in known.layers:
            alone = layer_selection.everywhere(known.segments, layer)
            found[layer] = pipeline.invert(known, layers=alone, on_progress=_silent)
    chosen = list(thresholds) or [pipeline.category.threshold]
    swept = pipeline.sweep(dataclasses.replace(known, singles={}), chosen, on_progress=_silent)
    titles = ["SAM"] if len(chosen) == 1 else [f"SAM {threshold:g}" for threshold in chosen]
    found |= dict(zip(titles, swept, strict=True))
    for count in steps:
        shorter = pipeline.invert(known, threshold=chosen[0], num_opt_steps=count, on_progress=_silent)
        found[f"SAM, {count} steps"] = shorter
    return {name: _row(pipeline, item, example.region, direction, strength) for name, item in found.items()}


def _row(
    pipeline: Pipeline, item: Inversion, region: np.ndarray | None, direction: np.ndarray | None, strength: float
) -> Row:
    effect = math.nan
    if direction is not None:
        pair = jnp.stack([pipeline.edit_array(item, direction, strength), item.image])
        height, width = item.analysis.target.shape[:2]
        edited, before = np.asarray(losses.comparable(pair, max(height, width), height, width))
        effect = metrics.edit_effect(edited, before, np.ones((height, width), bool) if region is None else region)
    quality = item.metrics
    return Row(quality["PSNR"], quality["SSIM"], quality["LPIPS"], effect, item.seconds)


def means(rows: Mapping[str, Mapping[str, Row]]) -> dict[str, Row]:
    """The mean of each method over images, with the median of seconds, in which compilation of the first image hardly
    shows; `rows` maps image and method to a row."""
    methods = next(iter(rows.values()))
    values = {name: [dataclasses.astuple(by_method[name]) for by_method in rows.values()] for name in methods}
    return {
        name: dataclasses.replace(Row(*np.mean(value, axis=0).tolist()), seconds=float(np.median(value, axis=0)[-1]))
        for name, value in values.items()
    }


def table(rows: Mapping[str, Mapping[str, Row]], caption: str) -> str:
    """A Markdown table of `means`; the column "of W+" is the mean edit effect relative to that of W+."""
    lines = ["| latent | PSNR, dB | SSIM | LPIPS | edit effect | of W+ | seconds |", "|---|--:|--:|--:|--:|--:|--:|"]
    averages = means(rows)
    for name, row in averages.items():
        share = row.edit / averages["W+"].edit if "W+" in averages and averages["W+"].edit else math.nan
        lines.append(
            f"| {name} | {row.psnr:.2f} | {row.ssim:.3f} | {row.lpips:.3f} | {row.edit:.3f} | {share:.0%} "
            f"| {row.seconds:.1f} |".replace("nan%", "–").replace("nan", "–")
        )
    return "\n".join([*lines, "", caption, ""])


# --- learned networks against measured maps ---


def load_learned(options: Options, *, segments_given: bool = False) -> tuple[Pipeline, Pipeline]:
    """Two pipelines that start at the encoder's code: with predicted maps, and with measured ones.

    Raises:
      UserError: as `Pipeline.from_options`, in particular if there is no encoder or no predictor.
    """
    options = dataclasses.replace(options, start="encoder", invertibility="predicted", generate_edits=False)
    predicting = load(options, segments_given=segments_given)
    measuring = Pipeline(
        predicting.generator, encoder=predicting.encoder, segmenter=predicting.segmenter, name=predicting.name,
        category=dataclasses.replace(predicting.category, invertibility="measured"), options=predicting.options,
    )  # fmt: skip
    return predicting, measuring


def evaluate_learned(predicting: Pipeline, measuring: Pipeline, example: Example) -> LearnedRow:
    """Compares predicted maps with measured ones, and the encoder's code with the mean style, on one image.

    Args:
      predicting: the first pipeline of `load_learned`.
      measuring: the second one.
      example: the image.

    Raises:
      UserError: an image or segments that cannot be used.
      DivergedError: a loss is not finite.
    """
    predicted = _analyze(predicting, example)
    measured = measuring.analyze(predicted.source, segments=predicted.segments, start=predicted.ws, on_progress=_silent)
    measured = dataclasses.replace(measured, singles={})  # only the maps are needed
    mean = analysis.start_latents(
        measuring.generator.config, measuring.networks, measured.target[None], measuring.config, kind="mean"
    )[0]
    from_mean = dataclasses.replace(measured, ws=mean)
    labels, threshold = measured.segments, measuring.category.threshold
    wanted, found = (layer_selection.assign_layers(one.maps, labels, threshold) for one in (measured, predicted))
    areas = np.bincount(layer_selection.contiguous(labels)[0].ravel()) / labels.size
    chosen, count = wanted.layer_maps[0], len(measured.layers)
    same = chosen == found.layer_maps[0]

    all_w = layer_selection.everywhere(labels, measured.layers[0])
    half = max(measuring.config.num_opt_steps // 2, 1)

    def invert(known: Analysis, layers: Mapping[int, str] | None = None, steps: int | None = None) -> Inversion:
        return measuring.invert(known, layers=layers, num_opt_steps=steps, on_progress=_silent)

    with_measured = invert(measured)
    with_predicted = with_measured if same.all() else invert(dataclasses.replace(measured, maps=predicted.maps))
    last_loss = lambda item: float(item.terms.total[-1])  # noqa: E731
    return LearnedRow(
        same_layer=float(same.mean()),
        segment_error=float((np.abs(wanted.means - found.means) * areas).sum(1).mean()),
        wanted=(np.bincount(chosen.ravel(), minlength=count) / chosen.size).tolist(),
        lpips_measured=with_measured.metrics["LPIPS"],
        lpips_predicted=with_predicted.metrics["LPIPS"],
        mean_w=last_loss(invert(from_mean, all_w)),
        half_w=last_loss(invert(measured, all_w, half)),
        mean_sam=last_loss(invert(from_mean)),
        half_sam=last_loss(invert(measured, None, half)),
    )


def learned_table(rows: Mapping[str, LearnedRow], caption: str, steps: int) -> str:
    """Two Markdown tables of means over images: one for maps, one for starts of W+."""
    mean = lambda name: float(np.mean([getattr(row, name) for row in rows.values()]))  # noqa: E731
    sooner = lambda half, whole: np.mean([getattr(r, half) <= getattr(r, whole) for r in rows.values()])  # noqa: E731
    measured, predicted = mean("lpips_measured"), mean("lpips_predicted")
    lines = [
        "| maps | area with the measured layer | error of segment means | SAM's LPIPS |",
        "|---|--:|--:|--:|",
        f"| measured | 100% | 0 | {measured:.3f} |",
        f"| predicted | {mean('same_layer'):.1%} | {mean('segment_error'):.3f}"
        f" | {predicted:.3f} ({predicted / measured - 1:+.1%}) |",
        "",
        f"| final loss | from the mean style, {steps} steps | from the encoder's code, {max(steps // 2, 1)} steps"
        " | code at most the mean's |",
        "|---|--:|--:|--:|",
        *(
            f"| {title} | {mean(f'mean_{key}'):.4f} | {mean(f'half_{key}'):.4f}"
            f" | {sooner(f'half_{key}', f'mean_{key}'):.0%} of images |"
            for title, key in (("W+", "w"), ("SAM", "sam"))
        ),
        "",
        caption,
        "",
    ]
    return "\n".join(lines)


# --- many images ---


def fingerprint(pipeline: Pipeline, *choices: Any) -> str:
    """Fingerprint of the settings of an evaluation: those of the pipeline, and any others."""
    options, networks = pipeline.options, (pipeline.encoder, pipeline.predictor)
    params = [None if network is None else network.params for network in networks]
    prepared = (options.fit, options.swap_channels, pipeline.category.segmenter)
    return provenance.fingerprint(pipeline.settings, prepared, params, choices)


def run(
    examples: Sequence[Example],
    function: Callable[[Example], Result],
    directory: Path,
    settings: str,
    read: Callable[[Any], Result],
) -> dict[str, Result]:
    """Evaluates many images; results of an earlier run with the same settings are read from `directory`.

    Args:
      examples: the images.
      function: evaluates one image.
      directory: directory of the files NAME_SETTINGS.json.
      settings: as returned by `fingerprint`.
      read: `read_rows` or `read_learned_row`, from the JSON form of a result, in which NaN is None.

    Returns:
      Results by name of the image.

    Raises:
      UserError: a file is damaged, or the function raises it.
    """
    results = {}
    for example in tqdm.tqdm(examples, unit="image"):
        path = directory / f"{files.safe_name(example.name)}_{settings}.json"
        if not path.exists():
            files.write_json(path, function(example))
        try:
            results[example.name] = read(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: remove it and run the same command again") from error
    return results


def read_rows(values: Any) -> dict[str, Row]:
    """The rows of one image by method, from their JSON form."""
    number = lambda value: math.nan if value is None else float(value)  # noqa: E731
    return {name: Row(**{key: number(value) for key, value in row.items()}) for name, row in values.items()}


def read_learned_row(values: Any) -> LearnedRow:
    """One image, from its JSON form."""
    return LearnedRow(**values)


def caption(directory: Path | None, count: int, text: str) -> str:
    """The caption of a table: the images, `text`, and the device."""
    shown = f"{count} hard scenes of the demo" if directory is None else f"{count} images of {directory.name}"
    return f"{shown}; {text}; {jax.devices()[0].device_kind}."


def _analyze(pipeline: Pipeline, example: Example) -> Analysis:
    return pipeline.analyze(example.image, segments=example.segments, name=example.name, on_progress=_silent)


def _silent(_: Progress) -> None:
    """Draws nothing: there is one progress bar, over images."""
