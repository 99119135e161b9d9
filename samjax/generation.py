"""Drawing images of a generator, from seeds or from styles.

z = np.stack([random_z(seed, config.z_dim) for seed in parse_seeds("0-7")])
images = draw(config, params, styles(config, params, z, truncation_psi=0.7))
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike
from PIL import Image

from samjax import batching
from samjax.errors import UserError
from samjax.io.styles import read as read_styles
from samjax.latents import synthesize_latents
from samjax.nets import stylegan2
from samjax.nets.stylegan2 import Noise, Params, StyleGAN2Config

MAX_IMAGES = 10_000
"""Limit on the number of images of one call of `parse_seeds`; files of codes have the same limit."""

GRID_SIDE = 4096
"""Largest side of a `Grid` in pixels."""


# --- seeds ---


def parse_seeds(text: str) -> list[int]:
    """Parses seeds and ranges of seeds, such as "0-7,12"; repeated seeds count once.

    Raises:
      UserError: another syntax, a range that runs backwards, a seed above 2^32 - 1, or too many seeds.

    >>> parse_seeds("0-3,12,2")
    [0, 1, 2, 3, 12]
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


def random_z(seed: int, z_dim: int) -> np.ndarray:
    """Draws z [z_dim] of a seed as NVIDIA's programs do."""
    return np.random.RandomState(seed).randn(1, z_dim)[0].astype(np.float32)


# --- styles ---


def read_ws(path: Path, config: StyleGAN2Config) -> np.ndarray:
    """Reads the codes in a file, in W or W+; see `samjax.io.styles.read`.

    Args:
      path: path of the file.
      config: sizes of the generator.

    Returns:
      [N, num_ws, w_dim] float32.

    Raises:
      UserError: the file is missing or damaged, holds no codes of this generator, or values that are not finite.
    """
    return np.stack(list(read_styles(path, config.num_ws, config.w_dim).values()))


def seed_classes(config: StyleGAN2Config, seeds: ArrayLike, class_idx: int | None) -> np.ndarray | None:
    """Classes [N] of seeds: the one given, or those of all classes in turn if None; None without classes."""
    seeds = np.asarray(seeds)
    if not config.c_dim:
        return None
    return seeds % config.c_dim if class_idx is None else np.full(len(seeds), class_idx)


@functools.partial(jax.jit, static_argnames=("config", "cutoff"))
def _styles(
    config: StyleGAN2Config, params: Params, z: Array, c: Array | None, psi: Array, cutoff: int | None
) -> Array:
    with jax.default_matmul_precision("highest"):
        return stylegan2.map_z(config, params, z, c, truncation_psi=psi, truncation_cutoff=cutoff)


