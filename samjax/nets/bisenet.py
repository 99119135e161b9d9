"""Face parsing: BiSeNet (Yu et al., "BiSeNet: Bilateral Segmentation Network for Real-Time Semantic Segmentation",
ECCV 2018) as in `zllrunning/face-parsing.PyTorch`, with the same numbers.

Channel attention refines the outputs of a ResNet-18 at 1/16 and 1/32 of the size, which are added from coarse to fine
(the context path). In place of a separate spatial path, the output of the ResNet at 1/8 enters the fusion. The
auxiliary heads at 1/8 and 1/16, which only training needs, are left out.

Arrays are NHWC and float32; images lie in [-1, 1]. Convolutions follow JAX's precision setting; see
`samjax.nets.lpips`.
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
      num_classes: labels are 0 to num_classes - 1.
      features: channels of the first stage of the ResNet; all widths are multiples of it.
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
    """Repeats every pixel along both axes and crops to `size`; [N, (H + 1) // 2, (W + 1) // 2, C] to [N, H, W, C].

    PyTorch's "nearest" takes row i * ((H + 1) // 2) // H of the input for row i, which is i // 2 for even and odd H.
    """
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, : size[0], : size[1]]


def image_mean(x: Array) -> Array:
    """Mean of each channel over all pixels; [N, H, W, C] to [N, 1, 1, C]."""
    return jnp.mean(x, axis=(1, 2), keepdims=True)


# --- blocks ---


class BasicBlock(nn.Module):
    """Residual block of ResNet-18 and ResNet-34: two 3x3 convolutions (He et al., CVPR 2016, figure 5 left).

    The shortcut is a convolution where the block changes the size or the number of channels.
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
    """ResNet-18 without its classifier; the outputs at 1/8, 1/16 and 1/32 of the size."""

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
    """Convolution, batch normalization, ReLU."""

    features: int
    kernel: int = 3
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = conv(self.features, self.kernel, name="conv")(x)
        return nn.relu(batch_norm(use_running_average=not self.train, name="bn")(x))


class AttentionRefinement(nn.Module):
    """Convolution whose output channels are scaled by factors computed from their means over the image."""

    features: int
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ConvBatchNorm(self.features, train=self.train, name="conv")(x)
        weights = conv(self.features, 1, name="conv_atten")(image_mean(x))
        weights = batch_norm(use_running_average=not self.train, name="bn_atten")(weights)
        return x * nn.sigmoid(weights)


class ContextPath(nn.Module):
    """The output of the ResNet at 1/8 of the size, and the context of all coarser outputs, also at 1/8."""

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
    """Joins two paths by a 1x1 convolution, then amplifies channels by factors computed from their means."""

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


# --- network ---


class BiSeNet(nn.Module):
    """Normalized images [N, H, W, 3] to logits at about 1/8 of the size."""

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
    """Random variables {"params": …, "batch_stats": …}; their `jax.eval_shape` is the tree that converters fill."""
    return BiSeNet(config).init(key, jnp.zeros((1, 32, 32, 3), jnp.float32))


def logits(variables: Variables, images: Array, config: BiSeNetConfig) -> Array:
    """Logits of the classes at every pixel.

    Args:
      variables: as returned by `init` or converted from a checkpoint.
      images: [N, H, W, 3] in [-1, 1], of any size; the published weights were trained on crops of 448 x 448 from
        512 x 512.
      config: sizes of the network.

    Returns:
      [N, H, W, num_classes].

    Raises:
      ValueError: If images have another shape or type.
    """
    x: Array = BiSeNet(config).apply(variables, imagenet(images))  # type: ignore[assignment]
    return resize_aligned(x, (images.shape[1], images.shape[2]))


def labels(variables: Variables, images: Array, config: BiSeNetConfig) -> Array:
    """The most probable class at every pixel, int32 [N, H, W]; arguments and errors as of `logits`."""
    return jnp.argmax(logits(variables, images, config), axis=-1).astype(jnp.int32)
