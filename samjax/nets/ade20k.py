"""Semantic segmentation into ADE20K's 150 classes (Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017).

The network "ade20k-resnet50dilated-ppm_deepsup" of CSAIL's `semantic-segmentation-pytorch`, with the same numbers: a
ResNet-50 whose last two stages are dilated instead of strided, so that it ends at 1/8 of the size, and pyramid pooling
(Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017). The branch for deep supervision, which only training needs,
is left out.

Arrays are NHWC and float32; images lie in [-1, 1]. Convolutions follow JAX's precision setting; see
`samjax.nets.lpips`.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from samjax.nets.blocks import Bottleneck, Variables, batch_norm, conv, imagenet, max_pool, resize_bilinear

# Of each stage: stride of its first block, dilation of that block, dilation of the other blocks. In the last two stages
# dilation replaces a stride of 2; it applies to the convolutions after the one that had the stride.
_STAGES = ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4))
_POOL_SCALES = (1, 2, 3, 6)


@dataclasses.dataclass(frozen=True)
class ADE20KConfig:
    """Sizes of the network; the defaults are those of the published weights.

    Attributes:
      num_classes: labels are 0 to num_classes - 1.
      features: channels of the stem; all widths are multiples of it.
      blocks: residual blocks in each of the four stages.
    """

    num_classes: int = 150
    features: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= 65536:
            raise ValueError(f"num_classes must be from 1 to 65536, not {self.num_classes}")
        if not 1 <= self.features <= 1024:
            raise ValueError(f"features must be from 1 to 1024, not {self.features}")
        if len(self.blocks) != len(_STAGES) or not all(1 <= count <= 64 for count in self.blocks):
            raise ValueError(f"blocks must be four numbers from 1 to 64, not {self.blocks}")


# --- operations ---


def _bins(size: int, count: int) -> np.ndarray:
    """Weights [count, size] of the means over `count` equal parts of an axis.

    Parts are extended to whole entries, so they overlap where `count` does not divide `size`.
    """
    weights = np.zeros((count, size), np.float32)
    for i in range(count):
        start, end = i * size // count, -(-(i + 1) * size // count)
        weights[i, start:end] = 1 / (end - start)
    return weights


def adaptive_mean(x: Array, count: int) -> Array:
    """Means over `count` x `count` parts (PyTorch's `adaptive_avg_pool2d`); [N, H, W, C] to [N, count, count, C]."""
    rows, columns = (jnp.asarray(_bins(size, count)) for size in x.shape[1:3])
    return jnp.einsum("yh,nhwc,xw->nyxc", rows, x, columns)


# --- blocks ---


class Encoder(nn.Module):
    """Bottleneck ResNet with a stem of three convolutions; [N, H, W, 3] to [N, H / 8, W / 8, 32 * features]."""

    config: ADE20KConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = functools.partial(batch_norm, use_running_average=not self.train)
        width = self.config.features
        for i, (features, stride) in enumerate(((width, 2), (width, 1), (2 * width, 1)), 1):
            x = nn.relu(norm(name=f"bn{i}")(conv(features, 3, stride, name=f"conv{i}")(x)))
        x = max_pool(x)
        for s, (count, (stride, first, others)) in enumerate(zip(self.config.blocks, _STAGES, strict=True), 1):
            for b in range(count):
                x = Bottleneck(
                    width * 2 ** (s - 1),
                    stride if b == 0 else 1,
                    first if b == 0 else others,
                    project=b == 0,
                    train=self.train,
                    name=f"layer{s}_{b}",
                )(x)
        return x


class Decoder(nn.Module):
    """Pyramid pooling: adds the means over parts of the image to every pixel; logits [N, h, w, num_classes]."""

    config: ADE20KConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = functools.partial(batch_norm, use_running_average=not self.train)
        width = 8 * self.config.features
        levels = [x]
        for i, scale in enumerate(_POOL_SCALES):
            y = conv(width, 1, name=f"ppm{i}_conv")(adaptive_mean(x, scale))
            y = nn.relu(norm(name=f"ppm{i}_bn")(y))
            levels.append(resize_bilinear(y, (x.shape[1], x.shape[2])))
        y = conv(width, name="conv")(jnp.concatenate(levels, axis=-1))
        y = nn.relu(norm(name="bn")(y))
        return conv(self.config.num_classes, 1, bias=True, name="classifier")(y)


# --- network ---


class ADE20K(nn.Module):
    """Encoder and decoder: normalized images [N, H, W, 3] to logits at about 1/8 of the size."""

    config: ADE20KConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Encoder(self.config, self.train, name="encoder")(x)
        return Decoder(self.config, self.train, name="decoder")(x)


# --- functions ---


def init(config: ADE20KConfig, *, key: Array) -> Variables:
    """Random variables {"params": …, "batch_stats": …}; their `jax.eval_shape` is the tree that converters fill."""
    return ADE20K(config).init(key, jnp.zeros((1, 8, 8, 3), jnp.float32))


def logits(variables: Variables, images: Array, config: ADE20KConfig) -> Array:
    """Logits of the classes at every pixel.

    Args:
      variables: as returned by `init` or converted from a checkpoint.
      images: [N, H, W, 3] in [-1, 1], of any size.
      config: sizes of the network.

    Returns:
      [N, H, W, num_classes].

    Raises:
      ValueError: If images have another shape or type.
    """
    x: Array = ADE20K(config).apply(variables, imagenet(images))  # type: ignore[assignment]
    return resize_bilinear(x, (images.shape[1], images.shape[2]))


def labels(variables: Variables, images: Array, config: ADE20KConfig) -> Array:
    """The most probable class at every pixel, int32 [N, H, W]; arguments and errors as of `logits`."""
    return jnp.argmax(logits(variables, images, config), axis=-1).astype(jnp.int32)
