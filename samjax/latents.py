"""The latent layers of a generator: their names, shapes and start, and the image they form.

W+ holds one style for every layer. F4, F6, F8 and F10 are offsets, one per pixel and channel, added to the output
of the generator's 16, 32, 64 and 128 px block where a mask allows it. SAM (CVPR 2022), section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from samjax.errors import UserError
from samjax.nets import stylegan2
from samjax.nets.stylegan2 import Noise, Params, StyleGAN2Config, Synthesis

Latents = Mapping[str, Any]
"""{"W+": [N, num_ws, w_dim], "F4": [N, 16, 16, C], ...}; any subset of the F layers."""
Masks = Mapping[str, Any]
"""{"F4": [N, 16, 16, 1], ...} in [0, 1], for the F layers."""

RESOLUTIONS = {"F4": 16, "F6": 32, "F8": 64, "F10": 128}
"""Resolution of the block whose output an offset changes."""

LATENT_NAMES = ("W+", *RESOLUTIONS)
"""All latent layers, the most editable first."""


class LatentLayer(NamedTuple):
    """One latent layer.

    Attributes:
      name: such as "W+" or "F4".
      resolution: resolution of its block; None for W+, which acts on all blocks.
      shape: shape of one image's latent.
    """

    name: str
    resolution: int | None
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        return self.shape[-1]


def latent_layers(config: StyleGAN2Config, names: Sequence[str] = LATENT_NAMES) -> tuple[LatentLayer, ...]:
    """The latent layers among `names` that the generator has, the most editable first; W+ is always among them.

    An offset at the last block has no effect, since that block's RGB is computed before it: only layers below the
    image's resolution count.
    """
    layers = [LatentLayer("W+", None, (config.num_ws, config.w_dim))]
    for name, resolution in RESOLUTIONS.items():
        if name in names and resolution < config.img_resolution:
            layers.append(LatentLayer(name, resolution, (resolution, resolution, config.channels(resolution))))
    return tuple(layers)


def parse_latent_names(text: str, config: StyleGAN2Config | None = None) -> tuple[str, ...]:
    """Reads a list such as "W+,F4"; the result includes W+ and is ordered, the most editable first.

    Args:
      text: names separated by commas.
      config: sizes of a generator; if given, layers that it lacks are errors too.

    Raises:
      UserError: a name is not a latent layer, or not one of this generator.

    >>> parse_latent_names("F10, F4")
    ('W+', 'F4', 'F10')
    """
    valid = LATENT_NAMES if config is None else tuple(layer.name for layer in latent_layers(config))
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in valid]
    if unknown:
        whose = "the latent layers are" if config is None else f"a {config.img_resolution} px generator has"
        raise UserError(f"unknown latent layer {', '.join(map(repr, unknown))}: {whose} {', '.join(valid)}")
    return tuple(name for name in valid if name in names or name == "W+")


def init_latents(layers: Sequence[LatentLayer], ws: Array) -> dict[str, Array]:
    """Latents at the start of an optimization: W+ at `ws`, every offset at zero.

    Args:
      layers: as returned by `latent_layers`.
      ws: [N, num_ws, w_dim], or one style [N, w_dim] for all layers.
    """
    ws = jnp.asarray(ws, jnp.float32)
    if ws.ndim == 2:
        ws = jnp.broadcast_to(ws[:, None], (ws.shape[0], *layers[0].shape))
    if ws.shape[1:] != layers[0].shape:
        raise ValueError(f"W+ has shape {ws.shape[1:]}, expected {layers[0].shape}")
    count = ws.shape[0]
    return {layer.name: ws if layer.resolution is None else jnp.zeros((count, *layer.shape)) for layer in layers}


def single_layer_masks(layers: Sequence[LatentLayer]) -> dict[str, Array]:
    """Masks of single-layer inversions, as a batch of L: item i uses W+ and, everywhere, layer i.

    The authors' single-layer inversions add their one offset without a mask; with ones for that layer and zeros for
    the others the image and all gradients are the same.
    """
    return {
        layer.name: jnp.zeros((len(layers), layer.resolution, layer.resolution, 1)).at[i].set(1.0)
        for i, layer in enumerate(layers)
        if layer.resolution is not None
    }


def by_resolution(values: Mapping[str, Array]) -> dict[int, Array]:
    """The F entries of latents or masks, keyed by block resolution as the generator takes them."""
    return {RESOLUTIONS[name]: value for name, value in values.items() if name in RESOLUTIONS}


def synthesize_latents(
    config: StyleGAN2Config,
    params: Params,
    latents: Latents,
    masks: Masks,
    *,
    noise: Noise = "const",
    noise_keys: Array | None = None,
    half_precision: bool = False,
) -> Synthesis:
    """The images of latents, in one forward pass.

    Args:
      config: sizes of the generator.
      params: its parameters.
      latents: W+ and any F layers; those without an entry in `masks` act everywhere.
      masks: soft masks in [0, 1].
      noise: "const", "none", or "random" with `noise_keys`.
      noise_keys: random keys [N], one for each item, so that an item's noise does not depend on its neighbors.
      half_precision: runs the four highest resolutions in bfloat16.

    Returns:
      `Synthesis`: images [N, R, R, 3] and the output of each block, offsets included.
    """
    ws, offsets, weights = latents["W+"], by_resolution(latents), by_resolution(masks)
    synthesize = functools.partial(stylegan2.synthesize, config, params, noise=noise, half_precision=half_precision)
    if noise != "random":
        return synthesize(ws, offsets=offsets, masks=weights)
    if noise_keys is None:
        raise ValueError("random noise needs noise_keys, one for each item")
    if ws.shape[0] == 1:
        return synthesize(ws, noise_key=noise_keys[0], offsets=offsets, masks=weights)

    def one(ws: Array, offsets: dict[int, Array], weights: dict[int, Array], key: Array) -> Synthesis:
        batch = jax.tree.map(lambda x: x[None], (ws, offsets, weights))
        synthesis = synthesize(batch[0], noise_key=key, offsets=batch[1], masks=batch[2])
        return jax.tree.map(lambda x: x[0], synthesis)

    return jax.vmap(one)(ws, offsets, weights, noise_keys)


@functools.partial(jax.jit, static_argnames=("config", "noise", "precision"))
def draw(
    config: StyleGAN2Config, params: Params, latents: Latents, masks: Masks, *, noise: Noise = "const",
    precision: str = "highest",
) -> tuple[Array, dict[int, Array]]:  # fmt: skip
    """The images of latents [N, R, R, 3], and block outputs at their F layers, {16: [N, 16, 16, C], ...}, offsets
    included. One program gives both, so that renderings and edits share it.
    """
    with jax.default_matmul_precision(precision):
        made = synthesize_latents(config, params, latents, masks, noise=noise)
    return made.image, {r: made.features[r] for name, r in RESOLUTIONS.items() if name in latents}
