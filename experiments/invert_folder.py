"""Inverts every image of a folder in each latent layer alone: the training data of an invertibility predictor.

    python experiments/invert_folder.py --image_folder photos/train --gan_weights converted/ --output_path data/train

Writes OUTPUT_PATH/LAYER/NAME/final/input.png and reconstruction.png, as the authors' program does, so that their
training and `train_invertibility.py` both read it. Images and layers are items of one batch, and a batch is divided
over all devices of this machine. Stopped at any time, the same command goes on: what is finished is skipped, and
nothing half-written counts as finished.

Several machines share a folder: start the same command on each with --coordinator HOST:PORT --num_processes N
--process_id I (or, on a TPU pod, with --distributed), and every one takes its share of the images.

Exit code 1: some images could not be read or inverted; they are named, and all others are done.
"""

from __future__ import annotations

import dataclasses
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cli
import jax
import jax.numpy as jnp
import networks
import numpy as np
import tqdm

from samjax import api, inversion, losses
from samjax.config import Precision, Preset, with_preset
from samjax.errors import UserError
from samjax.io import files, images
from samjax.latents import init_latents, latent_layers, parse_latent_names, single_layer_masks


@dataclasses.dataclass(frozen=True)
class Arguments(networks.Flags):
    image_folder: Path = Path("images")
    """The images."""
    output_path: Path = Path("output/single_layers")
    """A folder for each layer goes here."""
    latent_names: str | None = None
    """Layers, separated by commas; none: all that the generator has of W+,F4,F6,F8,F10."""
    fit: Literal["stretch", "letterbox", "crop"] = "stretch"
    """How an image of another shape is brought to the category's size."""
    preset: Preset | None = None
    """How long and how fast: "reference" is the authors' course, "fast" takes a third of its steps; none: as below."""
    num_opt_steps: int | None = None
    """Adam steps of each inversion; none: the preset's, or 501, or the category's where that has fewer."""
    precision: Precision = "highest"
    """Of the optimisation; see invert.py."""
    lpips_type: Literal["vgg", "alex"] | None = None
    """Network of the loss; none: by category."""
    noise: Literal["random", "const", "none"] = "random"
    """The generator's noise during optimisation."""
    save_latents: bool = False
    """Also writes final/latents.npz."""
    batch_size: int | None = None
    """Inversions in one program, over all devices; none: one a device on a CPU, elsewhere as many as fit, at most
    eight."""
    seed: int = 0

    distributed: bool = False
    """Takes this process's place among others from its surroundings (TPU pods, Slurm, Open MPI)."""
    coordinator: str | None = None
    """Address of the first process, HOST:PORT, where the surroundings do not tell; with the two flags below."""
    num_processes: int | None = None
    process_id: int | None = None


class Task(NamedTuple):
    """One image, and the layers in which it is still to be inverted (indices)."""

    path: Path
    layers: tuple[int, ...]


class Item(NamedTuple):
    """One inversion: an image at the two sizes that count, and the layer."""

    path: Path
    layer: int
    picture: np.ndarray  # uint8 [H, W, 3], at the generator's size
    target: np.ndarray  # [h, w, 3] in [-1, 1]
    ws: np.ndarray  # [num_ws, w_dim]


def final(output: Path, layer: str, path: Path) -> Path:
    return output / layer / path.stem / "final"


def unfinished(paths: list[Path], output: Path, names: tuple[str, ...]) -> list[Task]:
    """What is left to do; the reconstruction is written last, so that it stands for the rest."""
    tasks = []
    for path in paths:
        last = (final(output, name, path) / "reconstruction.png" for name in names)
        left = tuple(i for i, picture in enumerate(last) if not picture.exists())
        if left:
            tasks.append(Task(path, left))
    return tasks


def items(
    tasks: list[Task], args: Arguments, nets: networks.Networks, models: api.Models, failed: dict[Path, str]
) -> Iterator[Item]:
    """The inversions to do, read as they are asked for; images that cannot be read go to `failed`."""
    height, width = nets.category.target_size
    factor = nets.generator.config.img_resolution // max(height, width)
    for task in tasks:
        try:
            picture = images.read_image(task.path, notify=lambda _: None)
        except UserError as error:
            failed[task.path] = str(error)
            continue
        full = images.fit(picture, height * factor, width * factor, args.fit)
        target = images.to_float(images.fit(picture, height, width, args.fit))
        if nets.encoder is not None:
            ws = networks.encode(nets, target)
        else:
            ws = api.start(models, target, kind=nets.category.start, seed=args.seed)
        for layer in task.layers:
            yield Item(task.path, layer, full, target, ws)


