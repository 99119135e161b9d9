"""Finding directions in W, for any generator: from its weights, from its styles, or from samples with scores.

- `sefa`: Shen and Zhou, "Closed-Form Factorization of Latent Semantics in GANs", CVPR 2021.
- `ganspace`: Härkönen et al., "GANSpace: Discovering Interpretable GAN Controls", NeurIPS 2020.
- `regression` and `boundary`: the normal of a linear fit to scores, or of the boundary between two classes (Shen et
  al., "Interpreting the Latent Space of GANs for Semantic Face Editing", CVPR 2020).

Directions are scaled by the spread of the generator's own styles along them: a strength of 1 is one standard deviation,
whatever the method.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
import tqdm
from jax import Array
from numpy.typing import ArrayLike

from samjax import generation
from samjax.errors import UserError
from samjax.io import images
from samjax.nets import lpips, stylegan2
from samjax.nets.stylegan2 import Params, StyleGAN2Config

Scorer = Callable[[np.ndarray], Any]
"""Maps images, uint8 [N, R, R, 3], to N numbers."""

TRIED_STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Strengths between which `typical_strength` interpolates."""


class Directions(NamedTuple):
    """The directions that a method found, the strongest first.

    Attributes:
      vectors: [K, w_dim]; each as long as one standard deviation of the generator's styles along it.
      values: [K] the method's own measure of strength, by which they are ordered.
    """

    vectors: np.ndarray
    values: np.ndarray


class Styles(NamedTuple):
    """Styles of many z, and their distribution.

    Attributes:
      mean: [w_dim] float64.
      covariance: [w_dim, w_dim] float64.
      ws: [N, w_dim] the styles.
    """

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
    class_idx: int | None = None,
    batch_size: int = 5_000,
) -> Styles:
    """Maps many z to W.

    Args:
      config: sizes of the generator.
      params: its parameters.
      key: random key of the z.
      samples: number of z.
      class_idx: class of all z, for a conditional generator; classes drawn uniformly if None.
      batch_size: z in one pass.
    """
    parts = []
    for first in range(0, samples, batch_size):
        count = min(batch_size, samples - first)
        own = jax.random.fold_in(key, first)
        z = jax.random.normal(own, (count, config.z_dim))
        labels = stylegan2.draw_labels(config, count, class_idx, key=jax.random.fold_in(own, 1))
        with jax.default_matmul_precision("highest"):
            parts.append(np.asarray(stylegan2.map_z(config, params, z, labels)[:, 0]))
    ws = np.concatenate(parts)
    exact = ws.astype(np.float64)
    return Styles(exact.mean(0), np.cov(exact, rowvar=False), ws)


def affine_weights(config: StyleGAN2Config, params: Params) -> list[np.ndarray]:
    """The weights [w_dim, channels] by which each of the `num_ws` styles modulates its convolution.

    ToRGB layers are left out, except for the last style, which has no other layer.
    """
    blocks: list[Any] = [params["synthesis"][f"b{resolution}"] for resolution in config.block_resolutions]
    layers = [block[name] for block in blocks for name in ("conv0", "conv1") if name in block]
    return [np.asarray(layer["affine"]["weight"], np.float64) for layer in (*layers, blocks[-1]["torgb"])]


def sefa(
    config: StyleGAN2Config, params: Params, styles: Styles, *, layers: tuple[int, int] | None = None, count: int = 8
) -> Directions:
    """The directions that move the modulation of a range of layers most.

    They are the eigenvectors of A Aᵀ, where A holds the affine weights of these layers side by side, with columns of
    unit length, as in SeFa's own code.

    Args:
      config: sizes of the generator.
      params: its parameters.
      styles: as returned by `sample_styles`, for the scale.
      layers: (first, end) of the range of styles, the end excluded; all if None.
      count: number of directions.

    Raises:
      ValueError: the range is outside the generator's styles.
    """
    first, last = check_layers(config, layers)
    a = np.concatenate(affine_weights(config, params)[first:last], axis=1)
    a /= np.maximum(np.linalg.norm(a, axis=0, keepdims=True), 1e-12)
    return _strongest(a @ a.T, styles, count)


