"""Training of an offset encoder for a generator: from an image, its code and any masks to offsets of all F layers.

The loss is that of the inversion itself, through the frozen generator, after each of a few passes. Every segment of an
image takes a random layer in each step, so that the network serves whatever masks are chosen later.

Steps are pure and shardable like those of `samjax.training.predictor`. `samjax.training.recipes.train_offsets` runs a
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

from samjax import learned_start, losses
from samjax.inversion import Networks
from samjax.latents import LATENT_NAMES, RESOLUTIONS, init_latents, latent_layers, synthesize_latents
from samjax.nets import e4e, lpips, offset_encoder, stylegan2
from samjax.nets.blocks import Variables
from samjax.nets.e4e import E4EConfig
from samjax.nets.offset_encoder import OffsetEncoderConfig
from samjax.nets.stylegan2 import StyleGAN2Config
from samjax.training import schedules


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How an offset encoder is trained. A step has a loss after each pass of the network.

    Attributes:
      num_steps: length of the run, over which the learning rate falls to 0 along a cosine.
      lr: learning rate of Adam.
      warmup: steps in which the learning rate rises linearly.
      single: fraction of the images that use one layer everywhere.
      max_segments: segments that can have layers of their own; labels from there on share them.
      lambda_mse: weight of the squared error of the images.
      lambda_lpips: weight of the LPIPS of the images.
      lambda_f_rec: weight of the squared offsets.
      lambda_delta: weight of the distance between the styles. The defaults of these four are the inversion's.
      lambda_style: weight of the squared correction of W+, relative to the variance of W. Without it some images move
        far out of W, where edits lose strength.
      lambda_alone: weight of squared error and LPIPS, weighted as above, of the image of W+ without offsets. Edits act
        on W+: with it offsets leave to W+ what W+ can reproduce.
      lpips_type: LPIPS network of the loss.
      lpips_crop: pixels a side of the random part of each image on which LPIPS is computed; 0 for whole images. Half
        the size takes a quarter of the time.
      average: decay of the running average of the weights, which is the network that is kept.
      seed: seed of the initial weights, the layers and the crops.
    """

    num_steps: int = 20_000
    lr: float = 1e-3
    warmup: int = 100
    single: float = 0.25
    max_segments: int = 64
    lambda_mse: float = 1.0
    lambda_lpips: float = 1.0
    lambda_f_rec: float = 5.0
    lambda_delta: float = 1e-3
    lambda_style: float = 0.02
    lambda_alone: float = 0.5
    lpips_type: lpips.Net = "vgg"
    lpips_crop: int = 0
    average: float = 0.995
    seed: int = 0


class Batch(NamedTuple):
    """A batch of B images.

    Attributes:
      images: [B, h, w, 3] in [-1, 1].
      segments: [B, h, w], labels from 0.
    """

    images: Any
    segments: Any


class Frozen(NamedTuple):
    """All frozen parameters: those of the generator and LPIPS, with the prior, and those of the e4e encoder."""

    networks: Networks
    encoder: Variables


class TrainState(NamedTuple):
    """The state of a training between two steps: a pytree of arrays, from which a run resumes exactly.

    Attributes:
      variables: the running average of the network's variables.
      params: the parameters themselves.
      optimizer: moments and schedule of Adam.
      step: [] int32, steps taken.
    """

    variables: Mapping[str, Any]
    params: Any
    optimizer: optax.OptState
    step: Array


class Metrics(NamedTuple):
    """The loss of a batch, summed over passes, and its terms after the last pass, before weighting; arrays []."""

    loss: Array
    mse: Array
    lpips: Array
    f_rec: Array
    delta: Array
    style: Array
    alone: Array


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The schedule of the learning rate: half a cosine over the run, times a linear warm-up."""
    return schedules.warmup_cosine(config.lr, config.num_steps, config.warmup)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam with the schedule of `learning_rate`, and gradients of at most unit norm."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate(config), b1=0.9, b2=0.99))


def init(
    network: OffsetEncoderConfig,
    config: TrainConfig,
    generator: StyleGAN2Config,
    networks: Networks,
    variables: Variables | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      network: sizes of the offset encoder.
      config: settings.
      generator: sizes of the generator.
      networks: the generator's parameters.
      variables: variables to start from; random ones, with the generator's constants, if None.
    """
    if variables is None:
        key = jax.random.key(config.seed, impl="rbg")  # its programs compile several times faster
        fresh = jax.jit(offset_encoder.init, static_argnums=0)(network, key=key)
        constants = learned_start.statistics(network, generator, networks.generator, key=jax.random.key(config.seed))
        variables = {"params": fresh["params"], "batch_stats": constants}
    params = jax.tree.map(jnp.array, variables["params"])
    return TrainState(variables, params, optimizer(config).init(params), jnp.zeros((), jnp.int32))


