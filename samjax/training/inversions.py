"""Training data of the invertibility predictor: every image of a directory, inverted in each latent layer alone."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tqdm

from samjax import driver, losses
from samjax.config import CategoryName, Fit, InversionConfig, Options, Precision, Preset, Start, resolve
from samjax.errors import UserError
from samjax.inversion import Items
from samjax.io import files, images, provenance
from samjax.latents import single_layer_masks
from samjax.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class DirectoryOptions:
    """Options of `invert_directory`."""

    image_category: CategoryName | None = None
    """Image sizes, letterboxing, and the defaults below that are "the category's". Default: demo, or custom with
    gan_weights."""
    weights: Path | None = None
    """A directory with the category's files under the names their authors gave them. Default: the files fetched by
    `python -m ckpt_convert get`."""
    gan_weights: Path | None = None
    """A generator, converted or as distributed. Default: the category's."""
    class_idx: int | None = None
    """Class of the images, for a generator with classes. Default: all classes."""
    e4e_path: Path | None = None
    """An e4e encoder, converted or as distributed. Default: the category's."""
    offsets_path: Path | None = None
    """An offset encoder, for the start "learned". Default: the demo's."""
    start: Start | None = None
    """Where latents start: W+ at the mean style, at the best of 256 samples by LPIPS, or at the encoder's code; or all
    layers at what an offset encoder finds from that code ("learned"). Default: the category's, learned with
    offsets_path, or encoder with e4e_path."""
    image_folder: Path = Path("images")
    """Directory of the images."""
    output_path: Path = Path("output/single_layers")
    """Directory of the results, with a subdirectory for each layer."""
    latent_names: str | None = None
    """Latent layers, separated by commas. Default: all of W+,F4,F6,F8,F10 that the generator has."""
    fit: Fit = "stretch"
    """How an image of another aspect ratio is fitted to the category's size."""
    preset: Preset | None = None
    """The schedule: "reference" is the authors', "fast" takes 60 steps. Default: the category's."""
    num_opt_steps: int | None = None
    """Adam steps of each inversion. Default: the preset's if one is given, otherwise the category's, at most 501."""
    precision: Precision | None = None
    """Precision of the optimization: "highest", the default, is full float32; see invert.py for the others."""
    lpips_type: Literal["vgg", "alex"] | None = None
    """Network of the perceptual loss. Default: the category's."""
    noise: Literal["random", "const", "none"] = "random"
    """The generator's noise during optimization."""
    save_latents: bool = False
    """Also writes final/latents.npz."""
    batch_size: int | None = None
    """Inversions in one program, over all devices of this machine. Default: 1 for each device on a CPU; elsewhere as
    many as fit, at most 8 for each device."""
    seed: int = 0
    """Seed of the noise, of the prior's samples, and of the samples that --start best tries."""

    def pipeline_options(self) -> Options:
        """Options of the pipeline that inverts the images."""
        names = {field.name for field in dataclasses.fields(Options)}
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}
        return Options(**shared, invertibility="measured", generate_edits=False)


class DirectoryResult(NamedTuple):
    """The result of `invert_directory`.

    Attributes:
      directory: directory of the results.
      images: images of this process.
      latent_names: the latent layers.
      failed: images that could not be read or inverted, each with the reason.
    """

    directory: Path
    images: tuple[Path, ...]
    latent_names: tuple[str, ...]
    failed: dict[Path, str]


class _Item(NamedTuple):
    """One inversion: an image and a layer.

    Attributes:
      path: file of the image.
      layer: index of the layer.
      image: uint8 [H, W, 3], at the generator's size.
      target: [h, w, 3] in [-1, 1].
      ws: [num_ws, w_dim], where W+ starts.
    """

    path: Path
    layer: int
    image: np.ndarray
    target: np.ndarray
    ws: np.ndarray


def invert_directory(
    options: DirectoryOptions, *, open_output: Callable[[Path], Path] = files.output_directory
) -> DirectoryResult:
    """Inverts every image of a directory in each latent layer alone.

    Writes LAYER/NAME/final/input.png and reconstruction.png to `options.output_path`, the layout of the authors' data.
    Images and layers are items of the same batches, which are divided over all devices of this process. If there are
    several processes, each inverts its share of the images. Finished inversions are skipped, so an interrupted run is
    resumed by calling the function again, with the same settings; images and layers may be added. Images that cannot be
    read, or whose loss diverges, are skipped too.

    Args:
      options: what to invert, and how.
      open_output: creates the directory of the results, once everything else is known to be usable.

    Returns:
      The images of this process, and those among them that failed.

    Raises:
      UserError: bad options, there are no images, results cannot be written, or those in the directory are of other
        settings.
    """
    paths = images.list_images(options.image_folder, notify=print)
    pipeline = Pipeline.from_options(options.pipeline_options(), segments_given=True)
    config = _config(options, pipeline)
    open_output(options.output_path)
    _check_settings(options, pipeline, config)
    share = tuple(paths[jax.process_index() :: jax.process_count()])
    remaining = {path: _unfinished(path, options.output_path, config.latent_names) for path in share}
    count, total = sum(map(len, remaining.values())), len(share) * len(config.latent_names)
    if count < total:
        print(f"resuming: {total - count} of {total} inversions are done", flush=True)
    failed: dict[Path, str] = {}
    with tqdm.tqdm(total=count, unit="inversion", desc="single layers", disable=not count) as bar:
        batch: list[_Item] = []
        for item in _items(remaining, options, pipeline, failed):
            batch.append(item)
            if len(batch) == config.batch_size:
                _invert(batch, options, pipeline, config, failed)
                bar.update(len(batch))
                batch = []
        _invert(batch, options, pipeline, config, failed)
        bar.update(len(batch))
    return DirectoryResult(options.output_path, share, config.latent_names, failed)