def ganspace(styles: Styles, *, count: int = 8) -> Directions:
    """Principal components of the styles.

    Args:
      styles: as returned by `sample_styles`.
      count: number of directions.
    """
    return _strongest(styles.covariance, styles, count)


def _strongest(matrix: np.ndarray, styles: Styles, count: int) -> Directions:
    values, vectors = np.linalg.eigh(matrix)
    order = np.argsort(values)[::-1][:count]
    chosen = vectors[:, order].T
    # The sign of an eigenvector is arbitrary: make its largest entry positive.
    chosen *= np.sign(np.take_along_axis(chosen, np.abs(chosen).argmax(1)[:, None], axis=1))
    return scaled(chosen, values[order], styles)


def scaled(vectors: np.ndarray, values: np.ndarray, styles: Styles) -> Directions:
    """Scales directions [K, w_dim] of any length to one standard deviation of the styles."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return Directions((units * styles.spread(units)[:, None]).astype(np.float32), np.asarray(values))


def regression(ws: ArrayLike, scores: ArrayLike, styles: Styles, *, ridge: float = 1e-3) -> Directions:
    """The direction along which a score rises: the normal of its linear fit.

    Args:
      ws: [N, w_dim].
      scores: [N] numbers.
      styles: as returned by `sample_styles`, for the scale.
      ridge: added to the diagonal of the covariance of `ws`, as a fraction of its mean variance.

    Returns:
      One direction; its value is the correlation of the fit with the scores.

    Raises:
      ValueError: fewer than two samples, or scores that are all the same or not finite.
    """
    x, y = _samples(ws, scores)
    covariance = x.T @ x / len(x)
    normal = np.linalg.solve(covariance + ridge * np.trace(covariance) / len(covariance) * np.eye(x.shape[1]), x.T @ y)
    return scaled(normal[None], np.array([np.corrcoef(x @ normal, y)[0, 1]]), styles)


def boundary(ws: ArrayLike, labels: ArrayLike, styles: Styles, *, ridge: float = 1e-3) -> Directions:
    """The normal of the boundary between two classes, by logistic regression.

    Args:
      ws: [N, w_dim].
      labels: [N], 0 or 1.
      styles: as returned by `sample_styles`, for the scale.
      ridge: weight of the squared normal, for `ws` of unit variance.

    Returns:
      One direction; its value is the fraction of samples on the correct side of the boundary.

    Raises:
      ValueError: labels other than 0 and 1, or all the same.
    """
    classes = np.asarray(labels, np.float64)
    if not np.isin(classes, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    x, _ = _samples(ws, classes)
    deviation = np.maximum(x.std(0), 1e-12)
    design = np.concatenate([x / deviation, np.ones((len(x), 1))], axis=1)
    penalty = ridge * np.array([*np.ones(x.shape[1]), 0.0])  # no penalty on the bias

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = design @ weights
        cross_entropy = float(np.mean(np.logaddexp(0, logits) - classes * logits))
        gradient = design.T @ (scipy.special.expit(logits) - classes) / len(x) + penalty * weights
        return cross_entropy + float(penalty @ weights**2) / 2, gradient

    def hessian(weights: np.ndarray) -> np.ndarray:
        p = scipy.special.expit(design @ weights)
        return (design * (p * (1 - p))[:, None]).T @ design / len(x) + np.diag(penalty)

    start, options = np.zeros(design.shape[1]), {"gtol": 1e-10}
    weights = scipy.optimize.minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options=options).x
    right = np.mean((design @ weights > 0) == (classes > 0.5))
    return scaled((weights[:-1] / deviation)[None], np.array([right]), styles)


def _samples(ws: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Centered styles and scores, in float64."""
    x, y = np.asarray(ws, np.float64), np.asarray(scores, np.float64)
    if x.ndim != 2 or y.shape != (len(x),) or len(x) < 2:
        raise ValueError(f"expected styles [N, w_dim] and scores [N] with N at least 2, not {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("styles or scores are not finite")
    if np.ptp(y) == 0:
        raise ValueError("all scores are the same: there is no direction along which they change")
    return x - x.mean(0), y - y.mean()


def fit(ws: ArrayLike, scores: ArrayLike, styles: Styles) -> Directions:
    """`boundary` if all scores are 0 or 1, otherwise `regression`.

    Raises:
      ValueError: as `boundary` and `regression` raise.
    """
    return (boundary if np.isin(scores, (0, 1)).all() else regression)(ws, scores, styles)


# --- ranges of styles ---


def check_layers(config: StyleGAN2Config, layers: tuple[int, int] | None) -> tuple[int, int]:
    """Checks the range of styles that a direction acts on, and returns it; None means all of them.

    Raises:
      ValueError: the range is outside the generator's styles.
    """
    first, last = layers or (0, config.num_ws)
    if not 0 <= first < last <= config.num_ws:
        raise ValueError(f"styles {first} to {last}: this generator has {config.num_ws} styles, counted from 0")
    return first, last


def parse_layers(text: str | None, num_ws: int) -> tuple[int, int] | None:
    """Parses a range of styles such as "0-5", which is (0, 6).

    Raises:
      UserError: another syntax, or styles that the generator does not have.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,3})(?:\s*-\s*(\d{1,3}))?\s*", text, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < num_ws:
        raise UserError(
            f"--layers {text[:40]!r}: give the first and last style, such as 0-5; there are {num_ws}, counted from 0"
        )
    return first, last + 1


def spread_over(vector: ArrayLike, config: StyleGAN2Config, layers: tuple[int, int] | None = None) -> np.ndarray:
    """A direction [w_dim] in a range of styles, and 0 in the others; [num_ws, w_dim].

    Raises:
      ValueError: the range is outside the generator's styles.
    """
    first, last = check_layers(config, layers)
    direction = np.zeros((config.num_ws, config.w_dim), np.float32)
    direction[first:last] = np.asarray(vector, np.float32)
    return direction


# --- scores ---


def seed_styles(
    config: StyleGAN2Config,
    params: Params,
    seeds: Sequence[int],
    truncation_psi: float = 1.0,
    *,
    class_idx: int | None = None,
) -> np.ndarray:
    """Styles [N, num_ws, w_dim] of seeds, as `generation.draw_batches` draws them."""
    z = [generation.random_z(seed, config.z_dim) for seed in seeds]
    classes = generation.seed_classes(config, seeds, class_idx)
    return generation.styles(
        config, params, np.reshape(z, (-1, config.z_dim)), truncation_psi=truncation_psi, classes=classes
    )


def read_scores(path: Path) -> tuple[list[int], np.ndarray]:
    """Reads seeds and their scores from a CSV file with the columns seed and score.

    Raises:
      UserError: no such file, no such columns, or something other than seeds and numbers in them.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--scores: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if missing := [name for name in ("seed", "score") if name not in columns]:
        raise UserError(
            f"--scores: {path} has no column {' and no column '.join(missing)}: its first line must name the columns"
            " seed and score"
        )
    seeds, scores = [], np.empty(len(rows))
    for i, row in enumerate(rows):
        try:
            seeds.append(int(row["seed"]))
            scores[i] = float(row["score"])
        except (TypeError, ValueError) as error:
            raise UserError(f"--scores: {path}: row {i + 1} does not hold a seed and a score, two numbers") from error
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"--scores: {path}: seeds lie between 0 and 4294967295")
    return seeds, scores


