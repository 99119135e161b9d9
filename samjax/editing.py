"""Edits of inverted images: a direction moves W+, while segments in the other layers keep their features.

SAM (CVPR 2022), section 3.4. A recording pass takes the block outputs at the F layers from the unedited latents. An
edited pass moves W+ along the direction, adds no offsets, and at each F layer puts the recorded output back where
that layer's mask is.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from samjax import batching
from samjax.latents import Latents, Masks, by_resolution, draw
from samjax.nets import stylegan2
from samjax.nets.stylegan2 import Noise, Params, StyleGAN2Config


@functools.partial(jax.jit, static_argnames=("config", "noise", "precision"))
def apply(
    config: StyleGAN2Config,
    params: Params,
    ws: Array,
    features: dict[int, Array],
    masks: Masks,
    directions: Array,
    strengths: Array,
    *,
    noise: Noise = "const",
    precision: str = "highest",
) -> Array:
    """The edited pass from one set of latents: an image for each of B pairs of a direction and a strength.

    Args:
      config: sizes of the generator.
      params: its parameters.
      ws: [1, num_ws, w_dim], unedited.
      features: block outputs of the unedited latents, as `samjax.latents.draw` returns them, [1, r, r, C] each.
      masks: {"F4": [1, 16, 16, 1], ...}.
      directions: [B, num_ws, w_dim].
      strengths: [B] multiples of the directions.
      noise: "const" or "none".
      precision: precision of matrix products and convolutions.

    Returns:
      [B, R, R, 3], in [-1, 1] up to overshoot.
    """
    ws = ws + directions * strengths[:, None, None]
    with jax.default_matmul_precision(precision):
        return stylegan2.synthesize(
            config, params, ws, noise=noise, features=features, masks=by_resolution(masks)
        ).image


def edit(
    config: StyleGAN2Config,
    params: Params,
    latents: Latents,
    masks: Masks,
    directions: ArrayLike,
    strengths: ArrayLike,
    *,
    noise: Noise = "const",
    precision: str = "highest",
    batch_size: int = 4,
) -> np.ndarray:
    """Edits one image along several directions, at several strengths.

    All passes have the same batch size, so that another direction compiles nothing.

    Args:
      config: sizes of the generator.
      params: its parameters.
      latents: latents of one image, {"W+": [1, num_ws, w_dim], "F4": [1, 16, 16, C], ...}.
      masks: {"F4": [1, 16, 16, 1], ...}.
      directions: [D, num_ws, w_dim].
      strengths: [S] multiples of a direction; 0 gives the reconstruction, except at the soft edges of masks.
      noise: "const", the stored noise, or "none".
      precision: precision of matrix products and convolutions; "highest" is full float32.
      batch_size: edited images in one pass.

    Returns:
      [D, S, R, R, 3] float32, in [-1, 1] up to overshoot.

    Raises:
      ValueError: latents of more than one image, or directions that do not fit the generator.
    """
    directions, strengths = np.asarray(directions, np.float32), np.asarray(strengths, np.float32)
    if latents["W+"].shape[0] != 1:
        raise ValueError(f"edit takes the latents of one image, not of {latents['W+'].shape[0]}")
    if directions.shape[1:] != (config.num_ws, config.w_dim):
        raise ValueError(f"directions have shape {directions.shape}, expected [D, {config.num_ws}, {config.w_dim}]")
    count = len(directions) * len(strengths)
    if not count:
        size = config.img_resolution
        return np.zeros((len(directions), len(strengths), size, size, config.img_channels), np.float32)
    ws = jnp.asarray(latents["W+"])
    masks = {name: jnp.asarray(mask) for name, mask in masks.items()}
    _, features = draw(config, params, dict(latents), masks, noise=noise, precision=precision)

    def apply_pairs(pairs: tuple[np.ndarray, np.ndarray]) -> Array:
        return apply(config, params, ws, features, masks, *pairs, noise=noise, precision=precision)

    pairs = (np.repeat(directions, len(strengths), axis=0), np.tile(strengths, len(directions)))
    images = batching.map_batches(apply_pairs, pairs, batch_size)
    return images.reshape(len(directions), len(strengths), *images.shape[1:])