def _config(options: DirectoryOptions, pipeline: Pipeline) -> InversionConfig:
    """Settings of the inversions, with batches that divide over the devices of this process."""
    devices = jax.local_device_count()
    settings = resolve(options.pipeline_options(), pipeline.generator.config, devices=devices)
    if options.preset or options.num_opt_steps:
        return settings.config
    return dataclasses.replace(settings.config, num_opt_steps=min(settings.config.num_opt_steps, 501))


def _check_settings(options: DirectoryOptions, pipeline: Pipeline, config: InversionConfig) -> None:
    """Checks that the inversions in the output directory, if there are any, were made with the same settings."""
    unused = ("latent_names", "invertibility", "measure_steps", "predictor")
    settings = {name: value for name, value in pipeline.settings.items() if name not in unused}
    settings |= {"num_opt_steps": config.num_opt_steps, "fit": options.fit, "size": pipeline.category.target_size}
    provenance.check_settings(options.output_path / "settings.json", settings, "--output_path")


def _final(output: Path, layer: str, path: Path) -> Path:
    return output / layer / files.safe_name(path.stem) / "final"


def _unfinished(path: Path, output: Path, names: tuple[str, ...]) -> list[int]:
    """Indices of the layers in which an image is not inverted yet, judged by the file that is written last."""
    return [i for i, name in enumerate(names) if not (_final(output, name, path) / "reconstruction.png").exists()]


def _items(
    remaining: dict[Path, list[int]],
    options: DirectoryOptions,
    pipeline: Pipeline,
    failed: dict[Path, str],
) -> Iterator[_Item]:
    """Reads images lazily, and adds those that cannot be read to `failed`."""
    height, width = pipeline.category.target_size
    factor = pipeline.generator.config.img_resolution // max(height, width)
    for path, layers in remaining.items():
        if not layers:
            continue
        try:
            source, target = pipeline.read_image(path, notify=lambda _: None)
        except UserError as error:
            failed[path] = str(error)
            continue
        image = images.fit(source, height * factor, width * factor, options.fit)
        ws = pipeline.start(target)
        for layer in layers:
            yield _Item(path, layer, image, target, ws)


def _invert(
    batch: list[_Item],
    options: DirectoryOptions,
    pipeline: Pipeline,
    config: InversionConfig,
    failed: dict[Path, str],
) -> None:
    """Inverts a batch and writes the results, without the items whose loss diverges."""
    while batch:
        try:
            return _invert_all(batch, options, pipeline, config)
        except driver.DivergedError as error:
            failed |= {batch[i].path: str(error) for i in error.items}
            batch = [item for i, item in enumerate(batch) if i not in error.items]


def _invert_all(batch: list[_Item], options: DirectoryOptions, pipeline: Pipeline, config: InversionConfig) -> None:
    generator, networks, layers = pipeline.generator.config, pipeline.networks, pipeline.layers
    chosen = [item.layer for item in batch]
    masks: dict[str, Any] = {name: np.asarray(mask)[chosen] for name, mask in single_layer_masks(layers).items()}
    targets = np.stack([item.target for item in batch])
    start = pipeline.start_latents(targets, np.stack([item.ws for item in batch]), masks)
    # The noise of an item does not depend on the other items of its batch.
    seeds = [zlib.crc32(f"{options.seed}/{item.path.stem}/{item.layer}".encode()) for item in batch]
    items = Items(targets, masks, start, np.asarray(seeds))
    latents, _ = driver.run(generator, networks, items, config, devices=jax.local_devices())
    rendered = driver.render(
        generator, networks.generator, latents, masks,
        noise=config.stored_noise, precision=config.matmul_precision, batch_size=config.batch_size,
    )  # fmt: skip
    reconstructions = losses.full_size(rendered, *targets.shape[1:3])
    for i, item in enumerate(batch):
        directory = _final(options.output_path, layers[item.layer].name, item.path)
        images.save_png(directory / "input.png", item.image)
        if options.save_latents:
            files.write_npz(directory / "latents.npz", {name: np.asarray(x[i]) for name, x in latents.items()})
        # Written last: its existence marks the inversion as finished.
        images.save_png(directory / "reconstruction.png", reconstructions[i])
