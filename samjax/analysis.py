"""The analysis of an image before its inversion: segments, where W+ starts, and the error maps of the layers.

An error map gives, for one latent layer used alone, the perceptual error at each pixel. `measure_maps` measures it by
inverting in each layer, for any generator. `predict_maps` uses a network trained on such measurements for
one kind of image (SAM, CVPR 2022, section 3.2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import ArrayLike

from samjax import batching, driver, losses
from samjax.config import InversionConfig
from samjax.driver import OnProgress
from samjax.errors import escaped
from samjax.inversion import Items, Networks, Terms, lpips_features, structure
from samjax.latents import Latents, init_latents, latent_layers, single_layer_masks
from samjax.nets import deeplab, e4e, lpips, stylegan2
from samjax.nets.blocks import Variables
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.e4e import E4EConfig
from samjax.nets.stylegan2 import Params, StyleGAN2Config


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """One image, ready to be inverted. All arrays are NumPy's.

    Attributes:
      name: name of the image: that of its file without the suffix, or "image".
      source: uint8 [H, W, 3], the image as it was given.
      target: float32 [h, w, 3] in [-1, 1], at the category's size.
      segments: integers [h, w], the label of each pixel.
      segment_names: label to the name of what the segment shows, where known.
      segments_from: "given", or the segmenter that found them.
      ws: [num_ws, w_dim], where W+ starts.
      layers: names of the latent layers, the most editable first.
      maps: [L, h, w] error map of each layer, 0 or more.
      singles: the inversions in each layer alone by which the maps were measured: "latent_W+" [L, num_ws, w_dim],
        "latent_F4" [L, 16, 16, C], ..., "terms" [6, steps, L], the loss terms, and "seconds", the time of each;
        empty if the maps were predicted.
      ws_from: "given", or how `ws` was found: "mean", "best", "encoder", or "learned", with which an offset encoder
        finds the start of all layers from the encoder's code.
      maps_from: "given", or how the maps were found: "measured" or "predicted".
      fingerprint: fingerprint of the generator for which the image was analyzed; empty if it is not known.
    """

    name: str
    source: np.ndarray
    target: np.ndarray
    segments: np.ndarray
    segment_names: Mapping[int, str]
    segments_from: str
    ws: np.ndarray
    layers: tuple[str, ...]
    maps: np.ndarray
    singles: Mapping[str, np.ndarray]
    ws_from: str = "mean"
    maps_from: str = "predicted"
    fingerprint: str = ""

    def __repr__(self) -> str:
        height, width = self.target.shape[:2]
        count = len(np.unique(self.segments))
        return f"<Analysis of {escaped(self.name)}: {width} x {height}, {count} segments, {', '.join(self.layers)}>"

    def full_size(self, image: np.ndarray) -> np.ndarray:
        """A generator's image [R, R, 3] without the rows that letterboxing added; see `losses.full_size`."""
        return losses.full_size(image, *self.target.shape[:2])


# --- error maps ---


@functools.partial(jax.jit, static_argnames=("size", "net", "precision"))
def _spatial(params: Params, images: Array, targets: Array, size: int, net: lpips.Net, precision: str) -> Array:
    height, width = targets.shape[1:3]
    images = losses.comparable(images, size, height, width)
    with jax.default_matmul_precision(precision):
        fx, fy = lpips.features(params, images, net), lpips.features(params, targets, net)
        return lpips.spatial_distance(params, fx, fy, (height, width))


def spatial_maps(
    params: Params,
    images: ArrayLike,
    targets: ArrayLike,
    *,
    net: lpips.Net = "vgg",
    precision: str = "highest",
    batch_size: int = 1,
) -> np.ndarray:
    """Spatial LPIPS between a generator's images and targets.

    Args:
      params: parameters of the LPIPS network.
      images: [N, R, R, 3]; reduced, clipped and cropped to the targets as in the loss.
      targets: [N, h, w, 3] in [-1, 1].
      net: "vgg" or "alex".
      precision: precision of convolutions.
      batch_size: pairs in one pass.

    Returns:
      [N, h, w] float32.
    """
    pairs = np.asarray(images, np.float32), np.asarray(targets, np.float32)
    size = min(pairs[0].shape[1], max(pairs[1].shape[1:3]))
    return batching.map_batches(lambda pair: _spatial(params, *pair, size, net, precision), pairs, batch_size)


