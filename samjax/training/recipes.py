"""Whole trainings: from options and image files to a trained encoder, offset encoder or invertibility predictor.

All resume after an interruption, and run on all devices of all processes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from samjax import learned_start, segmentation
from samjax.config import (
    CATEGORIES,
    CLASSICAL_SEGMENTERS,
    CategoryName,
    Fit,
    Options,
    Segmenter,
    segmenter_category,
)
from samjax.errors import UserError, check_least, check_positive
from samjax.io import checkpoints, files, images, provenance, registry, weights
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.e4e import E4EConfig
from samjax.nets.offset_encoder import OffsetEncoderConfig
from samjax.nets.stylegan2 import StyleGAN2Config
from samjax.pipeline import Pipeline
from samjax.report import training as report
from samjax.training import data, encoder, loop, offsets, predictor

ENCODER_PRESETS = {
    "full": E4EConfig(),  # the authors', of the e4e paper
    "small": E4EConfig(widths=(16, 32, 64, 96), blocks=(1, 2, 2, 1), head_width=24),  # one million parameters
}
"""Sizes of encoders."""

OFFSET_PRESETS: dict[str, dict[str, Any]] = {
    "full": {"widths": {16: 256, 32: 192, 64: 128, 128: 64}, "blocks": 2, "style_width": 512},
    "small": {"widths": {16: 96, 32: 64, 64: 48, 128: 32}, "blocks": 1, "style_width": 192},  # one million
}
"""Sizes of offset encoders: channels at each resolution, residual blocks, and hidden entries of W+'s correction."""

PREDICTOR_PRESETS = {
    "full": PredictorConfig(),  # the authors', 59 million parameters
    "small": PredictorConfig(blocks=(1, 1, 1, 1), width=16, decoder_width=32, low_level_width=16),  # one million
}
"""Sizes of invertibility predictors."""

PREDICTOR_LEARNING_RATES = {"full": 1e-4, "small": 1e-2}
"""Learning rate of each preset. That of "full" is the authors', who start with pretrained weights."""


def _compare(
    batches: Iterable[Any], evaluate: Callable[[int, Any], Any], images_of: Callable[[Any], Any], count: int, title: str
) -> tuple[list[float], np.ndarray]:
    """Means of metrics over validation images, and a figure of the first images beside those that were made.

    Args:
      batches: batches of `count` images; a last one may repeat its last image.
      evaluate: maps number and batch to metrics [B] each, and the images made.
      images_of: the images of a batch.
      count: number of images.
      title: title of the images made.
    """
    rows, figure = [], np.zeros((1, 1, 3), np.uint8)
    for i, batch in enumerate(batches):
        *terms, made = multihost_utils.process_allgather(evaluate(i, batch), tiled=True)
        rows.append(np.stack(terms, 1))
        if i == 0:
            given = multihost_utils.process_allgather(images_of(batch), tiled=True)
            figure = report.pairs_figure(given[:8], made[:8], ("Image", title))
    return np.concatenate(rows)[:count].mean(0).tolist(), figure


# --- encoder ---


