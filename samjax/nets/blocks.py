"""Layers that the networks share: convolution, normalization, resizing and residual blocks as in PyTorch.

They are Flax layers with PyTorch's conventions (explicit padding, momenta, epsilons), and what Flax lacks. Arrays are
NHWC. Variables are {"params": …, "batch_stats": …}; "batch_stats" holds running means and variances of channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Variables = Mapping[str, Any]
"""{"params": {...}, "batch_stats": {...}}, nested dictionaries of float32 arrays."""

# Channel means and standard deviations of ImageNet, for images in [-1, 1] instead of [0, 1].
_MEAN = np.array([-0.030, -0.088, -0.188], np.float32)
_STD = np.array([0.458, 0.448, 0.450], np.float32)


def conv(features: int, kernel: int = 3, stride: int = 1, *, dilation: int = 1, bias: bool = False,
         name: str | None = None) -> nn.Conv:  # fmt: skip
    """Convolution with zero padding of `dilation * (kernel // 2)`, so that stride 1 keeps the size."""
    pad = dilation * (kernel // 2)
    return nn.Conv(
        features, (kernel, kernel), (stride, stride), padding=((pad, pad), (pad, pad)),
        kernel_dilation=(dilation, dilation), use_bias=bias, kernel_init=nn.initializers.he_normal(), name=name,
    )  # fmt: skip


batch_norm: Callable[..., nn.BatchNorm] = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
"""Batch normalization with PyTorch's epsilon and momentum (0.1 there, which is 1 - 0.9)."""


def imagenet(images: Array) -> Array:
    """Normalizes images [N, H, W, 3] in [-1, 1] by the means and standard deviations of ImageNet.

    Raises:
      ValueError: If images have another shape or type.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images must be [N, H, W, 3], not {list(images.shape)}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floating point in [-1, 1], not {images.dtype}")
    return (images - _MEAN) / _STD


def max_pool(x: Array) -> Array:
    """Maximum over 3x3 windows, stride 2, padding 1; [N, H, W, C] to [N, (H + 1) // 2, (W + 1) // 2, C]."""
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # type: ignore[arg-type]


def _interpolation(size: int, to: int) -> np.ndarray:
    """Weights [to, size] of linear interpolation from `size` to `to` points with fixed end points."""
    at = np.arange(to) * ((size - 1) / (to - 1)) if to > 1 else np.zeros(1)
    low = np.minimum(at.astype(int), max(size - 2, 0))
    weights = np.zeros((to, size), np.float32)
    weights[np.arange(to), low] = 1 - (at - low)
    weights[np.arange(to), np.minimum(low + 1, size - 1)] += at - low
    return weights


def resize_aligned(x: Array, size: tuple[int, int]) -> Array:
    """Resizes bilinearly with aligned corners (PyTorch's `align_corners=True`); [N, H, W, C] to [N, *size, C]."""
    if x.shape[1:3] == size:
        return x
    rows, columns = (jnp.asarray(_interpolation(x.shape[i + 1], size[i])) for i in (0, 1))
    return jnp.einsum("yh,nhwc,xw->nyxc", rows, x, columns)


def resize_bilinear(x: Array, size: tuple[int, int]) -> Array:
    """Resizes bilinearly with half-pixel centers (PyTorch's `align_corners=False`); [N, H, W, C] to [N, *size, C]."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False)


class Bottleneck(nn.Module):
    """Residual block of ResNet-50 and deeper: 1x1, 3x3, 1x1 (He et al., CVPR 2016, figure 5 right).

    Attributes:
      features: channels of the inner convolutions; the output has four times as many.
      stride: stride of the 3x3 convolution, as in torchvision.
      dilation: dilation of the 3x3 convolution.
      project: whether the shortcut is a convolution (in the first block of a stage).
      train: whether to normalize by the batch and update the running statistics.
      stride_first: whether the first 1x1 convolution has the stride instead, as in Caffe and Detectron2.
    """

    features: int
    stride: int = 1
    dilation: int = 1
    project: bool = False
    train: bool = False
    stride_first: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = functools.partial(batch_norm, use_running_average=not self.train)
        first, second = (self.stride, 1) if self.stride_first else (1, self.stride)
        y = nn.relu(norm(name="bn1")(conv(self.features, 1, first, name="conv1")(x)))
        y = conv(self.features, 3, second, dilation=self.dilation, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y))
        y = norm(name="bn3")(conv(4 * self.features, 1, name="conv3")(y))
        if self.project:
            x = norm(name="downsample_bn")(conv(4 * self.features, 1, self.stride, name="downsample_conv")(x))
        return nn.relu(x + y)


def flax_variables(params: Mapping[str, Any]) -> dict[str, Any]:
    """Flax collections from parameters: "params", and "prepacked" as added by a network's `prepack`."""
    trained = {name: part for name, part in params.items() if name != "prepacked"}
    return {"params": trained, "prepacked": params.get("prepacked", {})}
