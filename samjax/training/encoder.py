"""Training of an encoder for a generator: from an image to the W+ at which its inversion starts.

On images, the loss is that of the inversion itself, so the encoder learns to predict what many optimization steps would
find. Samples of the generator, whose styles are known, teach it where the generator's images lie in W. Together with
the penalty on the distance between styles, they replace the adversarial loss on styles of e4e (Tov et al., "Designing
an Encoder for StyleGAN Image Manipulation", SIGGRAPH 2021): codes stay near W, where edits work.

Steps are pure and shardable like those of `samjax.training.predictor`. `samjax.training.recipes.train_encoder` runs a
whole training.
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
from samjax.training import schedules


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How an encoder is trained.

    Attributes:
      num_steps: length of the run, over which the learning rate falls to 0 along a cosine.
      lr: learning rate of Adam.
      warmup: steps in which the learning rate rises linearly.
      samples: samples of the generator in each step, in addition to the images.
      lambda_mse: weight of the squared error of the images.
      lambda_lpips: weight of the LPIPS of the images.
      lambda_delta: weight of the distance between the styles of an image. The defaults of these three weights are the
        inversion's.
      lambda_w: weight of the squared error of the samples' styles, relative to the variance of W.
      lpips_type: LPIPS network of the loss.
      seed: seed of the initial weights, the samples and the noise.
      class_idx: class of the samples of a conditional generator; classes drawn uniformly if None.
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
    class_idx: int | None = None


class TrainState(NamedTuple):
    """The state of a training between two steps: a pytree of arrays, from which a run resumes exactly.

    Attributes:
      variables: parameters and batch statistics of the encoder.
      optimizer: moments and schedule of Adam.
      step: [] int32, steps taken.
    """

    variables: Mapping[str, Any]
    optimizer: optax.OptState
    step: Array


class Metrics(NamedTuple):
    """The loss of a batch and its terms before weighting; arrays []."""

    loss: Array
    mse: Array
    lpips: Array
    delta: Array
    w: Array


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The schedule of the learning rate: half a cosine over the run, times a linear warm-up."""
    return schedules.warmup_cosine(config.lr, config.num_steps, config.warmup)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam with the schedule of `learning_rate`."""
    return optax.adam(learning_rate(config), b1=0.9, b2=0.99)


def init(encoder: E4EConfig, config: TrainConfig, networks: Networks, variables: Variables | None = None) -> TrainState:
    """The state before the first step.

    A random encoder starts with one style for all layers, near the mean style. The progressive training of e4e holds
    the styles together for longer, but starts there too.

    Args:
      encoder: sizes of the encoder.
      config: settings.
      networks: the generator's parameters and the prior.
      variables: variables to start from; random ones if None.
    """
    if variables is None:
        key = jax.random.key(config.seed, impl="rbg")  # its programs compile several times faster
        fresh = jax.jit(e4e.init, static_argnums=0)(encoder, key=key)
        average = jnp.broadcast_to(networks.prior.mean_w, (encoder.num_styles, encoder.style_dim))
        params = dict(fresh["params"])
        for i in range(encoder.num_styles):
            head = params[f"head_{i}"]
            kernel = head["linear"]["kernel"] * (0.0 if i else 0.1)
            params[f"head_{i}"] = {**head, "linear": {**head["linear"], "kernel": kernel}}
        variables = {"params": params, "batch_stats": {**fresh["batch_stats"], "latent_avg": jnp.array(average)}}
    return TrainState(variables, optimizer(config).init(variables["params"]), jnp.zeros((), jnp.int32))


def _render(generator: StyleGAN2Config, networks: Networks, ws: Array, key: Array) -> Array:
    return stylegan2.synthesize(generator, networks.generator, ws, noise="random", noise_key=key).image


def _image_terms(
    generator: StyleGAN2Config, config: TrainConfig, networks: Networks, ws: Array, images: Array, key: Array
) -> tuple[Array, Array, Array]:
    """Squared error, LPIPS and distance of the styles of each image; [N] each."""
    height, width = images.shape[1:3]
    made = losses.comparable(_render(generator, networks, ws, key), max(height, width), height, width)
    perceptual = lpips.lpips(networks.lpips, made, images, config.lpips_type)
    return losses.mean_squares(made, images), perceptual, losses.delta(ws)


@functools.partial(jax.jit, static_argnames=("encoder", "generator", "config"), donate_argnames="state")
def step(
    encoder: E4EConfig,
    generator: StyleGAN2Config,
    config: TrainConfig,
    networks: Networks,
    state: TrainState,
    images: Array,
) -> tuple[TrainState, Metrics]:
    """One step of Adam.

    Args:
      encoder: sizes of the encoder.
      generator: sizes of the generator.
      config: settings.
      networks: the frozen parameters of generator and LPIPS, and the prior.
      state: the current state; its buffers are donated.
      images: [N, h, w, 3] in [-1, 1], on one device or sharded along the first axis.

    Returns:
      The new state, and the metrics of the batch before the update.
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step), 3)
    with jax.default_matmul_precision("highest"):
        z = jax.random.normal(keys[0], (config.samples, generator.z_dim))
        own = jax.random.fold_in(keys[0], 1)
        labels = stylegan2.draw_labels(generator, config.samples, config.class_idx, key=own)
        true = stylegan2.map_z(generator, networks.generator, z, labels)
        height, width = images.shape[1:3]
        drawn = losses.comparable(_render(generator, networks, true, keys[1]), max(height, width), height, width)
        variance = jnp.var(true, axis=(0, 1)) if config.samples > 1 else jnp.ones(true.shape[-1])
        # One batch for images and samples, so that batch normalization does not treat them differently.
        together = jnp.concatenate((images, jax.lax.stop_gradient(drawn)))

        def objective(params: Any) -> tuple[Array, tuple[Metrics, Any]]:
            variables = {"params": params, "batch_stats": state.variables["batch_stats"]}
            ws, changed = e4e.train_codes(variables, together, encoder)
            count = images.shape[0]
            terms = _image_terms(generator, config, networks, ws[:count], images, keys[2])
            mse, perceptual, delta = (jnp.mean(term) for term in terms)
            styles = jnp.mean(jnp.square(ws[count:] - true)) / jnp.mean(variance) if config.samples else jnp.zeros(())
            loss = (
                config.lambda_mse * mse
                + config.lambda_lpips * perceptual
                + config.lambda_delta * delta
                + config.lambda_w * styles
            )
            return loss, (Metrics(loss, mse, perceptual, delta, styles), changed)

        gradients, (metrics, changed) = jax.grad(objective, has_aux=True)(state.variables["params"])
    params_before = state.variables["params"]
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float32 to an int32 power
        updates, optimizer_state = optimizer(config).update(gradients, state.optimizer, params_before)
    params = optax.apply_updates(params_before, updates)
    return TrainState({"params": params, "batch_stats": changed}, optimizer_state, state.step + 1), metrics


@functools.partial(jax.jit, static_argnames=("encoder", "generator", "config"))
def evaluate(
    encoder: E4EConfig,
    generator: StyleGAN2Config,
    config: TrainConfig,
    networks: Networks,
    variables: Variables,
    images: Array,
) -> tuple[Array, Array, Array, Array]:
    """Compares images with those that the generator makes of their codes.

    Args:
      encoder: sizes of the encoder.
      generator: sizes of the generator.
      config: settings.
      networks: the frozen parameters of generator and LPIPS, and the prior.
      variables: variables of the encoder.
      images: [N, h, w, 3] in [-1, 1].

    Returns:
      Squared error, LPIPS and distance of the styles of each image, [N] each; and the generator's images of the codes,
      at the size of `images`.
    """
    with jax.default_matmul_precision("highest"):
        ws = e4e.encode(variables, images, encoder)
        height, width = images.shape[1:3]
        made = stylegan2.synthesize(generator, networks.generator, ws, noise="const").image
        made = losses.comparable(made, max(height, width), height, width)
        perceptual = lpips.lpips(networks.lpips, made, images, config.lpips_type)
    return losses.mean_squares(made, images), perceptual, losses.delta(ws), made