@dataclasses.dataclass(frozen=True)
class EncoderOptions(loop.LoopOptions):
    """Options of `train_encoder`."""

    image_category: CategoryName | None = None
    """Size of the images, and LPIPS network of the loss. Default: demo, or custom with gan_weights."""
    weights: Path | None = None
    """A directory with the category's files under their authors' names."""
    gan_weights: Path | None = None
    """A generator, converted or as distributed. Default: the category's."""
    class_idx: int | None = None
    """Class of the images, for a generator with classes. Default: all classes."""
    image_folder: Path = Path("images/train")
    """Directory of the training images."""
    image_folder_val: Path = Path("images/val")
    """Directory of the validation images."""
    fit: Fit = "stretch"
    """How an image of another aspect ratio is fitted to the category's size."""
    output_folder: Path = Path("output/encoder")
    """Directory of the encoder, checkpoints, metrics and figures."""
    preset: Literal["full", "small"] = "full"
    """Size of the encoder: that of the e4e paper, or one for small domains."""
    init: Path | None = None
    """A converted encoder to start from. Default: random weights."""
    batch_size: int = 8
    """Images in a batch over all devices and machines."""
    samples: int | None = None
    """Samples of the generator in each step, in addition to the images. Default: as many as images."""
    lr: float = 1e-3
    """Learning rate of Adam, which rises in the first 100 steps and falls along a cosine."""
    lambda_delta: float = 1e-3
    """Weight of the distance between the styles of an image."""
    lambda_w: float = 1.0
    """Weight of the error of the samples' styles."""
    lpips_type: Literal["vgg", "alex"] | None = None
    """LPIPS network of the loss. Default: the category's."""

    def check(self) -> None:
        super().check()
        check_least(self, dict.fromkeys(("samples", "lambda_delta", "lambda_w"), 0))
        check_positive(self, ("lr",))

    def pipeline_options(self) -> Options:
        """Options of the pipeline whose generator the encoder is for."""
        return Options(
            image_category=self.image_category, weights=self.weights, gan_weights=self.gan_weights,
            class_idx=self.class_idx, lpips_type=self.lpips_type, invertibility="measured", start="mean",
            generate_edits=False,
        )  # fmt: skip


def _new_encoder(options: EncoderOptions, generator: StyleGAN2Config) -> tuple[E4EConfig, Any]:
    """Sizes of the encoder and the variables to start from, None for random ones."""
    styles = (generator.num_ws, generator.w_dim)
    if options.init is None:
        return dataclasses.replace(ENCODER_PRESETS[options.preset], num_styles=styles[0], style_dim=styles[1]), None
    config, variables, _ = checkpoints.load_network(options.init, "e4e")
    if (config.num_styles, config.style_dim) != styles:
        raise UserError(
            f"{options.init} gives {config.num_styles} styles of {config.style_dim}, the generator takes"
            f" {styles[0]} of {styles[1]}"
        )
    return config, variables


