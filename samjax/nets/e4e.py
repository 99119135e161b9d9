"""The e4e encoder (Tov et al., "Designing an Encoder for StyleGAN Image Manipulation", SIGGRAPH 2021) in Flax Linen.

It maps an image to one style for each layer of a StyleGAN2, with the same numbers as the authors' PyTorch code in
evaluation mode. A face recognizer's residual network with squeeze-excitation (IR-SE-50; Deng et al., "ArcFace",
CVPR 2019) computes features at 1/4, 1/8 and 1/16 of the size. A feature pyramid adds coarser levels to finer ones,
and the heads of some styles are attached to each level. Style 0 is the output of its head plus the average style; every
other style is style 0 plus the output of its own head.

Widths and depths are configurable, so that a simple image domain can use an encoder of a few MB.

Arrays are NHWC and float32; images lie in [-1, 1]. Pass variables through `jax.jit` as arguments instead of closing
over them. Convolutions follow JAX's precision setting; see `samjax.nets.lpips`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from samjax.nets import blocks
from samjax.nets.blocks import Variables

_LEVEL_STARTS = (0, 3, 7)  # first style on each level of the pyramid, coarsest first
_REDUCTION = 16  # factor by which a squeeze-excitation reduces channels
_SLOPE = 0.01  # of the leaky ReLU in the heads


@dataclasses.dataclass(frozen=True)
class E4EConfig:
    """Sizes of an encoder; the defaults are the authors', for a 1024 px generator.

    Attributes:
      num_styles: number of styles, 2 log2(R) - 2 for a generator of R px; even, from 4 to 18.
      style_dim: size of a style.
      widths: channels of the four stages. The stem has as many as the first stage, the pyramid as the last.
      blocks: residual blocks in each of the four stages; (3, 4, 14, 3) is IR-SE-50.
      head_width: channels of the convolutions in the heads.
      head_depth: convolutions of a head on the coarsest level; there is one more on each finer level.
    """

    num_styles: int = 18
    style_dim: int = 512
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (3, 4, 14, 3)
    head_width: int = 512
    head_depth: int = 4

    def __post_init__(self) -> None:
        if self.num_styles % 2 or not 4 <= self.num_styles <= 18:
            raise ValueError(f"num_styles must be an even number from 4 to 18, not {self.num_styles}")
        for name in ("widths", "blocks"):
            if len(getattr(self, name)) != 4 or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be four numbers of at least 1, not {getattr(self, name)}")
        for name in ("style_dim", "head_width", "head_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def max_size(self) -> int:
        """Largest height and width, in pixels, that four stages and `head_depth` convolutions reduce to one pixel."""
        return 2 ** (4 + self.head_depth)


# --- blocks ---


class PReLU(nn.Module):
    """ReLU with a learned slope per channel for negative inputs (He et al., ICCV 2015)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.where(x < 0, slope * x, x)


class SqueezeExcite(nn.Module):
    """Scales each channel by a factor in (0, 1) computed from the means of all channels (Hu et al., CVPR 2018)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = nn.relu(blocks.conv(max(channels // _REDUCTION, 1), 1, name="fc1")(y))
        return x * nn.sigmoid(blocks.conv(channels, 1, name="fc2")(y))


class EqualDense(nn.Module):
    """Dense layer with equalized learning rate: the kernel is stored without its factor 1 / sqrt(inputs)."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x @ (kernel / math.sqrt(x.shape[-1])) + bias


class ResidualBlock(nn.Module):
    """Residual block of an IR-SE network; the shortcut is a projection where the number of channels changes.

    Attributes:
      features: output channels.
      stride: stride of the second convolution and of the shortcut.
      train: whether to normalize by the batch and update the running statistics.
    """

    features: int
    stride: int = 1
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = functools.partial(blocks.batch_norm, use_running_average=not self.train)
        y = blocks.conv(self.features, name="conv1")(norm(name="bn1")(x))
        y = blocks.conv(self.features, stride=self.stride, name="conv2")(PReLU(name="prelu")(y))
        y = SqueezeExcite(name="se")(norm(name="bn2")(y))
        if x.shape[-1] == self.features:
            return x[:, :: self.stride, :: self.stride] + y
        shortcut = blocks.conv(self.features, 1, self.stride, name="shortcut_conv")(x)
        return norm(name="shortcut_bn")(shortcut) + y