def styles(
    config: StyleGAN2Config,
    params: Params,
    z: ArrayLike,
    *,
    truncation_psi: float = 1.0,
    truncation_cutoff: int | None = None,
    classes: ArrayLike | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Maps z to styles.

    Args:
      config: sizes of the generator.
      params: its parameters.
      z: [N, z_dim].
      truncation_psi: interpolates between the mean style (0) and the style of z (1).
      truncation_cutoff: number of leading styles to truncate; all if None.
      classes: [N] classes, for a conditional generator; see `seed_classes`.
      batch_size: z in one pass; all if None.

    Returns:
      [N, num_ws, w_dim] float32.
    """
    z = np.asarray(z, np.float32)
    if not len(z):
        return np.zeros((0, config.num_ws, config.w_dim), np.float32)
    labels = None if classes is None else np.eye(config.c_dim, dtype=np.float32)[np.asarray(classes)]
    psi = jnp.float32(truncation_psi)
    return batching.map_batches(
        lambda batch: _styles(config, params, *batch, psi, truncation_cutoff), (z, labels), batch_size or len(z)
    )


# --- images ---


@functools.partial(jax.jit, static_argnames=("config", "noise"))
def _draw(config: StyleGAN2Config, params: Params, ws: Array, seeds: Array, noise: Noise) -> Array:
    keys = jax.vmap(jax.random.key)(seeds)
    with jax.default_matmul_precision("highest"):
        return synthesize_latents(config, params, {"W+": ws}, {}, noise=noise, noise_keys=keys).image


def draw(
    config: StyleGAN2Config,
    params: Params,
    ws: ArrayLike,
    *,
    seeds: ArrayLike | None = None,
    noise: Noise = "const",
    batch_size: int = 4,
) -> np.ndarray:
    """Images of styles.

    Args:
      config: sizes of the generator.
      params: its parameters.
      ws: [N, num_ws, w_dim].
      seeds: [N] integers below 2^32 for random noise, which depends on an image's own seed only; 0 to N - 1 if None.
      noise: "const", the stored noise; "none"; or "random".
      batch_size: images in one pass.

    Returns:
      [N, R, R, C] float32, clipped to [-1, 1].

    Raises:
      UserError: the generator produces values that are not finite.
    """
    ws = np.asarray(ws, np.float32)
    seeds = np.asarray(np.arange(len(ws)) if seeds is None else seeds, np.uint32)
    made = batching.map_batches(
        lambda batch: _draw(config, params, *map(jnp.asarray, batch), noise), (ws, seeds), batch_size
    )
    if not np.isfinite(made).all():
        raise UserError("the generator produces values that are not finite: do its weights and the styles match?")
    return np.clip(made, -1, 1)


def draw_batches(
    config: StyleGAN2Config,
    params: Params,
    seeds: ArrayLike,
    *,
    ws: np.ndarray | None = None,
    truncation_psi: float = 1.0,
    truncation_cutoff: int | None = None,
    class_idx: int | None = None,
    noise: Noise = "const",
    batch_size: int = 4,
) -> Iterator[np.ndarray]:
    """Images of seeds or styles, one batch at a time, so that memory does not grow with their number.

    Args:
      config: sizes of the generator.
      params: its parameters.
      seeds: [N] integers below 2^32, from which z and random noise are drawn.
      ws: [N, num_ws, w_dim], instead of the styles of z.
      truncation_psi: see `styles`.
      truncation_cutoff: see `styles`.
      class_idx: class of all images, for a conditional generator; the class of a seed is its remainder by the number
        of classes if None.
      noise: see `draw`.
      batch_size: images in one pass.

    Yields:
      [batch_size, R, R, C] float32 in [-1, 1]; the last batch may have fewer.

    Raises:
      UserError: see `draw`.
    """
    seeds = np.asarray(seeds, np.uint32)
    size = min(batch_size, len(seeds))
    for index in batching.rows(len(seeds), size):
        if ws is None:
            z = np.stack([random_z(int(seed), config.z_dim) for seed in seeds[index]])
            chosen = styles(
                config, params, z, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff,
                classes=seed_classes(config, seeds[index], class_idx),
            )  # fmt: skip
        else:
            chosen = ws[index]
        made = draw(config, params, chosen, seeds=seeds[index], noise=noise, batch_size=size)
        yield made[: len(seeds) - int(index[0])]


class Grid:
    """All images on one sheet, row by row, reduced if the sheet would become larger than `GRID_SIDE`."""

    def __init__(self, count: int, resolution: int):
        self._columns = math.ceil(math.sqrt(count))
        self._tile = max(1, min(resolution, GRID_SIDE // self._columns))
        rows = math.ceil(count / self._columns)
        self.image = np.full((rows * self._tile, self._columns * self._tile, 3), 255, np.uint8)
        self._filled = 0

    def add(self, image: np.ndarray) -> None:
        """Sets the next tile: uint8 [R, R], [R, R, 3] or [R, R, 4], which is put on white."""
        row, column = divmod(self._filled, self._columns)
        tile = Image.fromarray(image)
        if tile.mode == "RGBA":
            tile = Image.alpha_composite(Image.new("RGBA", tile.size, "white"), tile)
        tile = tile.convert("RGB")
        if tile.width != self._tile:
            tile = tile.resize((self._tile, self._tile), Image.Resampling.LANCZOS)
        top, left = row * self._tile, column * self._tile
        self.image[top : top + self._tile, left : left + self._tile] = np.asarray(tile)
        self._filled += 1
