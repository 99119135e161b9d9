"""The offset encoder: from what an image still lacks to a correction of all its latents, in one forward pass.

A U-Net over the resolutions of the F layers. It sees the target, the generator's current image, the generator's
features at the output of each block, the masks, and the gradient of the squared error with respect to each latent,
through which the generator's own Jacobian reaches the network. Applied twice or more, each time to the image of the
corrected latents, it is to the offsets what ReStyle (Alaluf et al., ICCV 2021) is to W+.

There is no normalization inside, so that a small error gives a small correction. Arrays are NHWC and float32; images
lie in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from samjax.nets.blocks import Variables

_SLOPE = 0.2  # of the leaky ReLUs
_INSIDE = nn.initializers.variance_scaling(2.0 / (1 + _SLOPE**2), "fan_in", "normal")
_LAST = nn.initializers.variance_scaling(0.1, "fan_in", "normal")  # of a residual block: nearly the identity at first


@dataclasses.dataclass(frozen=True)
class OffsetEncoderConfig:
    """Sizes of an offset encoder.

    Attributes:
      resolutions: pixels a side of the blocks that take offsets, each twice the one before.
      channels: channels of these blocks.
      num_styles: number of styles of W+.
      style_dim: size of a style.
      widths: channels of the U-Net at these resolutions.
      blocks: residual blocks at each resolution, on the way down and on the way up.
      style_width: hidden entries of the correction of W+.
      passes: how often the network is applied to an image.
    """

    resolutions: tuple[int, ...] = (16, 32, 64, 128)
    channels: tuple[int, ...] = (512, 512, 512, 256)
    num_styles: int = 14
    style_dim: int = 512
    widths: tuple[int, ...] = (256, 192, 128, 64)
    blocks: int = 2
    style_width: int = 512
    passes: int = 2

    def __post_init__(self) -> None:
        count = len(self.resolutions)
        if count < 1 or self.resolutions != tuple(self.resolutions[0] << i for i in range(count)):
            raise ValueError(f"each of the resolutions must be twice the one before, not {self.resolutions}")
        for name in ("channels", "widths"):
            if len(getattr(self, name)) != count or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be {count} numbers of at least 1, not {getattr(self, name)}")


# --- blocks ---


class Residual(nn.Module):
    """Two 3x3 convolutions, added to their input."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = functools.partial(nn.Conv, x.shape[-1], (3, 3))
        y = nn.leaky_relu(conv(kernel_init=_INSIDE, name="conv0")(nn.leaky_relu(x, _SLOPE)), _SLOPE)
        return x + conv(kernel_init=_LAST, name="conv1")(y)


class StyleCorrection(nn.Module):
    """Corrects each style by what the coarsest level sees, by the style itself, and by its gradient."""

    config: OffsetEncoderConfig

    @nn.compact
    def __call__(self, x: Array, styles: Array, gradient: Array) -> Array:
        config = self.config
        pooled = nn.Dense(config.style_width, name="image")(jnp.mean(nn.leaky_relu(x, _SLOPE), axis=(1, 2)))
        both = jnp.concatenate((styles, gradient), axis=-1)
        own = nn.Dense(config.style_width, use_bias=False, name="style")(both)
        place = self.param("place", nn.initializers.normal(0.1), (config.num_styles, config.style_width))
        hidden = nn.leaky_relu(pooled[:, None] + own + place, _SLOPE)
        return nn.Dense(config.style_dim, kernel_init=nn.initializers.zeros, name="out")(hidden)


# --- network ---