def measure_maps(
    generator: StyleGAN2Config,
    networks: Networks,
    targets: ArrayLike,
    start: ArrayLike | Latents,
    config: InversionConfig,
    *,
    seed: int = 0,
    map_params: Params | None = None,
    map_net: Literal["vgg", "alex"] | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray], Terms]:
    """Inverts each target in each layer alone; the spatial LPIPS of the results are the error maps.

    All N * L inversions are items of one `driver.run`, so with the same batch size and chunk length they share the
    program of the inversion that follows.

    Args:
      generator: sizes of the generator.
      networks: its parameters, those of LPIPS, and the prior.
      targets: [N, h, w, 3] in [-1, 1].
      start: where latents start: [N, num_ws, w_dim] for W+, with offsets of zero; or {"W+": [N, L, num_ws, w_dim],
        "F4": [N, L, 16, 16, C], ...}, those of each layer's inversion.
      config: settings; `num_opt_steps` is the length of each inversion (501 in the authors' training of their
        predictor; a few dozen already rank the layers).
      seed: seed of the noise.
      map_params: LPIPS weights of the maps; those of the loss if None.
      map_net: LPIPS network of the maps; that of the loss if None. The authors' maps, and therefore their thresholds,
        are VGG's.
      on_progress: as in `driver.run`.

    Returns:
      Maps [N, L, h, w]; latents {"W+": [N, L, num_ws, w_dim], "F4": [N, L, 16, 16, C], ...}; and loss terms
      [steps, N, L]. All are NumPy arrays.

    Raises:
      DivergedError: a loss is not finite.
      ValueError: shapes are inconsistent.
    """
    targets = np.asarray(targets, np.float32)
    layers = latent_layers(generator, config.latent_names)
    count, each = len(targets), len(layers)
    repeated = np.repeat(targets, each, axis=0)  # [N * L, h, w, 3]
    if isinstance(start, Mapping):
        begin = {name: np.concatenate(value) for name, value in start.items()}
    else:
        begin = init_latents(layers, jnp.asarray(np.repeat(np.asarray(start, np.float32), each, axis=0)))
    masks = {name: jnp.tile(mask, (count, 1, 1, 1)) for name, mask in single_layer_masks(layers).items()}
    seeds = np.repeat(np.arange(seed, seed + count), each)
    items = Items(repeated, masks, begin, seeds)
    latents, terms = driver.run(generator, networks, items, config, on_progress=on_progress)

    shared = {"precision": config.matmul_precision, "batch_size": config.batch_size}
    images = driver.render(generator, networks.generator, latents, masks, noise=config.stored_noise, **shared)
    params = networks.lpips if map_params is None else map_params
    maps = spatial_maps(params, images, repeated, net=map_net or config.net, **shared)
    by_target = lambda x: np.asarray(x).reshape(count, each, *x.shape[1:])  # noqa: E731
    by_layer = Terms(*(term.reshape(len(term), count, each) for term in terms))
    return by_target(maps), {name: by_target(value) for name, value in latents.items()}, by_layer


@functools.partial(jax.jit, static_argnames=("config", "precision"))
def _predict(params: Variables, images: Array, config: PredictorConfig, precision: str) -> Array:
    with jax.default_matmul_precision(precision):
        return deeplab.predict(params, images, config)


def predict_maps(
    config: PredictorConfig,
    params: Variables,
    targets: ArrayLike,
    *,
    precision: str = "highest",
    batch_size: int = 1,
) -> np.ndarray:
    """Error maps of targets, by a trained predictor.

    Args:
      config: sizes of the predictor; the maps are those of `config.latent_names`, in this order.
      params: its variables; see `samjax.nets.deeplab`.
      targets: [N, h, w, 3] in [-1, 1].
      precision: precision of convolutions; "highest" is full float32 on every device.
      batch_size: targets in one pass.

    Returns:
      [N, L, h, w] float32.

    Raises:
      ValueError: targets of another shape.
    """
    made = lambda x: _predict(params, jnp.asarray(x), config, precision)  # noqa: E731
    return batching.map_batches(made, np.asarray(targets, np.float32), batch_size)


# --- where W+ starts ---


@functools.partial(jax.jit, static_argnames="config")
def _encode(params: Variables, images: Array, config: E4EConfig) -> Array:
    with jax.default_matmul_precision("highest"):
        return e4e.encode(params, images, config)


