"""Training of an encoder for a generator: from a picture to the W+ where an inversion starts.

Pictures teach it by the loss of the inversion itself: an encoder learns to put out at once what many steps would find.
The generator's own samples, whose styles are known, teach it besides where in W the pictures of this generator lie.
What e4e (Tov et al., "Designing an Encoder for StyleGAN Image Manipulation", SIGGRAPH 2021) has in an adversary on
styles, these samples and the term of the styles' distances do here: codes stay near W, where edits work.

Pure and sharded as `samjax.training`; files and loops are elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from samjax import losses
from samjax.inversion import Networks
from samjax.nets import e4e, lpips, stylegan2
from samjax.nets.blocks import Variables
from samjax.nets.e4e import E4EConfig
from samjax.nets.stylegan2 import StyleGAN2Config


@dataclasses.dataclass(frozen=True)
class EncoderTrainConfig:
    """How an encoder is trained.

    Attributes:
      num_steps: of the whole run; the learning rate rises in the first `warmup` and then falls as a half cosine.
      lr: Adam's highest rate.
      warmup: steps.
      samples: of the generator in each step, beside the pictures.
      lambda_mse, lambda_lpips, lambda_delta: weights of the pictures' terms; the defaults are the inversion's.
      lambda_w: weight of the squared error of the samples' styles, in variances of W.
      lpips_type: network of the perceptual term.
      seed: of samples and noise.
    """

    num_steps: int = 20_000
    lr: float = 1e-3
    warmup: int = 100
    samples: int = 8
    lambda_mse: float = 1.0
    lambda_lpips: float = 1.0
    lambda_delta: float = 1e-3
    lambda_w: float = 1.0
    lpips_type: lpips.Net = "vgg"
    seed: int = 0


class EncoderState(NamedTuple):
    """A training between two steps; a pytree of arrays."""

    variables: Mapping[str, Any]
    optimizer: optax.OptState
    step: Array


class EncoderMetrics(NamedTuple):
    """The loss and its parts, not weighted, of one batch: arrays []."""

    loss: Array
    mse: Array
    lpips: Array
    delta: Array
    w: Array


def learning_rate(step: Array, config: EncoderTrainConfig) -> Array:
    """Adam's rate at a step."""
    at = step.astype(jnp.float32)
    rise = jnp.minimum((at + 1) / max(config.warmup, 1), 1.0)
    return config.lr * rise * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(at / config.num_steps, 0, 1)))


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=0.9, b2=0.99)


def init(
    encoder: E4EConfig, config: EncoderTrainConfig, networks: Networks, variables: Variables | None = None
) -> EncoderState:
    """The state before the first step: of `variables`, or of random ones.

    Random ones put out one style for all layers, near the mean style. e4e's training ("progressive") holds the styles
    together for longer, but from there too.
    """
    if variables is None:
        key = jax.random.key(config.seed, impl="rbg")  # whose programs compile several times faster
        fresh = jax.jit(e4e.init, static_argnums=0)(encoder, key=key)
        average = jnp.broadcast_to(networks.prior.mean_w, (encoder.num_styles, encoder.style_dim))
        params = dict(fresh["params"])
        for i in range(encoder.num_styles):
            head = params[f"head_{i}"]
            kernel = head["linear"]["kernel"] * (0.0 if i else 0.1)
            params[f"head_{i}"] = {**head, "linear": {**head["linear"], "kernel": kernel}}
        variables = {"params": params, "batch_stats": {**fresh["batch_stats"], "latent_avg": jnp.array(average)}}
    return EncoderState(variables, _adam().init(variables["params"]), jnp.zeros((), jnp.int32))


def _render(generator: StyleGAN2Config, networks: Networks, ws: Array, key: Array) -> Array:
    return stylegan2.synthesize(generator, networks.generator, ws, noise="random", noise_key=key).image


