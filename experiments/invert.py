"""Inverts an image with SAM and edits it.

    python experiments/invert.py                                   # the demo: no files, no network needed
    python experiments/invert.py --image_path photo.png --gan_weights converted/ --edits_folder edits/
    python experiments/invert.py --image_path car.png --image_category cars   # after `python -m ckpt_convert get cars`

Flags carry the names and meaning of the authors' script where it has them. Results go to OUTPUT_PATH/IMAGE_NAME;
the same command again goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shlex
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cli
import jax
import jax.numpy as jnp
import networks
import numpy as np

from ckpt_convert import directions
from samjax import api, demo, inversion, losses, maps
from samjax.config import Category, InversionConfig, Precision, Preset, with_preset
from samjax.errors import UserError
from samjax.io import files, images, report
from samjax.latents import init_latents, latent_layers, parse_latent_names, single_layer_masks
from samjax.metrics import quality


@dataclasses.dataclass(frozen=True)
class Settings(networks.Flags):
    """How an image is inverted and edited, whatever asks for it."""

    latent_names: str | None = None
    """Candidate latent layers, separated by commas; none: all that the generator has of W+,F4,F6,F8,F10."""
    fit: Literal["stretch", "letterbox", "crop"] = "stretch"
    """How an image of another shape is brought to the category's size."""
    invertibility_steps: int | None = None
    """Steps of each inversion by which maps are measured; none: as many as num_opt_steps, at most 501."""
    threshold: float | None = None
    """Mean error up to which a segment may use a layer; none: by category."""

    preset: Preset | None = None
    """How long and how fast: "reference" is the authors' course, "fast" takes a third of its steps; none: the
    category's. The flags that follow come before it."""
    num_opt_steps: int | None = None
    """Adam steps. This and what follows up to lambda_mvg, where not given, is the category's: for all but the demo the
    authors' 1001, 0.05, 0.25, 0.05, 0.9, 0.999, vgg, 1, 1, 5, 1e-3, 1e-8."""
    lr: float | None = None
    lr_rampdown_length: float | None = None
    lr_rampup_length: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    lpips_type: Literal["vgg", "alex"] | None = None
    """Network of the perceptual loss."""
    lambda_mse: float | None = None
    lambda_lpips: float | None = None
    lambda_f_rec: float | None = None
    lambda_delta: float | None = None
    lambda_mvg: float | None = None
    precision: Precision | None = None
    """Of the optimisation; "highest", the default, is full float32, "high" and "default" are faster on a GPU or a TPU
    only, "bfloat16" uses 16 bits in LPIPS and the generator's highest resolutions."""
    noise: Literal["random", "const", "none"] = "random"
    """The generator's noise during optimisation."""
    batch_size: int | None = None
    """Inversions in one program; none: 1 on a CPU, elsewhere as many as fit, at most 8, or 16 of a sweep."""
    seed: int = 0

    generate_edits: bool | None = None
    """Applies the directions of edits_folder; none: where there is a folder."""
    edits_folder: Path | None = None
    """Directions as .npy, .npz, .safetensors or .pt (InterFaceGAN, and the first eight of GANSpace); none: those of
    the category."""
    edit_strengths: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Arguments(Settings):
    image_path: Path | None = None
    """The image; none: a sample of the demo."""
    output_path: Path = Path("output")
    """Results go to a folder in it with the image's name."""
    segments: Path | None = None
    """A label image of the same size as the image: one value or flat colour a segment; none: by the segmenter."""
    sweep_thresholds: bool = False
    """Runs all thresholds of the category; those that give the same layers run once."""
    paste_back: bool = False
    """Also writes reconstruction and edits at the image's own size and shape; what a crop left out stays as it was."""
    save_final_latent: bool = True
    """Keeps latents_T*.npz, from which a later run goes on."""
    save_intermediate: bool = False
    """Keeps pictures of the optimisation on its way, every save_frequency steps."""
    save_frequency: int = 250


