"""Edit directions in W for any generator: from its weights, from its styles, or from samples with scores.

- `sefa`: Shen and Zhou, "Closed-Form Factorization of Latent Semantics in GANs", CVPR 2021.
- `ganspace`: Härkönen et al., "GANSpace: Discovering Interpretable GAN Controls", NeurIPS 2020.
- `regression` and `boundary`: the normal of a linear fit to scores, or of the boundary between two classes (Shen et
  al., "Interpreting the Latent Space of GANs for Semantic Face Editing", CVPR 2020).

Directions are scaled by the spread of the generator's own styles along them, so that a strength of 1 is one standard
deviation whatever found them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from samjax.nets import stylegan2
from samjax.nets.stylegan2 import Params, StyleGAN2Config


class Directions(NamedTuple):
    """What a method found, the strongest first.

    Attributes:
      vectors: [K, w_dim]; one standard deviation of the generator's styles along each.
      values: [K] by which they are ordered: the method's own measure of strength.
    """

    vectors: np.ndarray
    values: np.ndarray


class Styles(NamedTuple):
    """Of many mapped z: `mean` [w_dim], `covariance` [w_dim, w_dim], both float64; `ws` [N, w_dim] themselves."""

    mean: np.ndarray
    covariance: np.ndarray
    ws: np.ndarray

    def spread(self, vectors: np.ndarray) -> np.ndarray:
        """Standard deviation [K] along unit vectors [K, w_dim]."""
        return np.sqrt(np.einsum("ki,ij,kj->k", vectors, self.covariance, vectors))


def sample_styles(
    config: StyleGAN2Config,
    params: Params,
    *,
    key: Array,
    samples: int = 20_000,
    c: ArrayLike | None = None,
    batch_size: int = 5_000,
) -> Styles:
    """Maps many z to W.

    Args:
      config: sizes of the generator.
      params: its parameters.
      key: random key of the z.
      samples: how many.
      c: [c_dim] label of all of them, for conditional generators; zeros if None.
      batch_size: in one pass.
    """
    parts = []
    for first in range(0, samples, batch_size):
        count = min(batch_size, samples - first)
        z = jax.random.normal(jax.random.fold_in(key, first), (count, config.z_dim))
        label = jnp.zeros(config.c_dim) if c is None else jnp.asarray(c, jnp.float32)
        labels = jnp.broadcast_to(label, (count, config.c_dim)) if config.c_dim else None
        with jax.default_matmul_precision("highest"):
            parts.append(np.asarray(stylegan2.map_z(config, params, z, labels)[:, 0]))
    ws = np.concatenate(parts)
    exact = ws.astype(np.float64)
    return Styles(exact.mean(0), np.cov(exact, rowvar=False), ws)


def affine_weights(config: StyleGAN2Config, params: Params) -> list[np.ndarray]:
    """What each of the `num_ws` styles is multiplied with in the convolution it modulates: [w_dim, channels] each.

    ToRGB layers do not count, but for the last style, which has nothing else.
    """
    blocks: list[Any] = [params["synthesis"][f"b{resolution}"] for resolution in config.block_resolutions]
    layers = [block[name] for block in blocks for name in ("conv0", "conv1") if name in block]
    return [np.asarray(layer["affine"]["weight"], np.float64) for layer in (*layers, blocks[-1]["torgb"])]


def sefa(
    config: StyleGAN2Config, params: Params, styles: Styles, *, layers: tuple[int, int] | None = None, count: int = 8
) -> Directions:
    """The directions that move the modulation of a range of layers most.

    They are the eigenvectors of A Aᵀ, A being the affine weights of these layers side by side, each column of unit
    length, as in SeFa's own code.

    Args:
      config: sizes of the generator.
      params: its parameters.
      styles: of `sample_styles`, for the scale.
      layers: first and last style (not included); None for all.
      count: how many directions.

    Raises:
      ValueError: a range that the generator does not have.
    """
    first, last = check_layers(config, layers)
    a = np.concatenate(affine_weights(config, params)[first:last], axis=1)
    a /= np.maximum(np.linalg.norm(a, axis=0, keepdims=True), 1e-12)
    return _strongest(a @ a.T, styles, count)


def ganspace(styles: Styles, *, count: int = 8) -> Directions:
    """Principal components of the styles.

    Args:
      styles: of `sample_styles`.
      count: how many directions.
    """
    return _strongest(styles.covariance, styles, count)


def _strongest(matrix: np.ndarray, styles: Styles, count: int) -> Directions:
    values, vectors = np.linalg.eigh(matrix)
    order = np.argsort(values)[::-1][:count]
    chosen = vectors[:, order].T
    # Eigenvectors leave their sign open.
    chosen *= np.sign(np.take_along_axis(chosen, np.abs(chosen).argmax(1)[:, None], axis=1))
    return scaled(chosen, values[order], styles)


def scaled(vectors: np.ndarray, values: np.ndarray, styles: Styles) -> Directions:
    """Directions [K, w_dim] of any length, brought to one standard deviation of the styles."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return Directions((units * styles.spread(units)[:, None]).astype(np.float32), np.asarray(values))