def train_encoder(options: EncoderOptions, *, open_output: Callable[[Path], Path] = files.output_directory) -> Path:
    """Trains an encoder for a generator on the images of a directory.

    Writes the encoder with the lowest validation loss, checkpoints, metrics and figures to `options.output_folder`. If
    that directory holds an interrupted run of the same options, the run is resumed.

    Args:
      options: options of the training.
      open_output: creates the directory of the results, once everything else is known to be usable.

    Returns:
      The directory of the encoder, the `e4e_path` of `samjax.config.Options`.

    Raises:
      UserError: bad options or files, or the directory holds a run of other options.
    """
    options.check()
    train_files = images.list_images(options.image_folder, notify=print)
    val_files = images.list_images(options.image_folder_val, notify=print)
    place, part = loop.Placement(options.batch_size), (jax.process_index(), jax.process_count())
    pipeline = Pipeline.from_options(options.pipeline_options(), segments_given=True)
    generator, networks = pipeline.generator.config, pipeline.networks
    network, variables = _new_encoder(options, generator)
    config = encoder.TrainConfig(
        num_steps=options.total_steps(len(train_files)), lr=options.lr, lambda_delta=options.lambda_delta,
        lambda_w=options.lambda_w, samples=options.batch_size if options.samples is None else options.samples,
        lpips_type=pipeline.config.net, seed=options.seed, class_idx=options.class_idx,
    )  # fmt: skip
    _check_settings(open_output(options.output_folder), {
        "encoder": network, "training": config, "batch_size": options.batch_size, "init": options.init,
        "data": [options.image_folder, options.image_folder_val], "images": [len(train_files), len(val_files)],
        "fit": options.fit, "generator": pipeline.fingerprint,
    })  # fmt: skip
    frozen = place.replicate(networks)
    read = functools.partial(data.image_samples, size=pipeline.category.target_size, fit=options.fit, seed=options.seed)
    source, val_source = read(train_files, train=True), read(val_files, train=False)

    def batches(source: Any, first: int, last: int) -> Iterator[Any]:
        for batch in data.batches(source, options.batch_size, first, last, part=part):
            yield place.shard(images.to_float(images.to_gray(batch) if pipeline.gray else batch))

    def validate(variables: Any) -> tuple[dict[str, float], np.ndarray]:
        held_out = batches(val_source, 0, -(-len(val_files) // options.batch_size))
        evaluate = lambda _, batch: encoder.evaluate(network, generator, config, frozen, variables, batch)  # noqa: E731
        means, figure = _compare(held_out, evaluate, lambda batch: batch, len(val_files), "From its code")
        mse, perceptual, delta = means
        loss = config.lambda_mse * mse + config.lambda_lpips * perceptual + config.lambda_delta * delta
        return {"val_loss": loss, "val_mse": mse, "val_lpips": perceptual, "val_delta": delta}, figure

    trained = loop.run(options, loop.Job(
        num_steps=config.num_steps,
        state=place.replicate(encoder.init(network, config, networks, variables)),
        batches=lambda first: batches(source, first, config.num_steps),
        step=functools.partial(encoder.step, network, generator, config, frozen),
        learning_rate=encoder.learning_rate(config),
        validate=validate,
        val_frequency=options.val_frequency or options.epoch_steps(len(train_files)),
        panels=(("LPIPS", "lpips", "val_lpips"), ("Mean squared error", "mse", "val_mse")),
    ))  # fmt: skip
    directory = options.output_folder / "encoder"
    if part[0] == 0:
        loop.save_network(directory, network, trained)
        print(f"best at step {trained.step}: validation LPIPS {trained.metrics['val_lpips']:.3f} from the code alone")
    return directory


# --- offset encoder ---


@dataclasses.dataclass(frozen=True)
class OffsetOptions(loop.LoopOptions):
    """Options of `train_offsets`."""

    image_category: CategoryName | None = None
    """Size of the images, their segments, and weights and LPIPS network of the loss. Default: demo, or custom with
    gan_weights."""
    weights: Path | None = None
    """A directory with the category's files under their authors' names."""
    gan_weights: Path | None = None
    """A generator, converted or as distributed. Default: the category's."""
    e4e_path: Path | None = None
    """The encoder of W+, converted or as distributed. Default: the category's."""
    class_idx: int | None = None
    """Class of the images, for a generator with classes. Default: all classes."""
    segmenter: Segmenter | None = None
    """How segments are found: felzenszwalb, slic, ade20k, bisenet or mask_rcnn. Default: the category's."""
    image_folder: Path = Path("images/train")
    """Directory of the training images."""
    image_folder_val: Path = Path("images/val")
    """Directory of the validation images."""
    fit: Fit = "stretch"
    """How an image of another aspect ratio is fitted to the category's size."""
    output_folder: Path = Path("output/offsets")
    """Directory of the offset encoder, checkpoints, metrics and figures."""
    preset: Literal["full", "small"] = "full"
    """Size of the offset encoder: for photographs, or for small domains."""
    init: Path | None = None
    """An offset encoder to start from. Default: random weights."""
    batch_size: int = 8
    """Images in a batch over all devices and machines."""
    passes: int = 2
    """Passes of the network over each image."""
    latent_names: str | None = None
    """Latent layers, separated by commas, such as W+,F6 for a network of one F layer. Default: all of the generator."""
    lr: float = 1e-3
    """Learning rate of Adam, which rises in the first 100 steps and falls along a cosine."""
    lambda_f_rec: float | None = None
    """Weight of the squared offsets. Default: the category's."""
    lambda_delta: float | None = None
    """Weight of the distance between the styles of an image. Default: the category's."""
    lambda_style: float = 0.02
    """Weight of the squared correction of W+."""
    lambda_alone: float = 0.5
    """Weight of the errors of W+'s image without offsets. Edits act on W+, so it should show by itself what it can."""
    lpips_type: Literal["vgg", "alex"] | None = None
    """LPIPS network of the loss. Default: the category's."""
    lpips_crop: int = 0
    """Pixels a side of the random part of an image on which LPIPS is computed, which saves time; 0 for whole images."""

    def check(self) -> None:
        super().check()
        check_least(
            self,
            {"lambda_f_rec": 0, "lambda_delta": 0, "lambda_style": 0, "lambda_alone": 0, "lpips_crop": 0, "passes": 1},
        )
        check_positive(self, ("lr",))

    def pipeline_options(self) -> Options:
        """Options of the pipeline whose generator and encoder the offset encoder is for."""
        return Options(
            image_category=self.image_category, weights=self.weights, gan_weights=self.gan_weights,
            e4e_path=self.e4e_path, class_idx=self.class_idx, segmenter=self.segmenter, lpips_type=self.lpips_type,
            lambda_f_rec=self.lambda_f_rec, lambda_delta=self.lambda_delta, latent_names=self.latent_names,
            invertibility="measured", start="encoder", generate_edits=False,
        )  # fmt: skip


def _new_offsets(options: OffsetOptions, pipeline: Pipeline) -> tuple[OffsetEncoderConfig, Any]:
    """Sizes of the offset encoder and the variables to start from, None for random ones."""
    layers = [layer for layer in pipeline.layers if layer.resolution is not None]
    resolutions = tuple(layer.resolution for layer in layers if layer.resolution is not None)
    preset = OFFSET_PRESETS[options.preset]
    if any(high != 2 * low for low, high in itertools.pairwise(resolutions)) or not resolutions:
        raise UserError("--latent_names must list W+ and one or more F layers, without one in between left out")
    config = OffsetEncoderConfig(
        resolutions, tuple(layer.channels for layer in layers), *pipeline.layers_shape,
        widths=tuple(preset["widths"][r] for r in resolutions), blocks=preset["blocks"],
        style_width=preset["style_width"], passes=options.passes,
    )  # fmt: skip
    if options.init is None:
        return config, None
    config, variables, _ = checkpoints.load_network(options.init, "offsets")
    learned_start.check(config, pipeline.generator.config)
    return dataclasses.replace(config, passes=options.passes), variables


def train_offsets(options: OffsetOptions, *, open_output: Callable[[Path], Path] = files.output_directory) -> Path:
    """Trains an offset encoder for a generator and an encoder on the images of a directory.

    Writes the offset encoder with the lowest validation loss, checkpoints, metrics and figures to
    `options.output_folder`. If that directory holds an interrupted run of the same options, the run is resumed.

    Args:
      options: options of the training.
      open_output: creates the directory of the results, once everything else is known to be usable.

    Returns:
      The directory of the offset encoder, the `offsets_path` of `samjax.config.Options`.

    Raises:
      UserError: bad options or files, or the directory holds a run of other options.
    """
    options.check()
    paths = {
        "train": images.list_images(options.image_folder, notify=print),
        "val": images.list_images(options.image_folder_val, notify=print),
    }
    place, part = loop.Placement(options.batch_size), (jax.process_index(), jax.process_count())
    pipeline = Pipeline.from_options(options.pipeline_options())
    assert pipeline.encoder is not None
    assert pipeline.segmenter is not None
    generator, networks, e4e_config = pipeline.generator.config, pipeline.networks, pipeline.encoder.config
    network, variables = _new_offsets(options, pipeline)
    counts, inversion = {name: len(found) for name, found in paths.items()}, pipeline.config
    config = offsets.TrainConfig(
        num_steps=options.total_steps(counts["train"]), lr=options.lr, seed=options.seed,
        lambda_mse=inversion.lambda_mse, lambda_lpips=inversion.lambda_lpips, lambda_f_rec=inversion.lambda_f_rec,
        lambda_delta=inversion.lambda_delta, lambda_style=options.lambda_style, lambda_alone=options.lambda_alone,
        lpips_type=inversion.net, lpips_crop=options.lpips_crop,
    )  # fmt: skip
    size = pipeline.category.target_size
    _check_settings(open_output(options.output_folder), {
        "offsets": network, "training": config, "batch_size": options.batch_size, "init": options.init,
        "data": [options.image_folder, options.image_folder_val], "images": counts, "fit": options.fit,
        "segmenter": pipeline.category.segmenter, "generator": pipeline.fingerprint,
        "encoder": provenance.fingerprint(e4e_config, pipeline.encoder.params),
    })  # fmt: skip
    directory = options.output_folder / "segments"
    if part[0] == 0:
        for name, found in paths.items():
            named = {path.stem: path for path in found}
            data.cache_segments(directory / name, named, size, pipeline.segmenter, options.fit)
    multihost_utils.sync_global_devices("segments")
    frozen = place.replicate(offsets.Frozen(networks, pipeline.encoder.params))
    source, val_source = (
        data.segmented_samples(
            found, functools.partial(data.read_labels, directory / name, size), size=size, fit=options.fit,
            train=name == "train", seed=options.seed,
        )
        for name, found in paths.items()
    )  # fmt: skip

    def batches(source: Any, first: int, last: int) -> Iterator[Any]:
        for image, segments in data.batches(source, options.batch_size, first, last, part=part):
            shown = images.to_float(images.to_gray(image) if pipeline.gray else image)
            yield place.shard(offsets.Batch(shown, segments.astype(np.int32)))

    def validate(variables: Any) -> tuple[dict[str, float], np.ndarray]:
        def evaluate(i: int, batch: Any) -> Any:
            key = jax.random.fold_in(jax.random.key(options.seed), i)
            return offsets.evaluate(network, e4e_config, generator, config, frozen, variables, batch, key)

        held_out = batches(val_source, 0, -(-counts["val"] // options.batch_size))
        means, figure = _compare(held_out, evaluate, lambda batch: batch.images, counts["val"], "Learned start")
        named = {f"val_{name}": mean for name, mean in zip(offsets.Metrics._fields[1:], means, strict=True)}
        return {"val_loss": float(offsets.total(config, *means)), **named}, figure

    trained = loop.run(options, loop.Job(
        num_steps=config.num_steps,
        state=place.replicate(offsets.init(network, config, generator, networks, variables)),
        batches=lambda first: batches(source, first, config.num_steps),
        step=functools.partial(offsets.step, network, e4e_config, generator, config, frozen),
        learning_rate=offsets.learning_rate(config),
        validate=validate,
        val_frequency=options.val_frequency or options.epoch_steps(counts["train"]),
        panels=(("LPIPS", "lpips", "val_lpips"), ("Mean squared error", "mse", "val_mse")),
    ))  # fmt: skip
    directory = options.output_folder / "offsets"
    if part[0] == 0:
        loop.save_network(directory, network, trained)
        print(f"best at step {trained.step}: validation LPIPS {trained.metrics['val_lpips']:.3f} without any step")
    return directory


# --- predictor ---


@dataclasses.dataclass(frozen=True)
class PredictorOptions(loop.LoopOptions):
    """Options of `train_predictor`."""

    dataset_folder_train: Path = Path("data/train")
    """Directory of the training images and their inversions, as `invert_folder.py` writes it."""
    dataset_folder_val: Path = Path("data/val")
    """The same for the validation images."""
    output_folder: Path = Path("output/predictor")
    """Directory of the predictor, checkpoints, metrics and figures."""
    preset: Literal["full", "small"] = "full"
    """Size of the predictor: that of the official categories, or one for small domains."""
    init: Path | None = None
    """A converted predictor to start from. Default: random weights."""
    latent_space_name: str | None = None
    """Latent layers, separated by commas. Default: all layers of the data."""
    target_H: int = 256
    """Height to which images are resized."""
    target_W: int = 256
    """Width to which images are resized."""

    image_category: CategoryName | None = None
    """The category, for the defaults below that are "the category's"."""
    segmenter: Segmenter | None = None
    """How segments are found: felzenszwalb, slic, ade20k, bisenet or mask_rcnn. Default: the category's, or
    felzenszwalb."""
    weights: Path | None = None
    """A directory with the segmenter's file under its authors' name."""
    threshold: float | None = None
    """Threshold of the layer selection that validation compares. Default: the category's, or 0.225."""

    lr: float | None = None
    """Learning rate of the backbone; that of all other layers is ten times as high. Default: 1e-4 for full, as the
    authors', and 1e-2 for small."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    segment_weight: float = 1.0
    """Weight of the error of segment means; 0 gives the paper's loss."""
    lpips_type: Literal["vgg", "alex"] = "vgg"
    """LPIPS network of the true maps, to which thresholds belong."""
    cache_targets: bool = False
    """Computes the true maps once instead of in every step, and leaves blur out of the augmentation. Faster on a CPU,
    where the true maps take most of the time."""
    bfloat16: bool = False
    """Runs the predictor in bfloat16."""

    def check(self) -> None:
        super().check()
        if self.batch_size < 2:
            raise UserError("--batch_size must be at least 2: batch normalization needs more than one image")
        check_least(self, {"target_H": 16, "target_W": 16, "momentum": 0, "weight_decay": 0, "segment_weight": 0,
                           "threshold": 0})  # fmt: skip
        check_positive(self, ("lr",))
        if self.momentum >= 1:
            raise UserError(f"--momentum must be below 1, not {self.momentum}")

    def segmenter_name(self) -> Segmenter:
        """The segmenter to use."""
        category = CATEGORIES.get(self.image_category or "")
        return self.segmenter or (category.segmenter if category else "felzenszwalb")


def _new_predictor(options: PredictorOptions, latent_names: tuple[str, ...]) -> tuple[PredictorConfig, Any]:
    """Sizes of the predictor and the variables to start from, None for random ones."""
    if options.init is None:
        return dataclasses.replace(PREDICTOR_PRESETS[options.preset], latent_names=latent_names), None
    config, variables, _ = checkpoints.load_network(options.init, "invertibility")
    known = config.latent_names
    if known != latent_names:
        raise UserError(f"{options.init} has maps of {','.join(known)}, the data have {','.join(latent_names)}")
    return config, variables


def _segments(options: PredictorOptions, datasets: dict[str, data.Dataset]) -> dict[str, data.Labels]:
    """The segments of all images, which the first process finds once and keeps in the output directory."""
    directory, size = options.output_folder / "segments", (options.target_H, options.target_W)
    if jax.process_index() == 0:
        name = options.segmenter_name()
        network = None
        if name not in CLASSICAL_SEGMENTERS:
            path = registry.find_converted(segmenter_category(name), "segmenter")
            network = checkpoints.load_network(path, name)
        segment = segmentation.load(name, network)
        for part, dataset in datasets.items():
            paths = {example.name: example.image for example in dataset.examples}
            data.cache_segments(directory / part, paths, size, segment)
    multihost_utils.sync_global_devices("segments")
    return {part: functools.partial(data.read_labels, directory / part, size) for part in datasets}


def _true_maps(
    options: PredictorOptions, datasets: dict[str, data.Dataset], params: Any, part: tuple[int, int]
) -> dict[str, data.Targets]:
    """The true maps of all images, of which each process computes a part and keeps it in the output directory."""

    @jax.jit
    def compare(params: Any, image: jax.Array, inversions: jax.Array) -> jax.Array:
        batch = predictor.Batch(image[None], inversions[None], None)
        with jax.default_matmul_precision("highest"):
            return predictor.true_maps(params, batch, options.lpips_type)[0]

    # An argument rather than a captured constant, which would put the 59 MB of VGG16 into the program.
    compare_image = functools.partial(compare, jax.device_put(params))
    directory, size = options.output_folder / "targets", (options.target_H, options.target_W)
    for name, dataset in datasets.items():
        data.cache_targets(directory / name, dataset, size, compare_image, part=part)
    multihost_utils.sync_global_devices("targets")
    return {name: functools.partial(data.read_targets, directory / name) for name in datasets}


def train_predictor(options: PredictorOptions, *, open_output: Callable[[Path], Path] = files.output_directory) -> Path:
    """Trains an invertibility predictor on images and their inversions in each layer alone.

    Writes the predictor with the lowest validation loss, checkpoints, metrics and figures to `options.output_folder`.
    If that directory holds an interrupted run of the same options, the run is resumed.

    Args:
      options: options of the training.
      open_output: creates the directory of the results, once everything else is known to be usable.

    Returns:
      The directory of the predictor, the `inv_model_path` of `samjax.config.Options`.

    Raises:
      UserError: bad options or files, or the directory holds a run of other options.
    """
    options.check()
    wanted = options.latent_space_name.split(",") if options.latent_space_name else None
    datasets = {"train": data.find(options.dataset_folder_train, wanted)}
    latent_names = datasets["train"].latent_names
    datasets["val"] = data.find(options.dataset_folder_val, latent_names)
    network, variables = _new_predictor(options, latent_names)
    place, part = loop.Placement(options.batch_size), (jax.process_index(), jax.process_count())
    count, val_count = (len(dataset.examples) for dataset in datasets.values())
    config = predictor.TrainConfig(
        num_steps=options.total_steps(count), lr=options.lr or PREDICTOR_LEARNING_RATES[options.preset],
        momentum=options.momentum, weight_decay=options.weight_decay, segment_weight=options.segment_weight,
        lpips_type=options.lpips_type, bfloat16=options.bfloat16, seed=options.seed,
    )  # fmt: skip
    category = CATEGORIES.get(options.image_category or "")
    threshold = options.threshold
    if threshold is None:
        threshold = category.threshold if category else 0.225
    size = (options.target_H, options.target_W)
    _check_settings(open_output(options.output_folder), {
        "predictor": network, "training": config, "batch_size": options.batch_size, "size": size, "init": options.init,
        "data": [options.dataset_folder_train, options.dataset_folder_val], "images": [count, val_count],
        "segmenter": options.segmenter_name(), "cache_targets": options.cache_targets,
    })  # fmt: skip
    labels, params = _segments(options, datasets), weights.load_lpips(options.lpips_type)
    targets = _true_maps(options, datasets, params, part) if options.cache_targets else dict.fromkeys(datasets)
    source, val_source = (
        data.samples(dataset, labels[name], size, train=name == "train", seed=options.seed, targets=targets[name])
        for name, dataset in datasets.items()
    )
    frozen, tau = place.replicate(params), jnp.asarray(threshold, jnp.float32)

    def batches(source: Any, first: int, last: int) -> Iterator[Any]:
        for batch in data.batches(source, options.batch_size, first, last, part=part):
            yield place.shard(data.to_batch(batch))

    def validate(variables: Any) -> tuple[dict[str, float], np.ndarray]:
        rows, figure = [], np.zeros((1, 1, 3), np.uint8)
        for i, batch in enumerate(batches(val_source, 0, -(-val_count // options.batch_size))):
            found = predictor.evaluate(network, config, frozen, variables, batch, tau)
            metrics, same, *maps = multihost_utils.process_allgather(found, tiled=True)
            rows.append(np.stack((*metrics, same), 1))
            if i == 0:
                shown = (multihost_utils.process_allgather(batch.images, tiled=True), *maps)
                some = min(4, val_count)
                figure = report.maps_figure([*zip(*(x[:some] for x in shown), strict=True)], latent_names)
        means = np.concatenate(rows)[:val_count].mean(0)  # without the samples that fill the last batch
        names = (*predictor.Metrics._fields, "same_layer")
        return {f"val_{name}": float(mean) for name, mean in zip(names, means, strict=True)}, figure

    trained = loop.run(options, loop.Job(
        num_steps=config.num_steps,
        state=place.replicate(predictor.init(network, config, variables)),
        batches=lambda first: batches(source, first, config.num_steps),
        step=functools.partial(predictor.step, network, config, frozen),
        learning_rate=predictor.learning_rate(config),
        validate=validate,
        val_frequency=options.val_frequency or options.epoch_steps(count),
        panels=(("Loss", "loss", "val_loss"), ("Error of segment means", "segment_error", "val_segment_error")),
    ))  # fmt: skip
    directory = options.output_folder / "predictor"
    if part[0] == 0:
        loop.save_network(directory, network, trained)
        print(
            f"best at step {trained.step}: validation error of segment means"
            f" {trained.metrics['val_segment_error']:.4f}; {trained.metrics['val_same_layer']:.1%} of the area gets the"
            " same layer as from the true maps"
        )
    return directory


def _check_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Checks that the run in the output directory, if there is one, has the same settings.

    Raises:
      UserError: it has other settings.
    """
    if jax.process_index() == 0:
        provenance.check_settings(directory / "settings.json", settings, "--output_folder")
