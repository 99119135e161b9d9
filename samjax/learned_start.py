"""The learned start: latents of all layers by an offset encoder, in a few forward passes instead of many steps.

The paper (SAM, CVPR 2022) has encoders for each latent space beside optimization, but no code for them. Here one
network serves all layers and any masks. It looks at the generator's current image as an optimizer does, through its
gradient, but predicts the correction instead of taking a small step.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from samjax import batching, losses
from samjax.errors import UserError
from samjax.latents import RESOLUTIONS, Latents, Masks, by_resolution, synthesize_latents
from samjax.nets import offset_encoder, stylegan2
from samjax.nets.blocks import Variables
from samjax.nets.offset_encoder import OffsetEncoderConfig
from samjax.nets.stylegan2 import Noise, Params, StyleGAN2Config


def check(config: OffsetEncoderConfig, generator: StyleGAN2Config) -> None:
    """Checks that an offset encoder is for generators of these sizes.

    Raises:
      UserError: it is for others.
    """
    wanted = (generator.num_ws, generator.w_dim, tuple(generator.channels(r) for r in config.resolutions))
    found = (config.num_styles, config.style_dim, config.channels)
    if config.resolutions[-1] >= generator.img_resolution or wanted != found:
        raise UserError(
            f"the offset encoder is for a generator of {found[0]} styles of {found[1]}, and {list(found[2])} channels"
            f" at {list(config.resolutions)} px, not for this one: use networks that belong together"
        )


def gradient_inputs(
    generator: StyleGAN2Config, params: Params, targets: Array, masks: Masks, latents: Latents,
    noise: Noise = "const",
) -> tuple[Array, dict[int, Array], dict[str, Array]]:  # fmt: skip
    """What the network sees of latents: their image, the outputs of the blocks, and the gradient of the squared error.

    Args:
      generator: sizes of the generator.
      params: its parameters.
      targets: [N, h, w, 3] in [-1, 1].
      masks: {"F4": [N, 16, 16, 1], ...}.
      latents: {"W+": [N, num_ws, w_dim], "F4": [N, 16, 16, C], ...}.
      noise: the generator's noise, "const" or "none".

    Returns:
      Images [N, h, w, 3]; features {16: [N, 16, 16, C], ...}; and the gradient, of half the squared error summed over
      pixels and channels, with respect to the latents.
    """
    height, width = targets.shape[1:3]

    def error(latents: Latents) -> tuple[Array, tuple[Array, dict[int, Array]]]:
        made = synthesize_latents(generator, params, latents, masks, noise=noise)
        images = losses.comparable(made.image, max(height, width), height, width)
        return 0.5 * jnp.sum(jnp.square(images - targets)), (images, made.features)

    gradient, (images, features) = jax.grad(error, has_aux=True)(dict(latents))
    return images, features, gradient


def correct(
    config: OffsetEncoderConfig,
    variables: Variables,
    generator: StyleGAN2Config,
    params: Params,
    targets: Array,
    masks: Masks,
    latents: Latents,
    *,
    noise: Noise = "const",
) -> dict[str, Array]:
    """One pass: latents that reproduce the targets better than `latents`.

    Args:
      config: sizes of the offset encoder.
      variables: its variables. Gradients with respect to them pass; those with respect to `latents` do not.
      generator: sizes of the generator.
      params: its parameters.
      targets: [N, h, w, 3] in [-1, 1].
      masks: {"F4": [N, 16, 16, 1], ...}.
      latents: {"W+": [N, num_ws, w_dim], "F4": [N, 16, 16, C], ...}, for all F layers of the offset encoder.
      noise: the generator's noise, "const" or "none".
    """
    latents = jax.lax.stop_gradient(dict(latents))
    images, features, gradient = jax.lax.stop_gradient(
        gradient_inputs(generator, params, targets, masks, latents, noise)
    )
    square = functools.partial(losses.letterbox, size=max(targets.shape[1:3]))
    styles, offsets = offset_encoder.correct(
        variables, square(targets), square(images), latents["W+"], gradient["W+"], features, by_resolution(gradient),
        by_resolution(masks), config,
    )  # fmt: skip
    changes = {"W+": styles, **{name: offsets[RESOLUTIONS[name]] for name in latents if name != "W+"}}
    return {name: latents[name] + changes[name] for name in latents}


@functools.partial(jax.jit, static_argnames=("config", "generator", "noise", "precision"))
def _correct(
    config: OffsetEncoderConfig, variables: Variables, generator: StyleGAN2Config, params: Params, targets: Array,
    masks: Masks, latents: Latents, noise: Noise, precision: str,
) -> dict[str, Array]:  # fmt: skip
    with jax.default_matmul_precision(precision):
        return correct(config, variables, generator, params, targets, masks, latents, noise=noise)


def learned_latents(
    config: OffsetEncoderConfig,
    variables: Variables,
    generator: StyleGAN2Config,
    params: Params,
    targets: np.ndarray,
    masks: Masks,
    start: Latents,
    *,
    noise: Literal["const", "none"] = "const",
    precision: str = "highest",
    batch_size: int = 1,
) -> dict[str, np.ndarray]:
    """Latents of targets by a trained offset encoder: `config.passes` passes, each of which sees the image that the one
    before it left.

    Args:
      config: sizes of the offset encoder.
      variables: its variables.
      generator: sizes of the generator.
      params: its parameters.
      targets: [N, h, w, 3] in [-1, 1].
      masks: {"F4": [N, 16, 16, 1], ...} in [0, 1]; any of the offset encoder's layers.
      start: {"W+": [N, num_ws, w_dim], "F4": [N, 16, 16, C], ...}, an encoder's codes and zeros, of the same layers.
      noise: the generator's noise.
      precision: precision of convolutions.
      batch_size: targets in one pass.
    """

    def whole(items: tuple[Array, Masks, Latents]) -> dict[str, Array]:
        targets, masks, latents = items
        for _ in range(config.passes):
            latents = _correct(config, variables, generator, params, targets, masks, latents, noise, precision)
        return dict(latents)

    count = len(targets)
    masks, latents = dict(masks), dict(start)
    for name, r in RESOLUTIONS.items():  # the network always sees all of its layers
        if r in config.resolutions and name not in start:
            masks[name] = np.zeros((count, r, r, 1), np.float32)
            latents[name] = np.zeros((count, r, r, generator.channels(r)), np.float32)
    found = batching.map_batches(whole, (np.asarray(targets, np.float32), masks, latents), batch_size)
    return {name: found[name] for name in start}


# --- what belongs to the generator ---


@functools.partial(jax.jit, static_argnames=("config", "generator", "samples"))
def statistics(
    config: OffsetEncoderConfig, generator: StyleGAN2Config, params: Params, *, key: Array, samples: int = 16
) -> dict[str, Array]:
    """The constants of an offset encoder: how large styles, features and gradients of a generator are.

    They are measured on samples, and on the error between samples and others.

    Args:
      config: sizes of the offset encoder.
      generator: sizes of the generator.
      params: its parameters.
      key: random key.
      samples: number of samples.

    Returns:
      Its "batch_stats".
    """
    names = {name: r for name, r in RESOLUTIONS.items() if r in config.resolutions}
    size = 2 * config.resolutions[-1]

    def moments(key: Array) -> dict[str, tuple[Array, Array]]:
        """Means and mean squares, over all axes but the last, of a sample and of the error between it and another."""
        z = jax.random.normal(key, (2, generator.z_dim))
        labels = stylegan2.draw_labels(generator, 2, None, key=jax.random.fold_in(key, 1))
        ws = stylegan2.map_z(generator, params, z, labels)
        made = stylegan2.synthesize(generator, params, ws)
        latents = {"W+": ws, **{name: jnp.zeros_like(made.features[r]) for name, r in names.items()}}
        others = losses.comparable(made.image[::-1], size, size, size)
        masks = {name: jnp.ones((2, r, r, 1)) for name, r in names.items()}
        _, _, gradient = gradient_inputs(generator, params, others, masks, latents)
        seen = {"style": ws, "style_slope": gradient["W+"]}
        seen |= {f"scale_{r}": made.features[r] for r in names.values()}
        seen |= {f"slope_{r}": gradient[name] for name, r in names.items()}
        mean = lambda x: jnp.mean(x, axis=tuple(range(x.ndim - 1)))  # noqa: E731
        return {name: (mean(value), mean(jnp.square(value))) for name, value in seen.items()}

    with jax.default_matmul_precision("highest"):
        found = jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(moments, jax.random.split(key, samples // 2)))
    spread = {name: jnp.sqrt(jnp.maximum(square - mean**2, 1e-12)) for name, (mean, square) in found.items()}
    return {"style_mean": found["style"][0], "style_scale": spread.pop("style"), **spread}
