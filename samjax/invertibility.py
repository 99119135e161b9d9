"""Invertibility maps: how badly each latent layer, used alone, renders each pixel of a target.

`measured` finds out by doing it, for any generator. `predicted` asks a network that was trained on such measurements
of one kind of pictures. Both stand behind one interface, `InvertibilitySource`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from samjax import inversion, losses
from samjax.config import InversionConfig
from samjax.inversion import Items, Networks, Progress, render
from samjax.latents import init_latents, latent_layers, single_layer_masks
from samjax.nets import deeplab, lpips
from samjax.nets.blocks import Variables
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.stylegan2 import Params, StyleGAN2Config


class InvertibilitySource(Protocol):
    """Anything that gives invertibility maps of targets."""

    def __call__(self, targets: ArrayLike) -> np.ndarray:
        """Takes targets [N, h, w, 3] in [-1, 1]; gives maps [N, L, h, w], the most editable layer first."""
        ...


class Measured(NamedTuple):
    """Single-layer inversions of N targets in each of L layers; host arrays.

    Attributes:
      maps: [N, L, h, w] spatial LPIPS between each inversion and its target.
      images: [N, L, R, R, 3] the inversions, in [-1, 1] up to overshoot.
      latents: {"W+": [N, L, num_ws, w_dim], "F4": [N, L, 16, 16, C], ...}.
      terms: loss terms of every step [steps, N, L].
    """

    maps: np.ndarray
    images: np.ndarray
    latents: dict[str, np.ndarray]
    terms: inversion.Terms


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
      params: of the LPIPS network.
      images: [N, R, R, 3], reduced, clipped and cropped to the targets as the loss does it.
      targets: [N, h, w, 3] in [-1, 1].
      net: "vgg" or "alex".
      precision: of convolutions.
      batch_size: pairs in one pass; the last one is filled up.

    Returns:
      [N, h, w] float32.
    """
    images, targets = np.asarray(images, np.float32), np.asarray(targets, np.float32)
    size = min(images.shape[1], max(targets.shape[1:3]))
    parts = []
    for first in range(0, len(images), batch_size):
        index = np.minimum(np.arange(first, first + batch_size), len(images) - 1)
        maps = _spatial(params, images[index], targets[index], size, net, precision)
        parts.append(np.asarray(maps)[: len(images) - first])
    return np.concatenate(parts)


def measured(
    generator: StyleGAN2Config,
    networks: Networks,
    targets: ArrayLike,
    ws: ArrayLike,
    config: InversionConfig,
    *,
    seed: int = 0,
    map_params: Params | None = None,
    map_net: Literal["vgg", "alex"] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Measured:
    """Inverts each target in each layer alone, and takes the spatial LPIPS of the results as maps.

    All N * L inversions are items of one `inversion.run`, so with the same batch size and chunk length they share
    the program of the inversion that follows.

    Args:
      generator: sizes of the generator.
      networks: its parameters, LPIPS' and the prior.
      targets: [N, h, w, 3] in [-1, 1].
      ws: [N, num_ws, w_dim], where W+ starts.
      config: settings; `num_opt_steps` is the length of each inversion (501 where the authors train their
        predictor; some tens already rank the layers).
      seed: of the noise.
      map_params: the LPIPS weights of the maps; those of the loss unless given.
      map_net: and their network. The authors' maps, and so their thresholds, are VGG's.
      on_progress: as in `inversion.run`.

    Raises:
      DivergedError: a loss that is not finite.
      ValueError: shapes that do not belong together.
    """
    targets = np.asarray(targets, np.float32)
    layers = latent_layers(generator, config.latent_names)
    count, each = len(targets), len(layers)
    repeated = np.repeat(targets, each, axis=0)  # [N * L, h, w, 3]
    start = init_latents(layers, jnp.asarray(np.repeat(np.asarray(ws, np.float32), each, axis=0)))
    masks = {name: jnp.tile(mask, (count, 1, 1, 1)) for name, mask in single_layer_masks(layers).items()}
    seeds = np.repeat(np.arange(seed, seed + count), each)
    result = inversion.run(generator, networks, Items(repeated, masks, start, seeds), config, on_progress=on_progress)

    shared = {"precision": config.matmul_precision, "batch_size": config.batch_size}
    images = render(generator, networks.generator, result.latents, masks, noise=config.stored_noise, **shared)
    params = networks.lpips if map_params is None else map_params
    maps = spatial_maps(params, images, repeated, net=map_net or config.lpips_type, **shared)
    by_target = lambda x: np.asarray(x).reshape(count, each, *x.shape[1:])  # noqa: E731
    terms = inversion.Terms(*(term.reshape(len(term), count, each) for term in result.terms))
    return Measured(by_target(maps), by_target(images), {k: by_target(v) for k, v in result.latents.items()}, terms)


def measuring(
    generator: StyleGAN2Config, networks: Networks, ws: ArrayLike, config: InversionConfig
) -> InvertibilitySource:
    """`measured` as an `InvertibilitySource`: every target starts at `ws` [num_ws, w_dim]."""

    def source(targets: ArrayLike) -> np.ndarray:
        start = np.broadcast_to(np.asarray(ws), (len(np.asarray(targets)), *np.shape(ws)))
        return measured(generator, networks, targets, start, config).maps

    return source


@functools.partial(jax.jit, static_argnames=("config", "precision"))
def _predict(variables: Variables, images: Array, config: PredictorConfig, precision: str) -> Array:
    with jax.default_matmul_precision(precision):
        return deeplab.predict(variables, images, config)


def predicted(
    variables: Variables, config: PredictorConfig, *, precision: str = "highest", batch_size: int = 1
) -> InvertibilitySource:
    """A trained predictor as an `InvertibilitySource`.

    Args:
      variables: of the predictor; see `samjax.nets.deeplab`.
      config: its sizes; the maps are those of `config.latent_names`, in this order.
      precision: of convolutions; "highest" is full float32 on every device.
      batch_size: targets in one pass; the last one is filled up.

    Returns:
      The source. It raises ValueError for targets that are not [N, h, w, 3].
    """

    def source(targets: ArrayLike) -> np.ndarray:
        targets = np.asarray(targets, np.float32)
        parts = []
        for first in range(0, len(targets), batch_size):
            index = np.minimum(np.arange(first, first + batch_size), len(targets) - 1)
            maps = _predict(variables, jnp.asarray(targets[index]), config, precision)
            parts.append(np.asarray(maps)[: len(targets) - first])
        return np.concatenate(parts)

    return source