def load_scorer(text: str) -> Scorer:
    """Loads the function that `FILE.py:NAME` names; this runs the file.

    Raises:
      UserError: no such file or function, or the file cannot be run.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise UserError(f"--scorer {text[:80]!r}: give FILE.py:NAME, a function in a Python file")
    if not Path(file).is_file():
        raise UserError(f"--scorer: there is no file {file}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's own program
        raise UserError(f"--scorer: {file} failed with {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"--scorer: {file} has no function {name[:40]!r}")
    return found


def score(
    scorer: Scorer, config: StyleGAN2Config, params: Params, ws: np.ndarray, *, batch_size: int = 16
) -> np.ndarray:
    """Scores the images of styles.

    Args:
      scorer: the scoring function.
      config: sizes of the generator.
      params: its parameters.
      ws: [N, num_ws, w_dim].
      batch_size: images that the scorer gets in one call; the last call may have fewer.

    Returns:
      [N] float64.

    Raises:
      UserError: the scorer fails, or does not return one number for each image.
    """
    scores = []
    for first in tqdm.trange(0, len(ws), batch_size, unit="batch", desc="scores"):
        made = images.to_uint8(generation.draw(config, params, ws[first : first + batch_size]))
        try:
            given = np.asarray(scorer(made), np.float64).reshape(-1)
        except Exception as error:  # it is the user's own program
            raise UserError(f"--scorer failed with {type(error).__name__}: {error}") from error
        if given.shape != (len(made),):
            raise UserError(f"--scorer returned {given.size} numbers for {len(made)} images, not one for each")
        scores.append(given)
    return np.concatenate(scores)


def scored_styles(
    config: StyleGAN2Config,
    params: Params,
    scores: Path | None,
    scorer: str | None,
    count: int,
    *,
    class_idx: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Styles and their scores, for `fit`.

    Args:
      config: sizes of the generator.
      params: its parameters.
      scores: a file for `read_scores`.
      scorer: a function for `load_scorer`, instead.
      count: number of images that the scorer gets, from seed 0 on.
      class_idx: see `generation.draw_batches`.

    Returns:
      Styles [N, w_dim] and scores [N].

    Raises:
      UserError: neither or both of a file and a scorer are given, or the one given cannot be used.
    """
    if scores is not None and scorer is None:
        seeds, given = read_scores(scores)
        return seed_styles(config, params, seeds, class_idx=class_idx)[:, 0], given
    if scorer is not None and scores is None:
        function = load_scorer(scorer)
        ws = seed_styles(config, params, range(count), class_idx=class_idx)
        return ws[:, 0], score(function, config, params, ws)
    raise UserError("--method supervised takes --scores, a CSV file with seed and score, or --scorer FILE.py:NAME")