class Photograph(NamedTuple):
    """An image to invert.

    Attributes:
      path: of its file.
      picture: uint8 [H, W, 3], as in the file.
      target: [h, w, 3] in [-1, 1], at the category's size.
      segments: [h, w] labels; None: by the segmenter.
      names: of segments, where known.
    """

    path: Path
    picture: np.ndarray
    target: np.ndarray
    segments: np.ndarray | None
    names: Mapping[int, str]


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments with everything settled that depends on the category, the networks and the image."""

    nets: networks.Networks
    category: Category
    config: InversionConfig
    photograph: Photograph
    folder: Path
    thresholds: list[float]
    main_threshold: float
    measure_steps: int
    directions: dict[str, np.ndarray]  # [num_ws, w_dim]
    strengths: tuple[float, ...]
    generator_name: str


class Inverted(NamedTuple):
    """One inversion of the image: latents and masks (leading axis 1), the image [R, R, 3], total loss of each step."""

    latents: dict[str, Any]
    masks: dict[str, Any]
    image: np.ndarray
    loss: np.ndarray


class Looked(NamedTuple):
    """What is known of the image before it is inverted: segments [h, w], where W+ starts [num_ws, w_dim], error maps
    [L, h, w], and the inversion in each layer alone, where the maps were measured by them."""

    segments: np.ndarray
    ws: np.ndarray
    maps: np.ndarray
    singles: list[Inverted]


# --- what to do ---


def settle(args: Arguments) -> Job:
    """Settles what arguments leave open, and reads every input: bad ones are found before work starts."""
    image_path, segments_path = args.image_path, args.segments
    if image_path is None:
        if args.image_category not in (None, "demo") or args.gan_weights is not None:
            raise UserError("--image_path is missing: give the image to invert")
        image_path = demo.SAMPLES / "scene0.png"
        segments_path = segments_path or demo.SAMPLES / "scene0_segments.png"
    picture = images.read_image(image_path, notify=lambda note: print(f"note: {note}"))
    nets = networks.load(args, segments_given=segments_path is not None)
    category = nets.category
    config = settle_config(args, nets, most=16 if args.sweep_thresholds else 8)
    main_threshold = settle_threshold(args, category)
    thresholds = sorted({*category.sweep(), main_threshold}) if args.sweep_thresholds else [main_threshold]
    return Job(
        nets=nets,
        category=category,
        config=config,
        photograph=fitted(image_path, picture, category, args.fit, segments_path),
        folder=args.output_path / image_path.stem,
        thresholds=thresholds,
        main_threshold=main_threshold,
        measure_steps=measure_steps(args, config),
        directions=load_directions(args, nets),
        strengths=args.edit_strengths,
        generator_name=generator_name(args, nets),
    )


def fitted(
    path: Path,
    picture: np.ndarray,
    category: Category,
    fit: Literal["stretch", "letterbox", "crop"],
    segments_path: Path | None,
) -> Photograph:
    """An image as read, uint8 [H, W, 3], at the category's size, and its segments; those of the demo's samples have
    names.

    Raises:
      UserError: a label image that is missing, damaged or of another size.
    """
    height, width = category.target_size
    target = images.to_float(images.fit(picture, height, width, fit))
    if segments_path is None:
        return Photograph(path, picture, target, None, {})
    segments = images.read_segments(segments_path, height, width, images.image_size(path), fit)
    known = segments_path.parent == demo.SAMPLES
    names = dict(enumerate((*demo.scenes.LABELS, "in front", "backdrop"))) if known else {}
    return Photograph(path, picture, target, segments, names)


def settle_config(args: Settings, nets: networks.Networks, most: int = 8) -> InversionConfig:
    """The settings of the inversion; `most` items at once where nobody says.

    Raises:
      UserError: settings out of range, or layers that the networks do not have.
    """
    category, generator = nets.category, nets.generator
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(InversionConfig)}
    taken = {name: value for name, value in given.items() if value is not None}
    if args.latent_names is None:
        taken["latent_names"] = tuple(layer.name for layer in latent_layers(generator.config))
    else:
        taken["latent_names"] = parse_latent_names(args.latent_names, generator.config)
    taken.setdefault("batch_size", inversion.default_batch_size(generator.config, most))
    try:
        config = with_preset(category.config, args.preset)
        config = dataclasses.replace(config, **taken, loss_resolution=max(category.target_size))
    except ValueError as error:
        raise UserError(str(error)) from error
    networks.check_layers(nets, config.latent_names)
    return config


def embedded(args: Settings, nets: networks.Networks) -> bool:
    """Whether the generator is the demo's own, so that its samples and directions belong to it."""
    return nets.name == "demo" and args.gan_weights is None


def generator_name(args: Settings, nets: networks.Networks) -> str:
    return nets.name if args.gan_weights is None else args.gan_weights.name