def _picture_terms(
    generator: StyleGAN2Config, config: EncoderTrainConfig, networks: Networks, ws: Array, images: Array, key: Array
) -> tuple[Array, Array, Array]:
    """Squared error, LPIPS and distance of the styles of each picture; [N] each."""
    height, width = images.shape[1:3]
    made = losses.comparable(_render(generator, networks, ws, key), max(height, width), height, width)
    perceptual = lpips.lpips(networks.lpips, made, images, config.lpips_type)
    return losses.mean_squares(made, images), perceptual, losses.delta(ws)


@functools.partial(jax.jit, static_argnames=("encoder", "generator", "config"), donate_argnames="state")
def step(
    encoder: E4EConfig,
    generator: StyleGAN2Config,
    config: EncoderTrainConfig,
    networks: Networks,
    state: EncoderState,
    images: Array,
) -> tuple[EncoderState, EncoderMetrics]:
    """One step of Adam.

    Args:
      encoder: its sizes.
      generator: its sizes.
      config: settings.
      networks: the generator's parameters, LPIPS' and the prior, which stay as they are.
      state: is donated.
      images: [N, h, w, 3] in [-1, 1], divided over devices or not.

    Returns:
      The new state, and the metrics of the old one.
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step), 3)
    with jax.default_matmul_precision("highest"):
        z = jax.random.normal(keys[0], (config.samples, generator.z_dim))
        labels = jnp.zeros((config.samples, generator.c_dim)) if generator.c_dim else None
        true = stylegan2.map_z(generator, networks.generator, z, labels)
        height, width = images.shape[1:3]
        drawn = losses.comparable(_render(generator, networks, true, keys[1]), max(height, width), height, width)
        variance = jnp.var(true, axis=(0, 1)) if config.samples > 1 else jnp.ones(true.shape[-1])
        # Normalisation is over pictures and samples together: the encoder may not tell them apart by it.
        together = jnp.concatenate((images, jax.lax.stop_gradient(drawn)))

        def objective(params: Any) -> tuple[Array, tuple[EncoderMetrics, Any]]:
            variables = {"params": params, "batch_stats": state.variables["batch_stats"]}
            ws, changed = e4e.train_codes(variables, together, encoder)
            count = images.shape[0]
            terms = _picture_terms(generator, config, networks, ws[:count], images, keys[2])
            mse, perceptual, delta = (jnp.mean(term) for term in terms)
            styles = jnp.mean(jnp.square(ws[count:] - true)) / jnp.mean(variance) if config.samples else jnp.zeros(())
            loss = (
                config.lambda_mse * mse
                + config.lambda_lpips * perceptual
                + config.lambda_delta * delta
                + config.lambda_w * styles
            )
            return loss, (EncoderMetrics(loss, mse, perceptual, delta, styles), changed)

        gradients, (metrics, changed) = jax.grad(objective, has_aux=True)(state.variables["params"])
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float32 to an int32 power
        updates, optimizer = _adam().update(gradients, state.optimizer)
    rate = learning_rate(state.step, config)
    params = jax.tree.map(lambda x, update: x - rate * update, state.variables["params"], updates)
    return EncoderState({"params": params, "batch_stats": changed}, optimizer, state.step + 1), metrics


@functools.partial(jax.jit, static_argnames=("encoder", "generator", "config"))
def evaluate(
    encoder: E4EConfig,
    generator: StyleGAN2Config,
    config: EncoderTrainConfig,
    networks: Networks,
    variables: Variables,
    images: Array,
) -> tuple[Array, Array, Array, Array]:
    """What an encoder is worth on pictures [N, h, w, 3].

    Returns:
      Squared error, LPIPS and the distance of the styles of each picture, [N] each; and what the generator makes of
      the codes, at the pictures' size.
    """
    with jax.default_matmul_precision("highest"):
        ws = e4e.encode(variables, images, encoder)
        height, width = images.shape[1:3]
        made = stylegan2.synthesize(generator, networks.generator, ws, noise="const").image
        made = losses.comparable(made, max(height, width), height, width)
        perceptual = lpips.lpips(networks.lpips, made, images, config.lpips_type)
    return losses.mean_squares(made, images), perceptual, losses.delta(ws), made
