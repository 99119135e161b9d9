"""Face parsing: BiSeNet (Yu et al., "BiSeNet: Bilateral Segmentation Network for Real-Time Semantic Segmentation",
ECCV 2018) as `zllrunning/face-parsing.PyTorch` has it, with the same numbers.

A ResNet-18, whose outputs at 1/8, 1/16 and 1/32 of the size are refined by channel attention and added up from coarse
to fine (the context path). There is no spatial path of its own: the ResNet's output at 1/8 stands for it in the
fusion. The heads at 1/8 and 1/16, which serve training only, are left out.

Arrays are NHWC and float32; images lie in [-1, 1]. Convolutions follow JAX's own precision: see `samjax.nets.lpips`.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from samjax.nets.blocks import Variables, batch_norm, conv, imagenet, max_pool, resize_aligned


@dataclasses.dataclass(frozen=True)
class BiSeNetConfig:
    """Sizes of the network; the defaults are those of the published face parser.

    Attributes:
      num_classes: labels are 0 to `num_classes` - 1.
      features: of the ResNet's first stage; all widths are multiples of it.
    """

    num_classes: int = 19
    features: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= 65536:
            raise ValueError(f"num_classes must be from 1 to 65536, not {self.num_classes}")
        if not 1 <= self.features <= 1024:
            raise ValueError(f"features must be from 1 to 1024, not {self.features}")


# --- operations ---


def double(x: Array, size: tuple[int, int]) -> Array:
    """Every pixel twice along both axes, then cut to `size`; [N, (H + 1) // 2, (W + 1) // 2, C] to [N, H, W, C].

    PyTorch's "nearest" takes pixel i * ((H + 1) // 2) // H for row i, which is i // 2 for odd H as well as for even.
    """
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, : size[0], : size[1]]


def image_mean(x: Array) -> Array:
    """Each channel's mean over all pixels; [N, H, W, C] to [N, 1, 1, C]."""
    return jnp.mean(x, axis=(1, 2), keepdims=True)


# --- network ---


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions of ResNet-18 and -34 (He et al., CVPR 2016, figure 5 left).

    The shortcut is a convolution too where the block changes the size or the number of channels.
    """

    features: int
    stride: int = 1
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = functools.partial(batch_norm, use_running_average=not self.train)
        y = nn.relu(norm(name="bn1")(conv(self.features, 3, self.stride, name="conv1")(x)))
        y = norm(name="bn2")(conv(self.features, 3, name="conv2")(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = norm(name="downsample_bn")(conv(self.features, 1, self.stride, name="downsample_conv")(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """ResNet-18 without its classifier; its outputs at 1/8, 1/16 and 1/32 of the size."""

    features: int
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        x = conv(self.features, 7, 2, name="conv1")(x)
        x = nn.relu(batch_norm(use_running_average=not self.train, name="bn1")(x))
        x = max_pool(x)
        outputs = []
        for s in range(4):
            x = BasicBlock(self.features * 2**s, 1 if s == 0 else 2, self.train, name=f"layer{s + 1}_0")(x)
            x = BasicBlock(self.features * 2**s, 1, self.train, name=f"layer{s + 1}_1")(x)
            outputs.append(x)
        return outputs[1], outputs[2], outputs[3]


class ConvBatchNorm(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    features: int
    kernel: int = 3
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = conv(self.features, self.kernel, name="conv")(x)
        return nn.relu(batch_norm(use_running_average=not self.train, name="bn")(x))


class AttentionRefinement(nn.Module):
    """A convolution whose channels are weighted by what the whole picture holds."""

    features: int
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ConvBatchNorm(self.features, train=self.train, name="conv")(x)
        weights = conv(self.features, 1, name="conv_atten")(image_mean(x))
        weights = batch_norm(use_running_average=not self.train, name="bn_atten")(weights)
        return x * nn.sigmoid(weights)


class ContextPath(nn.Module):
    """The ResNet's output at 1/8 of the size, and what is seen at that and all coarser sizes together, there too."""

    features: int
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        eighth, sixteenth, last = ResNet18(self.features, self.train, name="resnet")(x)
        width = 2 * self.features
        head = functools.partial(ConvBatchNorm, width, train=self.train)
        x = AttentionRefinement(width, self.train, name="arm32")(last)
        x = x + head(kernel=1, name="conv_avg")(image_mean(last))
        x = head(name="conv_head32")(double(x, (sixteenth.shape[1], sixteenth.shape[2])))
        x = x + AttentionRefinement(width, self.train, name="arm16")(sixteenth)
        x = head(name="conv_head16")(double(x, (eighth.shape[1], eighth.shape[2])))
        return eighth, x


class FeatureFusion(nn.Module):
    """Joins two paths by a 1x1 convolution and strengthens channels by what the whole picture holds."""

    features: int
    train: bool = False

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        x = ConvBatchNorm(self.features, 1, self.train, name="convblk")(jnp.concatenate([x, y], axis=-1))
        weights = nn.relu(conv(self.features // 4, 1, name="conv1")(image_mean(x)))
        return x * nn.sigmoid(conv(self.features, 1, name="conv2")(weights)) + x


class Output(nn.Module):
    """Logits, [N, h, w, num_classes]."""

    features: int
    num_classes: int
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ConvBatchNorm(self.features, train=self.train, name="conv")(x)
        return conv(self.num_classes, 1, name="conv_out")(x)


class BiSeNet(nn.Module):
    """Normalised images [N, H, W, 3] to logits at about 1/8 of the size."""

    config: BiSeNetConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = 4 * self.config.features
        eighth, context = ContextPath(self.config.features, self.train, name="cp")(x)
        x = FeatureFusion(width, self.train, name="ffm")(eighth, context)
        return Output(width, self.config.num_classes, self.train, name="conv_out")(x)


# --- functions ---


def init(config: BiSeNetConfig, *, key: Array) -> Variables:
    """Random variables, {"params": …, "batch_stats": …}; `jax.eval_shape` of it is the tree that converters fill."""
    return BiSeNet(config).init(key, jnp.zeros((1, 32, 32, 3), jnp.float32))


def logits(variables: Variables, images: Array, config: BiSeNetConfig) -> Array:
    """How much speaks for each class at each pixel.

    Args:
      variables: as `init` describes them.
      images: [N, H, W, 3] in [-1, 1], of any size; the published weights were trained at 448 x 448 out of 512 x 512.
      config: the network's.

    Returns:
      [N, H, W, num_classes].

    Raises:
      ValueError: images of another shape or kind.
    """
    x: Array = BiSeNet(config).apply(variables, imagenet(images))  # type: ignore[assignment]
    return resize_aligned(x, (images.shape[1], images.shape[2]))


def labels(variables: Variables, images: Array, config: BiSeNetConfig) -> Array:
    """The likeliest class at each pixel, [N, H, W] int32; arguments and errors as of `logits`."""
    return jnp.argmax(logits(variables, images, config), axis=-1).astype(jnp.int32)