def settle_threshold(args: Settings, category: Category) -> float:
    """The threshold asked for, or the category's.

    Raises:
      UserError: it is not finite.
    """
    threshold = category.threshold if args.threshold is None else args.threshold
    if not math.isfinite(threshold):
        raise UserError(f"--threshold must be a number, not {threshold}")
    return threshold


def measure_steps(args: Settings, config: InversionConfig) -> int:
    """Steps of each inversion by which maps are measured."""
    return args.invertibility_steps or min(config.num_opt_steps, 501)


def load_directions(args: Settings, nets: networks.Networks) -> dict[str, np.ndarray]:
    """The directions to apply, by the names of their files."""
    own = demo.EDITS if embedded(args, nets) else nets.edits
    folder = args.edits_folder or own
    if args.generate_edits is False or (folder is None and not args.generate_edits):
        return {}
    if folder is None:
        raise UserError(
            "--generate_edits needs --edits_folder, a folder of directions (.npy, .npz, .safetensors or .pt)"
        )
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give --edits_folder a folder of directions")
    found = sorted(p for p in folder.iterdir() if p.suffix in directions.SUFFIXES)
    if not found:
        raise UserError(f"{folder} holds no directions (.npy, .npz, .safetensors or .pt)")
    config = nets.generator.config
    taken: dict[str, np.ndarray] = {}
    for path in found:
        taken |= directions.read(path, config.num_ws, config.w_dim)
    return taken


def check_settings(folder: Path, args: Arguments, job: Job) -> None:
    """Makes sure that what is already in `folder` was made with the same settings, and notes them where it is new."""
    nets, category, segments = job.nets, job.category, job.photograph.segments
    settings = json.loads(json.dumps({
        **dataclasses.asdict(job.config),
        "seed": args.seed,
        "start": category.start,
        "encoder": networks.origin(nets.encoder),
        "invertibility": category.invertibility,
        "measure_steps": job.measure_steps if nets.predictor is None else None,
        "predictor": networks.origin(nets.predictor),
        "generator": digest(*nets.generator.params["synthesis"]["b4"].values(), nets.generator.params["mapping"]),
        "target": digest(job.photograph.target),
        "segments": [category.segmenter, args.swap_channels] if segments is None else digest(segments),
    }))  # fmt: skip
    for how in ("batch_size", "chunk_steps"):  # not what
        del settings[how]
    path = folder / "settings.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged: remove the folder, or choose another --output_path") from error
        changed = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
        if changed:
            raise UserError(
                f"{folder} holds results of other settings ({', '.join(changed)}): choose another --output_path, "
                "or remove that folder"
            )
    else:
        files.write_json(path, settings)


