"""Draws images of a generator, from seeds or from styles.

    python experiments/generate.py --output_path out                                  # seeds 0 to 7 of the demo's
    python experiments/generate.py --generator converted/ --seeds 0-7,12 --truncation_psi 0.7 --output_path out
    python experiments/generate.py --generator converted/ --ws styles.npy --output_path out

A seed gives the z that NVIDIA's own programs draw for it, so images can be told by their seeds. OUTPUT_PATH gets a
PNG for each image, all of them in grid.png, and images.npy: float32 [N, H, W, C] in [-1, 1], not rounded, in the same
order. Files of the same names are replaced.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cli
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import Array
from PIL import Image

from samjax import demo
from samjax.errors import UserError
from samjax.io import checkpoints, files, images
from samjax.latents import synthesize_latents
from samjax.nets import stylegan2
from samjax.nets.stylegan2 import Noise, Params, StyleGAN2Config

MAX_IMAGES = 10_000
GRID_SIDE = 4096  # pixels


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path
    """Folder for the images."""
    generator: Path | None = None
    """A converted generator; none: the demo's."""
    seeds: str | None = None
    """Seeds and ranges of seeds, such as 0-7,12; none: 0-7."""
    ws: Path | None = None
    """Styles instead of seeds: a .npy file of floats, (N, num_ws, w_dim) or (num_ws, w_dim)."""
    truncation_psi: float = 1.0
    """How far a style goes from the average one (0) to its own (1); below 1 images vary less and look better."""
    truncation_cutoff: int | None = None
    """How many of the first styles are truncated; none: all."""
    class_idx: int | None = None
    """Class to draw, for generators with classes."""
    noise: Noise = "const"
    """Fine structure: stored with the generator, none, or random (drawn from the seed)."""
    batch_size: int = 4
    """Images in one program."""


class Job(NamedTuple):
    """What to draw: a name and a seed for each image, and z [N, z_dim] or ws [N, num_ws, w_dim]."""

    names: list[str]
    seeds: list[int]
    z: np.ndarray | None
    ws: np.ndarray | None


def parse_seeds(text: str) -> list[int]:
    """Reads "0-7,12"; repeated seeds count once.

    Raises:
      UserError: another syntax, a range that runs backwards, a seed above 2^32 - 1, too many.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,12})(?:\s*-\s*([0-9]{1,12}))?\s*", part, re.ASCII)
        if match is None:
            raise UserError(f"--seeds {text[:60]!r} cannot be read: give seeds and ranges of seeds, such as 0-7,12")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--seeds: the range {part.strip()} runs backwards: write {last}-{first}")
        if last >= 2**32:
            raise UserError(f"--seeds: {last} is above 4294967295, the largest seed")
        if last - first >= MAX_IMAGES or len(seeds.keys() | set(range(first, last + 1))) > MAX_IMAGES:
            raise UserError(f"--seeds asks for more than {MAX_IMAGES:,} images: draw fewer at a time")
        seeds |= dict.fromkeys(range(first, last + 1))
    return list(seeds)


def read_ws(path: Path, config: StyleGAN2Config) -> np.ndarray:
    """Styles [N, num_ws, w_dim], float32, from a .npy file; nothing in the file is executed.

    Raises:
      UserError: no such file, damaged, of another kind or shape, or with values that are not finite.
    """
    expected = f"(N, {config.num_ws}, {config.w_dim}) or ({config.num_ws}, {config.w_dim})"
    if not path.is_file():
        raise UserError(f"--ws: no such file: {path}; give a .npy file of styles of shape {expected}")
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # damaged files raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"--ws: {path} is no .npy file of numbers, or is damaged ({reason})") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f"--ws: {path} is an archive of arrays; save one array with numpy.save")
    if array.dtype.kind != "f":
        raise UserError(f"--ws: {path} holds {array.dtype} where styles are floats")
    if array.shape == (config.num_ws, config.w_dim):
        array = array[None]
    if array.ndim != 3 or array.shape[1:] != (config.num_ws, config.w_dim) or not len(array):
        raise UserError(f"--ws: {path} has shape {array.shape}; this generator takes {expected}")
    if len(array) > MAX_IMAGES:
        raise UserError(f"--ws: {path} holds {len(array):,} images: draw at most {MAX_IMAGES:,} at a time")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"--ws: {path} holds values that are not finite")
    return array


def random_z(seed: int, z_dim: int) -> np.ndarray:
    """z [z_dim] of a seed, as NVIDIA's programs draw it."""
    return np.random.RandomState(seed).randn(1, z_dim)[0].astype(np.float32)