def invert(batch: list[Item], args: Arguments, nets: networks.Networks, models: api.Models) -> None:
    """Inverts the items of one batch, and writes what comes out."""
    masks = {name: np.asarray(mask) for name, mask in single_layer_masks(models.layers).items()}
    chosen: dict[str, Any] = {name: mask[[item.layer for item in batch]] for name, mask in masks.items()}
    start = init_latents(models.layers, jnp.asarray(np.stack([item.ws for item in batch])))
    # The noise of an item is its own, whichever others are in the batch.
    seeds = [zlib.crc32(f"{args.seed}/{item.path.stem}/{item.layer}".encode()) for item in batch]
    targets = np.stack([item.target for item in batch])
    result = inversion.run(
        models.generator.config, models.networks, inversion.Items(targets, chosen, start, np.asarray(seeds)),
        models.config, devices=jax.local_devices(),
    )  # fmt: skip
    made = api.render(models, result.latents, chosen)
    for i, item in enumerate(batch):
        folder = final(args.output_path, models.layers[item.layer].name, item.path)
        factor = item.picture.shape[0] // item.target.shape[0]
        height, width = item.target.shape[0] * factor, item.target.shape[1] * factor
        image = losses.crop_letterbox(jnp.asarray(made[i : i + 1]), height, width)
        images.save_png(folder / "input.png", item.picture)
        if args.save_latents:
            files.write_npz(folder / "latents.npz", {name: np.asarray(v[i]) for name, v in result.latents.items()})
        images.save_png(folder / "reconstruction.png", np.asarray(image[0]))


def main(args: Arguments) -> None:
    paths = cli.image_files(args.image_folder)
    cli.connect(args.distributed, args.coordinator, args.num_processes, args.process_id)
    # What it makes is what a predictor is trained on: neither that nor segments are needed.
    nets = networks.load(dataclasses.replace(args, invertibility="measured"), segments_given=True)
    generator, category = nets.generator, nets.category
    if args.latent_names is None:
        names = tuple(layer.name for layer in latent_layers(generator.config))
    else:
        names = parse_latent_names(args.latent_names, generator.config)
    devices = jax.local_device_count()
    size = args.batch_size or devices * inversion.default_batch_size(generator.config)
    if size % devices:
        raise UserError(f"--batch_size {size} does not divide by the {devices} devices: give a multiple of {devices}")
    preset = with_preset(category.config, args.preset)
    config = dataclasses.replace(
        preset,
        latent_names=names,
        num_opt_steps=args.num_opt_steps or (preset.num_opt_steps if args.preset else min(preset.num_opt_steps, 501)),
        precision=args.precision,
        lpips_type=args.lpips_type or category.config.lpips_type,
        noise=args.noise,
        loss_resolution=max(category.target_size),
        batch_size=size,
    )
    files.output_folder(args.output_path)
    share = paths[jax.process_index() :: jax.process_count()]
    tasks = unfinished(share, args.output_path, names)
    count = sum(len(task.layers) for task in tasks)
    done = len(share) * len(names) - count
    if done:
        print(f"resuming: {done} of {len(share) * len(names)} inversions are done", flush=True)
    failed: dict[Path, str] = {}
    if tasks:
        models = api.load_models(generator, config, seed=args.seed)
        with tqdm.tqdm(total=count, unit="inversion", desc="single layers") as bar:
            batch: list[Item] = []
            for item in items(tasks, args, nets, models, failed):
                batch.append(item)
                if len(batch) == size:
                    attempt(batch, args, nets, models, failed)
                    bar.update(size)
                    batch = []
            if batch:
                attempt(batch, args, nets, models, failed)
                bar.update(len(batch))
    for path, reason in failed.items():
        print(f"skipped {path}: {reason}", file=sys.stderr)
    print(f"{args.output_path}: {len(share) - len(failed)} of {len(share)} images in {len(names)} layers", flush=True)
    if failed:
        sys.exit(1)


def attempt(
    batch: list[Item], args: Arguments, nets: networks.Networks, models: api.Models, failed: dict[Path, str]
) -> None:
    """`invert`; items whose loss is no longer finite are named, and the others run without them."""
    while batch:
        try:
            return invert(batch, args, nets, models)
        except inversion.DivergedError as error:
            for i in error.items:
                failed[batch[i].path] = str(error)
            batch = [item for i, item in enumerate(batch) if i not in error.items]


if __name__ == "__main__":
    cli.run(Arguments, main)