def digest(*trees: Any) -> str:
    """Tells arrays apart, in 16 letters."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()[:16]


# --- the work; each part is kept as soon as it is done ---


def look(folder: Path, args: Arguments, job: Job, models: api.Models, seconds: dict[str, float]) -> Looked:
    """Segments, start and error maps of the image."""
    began = time.perf_counter()
    segments, ws = first_look(args, job.nets, job.photograph, models)
    if job.nets.predictor is not None:
        error_maps = networks.predicted_maps(job.nets, job.photograph.target, job.config.latent_names)
        seconds["networks"] = time.perf_counter() - began
        return Looked(segments, ws, error_maps, [])
    seconds["networks"] = time.perf_counter() - began
    return Looked(segments, ws, *measured_layers(folder, args, job, models, ws, seconds))


def first_look(
    args: Settings, nets: networks.Networks, photograph: Photograph, models: api.Models
) -> tuple[np.ndarray, np.ndarray]:
    """Segments of the image [h, w], and where W+ starts [num_ws, w_dim]."""
    target, segments = photograph.target, photograph.segments
    if segments is None:
        segments = networks.segments(nets, target, args.swap_channels)
    if nets.encoder is not None:
        return segments, networks.encode(nets, target)
    return segments, api.start(models, target, kind=nets.category.start, seed=args.seed)


def starting_image(models: api.Models, ws: np.ndarray) -> np.ndarray:
    """What the generator makes of W+ where it starts [num_ws, w_dim]; [R, R, 3]."""
    latents = init_latents(models.layers, jnp.asarray(ws)[None])
    masks = {name: np.asarray(mask)[:1] for name, mask in single_layer_masks(models.layers).items()}
    return api.render(models, latents, masks)[0]


def measured_layers(
    folder: Path, args: Arguments, job: Job, models: api.Models, ws: np.ndarray, seconds: dict[str, float]
) -> tuple[np.ndarray, list[Inverted]]:
    """The single-layer inversions, which give the error maps and stand for comparison."""
    path = folder / "measured.npz"
    saved = load_arrays(path)
    if saved is None:
        began = time.perf_counter()
        with inversion.progress_bar("single layers") as bar:
            result = api.measure(
                models, job.photograph.target, ws, num_opt_steps=job.measure_steps, seed=args.seed, on_progress=bar
            )
        seconds["single_layers"] = time.perf_counter() - began
        saved = {
            "maps": result.maps[0],
            "loss": result.terms.total[:, 0],
            "seconds": np.asarray(seconds["single_layers"]),
        }
        saved |= {f"latent_{name}": value[0] for name, value in result.latents.items()}
        files.write_npz(path, saved)
    else:
        print(f"resuming: the single-layer inversions are done ({path.name})", flush=True)
        seconds["single_layers"] = float(saved["seconds"])
    latents = {name.removeprefix("latent_"): saved[name] for name in saved if name.startswith("latent_")}
    return saved["maps"], single_inversions(models, latents, saved["loss"])


def single_inversions(models: api.Models, latents: dict[str, Any], loss: np.ndarray) -> list[Inverted]:
    """The inversion in each layer alone, from latents [L, ...] and the losses of every step [steps, L]."""
    masks = {name: np.asarray(mask) for name, mask in single_layer_masks(models.layers).items()}
    made = api.render(models, latents, masks)
    pick = lambda tree, i: {name: value[i : i + 1] for name, value in tree.items()}  # noqa: E731
    return [Inverted(pick(latents, i), pick(masks, i), made[i], loss[:, i]) for i in range(len(models.layers))]


def sam_inversions(
    folder: Path,
    args: Arguments,
    job: Job,
    models: api.Models,
    ws: np.ndarray,
    layer_maps: np.ndarray,
    seconds: dict[str, float],
) -> list[Inverted]:
    """One inversion for each threshold; equal layer maps are run once, finished ones not again."""
    first, position = maps.unique_layer_maps(layer_maps)
    paths = [folder / f"latents_T{threshold:.3f}.npz" for threshold in job.thresholds]
    found = [load_arrays(path) for path in paths]
    done: dict[int, dict[str, np.ndarray]] = {p: f for p, f in zip(position, found, strict=True) if f is not None}
    for threshold, arrays in zip(job.thresholds, found, strict=True):
        if arrays is not None:
            print(f"resuming: threshold {threshold:.3f} is done", flush=True)
    todo = [k for k in range(len(first)) if k not in done]
    if len(first) < len(job.thresholds):
        print(f"{len(job.thresholds)} thresholds give {len(first)} different layer maps", flush=True)
    if todo:
        began = time.perf_counter()
        chosen = layer_maps[[first[k] for k in todo]]
        labels = [f"T{job.thresholds[first[k]]:.3f}" for k in todo]
        with inversion.progress_bar("SAM") as bar:
            watch = snapshots(folder, args, models, maps.stack_masks(chosen, models.layers), labels, bar)
            result = api.invert_layers(models, job.photograph.target, chosen, ws, seed=args.seed, on_progress=watch)
        took = (time.perf_counter() - began) / len(todo)
        for i, k in enumerate(todo):
            done[k] = {f"latent_{n}": np.asarray(v[i : i + 1]) for n, v in result.latents.items()} | {
                "loss": result.terms.total[:, i],
                "seconds": np.asarray(took),
            }
    results = []
    for i, path in enumerate(paths):
        arrays = done[position[i]]
        if found[i] is None and args.save_final_latent:
            files.write_npz(path, {**arrays, "layer_map": layer_maps[i]})
        latents = {name.removeprefix("latent_"): arrays[name] for name in arrays if name.startswith("latent_")}
        masks = maps.stack_masks(layer_maps[i : i + 1], models.layers)
        results.append(Inverted(latents, masks, api.render(models, latents, masks)[0], arrays["loss"]))
    seconds["sam"] = sum(float(done[k]["seconds"]) for k in done)
    return results


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a finished part, or None where there is none."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}
    except Exception as error:  # damaged archives raise almost anything
        raise UserError(f"{path} is damaged ({error}): remove it, and the same command makes it again") from error


def snapshots(
    folder: Path, args: Arguments, models: api.Models, masks: dict[str, Any], labels: list[str], bar: Any
) -> Any:
    """`bar`, and with --save_intermediate a picture every `save_frequency` steps."""

    def watch(progress: inversion.Progress) -> None:
        bar(progress)
        steps = len(progress.terms.total)
        due = progress.step // args.save_frequency > (progress.step - steps) // args.save_frequency
        if args.save_intermediate and due:
            size = len(progress.state.latents["W+"])
            rows = np.minimum(np.arange(progress.group * size, (progress.group + 1) * size), len(labels) - 1)
            made = api.render(models, progress.state.latents, {name: mask[rows] for name, mask in masks.items()})
            for row, image in zip(rows, made, strict=True):
                images.save_png(folder / "intermediate" / f"step_{labels[row]}_{progress.step:04d}.png", image)

    return watch if args.save_intermediate else bar


# --- what comes out ---


def describe(
    job: Job,
    models: api.Models,
    looked: Looked,
    assignment: maps.Assignment,
    index: int,
    methods: dict[str, Inverted],
    edited: dict[str, np.ndarray],
    forced: Collection[int] = (),
) -> report.Result:
    """Everything about one threshold, for pictures and tables; `edited` [directions, strengths, R, R, 3] by method,
    `forced` the labels of segments whose layer was chosen by hand."""
    names = [layer.name for layer in models.layers]
    rows = [
        report.SegmentRow(
            label=int(value),
            name=job.photograph.names.get(int(value)),
            share=float(np.mean(looked.segments == value)),
            means=tuple(float(mean) for mean in assignment.means[:, s]),
            layer=names[assignment.layers[index, s]],
            forced=int(value) in forced,
        )
        for s, value in enumerate(assignment.values)
    ]
    made = {name: api.comparable(item.image[None], job.photograph.target)[0] for name, item in methods.items()}
    metrics = {}
    for name, image in made.items():
        distance = float(api.distances(models, methods[name].image[None], job.photograph.target)[0])
        q = quality(image, job.photograph.target, distance)
        metrics[name] = {"MSE": q.mse, "PSNR": q.psnr, "SSIM": q.ssim, "LPIPS": distance}
    edits: dict[str, dict[str | float, dict[str, np.ndarray]]] = {}
    for name, sweeps in edited.items():
        for direction, sweep in zip(job.directions, sweeps, strict=True):
            for strength, image in zip(job.strengths, api.comparable(sweep, job.photograph.target), strict=True):
                edits.setdefault(direction, {}).setdefault(strength, {})[name] = image
    return report.Result(
        name=job.photograph.path.stem,
        image=job.photograph.target,
        segments=looked.segments,
        segment_rows=rows,
        layers=names,
        maps=looked.maps,
        layer_map=assignment.layer_maps[index],
        threshold=job.thresholds[index],
        reconstructions=made,
        edits=edits,
        metrics=metrics,
        losses={name: item.loss.tolist() for name, item in methods.items()},
        settings={
            "generator": job.generator_name,
            "steps": job.config.num_opt_steps,
            "error maps": "predicted" if not looked.singles else f"measured in {job.measure_steps} steps",
            "W+ starts at": job.category.start,
            "segments": "given" if job.photograph.segments is not None else job.category.segmenter,
            "LPIPS of the loss": job.config.lpips_type,
            "device": jax.devices()[0].device_kind,
        },
        thresholds=job.category.sweep(),
    )


def edit(job: Job, models: api.Models, item: Inverted) -> np.ndarray:
    """Along every direction, at every strength; [directions, strengths, R, R, 3]."""
    config = models.generator.config
    directions = np.reshape(list(job.directions.values()), (-1, config.num_ws, config.w_dim))
    return api.edit_all(models, item.latents, item.masks, directions, job.strengths)


def save_threshold(
    folder: Path, args: Arguments, job: Job, result: report.Result, image: np.ndarray, edited: np.ndarray
) -> None:
    """The pictures of one threshold: SAM's image [R, R, 3], and its edits [directions, strengths, R, R, 3]."""
    tag = f"T{result.threshold:.3f}"
    images.save_png(folder / f"layers_{tag}.png", report.layers_picture(result))
    images.save_png(folder / f"reconstruction_{tag}.png", full_size(job, image))
    for name, strengths in result.edits.items():
        images.save_png(folder / "edits" / name / f"{tag}.png", report.edit_strip(result, name))
        for strength, made in strengths.items():
            images.save_png(folder / "edits" / name / f"{tag}_mul{strength:g}.png", made["SAM"])
    if args.paste_back:
        paste = lambda image: images.paste_back(job.photograph.picture, full_size(job, image), args.fit)  # noqa: E731
        images.save_png(folder / "pasted" / f"reconstruction_{tag}.png", paste(image))
        for name, sweep in zip(job.directions, edited, strict=True):
            for strength, changed in zip(job.strengths, sweep, strict=True):
                images.save_png(folder / "pasted" / name / f"{tag}_mul{strength:g}.png", paste(changed))


