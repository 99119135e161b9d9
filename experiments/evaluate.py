"""Holds SAM against inversion in each single layer, over many images.

    python experiments/evaluate.py                                       # 32 held-out hard scenes of the demo
    python experiments/evaluate.py --images DIR --gan_weights converted/
    python experiments/evaluate.py --images DIR --image_category cars    # after `python -m ckpt_convert get cars`

Prints a Markdown table of PSNR, SSIM, LPIPS (VGG), seconds, and how much of an edit survives: the change of colour it
makes (for the demo inside the true car segment), relative to the inversion in W+. Writes it, with every image's
figures, to OUTPUT_PATH. Finished images are kept: the same command goes on where it was stopped. Where error maps are
predicted rather than measured, as in the official categories, there are no inversions in single layers, and SAM alone.

With several --thresholds there is one row of SAM for each: to choose one, on other scenes (--scene_seed).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cli
import jax
import networks
import numpy as np
import tqdm

from samjax import api, demo, inversion, maps
from samjax.config import InversionConfig, Precision, Preset, with_preset
from samjax.errors import UserError
from samjax.io import files, images
from samjax.latents import latent_layers, single_layer_masks
from samjax.metrics import edit_effect, quality


@dataclasses.dataclass(frozen=True)
class Flags(networks.Flags):
    """What to evaluate on, and how it is inverted."""

    images: Path | None = None
    """A folder, with NAME_segments.png beside images where there are label images; none: hard scenes of the demo."""
    fit: Literal["stretch", "letterbox", "crop"] = "stretch"
    """How images of another shape are brought to the category's size."""
    output_path: Path = Path("output/evaluation")
    scenes: int = 32
    """How many hard scenes."""
    scene_seed: int = 1
    """Which hard scenes: 1 are the held-out ones, the demo's threshold was chosen on those of 2."""
    preset: Preset | None = None
    """How long and how fast: the authors' course, or one with a third of its steps; none: the category's."""
    num_opt_steps: int | None = None
    """Steps of every inversion; none: the preset's, or 1001, the demo 100."""
    lpips_type: Literal["vgg", "alex"] | None = None
    """Network of the loss; none: vgg, the demo alex. The table's LPIPS is always VGG's."""
    precision: Precision = "highest"
    """Of the optimisation; see invert.py. The figures are always of full float32."""
    batch_size: int | None = None
    """Inversions in one program; none: 1 on a CPU, elsewhere as many as fit, at most 8."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Arguments(Flags):
    thresholds: tuple[float, ...] | None = None
    """Mean error up to which a segment may use a layer; none: that of the category."""
    edit: Path | None = None
    """The direction whose effect is measured; none: the demo's "blue car"."""
    edit_strength: float = 2.0


class Example(NamedTuple):
    name: str
    target: np.ndarray  # [h, w, 3]
    segments: np.ndarray  # [h, w]
    region: np.ndarray  # [h, w] bool, where an edit should act


class Figures(NamedTuple):
    psnr: float
    ssim: float
    lpips: float
    edit: float
    seconds: float


def examples(args: Flags, nets: networks.Networks) -> Iterator[Example]:
    """What to evaluate on, one at a time."""
    height, width = nets.category.target_size
    if args.images is None:
        scenes = demo.hard_scenes(args.scenes, key=jax.random.key(args.scene_seed))
        for i in range(args.scenes):
            labels = np.asarray(scenes.labels[i])
            # Through 8 bits, as from a file.
            image = images.to_float(images.to_uint8(scenes.image[i]))
            yield Example(f"scene{args.scene_seed}_{i:03d}", image, labels, labels == demo.scenes.CAR)
        return
    for path in cli.image_files(args.images):
        target = images.to_float(images.fit(images.read_image(path), height, width, args.fit))
        beside = path.with_name(f"{path.stem}_segments.png")
        if beside.exists():
            labels = images.read_segments(beside, height, width, images.image_size(path), args.fit)
        else:
            labels = networks.segments(nets, target, args.swap_channels)
        yield Example(path.stem, target, labels, np.ones((height, width), bool))