class OffsetEncoder(nn.Module):
    """The U-Net; use it through the functions below, which take `variables`."""

    config: OffsetEncoderConfig

    @nn.compact
    def __call__(
        self,
        pair: Array,
        styles: Array,
        style_gradient: Array,
        features: Mapping[int, Array],
        gradients: Mapping[int, Array],
        masks: Mapping[int, Array],
    ) -> tuple[Array, dict[int, Array]]:
        config = self.config
        sizes = dict(zip(config.resolutions, config.channels, strict=True))
        constant = lambda name, size: self.variable("batch_stats", name, jnp.ones, (size,)).value  # noqa: E731
        style_mean, style_scale = constant("style_mean", config.style_dim), constant("style_scale", config.style_dim)
        style_slope = constant("style_slope", config.style_dim)
        scales = {r: constant(f"scale_{r}", size) for r, size in sizes.items()}
        slopes = {r: constant(f"slope_{r}", size) for r, size in sizes.items()}
        styles, style_gradient = (styles - style_mean) / style_scale, style_gradient / style_slope
        levels = list(enumerate(config.resolutions))
        kept, x = {}, None
        for i, r in reversed(levels):
            near = [features[r] / scales[r], gradients[r] / slopes[r], *(_resize(masks[s], r) for s in sizes)]
            if x is None:
                near.append(_space_to_depth(pair, pair.shape[1] // r))
            y = nn.Conv(config.widths[i], (3, 3), kernel_init=_INSIDE, name=f"in_{r}")(jnp.concatenate(near, axis=-1))
            if x is not None:
                y = y + nn.Conv(config.widths[i], (2, 2), (2, 2), kernel_init=_INSIDE, name=f"down_{r}")(x)
            for j in range(config.blocks):
                y = Residual(name=f"down_{r}_{j}")(y)
            kept[r] = x = y
        assert x is not None
        change = StyleCorrection(config, name="styles")(x, styles, style_gradient)
        offsets = {}
        for i, r in levels:
            if i:
                up = nn.Conv(config.widths[i], (1, 1), kernel_init=_INSIDE, name=f"up_{r}")(x)
                x = kept[r] + jnp.repeat(jnp.repeat(up, 2, axis=1), 2, axis=2)
                for j in range(config.blocks):
                    x = Residual(name=f"up_{r}_{j}")(x)
            last = nn.Conv(config.channels[i], (3, 3), kernel_init=nn.initializers.zeros, name=f"out_{r}")
            offsets[r] = last(nn.leaky_relu(x, _SLOPE)) * scales[r]
        return change * style_scale, offsets


def _space_to_depth(x: Array, factor: int) -> Array:
    """Moves blocks of pixels into channels; [N, H, W, C] to [N, H / factor, W / factor, factor^2 C]."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // factor, factor, w // factor, factor, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // factor, w // factor, factor * factor * c)


def _resize(mask: Array, size: int) -> Array:
    """A mask [N, r, r, 1] at another power of two: means of blocks, or repeated pixels."""
    r = mask.shape[1]
    if r >= size:
        return jnp.mean(_space_to_depth(mask, r // size), axis=-1, keepdims=True)
    return jnp.repeat(jnp.repeat(mask, size // r, axis=1), size // r, axis=2)


# --- functions ---


def init(config: OffsetEncoderConfig, *, key: Array) -> Variables:
    """Random variables, whose corrections are zero; `jax.eval_shape` of this function is the tree that files hold.

    Returns:
      {"params": …, "batch_stats": …}; "batch_stats" holds the mean style, and the standard deviations of styles, of
      features, and of the gradients with respect to both. These belong to the generator and are not trained; they are 1
      here.
    """
    zeros = {r: jnp.zeros((1, r, r, c)) for r, c in zip(config.resolutions, config.channels, strict=True)}
    masks = {r: jnp.zeros((1, r, r, 1)) for r in config.resolutions}
    styles, size = jnp.zeros((1, config.num_styles, config.style_dim)), 2 * config.resolutions[-1]
    return OffsetEncoder(config).init(key, jnp.zeros((1, size, size, 6)), styles, styles, zeros, zeros, masks)


def correct(
    variables: Variables,
    targets: Array,
    images: Array,
    styles: Array,
    style_gradient: Array,
    features: Mapping[int, Array],
    gradients: Mapping[int, Array],
    masks: Mapping[int, Array],
    config: OffsetEncoderConfig,
) -> tuple[Array, dict[int, Array]]:
    """Corrections of latents whose image is not yet the target.

    Args:
      variables: as returned by `init`, or trained.
      targets: [N, R, R, 3], letterboxed to a square; R is a multiple of the highest resolution.
      images: [N, R, R, 3], the generator's images of the current latents, with the same rows and columns empty.
      styles: [N, num_styles, style_dim], the current W+.
      style_gradient: likewise, the gradient with respect to them of half the squared error, summed over pixels.
      features: {r: [N, r, r, C]}, outputs of the generator's blocks.
      gradients: likewise, the gradients with respect to the offsets.
      masks: {r: [N, r, r, 1]} in [0, 1].
      config: sizes of the network.

    Returns:
      What to add to the styles, and to the offsets {r: [N, r, r, C]}.
    """
    pair = jnp.concatenate((targets, images), axis=-1)
    return OffsetEncoder(config).apply(  # type: ignore[return-value]
        variables, pair, styles, style_gradient, features, gradients, masks
    )