def full_size(job: Job, image: np.ndarray) -> np.ndarray:
    """A generator's image [R, R, 3] without the rows of its letterbox, otherwise as large as it is."""
    height, width = job.category.target_size
    factor = max(image.shape[0] // max(height, width), 1)
    return np.asarray(losses.crop_letterbox(jnp.asarray(image)[None], height * factor, width * factor)[0])


def save_report(
    folder: Path,
    args: Arguments,
    job: Job,
    main: report.Result,
    results: list[report.Result],
    seconds: dict[str, float],
) -> None:
    """What sums everything up; report.html comes last."""
    images.save_png(folder / "segments.png", report.segments_picture(main))
    images.save_png(folder / "invertibility.png", report.invertibility_picture(main))
    images.save_png(folder / "comparison.png", report.comparison_picture(main))
    summary = {
        "image": job.photograph.path.name,
        "thresholds": {
            f"{result.threshold:.3f}": {"metrics": result.metrics, "segments": result.segment_rows}
            for result in results
        },
        "layers": list(main.layers),
        "steps": {"sam": job.config.num_opt_steps, "single_layers": job.measure_steps},
        "seconds": seconds,
        "settings": job.config,
        "seed": args.seed,
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("samjax", "jax", "flax", "optax", "numpy")},
        "command": shlex.join(["python", *sys.argv]),
    }
    files.write_json(folder / "metrics.json", summary)
    swept = {r.threshold: (r.reconstructions["SAM"], r.metrics["SAM"]["LPIPS"]) for r in results}
    main = dataclasses.replace(main, sweep=swept if len(swept) > 1 else {})
    files.write_text(folder / "report.html", report.render_html(main))