def evaluate(
    models: api.Models, nets: networks.Networks, example: Example, thresholds: list[float], args: Arguments
) -> dict[str, Figures]:
    """All rows of one image; measured maps come from the very inversions in single layers that SAM is compared with."""
    if nets.encoder is not None:
        ws = networks.encode(nets, example.target)
    else:
        ws = api.start(models, example.target, kind=nets.category.start, seed=args.seed)
    rows = {}
    if nets.predictor is not None:
        error_maps = networks.predicted_maps(nets, example.target, models.config.latent_names)
    else:
        rows, error_maps = single_layers(models, example, ws, args)
    assignment = maps.assign_layers(error_maps, example.segments, thresholds)
    first, position = maps.unique_layer_maps(assignment.layer_maps)
    began = time.perf_counter()
    sam = api.invert_layers(models, example.target, assignment.layer_maps[first], ws, seed=args.seed)
    each = (time.perf_counter() - began) / len(first)
    for threshold, k in zip(thresholds, position, strict=True):
        name = "SAM" if len(thresholds) == 1 else f"SAM {threshold:g}"
        rows[name] = figures(models, example, sam.latents, sam.masks, sam.images, k, each, args)
    return rows


def single_layers(
    models: api.Models, example: Example, ws: np.ndarray, args: Arguments
) -> tuple[dict[str, Figures], np.ndarray]:
    """Inversions in each layer alone: their rows, and the error maps [L, h, w] that they measure."""
    began = time.perf_counter()
    singles = api.measure(models, example.target, ws, seed=args.seed)
    each = (time.perf_counter() - began) / len(models.layers)
    masks = {name: np.asarray(mask) for name, mask in single_layer_masks(models.layers).items()}
    latents = {name: value[0] for name, value in singles.latents.items()}
    rows = {
        layer.name: figures(models, example, latents, masks, singles.images[0], i, each, args)
        for i, layer in enumerate(models.layers)
    }
    return rows, singles.maps[0]


def figures(
    models: api.Models, example: Example, latents: dict, masks: dict, made: np.ndarray, i: int, seconds: float,
    args: Arguments,
) -> Figures:  # fmt: skip
    """The figures of the i-th of a batch of inversions."""
    pick = lambda tree: {name: value[i : i + 1] for name, value in tree.items()}  # noqa: E731
    image = api.comparable(made[i : i + 1], example.target)[0]
    lpips = float(api.distances(models, made[i : i + 1], example.target)[0])
    q = quality(image, example.target)
    effect = float("nan")
    if (direction := edit_path(args)) is not None:
        edited = api.edit_latents(models, pick(latents), pick(masks), direction, (args.edit_strength,))
        effect = edit_effect(api.comparable(edited, example.target)[0], image, example.region)
    return Figures(q.psnr, q.ssim, lpips, effect, seconds)


