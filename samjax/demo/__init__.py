"""The embedded domain, "cars in scenes": its renderer, networks, sample images and edit directions.

Everything here was made by this repository's own scripts: `experiments/train_demo_generator.py`, `train_encoder.py` and
`train_invertibility.py` (weights), `experiments/make_demo_assets.py` (samples and directions).
"""

from __future__ import annotations

from importlib.resources import files as _files
from pathlib import Path

import jax
from jax import Array

from samjax.demo import scenes
from samjax.io import checkpoints

FOLDER = Path(str(_files("samjax.demo")))
GENERATOR = FOLDER / "generator.safetensors"
ENCODER = FOLDER / "encoder.safetensors"
PREDICTOR = FOLDER / "predictor.safetensors"
SAMPLES = FOLDER / "samples"
EDITS = FOLDER / "edits"


def load_generator() -> checkpoints.LoadedGenerator:
    """The demo's StyleGAN2: 256 px, w of 128 entries, z the factors of `scenes.FACTORS`."""
    return checkpoints.load_generator(GENERATOR)


def hard_scenes(count: int, *, key: Array, resolution: int = 256) -> scenes.Scene:
    """`count` hard scenes: images [N, R, R, 3] in [-1, 1] and labels [N, R, R].

    A scene depends on `key` and its own number alone: more of them leave the first ones as they are.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jax.numpy.arange(count))
    draw = lambda k: scenes.render_hard(  # noqa: E731
        jax.random.normal(jax.random.fold_in(k, 0), (scenes.NUM_FACTORS,)),
        key=jax.random.fold_in(k, 1),
        resolution=resolution,
    )
    return jax.jit(jax.vmap(draw))(keys)