def job(args: Arguments, config: StyleGAN2Config) -> Job:
    """What the arguments ask for.

    Raises:
      UserError: arguments that are wrong, or that do not fit together or this generator.
    """
    if args.seeds is not None and args.ws is not None:
        raise UserError("--seeds and --ws exclude each other: give one of them")
    if args.ws is not None:
        if args.truncation_psi != 1 or args.truncation_cutoff is not None or args.class_idx is not None:
            raise UserError(
                "--truncation_psi, --truncation_cutoff and --class_idx act on seeds: leave them out with --ws"
            )
        ws = read_ws(args.ws, config)
        return Job([f"ws{i:04d}" for i in range(len(ws))], list(range(len(ws))), None, ws)
    if not math.isfinite(args.truncation_psi):
        raise UserError(f"--truncation_psi must be a number such as 0.7, not {args.truncation_psi}")
    if args.truncation_cutoff is not None and not 0 <= args.truncation_cutoff <= config.num_ws:
        raise UserError(f"--truncation_cutoff must lie between 0 and this generator's {config.num_ws} styles")
    if config.c_dim and (args.class_idx is None or not 0 <= args.class_idx < config.c_dim):
        raise UserError(f"this generator has classes: give --class_idx from 0 to {config.c_dim - 1}")
    if not config.c_dim and args.class_idx is not None:
        raise UserError("this generator has no classes: leave --class_idx out")
    seeds = parse_seeds("0-7" if args.seeds is None else args.seeds)
    z = np.stack([random_z(seed, config.z_dim) for seed in seeds])
    return Job([f"seed{seed:04d}" for seed in seeds], seeds, z, None)


@functools.partial(jax.jit, static_argnames=("config", "cutoff"))
def styles(config: StyleGAN2Config, params: Params, z: Array, c: Array | None, psi: Array, cutoff: int | None) -> Array:
    with jax.default_matmul_precision("highest"):
        return stylegan2.map_z(config, params, z, c, truncation_psi=psi, truncation_cutoff=cutoff)


@functools.partial(jax.jit, static_argnames=("config", "noise"))
def draw(config: StyleGAN2Config, params: Params, ws: Array, seeds: Array, noise: Noise) -> Array:
    """Images [N, H, W, C] of ws; random noise depends on an image's own seed alone."""
    keys = jax.vmap(jax.random.key)(seeds)
    with jax.default_matmul_precision("highest"):
        return synthesize_latents(config, params, {"W+": ws}, {}, noise=noise, noise_keys=keys).image


def batches(args: Arguments, generator: checkpoints.LoadedGenerator, job: Job) -> Iterator[np.ndarray]:
    """Images in [-1, 1], up to a batch at a time; the last batch is filled up, so that all run the same program."""
    config, params, _ = generator
    count = len(job.names)
    size = min(args.batch_size, count)
    label = None if args.class_idx is None else jnp.zeros((size, config.c_dim)).at[:, args.class_idx].set(1.0)
    for first in range(0, count, size):
        rows = np.minimum(np.arange(first, first + size), count - 1)
        if job.z is None:
            assert job.ws is not None
            ws = jnp.asarray(job.ws[rows])
        else:
            psi = jnp.float32(args.truncation_psi)
            ws = styles(config, params, jnp.asarray(job.z[rows]), label, psi, args.truncation_cutoff)
        made = draw(config, params, ws, jnp.asarray(np.asarray(job.seeds, np.uint32)[rows]), args.noise)
        made = np.asarray(made)[: count - first]
        if not np.isfinite(made).all():
            raise UserError("the generator gives values that are not finite: are these its own weights and styles?")
        yield np.clip(made, -1, 1)


class Grid:
    """All images on one sheet, row by row, reduced where the sheet would become larger than `GRID_SIDE`."""

    def __init__(self, count: int, resolution: int):
        self._columns = math.ceil(math.sqrt(count))
        self._tile = max(1, min(resolution, GRID_SIDE // self._columns))
        rows = math.ceil(count / self._columns)
        self.image = np.full((rows * self._tile, self._columns * self._tile, 3), 255, np.uint8)
        self._filled = 0

    def add(self, image: np.ndarray) -> None:
        """Sets the next tile: uint8 [R, R] or [R, R, 3]."""
        row, column = divmod(self._filled, self._columns)
        picture = Image.fromarray(image).convert("RGB")
        if picture.width != self._tile:
            picture = picture.resize((self._tile, self._tile), Image.Resampling.LANCZOS)
        top, left = row * self._tile, column * self._tile
        self.image[top : top + self._tile, left : left + self._tile] = np.asarray(picture)
        self._filled += 1


def main(args: Arguments) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {args.batch_size}")
    generator = demo.load_generator() if args.generator is None else checkpoints.load_generator(args.generator)
    config = generator.config
    if config.img_channels not in (1, 3):
        raise UserError(f"this generator makes images of {config.img_channels} channels; PNGs are drawn of 1 or 3")
    todo = job(args, config)
    folder = files.output_folder(args.output_path)
    grid = Grid(len(todo.names), config.img_resolution)
    names = iter(todo.names)
    shape = (len(todo.names), config.img_resolution, config.img_resolution, config.img_channels)
    # Batch by batch, so that memory does not grow with the number of images.
    with files.whole_file(folder / "images.npy") as array, tqdm.tqdm(total=shape[0], unit="image") as bar:
        np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for batch in batches(args, generator, todo):
            array.write(np.ascontiguousarray(batch, "<f4").tobytes())
            for image in images.to_uint8(batch):
                image = image[..., 0] if config.img_channels == 1 else image
                images.save_png(folder / f"{next(names)}.png", image)
                grid.add(image)
                bar.update()
    images.save_png(folder / "grid.png", grid.image)
    print(f"{shape[0]} images of {config.img_resolution} px in {folder}: {todo.names[0]}.png, …, grid.png, images.npy")


if __name__ == "__main__":
    cli.run(Arguments, main)