def read_figures(path: Path) -> dict[str, Figures]:
    """The rows of a finished image."""
    try:
        rows = json.loads(path.read_text())
        return {name: Figures(*(float("nan") if v is None else v for v in row.values())) for name, row in rows.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: remove it, and the same command makes it again") from error


def edit_path(args: Arguments) -> Path | None:
    of_demo = args.gan_weights is None and args.image_category in (None, "demo")
    return args.edit or (demo.EDITS / "blue_car.npy" if of_demo else None)


def markdown(rows: dict[str, Figures], caption: str) -> str:
    """The table; an edit's survival is the ratio of means."""
    lines = ["| latent | PSNR, dB | SSIM | LPIPS | edit effect | of W+ | seconds |", "|---|--:|--:|--:|--:|--:|--:|"]
    for name, row in rows.items():
        share = row.edit / rows["W+"].edit if "W+" in rows and rows["W+"].edit else float("nan")
        lines.append(
            f"| {name} | {row.psnr:.2f} | {row.ssim:.3f} | {row.lpips:.3f} | {row.edit:.3f} | {share:.0%} "
            f"| {row.seconds:.1f} |".replace("nan%", "–").replace("nan", "–")
        )
    return "\n".join([*lines, "", caption, ""])


def count_examples(args: Flags) -> int:
    """How many images there will be. Raises UserError if there are none for such a generator."""
    if args.images is not None:
        return len(cli.image_files(args.images))
    if args.gan_weights is not None or args.image_category not in (None, "demo"):
        raise UserError("--images is missing, a folder of images: the hard scenes are the demo's")
    return args.scenes


def settings(args: Flags, nets: networks.Networks) -> InversionConfig:
    """Those of all inversions."""
    category = nets.category
    config = with_preset(category.config, args.preset)
    return dataclasses.replace(
        config,
        latent_names=tuple(layer.name for layer in latent_layers(nets.generator.config)),
        num_opt_steps=args.num_opt_steps or config.num_opt_steps,
        lpips_type=args.lpips_type or config.lpips_type,
        batch_size=args.batch_size or inversion.default_batch_size(nets.generator.config),
        loss_resolution=max(category.target_size),
        precision=args.precision,
    )


def fingerprint(network: Any) -> str:
    """What tells one network from another: a hash of some of its weights."""
    tree = None if network is None else network[1]  # the variables
    some = np.concatenate([np.ravel(x)[:100] for x in jax.tree.leaves(tree)] or [np.zeros(0)])
    return hashlib.sha256(some.tobytes()).hexdigest()[:16]


def main(args: Arguments) -> None:
    count = count_examples(args)
    nets = networks.load(args, segments_given=args.images is None)
    category, config = nets.category, settings(args, nets)
    thresholds = list(args.thresholds or (category.threshold,))
    networks.check_layers(nets, config.latent_names)
    folder = files.output_folder(args.output_path)
    models = api.load_models(nets.generator, config, seed=args.seed)
    looks = [*map(fingerprint, (nets.generator, nets.encoder, nets.predictor)), category.segmenter, category.start]
    direction = edit_path(args)
    edit = (direction and direction.read_bytes(), args.edit_strength)
    choices = (config, thresholds, *edit, args.fit, args.swap_channels, args.seed)
    run = hashlib.sha256(repr((*choices, *looks)).encode()).hexdigest()[:8]
    done: dict[str, dict[str, Figures]] = {}
    for example in tqdm.tqdm(examples(args, nets), total=count, unit="image"):
        path = folder / f"{example.name}_{run}.json"
        if path.exists():
            done[example.name] = read_figures(path)
            continue
        done[example.name] = evaluate(models, nets, example, thresholds, args)
        files.write_json(path, {name: row._asdict() for name, row in done[example.name].items()})
    names = next(iter(done.values())).keys()
    means = {name: Figures(*np.mean([rows[name] for rows in done.values()], axis=0).tolist()) for name in names}
    what = f"{count} hard scenes of the demo" if args.images is None else f"{count} images of {args.images.name}"
    shown = ", ".join(f"{threshold:g}" for threshold in thresholds)
    device = jax.devices()[0].device_kind
    course = f"{config.num_opt_steps} steps at {config.lr:g} with LPIPS-{config.lpips_type}"
    caption = f"{what}; {course}, threshold {shown}; {device}."
    text = markdown(means, caption)
    files.write_text(folder / "table.md", text)
    files.write_json(
        folder / "table.json",
        {"mean": {k: v._asdict() for k, v in means.items()},
         "images": {n: {k: v._asdict() for k, v in rows.items()} for n, rows in done.items()},
         "config": config, "thresholds": thresholds, "device": device},
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    cli.run(Arguments, main)