# --- strength ---


def typical_strength(
    config: StyleGAN2Config,
    params: Params,
    lpips_params: lpips.Params,
    ws: np.ndarray,
    direction: np.ndarray,
    change: float,
) -> float:
    """The strength at which images have changed by a given LPIPS (AlexNet) on average.

    Args:
      config: sizes of the generator.
      params: its parameters.
      lpips_params: parameters of LPIPS with AlexNet.
      ws: [N, num_ws, w_dim], styles of the images.
      direction: [num_ws, w_dim].
      change: LPIPS between an image before and after the edit.

    Returns:
      By linear interpolation between `TRIED_STRENGTHS`; at most the last of them.
    """
    before = generation.draw(config, params, ws)
    reached = [0.0]
    for strength in TRIED_STRENGTHS:
        after = generation.draw(config, params, ws + strength * direction)
        reached.append(float(np.mean(image_change(lpips_params, before, after))))
        if reached[-1] >= change:
            break
    strengths = [0.0, *TRIED_STRENGTHS][: len(reached)]
    return float(np.interp(change, np.maximum.accumulate(reached), strengths))


@jax.jit
def image_change(lpips_params: lpips.Params, before: ArrayLike, after: ArrayLike) -> Array:
    """LPIPS (AlexNet) between images [N, R, R, 3] in [-1, 1]; [N]."""
    return lpips.lpips(lpips_params, jnp.asarray(before), jnp.asarray(after), "alex")
