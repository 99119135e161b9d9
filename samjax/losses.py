"""The terms of the inversion loss as pure functions, the prior on W+, and the learning rate schedule.

SAM (CVPR 2022), section 3.3, with the constants of the authors' public code.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from samjax.errors import UserError
from samjax.nets import stylegan2
from samjax.nets.stylegan2 import Params, StyleGAN2Config

_SLOPE = 5.0  # inverts the mapping network's last leaky ReLU (slope 0.2), after which w is close to normal


class Prior(NamedTuple):
    """A normal distribution over v = leaky_relu(w, 5).

    Attributes:
      mean_w: [w_dim] mean of w.
      mean_v: [w_dim] leaky_relu(mean_w, 5).
      whitening: [w_dim, w_dim] matrix U with U U^T the inverse covariance of v, so that the squared Mahalanobis
        distance of v is |(v - mean_v) U|^2.
    """

    mean_w: Array
    mean_v: Array
    whitening: Array


def fit_prior(ws: ArrayLike) -> Prior:
    """Fits the prior to sampled styles, in NumPy and float64.

    The covariance gets 1e-8 on its diagonal, as in the authors' code. With fewer samples than dimensions it is
    otherwise singular, and distances are huge. Inverting its triangular factor keeps them accurate where the inverse
    itself would lose digits, even when it is applied to differences in float32.

    Args:
      ws: [n, w_dim] with n >= 2.

    Raises:
      UserError: too few samples, or values that are not finite.
    """
    w = np.asarray(ws, np.float64)
    if w.ndim != 2 or len(w) < 2:
        raise UserError(f"the prior needs at least two styles of shape [n, w_dim], not {w.shape}")
    if not np.isfinite(w).all():
        raise UserError("the generator's styles are not finite: its mapping network may be damaged")
    leaky = lambda x: np.where(x >= 0, x, _SLOPE * x)  # noqa: E731
    covariance = np.cov(leaky(w).T).reshape(w.shape[1], w.shape[1]) + 1e-8 * np.eye(w.shape[1])
    whitening = np.linalg.inv(np.linalg.cholesky(covariance)).T
    mean_w = w.mean(0)
    return Prior(*(jnp.asarray(x, jnp.float32) for x in (mean_w, leaky(mean_w), whitening)))


@functools.partial(jax.jit, static_argnames=("config", "samples", "class_idx"))
def _sample_ws(config: StyleGAN2Config, params: Params, key: Array, samples: int, class_idx: int | None) -> Array:
    with jax.default_matmul_precision("highest"):
        z = jax.random.normal(key, (samples, config.z_dim))
        labels = stylegan2.draw_labels(config, samples, class_idx, key=jax.random.fold_in(key, 1))
        return stylegan2.map_z(config, params, z, labels)[:, 0]


def generator_prior(
    config: StyleGAN2Config, params: Params, *, key: Array, samples: int = 5000, class_idx: int | None = None
) -> Prior:
    """The prior of a generator, from `samples` mapped z (5,000 in the authors' code).

    Args:
      config: sizes of the generator.
      params: its parameters.
      key: random key.
      samples: number of mapped z.
      class_idx: class of all z, for a conditional generator; classes drawn uniformly if None.

    Raises:
      UserError: the mapping network gives values that are not finite.
    """
    return fit_prior(_sample_ws(config, params, key, samples, class_idx))


# --- terms, one value for each item ---


def prior_distance(prior: Prior, ws: Array) -> Array:
    """Squared Mahalanobis distance of leaky_relu(w, 5), summed over the styles; [N, num_ws, w_dim] to [N]."""
    difference = jax.nn.leaky_relu(ws, _SLOPE) - prior.mean_v
    return jnp.sum(jnp.square(difference @ prior.whitening), axis=(1, 2))


def delta(ws: Array) -> Array:
    """Sum over i >= 1 of |w_i - w_0|; [N, num_ws, w_dim] to [N]. Its gradient at w_i = w_0 is zero, as in PyTorch."""
    squares = jnp.sum(jnp.square(ws[:, 1:] - ws[:, :1]), axis=-1)
    apart = squares > 0  # the square root's gradient is infinite at 0, and times 0 would be NaN
    return jnp.sum(jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0), axis=-1)


def offset_distance(latents: Mapping[str, Array], start: Mapping[str, Array]) -> Array | float:
    """Sum over the F layers of the mean squared distance from where they started; [N], or 0 without F layers."""
    names = [name for name in latents if name != "W+"]
    return sum((mean_squares(latents[name], start[name]) for name in names), start=0.0)


def mean_squares(x: Array, y: Array) -> Array:
    """Mean squared difference of each item; [N, ...] to [N]."""
    return jnp.mean(jnp.square(x - y), axis=tuple(range(1, x.ndim)))


# --- images ---


def reduce_area(images: Array, size: int) -> Array:
    """Averages square blocks of pixels down to `size`; images of that size or smaller are unchanged; [N, R, R, C]."""
    n, resolution, _, channels = images.shape
    if resolution <= size:
        return images
    factor, rest = divmod(resolution, size)
    if rest:
        raise ValueError(f"{resolution} px is not a multiple of {size} px")
    return jnp.mean(images.reshape(n, size, factor, size, factor, channels), axis=(2, 4))


def letterbox(images: Array, size: int, value: float = 0.0) -> Array:
    """Pads images to a square with `value`, equally on both ends; [N, h, w, C] to [N, size, size, C]."""
    height, width = images.shape[1:3]
    top, left = (size - height) // 2, (size - width) // 2
    around = ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0))
    return jnp.pad(images, around, constant_values=value)


def crop_letterbox(images: Array, height: int, width: int) -> Array:
    """Removes the rows (or columns) that `letterbox` adds; [N, R, R, C] to [N, height, width, C]."""
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return images[:, top : top + height, left : left + width]


def full_size(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """A generator's images at their own size, without the rows or columns that letterboxing added.

    Args:
      images: [..., R, R, C].
      height: height of the target.
      width: width of the target.

    Returns:
      [..., H, W, C] with the proportions of the target; the longer side is R, or the target's if R is smaller.

    >>> full_size(np.zeros((512, 512, 3)), 192, 256).shape
    (384, 512, 3)
    """
    size = images.shape[-2]
    factor = max(size // max(height, width), 1)
    rows, columns = height * factor, width * factor
    top, left = (size - rows) // 2, (size - columns) // 2
    return images[..., top : top + rows, left : left + columns, :]


def comparable(images: Array, size: int, height: int, width: int) -> Array:
    """A generator's images as the loss compares them: reduced to `size`, clipped to [-1, 1], cropped to the target."""
    return crop_letterbox(jnp.clip(reduce_area(images, size), -1.0, 1.0), height, width)


# --- schedule ---


def learning_rate(step: Array, num_steps: Array, lr: Array, rampdown: Array, rampup: Array) -> Array:
    """The learning rate of a step, as in StyleGAN2's projector.

    With t = step / num_steps it rises linearly while t < rampup, and falls as a cosine in the last `rampdown`.

    Args:
      step: counted from 0.
      num_steps: number of steps in total.
      lr: highest learning rate.
      rampdown: fraction of the run in which it falls; 0 for none.
      rampup: fraction of the run in which it rises; 0 for none.
    """
    t = step.astype(jnp.float32) / num_steps.astype(jnp.float32)
    share = lambda x, length: jnp.minimum(1.0, x / jnp.maximum(length, 1e-8))  # noqa: E731
    fall = 0.5 - 0.5 * jnp.cos(jnp.pi * share(1.0 - t, rampdown))
    return lr * fall * jnp.where(rampup > 0, share(t, rampup), 1.0)