def encode(
    config: E4EConfig,
    params: Variables,
    targets: ArrayLike,
    *,
    batch_size: int = 1,
) -> np.ndarray:
    """Codes of targets by the e4e encoder (Tov et al., SIGGRAPH 2021), from which the authors' inversions start.

    Args:
      config: sizes of the encoder.
      params: its variables; see `samjax.nets.e4e`.
      targets: [N, h, w, 3] in [-1, 1].
      batch_size: targets in one pass.

    Returns:
      W+ [N, num_ws, w_dim] float32.

    Raises:
      ValueError: targets of another shape, or too large.
    """
    made = lambda x: _encode(params, jnp.asarray(x), config)  # noqa: E731
    return batching.map_batches(made, np.asarray(targets, np.float32), batch_size)


@functools.partial(jax.jit, static_argnames=("config", "size", "net", "precision"))
def _candidates(
    config: StyleGAN2Config,
    networks: Networks,
    features: tuple[Array, ...],
    target: Array,
    z: Array,
    labels: Array | None,
    psi: Array,
    size: int,
    net: lpips.Net,
    precision: str,
) -> tuple[Array, Array]:
    """Styles [B, num_ws, w_dim] of z, truncated to the mean style, and their images' LPIPS to every target [N, B]."""
    with jax.default_matmul_precision(precision):
        mapped = stylegan2.map_z(config, networks.generator, z, labels)
        ws = networks.prior.mean_w + psi * (mapped - networks.prior.mean_w)
        images = losses.comparable(stylegan2.synthesize(config, networks.generator, ws).image, size, *target.shape[1:3])
        found = lpips.features(networks.lpips, images, net)

        def to_target(features: tuple[Array, ...]) -> Array:
            same = jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape), features, found)
            return lpips.distance(networks.lpips, found, same)

        return ws, lax.map(to_target, features)


def start_latents(
    generator: StyleGAN2Config,
    networks: Networks,
    targets: ArrayLike,
    config: InversionConfig,
    *,
    kind: Literal["mean", "best"] = "mean",
    samples: int = 256,
    truncation_psi: float = 0.7,
    class_idx: int | None = None,
    key: Array | None = None,
    batch_size: int = 8,
) -> np.ndarray:
    """Where W+ starts without an encoder: at the mean style, or at that of the sampled image closest to each target.

    Args:
      generator: sizes of the generator.
      networks: its parameters, those of LPIPS, and the prior.
      targets: [N, h, w, 3] in [-1, 1].
      config: settings of the inversion.
      kind: "mean", or "best" of `samples` by LPIPS (the mean style is one of them).
      samples: number of mapped z to try.
      truncation_psi: 1 samples the generator's whole range; smaller values stay closer to the mean style.
      class_idx: class of the samples of a conditional generator; classes drawn uniformly if None.
      key: random key, for "best".
      batch_size: sampled images in one pass.

    Returns:
      [N, num_ws, w_dim] float32.

    Raises:
      ValueError: an unknown `kind`, or no key where one is needed.
    """
    targets = np.asarray(targets, np.float32)
    count = len(targets)
    mean = np.broadcast_to(np.asarray(networks.prior.mean_w), (count, generator.num_ws, generator.w_dim))
    if kind == "mean":
        return np.array(mean)
    if kind != "best":
        raise ValueError(f"W+ starts at 'mean' or 'best', not at {kind!r}")
    if key is None:
        raise ValueError("sampling needs a random key")
    size = structure(generator, config).loss_resolution
    features = lpips_features(networks.lpips, jnp.asarray(targets), config.net, config.matmul_precision)
    best, chosen = np.full(count, np.inf), np.array(mean)
    for first in range(0, samples, batch_size):
        own = jax.random.fold_in(key, first)
        z = jax.random.normal(own, (batch_size, generator.z_dim))
        labels = stylegan2.draw_labels(generator, batch_size, class_idx, key=jax.random.fold_in(own, 1))
        # With psi = 0, the very first sample is the mean style itself.
        psi = np.full((batch_size, 1, 1), truncation_psi, np.float32)
        psi[0] *= first > 0
        ws, distances = _candidates(
            generator, networks, features, targets, z, labels, jnp.asarray(psi), size, config.net,
            config.matmul_precision,
        )  # fmt: skip
        distances = np.asarray(distances)[:, : samples - first]
        nearest = distances.argmin(axis=1)
        closer = distances.min(axis=1) < best
        best = np.where(closer, distances.min(axis=1), best)
        chosen[closer] = np.asarray(ws)[nearest[closer]]
    return chosen