def random_masks(
    config: TrainConfig, names: tuple[str, ...], segments: Array, size: int, key: Array
) -> dict[str, Array]:
    """Masks of images whose segments each take a random layer, or all the same one.

    Args:
      config: settings.
      names: names of the latent layers, with W+ first.
      segments: [B, h, w], labels from 0.
      size: pixels a side of the square into which the images are letterboxed.
      key: random key.

    Returns:
      {"F4": [B, 16, 16, 1], ...} in [0, 1].
    """
    count = segments.shape[0]
    keys = jax.random.split(key, 3)
    each = jax.random.randint(keys[0], (count, config.max_segments), 0, len(names))
    same = jax.random.uniform(keys[1], (count, 1)) < config.single
    each = jnp.where(same, jax.random.randint(keys[2], (count, 1), 0, len(names)), each)
    layer_maps = jnp.take_along_axis(each, (segments % config.max_segments).reshape(count, -1), axis=1)
    layer_maps = losses.letterbox(layer_maps.reshape(*segments.shape, 1), size, -1)
    return {
        name: losses.reduce_area((layer_maps == i).astype(jnp.float32), RESOLUTIONS[name])
        for i, name in enumerate(names)
        if name != "W+"
    }


def _terms(
    generator: StyleGAN2Config,
    config: TrainConfig,
    networks: Networks,
    latents: Mapping[str, Array],
    start: Mapping[str, Array],
    style_scale: Array,
    masks: Mapping[str, Array],
    images: Array,
    corner: Array | None,
) -> tuple[Array, ...]:
    """The terms of each image, [B] each, in the order of `total`; and the images made."""
    height, width = images.shape[1:3]

    def part(x: Array) -> Array:
        if corner is None:
            return x
        size = (x.shape[0], config.lpips_crop, config.lpips_crop, 3)
        return jax.lax.dynamic_slice(x, (0, corner[0], corner[1], 0), size)

    def compare(image: Array) -> tuple[Array, Array, Array]:
        made = losses.comparable(image, max(height, width), height, width)
        perceptual = lpips.lpips(networks.lpips, part(made), part(images), config.lpips_type)
        return made, losses.mean_squares(made, images), perceptual

    made, mse, perceptual = compare(synthesize_latents(generator, networks.generator, latents, masks).image)
    alone = jnp.zeros_like(mse)
    if config.lambda_alone:
        _, own_mse, own_lpips = compare(stylegan2.synthesize(generator, networks.generator, latents["W+"]).image)
        alone = config.lambda_mse * own_mse + config.lambda_lpips * own_lpips
    zeros = {name: jnp.zeros_like(value) for name, value in latents.items()}
    masked = {name: value * masks.get(name, 1.0) for name, value in latents.items()}
    offsets = losses.offset_distance(masked, zeros) + jnp.zeros_like(mse)
    moved = losses.mean_squares(latents["W+"] / style_scale, start["W+"] / style_scale)
    return mse, perceptual, offsets, losses.delta(latents["W+"]), moved, alone, made


def total(config: TrainConfig, mse: Any, perceptual: Any, f_rec: Any, delta: Any, style: Any, alone: Any) -> Any:
    """The loss, of arrays or numbers: the weighted sum of its terms."""
    return (
        config.lambda_mse * mse
        + config.lambda_lpips * perceptual
        + config.lambda_f_rec * f_rec
        + config.lambda_delta * delta
        + config.lambda_style * style
        + config.lambda_alone * alone
    )