def table(result: report.Result) -> None:
    """The figures of one threshold, for the terminal."""
    print(f"\n{'':8}{'LPIPS':>8}{'PSNR':>8}{'SSIM':>8}")
    for name, q in result.metrics.items():
        print(f"{name:8}{q['LPIPS']:8.3f}{q['PSNR']:8.2f}{q['SSIM']:8.3f}")
    print(f"layers at threshold {result.threshold:.3f}: "
          + ", ".join(f"{report.segment_title(row)} {row.layer}" for row in result.segment_rows) + "\n")  # fmt: skip


def main(args: Arguments) -> None:
    began = time.perf_counter()
    job = settle(args)
    folder = files.output_folder(job.folder)
    check_settings(folder, args, job)
    print(f"{job.photograph.path.name} -> {folder}", flush=True)
    models = api.load_models(job.nets.generator, job.config, seed=args.seed)
    images.save_png(folder / "input.png", job.photograph.target)
    seconds: dict[str, float] = {}
    looked = look(folder, args, job, models, seconds)
    assignment = maps.assign_layers(looked.maps, looked.segments, job.thresholds)
    images.save_png(folder / "start.png", full_size(job, starting_image(models, looked.ws)))
    sams = sam_inversions(folder, args, job, models, looked.ws, assignment.layer_maps, seconds)
    results = []
    for i, sam in enumerate(sams):
        methods = {"SAM": sam}
        if looked.singles:
            methods = {"W+": looked.singles[0], models.layers[-1].name: looked.singles[-1], **methods}
        edited = {name: edit(job, models, item) for name, item in methods.items()}
        results.append(describe(job, models, looked, assignment, i, methods, edited))
        save_threshold(folder, args, job, results[-1], sam.image, edited["SAM"])
    shown = results[job.thresholds.index(job.main_threshold)]
    seconds["total"] = time.perf_counter() - began
    save_report(folder, args, job, shown, results, seconds)
    table(shown)
    print(f"report: {folder / 'report.html'}  ({seconds['total']:.0f} s)", flush=True)


if __name__ == "__main__":
    cli.run(Arguments, main)
