"""Tiny generators and networks for tests, filled by NumPy: nothing is downloaded, and almost nothing is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from samjax import losses
from samjax.inversion import Networks
from samjax.io.checkpoints import LoadedNetwork
from samjax.latents import latent_layers
from samjax.nets import deeplab, e4e, lpips, offset_encoder, stylegan2
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.e4e import E4EConfig
from samjax.nets.offset_encoder import OffsetEncoderConfig
from samjax.nets.stylegan2 import StyleGAN2Config

TINY = StyleGAN2Config(img_resolution=32, z_dim=8, w_dim=8, channel_base=256, channel_max=8, mapping_layers=2)
"""A generator of 32 px images, with the latent layers W+ and F4."""

TINY_64 = StyleGAN2Config(img_resolution=64, z_dim=8, w_dim=8, channel_base=256, channel_max=8, mapping_layers=2)
"""A generator of 64 px images, with the latent layers W+, F4 and F6."""


def _names(path: tuple[Any, ...]) -> list[str]:
    return [part.key for part in path]


def _fill(shapes: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def one(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        names = _names(path)
        if names[-1] == "noise_strength":
            return np.full(shape.shape, 0.1, np.float32)  # so that noise has an effect
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
    """Parameters of a generator, distributed as at the start of its training, with noise."""
    return _fill(jax.eval_shape(lambda: stylegan2.init(config, key=jax.random.key(0))), 0)


def random_lpips(net: lpips.Net) -> dict[str, Any]:
    """Random parameters of LPIPS."""
    return _fill(jax.eval_shape(lambda: lpips.init(net, key=jax.random.key(0))), 1)


def tiny_networks(config: StyleGAN2Config = TINY, net: lpips.Net = "alex", *, samples: int = 100) -> Networks:
    """The frozen parameters of an inversion: a tiny generator, a random LPIPS, and the prior on W+.

    Args:
      config: sizes of the generator.
      net: LPIPS network.
      samples: number of mapped z that the prior is fitted to.
    """
    params = tiny_generator(config)
    prior = losses.generator_prior(config, params, key=jax.random.key(1), samples=samples)
    return Networks(params, random_lpips(net), prior)


def tiny_encoder_config(generator: StyleGAN2Config = TINY) -> E4EConfig:
    """Config of a tiny encoder for a generator."""
    depth = 1 if generator.img_resolution <= 32 else 2  # which limits the size of the images
    return E4EConfig(
        generator.num_ws, generator.w_dim, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), head_width=4, head_depth=depth
    )


def tiny_encoder(generator: StyleGAN2Config = TINY) -> LoadedNetwork:
    """A random encoder for a generator."""
    config, rng = tiny_encoder_config(generator), np.random.default_rng(2)

    def one(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        constants = {"bias": 0.0, "mean": 0.0, "latent_avg": 0.0, "scale": 1.0, "var": 1.0, "slope": 0.25}
        if (name := _names(path)[-1]) in constants:
            return np.full(shape.shape, constants[name], np.float32)
        values = rng.standard_normal(shape.shape).astype(np.float32)
        return values * np.float32(np.sqrt(2 / np.prod(shape.shape[:-1])))

    shapes = jax.eval_shape(lambda: e4e.init(config, key=jax.random.key(0)))
    return LoadedNetwork(config, jax.tree_util.tree_map_with_path(one, shapes), {})


def tiny_offset_encoder_config(generator: StyleGAN2Config = TINY) -> OffsetEncoderConfig:
    """Config of a tiny offset encoder for a generator."""
    layers = [layer for layer in latent_layers(generator) if layer.resolution is not None]
    return OffsetEncoderConfig(
        tuple(layer.resolution for layer in layers if layer.resolution is not None),
        tuple(layer.channels for layer in layers), generator.num_ws, generator.w_dim,
        widths=(8,) * len(layers), blocks=1, style_width=8,
    )  # fmt: skip


def tiny_offset_encoder(generator: StyleGAN2Config = TINY) -> LoadedNetwork:
    """A random offset encoder for a generator, whose corrections are small."""
    config, rng = tiny_offset_encoder_config(generator), np.random.default_rng(3)

    def one(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if _names(path)[0] == "batch_stats":
            return np.full(shape.shape, 0.0 if _names(path)[-1] == "style_mean" else 1.0, np.float32)
        return rng.normal(0, 0.1 / np.sqrt(np.prod(shape.shape[:-1])), shape.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda: offset_encoder.init(config, key=jax.random.key(0)))
    return LoadedNetwork(config, jax.tree_util.tree_map_with_path(one, shapes), {})


def tiny_predictor_config(latent_names: Sequence[str] = ("W+", "F4")) -> PredictorConfig:
    """Sizes of a tiny invertibility predictor."""
    return PredictorConfig(tuple(latent_names), blocks=(1, 1, 1, 1), width=4, decoder_width=8, low_level_width=4)


def tiny_predictor(latent_names: Sequence[str] = ("W+", "F4")) -> LoadedNetwork:
    """A random invertibility predictor.

    All values are positive, so that variances are valid and no ReLU hides a part of the network.
    """
    config, rng = tiny_predictor_config(latent_names), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: deeplab.init(config, key=jax.random.key(0)))
    values = jax.tree.map(lambda leaf: rng.uniform(0.05, 0.3, leaf.shape).astype(np.float32), shapes)
    return LoadedNetwork(config, values, {})