@functools.partial(jax.jit, static_argnames=("network", "encoder", "generator", "config"), donate_argnames="state")
def step(
    network: OffsetEncoderConfig,
    encoder: E4EConfig,
    generator: StyleGAN2Config,
    config: TrainConfig,
    frozen: Frozen,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One step of Adam.

    Args:
      network: sizes of the offset encoder.
      encoder: sizes of the e4e encoder.
      generator: sizes of the generator.
      config: settings.
      frozen: the frozen parameters.
      state: the current state; its buffers are donated.
      batch: the batch, on one device or sharded along its first axis.

    Returns:
      The new state, and the metrics of the batch before the update.
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step), 2)
    names = _names(network)
    images, networks = batch.images, frozen.networks
    height, width = images.shape[1:3]
    with jax.default_matmul_precision("highest"):
        masks = random_masks(config, names, batch.segments, max(height, width), keys[0])
        start = _start(generator, names, encoder, frozen.encoder, images)
        corners = [None] * network.passes
        if 0 < config.lpips_crop < min(height, width):
            most = jnp.array([height, width]) - config.lpips_crop + 1
            corners = [jax.random.randint(jax.random.fold_in(keys[1], i), (2,), 0, most) for i in range(network.passes)]

        scale = state.variables["batch_stats"]["style_scale"]

        def objective(params: Any) -> tuple[Array, Metrics]:
            variables = {"params": params, "batch_stats": state.variables["batch_stats"]}
            latents, loss, means = start, jnp.zeros(()), []
            for corner in corners:
                latents = learned_start.correct(
                    network, variables, generator, networks.generator, images, masks, latents
                )
                terms = _terms(generator, config, networks, latents, start, scale, masks, images, corner)
                means = [jnp.mean(term) for term in terms[:-1]]
                loss += total(config, *means)
            return loss, Metrics(loss, *means)

        gradients, metrics = jax.grad(objective, has_aux=True)(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float32 to an int32 power
        updates, optimizer_state = optimizer(config).update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # At first the average is over all steps so far, so that the initial weights do not stay in it.
    taken = state.step.astype(jnp.float32)
    decay = jnp.minimum(config.average, (taken + 1.0) / (taken + 10.0))
    average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.variables["params"], params)
    variables = {"params": average, "batch_stats": state.variables["batch_stats"]}
    return TrainState(variables, params, optimizer_state, state.step + 1), metrics


@functools.partial(jax.jit, static_argnames=("network", "encoder", "generator", "config"))
def evaluate(
    network: OffsetEncoderConfig,
    encoder: E4EConfig,
    generator: StyleGAN2Config,
    config: TrainConfig,
    frozen: Frozen,
    variables: Variables,
    batch: Batch,
    key: Array,
) -> tuple[Array, ...]:
    """Compares images with those that the generator makes of their latents, after all passes.

    Args:
      network: sizes of the offset encoder.
      encoder: sizes of the e4e encoder.
      generator: sizes of the generator.
      config: settings.
      frozen: the frozen parameters.
      variables: variables of the offset encoder.
      batch: the images, whose segments take random layers.
      key: random key of the layers.

    Returns:
      The terms of each image in the order of `total`, [B] each, with the LPIPS of whole images; and the images made, at
      the size of the batch's.
    """
    names, images = _names(network), batch.images
    with jax.default_matmul_precision("highest"):
        masks = random_masks(config, names, batch.segments, max(images.shape[1:3]), key)
        latents = start = _start(generator, names, encoder, frozen.encoder, images)
        scale = variables["batch_stats"]["style_scale"]
        for _ in range(network.passes):
            latents = learned_start.correct(
                network, variables, generator, frozen.networks.generator, images, masks, latents
            )
        return _terms(generator, config, frozen.networks, latents, start, scale, masks, images, None)


def _names(network: OffsetEncoderConfig) -> tuple[str, ...]:
    return tuple(name for name in LATENT_NAMES if name == "W+" or RESOLUTIONS[name] in network.resolutions)


def _start(
    generator: StyleGAN2Config, names: tuple[str, ...], encoder: E4EConfig, variables: Variables, images: Array
) -> dict[str, Array]:
    return init_latents(latent_layers(generator, names), e4e.encode(variables, images, encoder))