def regression(ws: ArrayLike, scores: ArrayLike, styles: Styles, *, ridge: float = 1e-3) -> Directions:
    """The direction along which a score rises: the normal of its linear fit.

    Args:
      ws: [N, w_dim].
      scores: [N] numbers.
      styles: of `sample_styles`, for the scale.
      ridge: added to the covariance of `ws`, as a share of its mean variance.

    Returns:
      One direction; its value is the correlation of the fit with the scores.

    Raises:
      ValueError: fewer than two samples, or scores that are all the same or not finite.
    """
    x, y = _samples(ws, scores)
    covariance = x.T @ x / len(x)
    normal = np.linalg.solve(covariance + ridge * np.trace(covariance) / len(covariance) * np.eye(x.shape[1]), x.T @ y)
    return scaled(normal[None], np.array([np.corrcoef(x @ normal, y)[0, 1]]), styles)


def boundary(ws: ArrayLike, labels: ArrayLike, styles: Styles, *, ridge: float = 1e-3, steps: int = 50) -> Directions:
    """The normal of the boundary between two classes, by logistic regression (Newton's method).

    Args:
      ws: [N, w_dim].
      labels: [N], 0 or 1.
      styles: of `sample_styles`, for the scale.
      ridge: weight of the squared normal, for `ws` of unit variance.
      steps: Newton steps at most.

    Returns:
      One direction; its value is the share of the samples on their own side.

    Raises:
      ValueError: labels other than 0 and 1, or all the same.
    """
    classes = np.asarray(labels, np.float64)
    if not np.isin(classes, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    x, _ = _samples(ws, classes)
    deviation = np.maximum(x.std(0), 1e-12)
    design = np.concatenate([x / deviation, np.ones((len(x), 1))], axis=1)
    penalty = ridge * len(x) * np.diag([*np.ones(x.shape[1]), 0.0])
    weights = np.zeros(design.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        hessian = (design * (p * (1 - p))[:, None]).T @ design + penalty + 1e-9 * np.eye(len(weights))
        change = np.linalg.solve(hessian, design.T @ (p - classes) + penalty @ weights)
        weights -= change
        if np.abs(change).max() < 1e-8 * np.abs(weights).max():
            break
    right = np.mean((design @ weights > 0) == (classes > 0.5))
    return scaled((weights[:-1] / deviation)[None], np.array([right]), styles)


def _samples(ws: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both without their means, float64."""
    x, y = np.asarray(ws, np.float64), np.asarray(scores, np.float64)
    if x.ndim != 2 or y.shape != (len(x),) or len(x) < 2:
        raise ValueError(f"styles {x.shape} and scores {y.shape} do not fit: [N, w_dim] and [N], N at least 2")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("styles or scores are not finite")
    if np.ptp(y) == 0:
        raise ValueError("all scores are the same: there is no direction along which they change")
    return x - x.mean(0), y - y.mean()


def check_layers(config: StyleGAN2Config, layers: tuple[int, int] | None) -> tuple[int, int]:
    """The range of styles, all of them for None.

    Raises:
      ValueError: the generator does not have it.
    """
    first, last = layers or (0, config.num_ws)
    if not 0 <= first < last <= config.num_ws:
        raise ValueError(f"styles {first} to {last}: this generator has {config.num_ws}, from 0")
    return first, last


def spread_over(vector: ArrayLike, config: StyleGAN2Config, layers: tuple[int, int] | None = None) -> np.ndarray:
    """A direction [w_dim] as an edit takes it, [num_ws, w_dim]: in a range of styles, nothing elsewhere.

    Raises:
      ValueError: a range that the generator does not have.
    """
    first, last = check_layers(config, layers)
    direction = np.zeros((config.num_ws, config.w_dim), np.float32)
    direction[first:last] = np.asarray(vector, np.float32)
    return direction