class Head(nn.Module):
    """Maps a level of the pyramid to one style [N, style_dim] by `depth` convolutions of stride 2."""

    width: int
    depth: int
    style_dim: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.depth):
            x = nn.leaky_relu(blocks.conv(self.width, stride=2, bias=True, name=f"conv{i}")(x), _SLOPE)
        return EqualDense(self.style_dim, name="linear")(x[:, 0, 0])


# --- network ---


class Encoder(nn.Module):
    """Backbone, pyramid and heads; use it through the functions below, which take `variables`."""

    config: E4EConfig
    train: bool = False

    @nn.compact
    def __call__(self, images: Array) -> Array:
        config = self.config
        # The average style belongs to the generator and is not trained.
        average = self.variable(
            "batch_stats", "latent_avg", jnp.zeros, (config.num_styles, config.style_dim), jnp.float32
        )
        x = blocks.conv(config.widths[0], name="input_conv")(images)
        x = blocks.batch_norm(use_running_average=not self.train, name="input_bn")(x)
        x = PReLU(name="input_prelu")(x)
        stages, index = [], 0
        for width, count in zip(config.widths, config.blocks, strict=True):
            for i in range(count):
                x = ResidualBlock(width, 1 if i else 2, self.train, name=f"body_{index}")(x)
                index += 1
            stages.append(x)

        levels = [stages[3]]
        for i, stage in enumerate((stages[2], stages[1]), 1):
            lateral = blocks.conv(config.widths[3], 1, bias=True, name=f"lateral{i}")(stage)
            levels.append(lateral + blocks.resize_aligned(levels[-1], (stage.shape[1], stage.shape[2])))

        styles = []
        for i in range(config.num_styles):
            level = sum(i >= start for start in _LEVEL_STARTS) - 1
            head = Head(config.head_width, config.head_depth + level, config.style_dim, name=f"head_{i}")
            style = head(levels[level])
            styles.append(styles[0] + style if i else style)
        return jnp.stack(styles, axis=1) + average.value  # [N, num_styles, style_dim]


# --- functions ---


def init(config: E4EConfig, *, key: Array) -> Variables:
    """Random variables; `jax.eval_shape` of this function is the tree that converters fill.

    Returns:
      {"params": …, "batch_stats": …}; "batch_stats" also holds the average style, "latent_avg"
      [num_styles, style_dim], which is zero here.
    """
    return Encoder(config).init(key, jnp.zeros((1, 16, 16, 3), jnp.float32))


def encode(variables: Variables, images: Array, config: E4EConfig) -> Array:
    """Encodes images as styles from which a generator approximately reconstructs them; the start of an inversion.

    Args:
      variables: as returned by `init` or converted from a checkpoint.
      images: [N, H, W, 3] in [-1, 1]; H and W are at most `config.max_size`. The authors' encoders are trained at
        256 x 256, the one for cars at 192 x 256.
      config: sizes of the encoder.

    Returns:
      [N, num_styles, style_dim].

    Raises:
      ValueError: If images have another shape or type or are too large.
    """
    _check(images, config)
    return Encoder(config).apply(variables, images)  # type: ignore[return-value]


def train_codes(variables: Variables, images: Array, config: E4EConfig) -> tuple[Array, Variables]:
    """Encodes images in training mode, normalizing by the statistics of the batch.

    Args:
      variables: as for `encode`.
      images: as for `encode`.
      config: sizes of the encoder.

    Returns:
      Styles [N, num_styles, style_dim] and the updated "batch_stats": 0.9 times the old plus 0.1 times the batch's.

    Raises:
      ValueError: As `encode` does.
    """
    _check(images, config)
    codes, changed = Encoder(config, train=True).apply(variables, images, mutable=["batch_stats"])
    return codes, changed["batch_stats"]  # type: ignore[return-value]


def _check(images: Array, config: E4EConfig) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be [N, H, W, 3], not {list(images.shape)}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floating point in [-1, 1], not {images.dtype}")
    height, width = images.shape[1:3]
    if not 1 <= min(height, width) <= max(height, width) <= config.max_size:
        raise ValueError(
            f"this encoder takes images of 1 to {config.max_size} pixels a side, not {height} x {width}: resize them"
        )
