"""A tiny generator and perceptual network for tests, filled without compiling anything."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from samjax.nets import lpips, stylegan2
from samjax.nets.stylegan2 import StyleGAN2Config

TINY = StyleGAN2Config(img_resolution=32, z_dim=8, w_dim=8, channel_base=256, channel_max=8, mapping_layers=2)


def _fill(shapes: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def one(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [part.key for part in path]
        if names[-1] == "noise_strength":
            return np.full(shape.shape, 0.1, np.float32)  # noise that counts
        if names[-1] in ("bias", "w_avg"):
            return np.full(shape.shape, 1.0 if names[-2] == "affine" else 0.0, np.float32)
        values = rng.standard_normal(shape.shape).astype(np.float32)
        if names[0] == "mapping":
            return 100 * values  # learning-rate multiplier 0.01
        if names[0] == "backbone":
            return values * np.float32(np.sqrt(2 / np.prod(shape.shape[:-1])))
        return np.abs(values) if names[0] == "heads" else values

    return jax.tree_util.tree_map_with_path(one, shapes)


def tiny_generator(config: StyleGAN2Config = TINY) -> dict[str, Any]:
    """Parameters as training starts from, with noise."""
    return _fill(jax.eval_shape(lambda: stylegan2.init(config, key=jax.random.key(0))), 0)


def random_lpips(net: lpips.Net) -> dict[str, Any]:
    """An LPIPS network with random weights."""
    return _fill(jax.eval_shape(lambda: lpips.init(net, key=jax.random.key(0))), 1)
