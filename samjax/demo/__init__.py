"""The embedded domain, "cars in scenes": its renderer, networks, sample images and directions.

Everything here was made by programs of this repository: `experiments/demo/train_generator.py`, `train_encoder.py`,
`train_offsets.py` and `train_invertibility.py` made the networks, `experiments/demo/make_assets.py` the samples and
directions.
"""

from __future__ import annotations

import functools
from importlib.resources import files as _files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import Array

from samjax.demo import scenes
from samjax.io import checkpoints, files, images

FOLDER = Path(str(_files("samjax.demo")))
GENERATOR = FOLDER / "generator.safetensors"
ENCODER = FOLDER / "encoder.safetensors"
OFFSETS = FOLDER / "offsets.safetensors"
PREDICTOR = FOLDER / "predictor.safetensors"
SAMPLES = FOLDER / "samples"
EDITS = FOLDER / "edits"
SEGMENT_NAMES = dict(enumerate((*scenes.LABELS, "in front", "backdrop")))
"""What the labels of the samples' segments show."""


def load_generator() -> checkpoints.LoadedNetwork:
    """The demo's StyleGAN2: 256 px images, w of 128 entries; its z are the factors of `scenes.FACTORS`."""
    return checkpoints.load_network(GENERATOR, "generator", trusted=True)


def hard_scenes(count: int, *, key: Array, resolution: int = 256) -> scenes.Scene:
    """Draws hard scenes, each of which depends on the key and its own number only.

    Args:
      count: number of scenes N.
      key: random key.
      resolution: image size R.

    Returns:
      Images [N, R, R, 3] in [-1, 1] and labels [N, R, R].
    """
    drawn = [_hard_scene(jax.random.fold_in(key, i), resolution) for i in range(count)]
    return jax.tree.map(lambda *each: jnp.stack(each), *drawn)


@functools.partial(jax.jit, static_argnames="resolution")
def _hard_scene(key: Array, resolution: int = 256) -> scenes.Scene:
    z = jax.random.normal(jax.random.fold_in(key, 0), (scenes.NUM_FACTORS,))
    return scenes.render_hard(z, key=jax.random.fold_in(key, 1), resolution=resolution)


@jax.jit
def _draw(key: Array, number: Array, easy: Array) -> Array:
    """Scene `number` of a key, [256, 256, 3] in [-1, 1]: of the domain if `easy`, otherwise hard."""
    key = jax.random.fold_in(key, number)
    z = jax.random.normal(jax.random.fold_in(key, 0), (scenes.NUM_FACTORS,))
    return jnp.where(easy, scenes.render(z).image, _hard_scene(key).image)


def draw_scenes(directory: Path, count: int, seed: int = 30, easy_every: int = 4) -> list[Path]:
    """Writes images of scenes to a directory: training images for the demo's encoder and predictor.

    A scene depends on the seed and its own number only. Files that are already there are kept.

    Args:
      directory: directory of the images, which is created if it is missing.
      count: number of scenes.
      seed: which scenes. Seeds 1 and 2 are those of evaluation and tuning, seed 20 those of the samples.
      easy_every: every n-th scene is one that the generator can draw, the others are hard; 0 for hard scenes only.

    Returns:
      The files, in order.

    Raises:
      UserError: the images cannot be written.
    """
    files.output_directory(directory)
    key = jax.random.key(seed)
    paths = [directory / f"scene{seed}_{i:05d}.png" for i in range(count)]
    for i, path in enumerate(tqdm.tqdm(paths, unit="scene")):
        if not path.exists():
            easy = easy_every > 0 and i % easy_every == 0
            images.save_png(path, np.asarray(_draw(key, i, easy)))
    return paths
