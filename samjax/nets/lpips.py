"""LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018) in Linen.

VGG16 and AlexNet features with the learned linear heads of version 0.1, and the same numbers as the PyPI package
`lpips`. Arrays are NHWC and float32; images lie in [-1, 1].

An inversion compares many images with one target. Compute the target's `features` once, then `distance` or
`spatial_distance` at every step. Pass parameters through `jax.jit` as arguments instead of closing over them.

Convolutions follow JAX's precision setting. On CPUs they are full float32. On GPUs and TPUs the default is faster and
less accurate; trace the call under `jax.default_matmul_precision("float32")` for full float32, as parity and reported
figures need. Everything else is elementwise and float32. With `half_precision`, kernels and activations are bfloat16,
sums and features float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from samjax.nets import convolution
from samjax.nets.blocks import flax_variables, imagenet, resize_bilinear
from samjax.nets.convolution import conv3x3

Params = Mapping[str, Any]
Net = Literal["vgg", "alex"]

_VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Of AlexNet's stages: features, kernel size, stride and padding of the convolution, and whether its input is pooled.
_ALEX_STAGES = ((64, 11, 4, 2, False), (192, 5, 1, 2, True), (384, 3, 1, 1, True), (256, 3, 1, 1, False),
                (256, 3, 1, 1, False))  # fmt: skip
MIN_SIZE: Mapping[Net, int] = {"vgg": 16, "alex": 31}  # of height and width, in pixels; the last stage is then 1 x 1


# --- operations ---


def max_pool_2x2(x: Array) -> Array:
    """Maximum over 2x2 windows, dropping an odd last row or column; [N, H, W, C] to [N, H // 2, W // 2, C].

    Computed as the maximum of strided slices, whose backward pass is elementwise; that of `reduce_window` is a scatter,
    10 to 20 times slower on a CPU. When several entries of a window are largest, the gradient is shared among them,
    while PyTorch gives it to the first. After a ReLU most ties are zeros, whose gradient the ReLU stops in any case;
    other ties are equal positive activations (in flat regions), where both are subgradients with the same sum.
    """
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    rows = jnp.maximum(x[:, 0:h:2], x[:, 1:h:2])
    return jnp.maximum(rows[:, :, 0:w:2], rows[:, :, 1:w:2])


def max_pool_3x3(x: Array) -> Array:
    """Maximum over 3x3 windows, stride 2, no padding; [N, H, W, C] to [N, (H - 1) // 2, (W - 1) // 2, C]."""
    for axis in (1, 2):
        count = (x.shape[axis] - 1) // 2
        first, second, third = (lax.slice_in_dim(x, i, i + 2 * count - 1, 2, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def normalize_channels(x: Array) -> Array:
    """Divides `x` by its Euclidean norm plus 1e-10, along the last axis.

    Where all channels are zero, the derivative of the norm is infinite and would make gradients NaN; it is replaced by
    zero. The values are those of the plain formula.
    """
    power = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    positive = power > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, power, 1.0)), 0.0)
    return x / (norm + 1e-10)


# --- blocks ---


class Conv(nn.Module):
    """Convolution with zero padding, bias and ReLU."""

    features: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        weight = self.param("weight", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if (self.kernel, self.stride, self.padding) == (3, 1, 1):
            prepacked = self.get_variable("prepacked", "kernel")
            y = conv3x3(x, weight.astype(self.dtype) if prepacked is None else prepacked)
        else:
            pad = (self.padding, self.padding)
            y = lax.conv_general_dilated(
                x,
                weight.astype(self.dtype),
                (self.stride, self.stride),
                (pad, pad),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return nn.relu(y.astype(jnp.float32) + bias).astype(self.dtype)


class VGG16(nn.Module):
    """Convolutions of VGG16; the outputs of relu1_2, 2_2, 3_3, 4_3 and 5_3, at 1, 1/2, 1/4, 1/8 and 1/16 the size."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        outputs = []
        for i, stage in enumerate(_VGG_STAGES, 1):
            if i > 1:
                x = max_pool_2x2(x)
            for j, channels in enumerate(stage, 1):
                x = Conv(channels, dtype=self.dtype, name=f"conv{i}_{j}")(x)
            outputs.append(x)
        return tuple(outputs)


class AlexNet(nn.Module):
    """Convolutions of AlexNet (torchvision's one-column variant); the outputs of its five ReLUs."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        outputs = []
        for i, (channels, kernel, stride, padding, pooled) in enumerate(_ALEX_STAGES, 1):
            if pooled:
                x = max_pool_3x3(x)
            x = Conv(channels, kernel, stride, padding, self.dtype, name=f"conv{i}")(x)
            outputs.append(x)
        return tuple(outputs)


class Heads(nn.Module):
    """Squared differences of features, summed over channels with learned weights; [N, h, w] for each stage."""

    @nn.compact
    def __call__(self, fx: tuple[Array, ...], fy: tuple[Array, ...]) -> tuple[Array, ...]:
        maps = []
        for i, (x, y) in enumerate(zip(fx, fy, strict=True)):
            weight = self.param(f"lin{i}", nn.initializers.uniform(1.0), (x.shape[-1],))
            maps.append(jnp.sum(jnp.square(x - y) * weight, axis=-1))
        return tuple(maps)


# --- network ---


class LPIPS(nn.Module):
    """Backbone and heads; use it through the functions below, which take `params`."""

    net: Net
    half_precision: bool = False

    def setup(self) -> None:
        backbone = VGG16 if self.net == "vgg" else AlexNet
        self.backbone = backbone(jnp.bfloat16 if self.half_precision else jnp.float32)
        self.heads = Heads()

    def __call__(self, x: Array, y: Array) -> tuple[Array, ...]:
        return self.heads(self.features(x), self.features(y))

    def features(self, images: Array) -> tuple[Array, ...]:
        return tuple(normalize_channels(f.astype(jnp.float32)) for f in self.backbone(imagenet(images)))


# --- functions ---


def init(net: Net, *, key: Array) -> Params:
    """Random parameters; `jax.eval_shape` of this function is the tree that converters fill.

    Returns:
      {"backbone": {"conv1_1": {"weight", "bias"}, …}, "heads": {"lin0": [C], …}}; the convolutions of AlexNet are
      "conv1" to "conv5".

    Raises:
      ValueError: If `net` is unknown.
    """
    _check_net(net)
    image = jnp.zeros((1, MIN_SIZE[net], MIN_SIZE[net], 3), jnp.float32)
    return LPIPS(net).init(key, image, image)["params"]


def prepack(
    params: Params,
    height: int,
    width: int,
    net: Net,
    *,
    half_precision: bool = False,
    minimal: bool | None = None,
) -> Params:
    """Transforms the 3x3 kernels once for many images of one size.

    The features stay the same up to rounding. The gradient with respect to the kernels becomes zero. AlexNet spends
    little time in 3x3 convolutions; its `params` are returned unchanged unless `minimal` is False.

    Args:
      params: as returned by `init` or `samjax.io.weights.load_lpips`.
      height: height of the images.
      width: width of the images.
      net: "vgg" or "alex".
      half_precision: as it will be passed to `features`.
      minimal: see `convolution.prepack`.

    Returns:
      `params` with the entry "prepacked".

    Raises:
      ValueError: If `net` is unknown.
    """
    _check_net(net)
    if net == "alex" and minimal is not False:
        return params
    kernels = {}
    for name, conv in params["backbone"].items():
        if conv["weight"].shape[:2] == (3, 3):
            weight = conv["weight"].astype(jnp.bfloat16 if half_precision else jnp.float32)
            stage = int(name[len("conv")]) - 1  # for AlexNet the size does not matter
            kernels[name] = {"kernel": convolution.prepack(weight, height >> stage, width >> stage, minimal=minimal)}
    return {**params, "prepacked": {"backbone": kernels}}


def features(params: Params, images: Array, net: Net, *, half_precision: bool = False) -> tuple[Array, ...]:
    """Channel-normalized activations of the five stages, for `distance` and `spatial_distance`.

    Args:
      params: as returned by `samjax.io.weights.load_lpips` or `prepack`.
      images: [N, H, W, 3] in [-1, 1]. Below `MIN_SIZE[net]` pixels a side, pixels are repeated.
      net: "vgg" or "alex".
      half_precision: whether to run the network in bfloat16.

    Returns:
      Five arrays [N, h, w, C] with C the features of the stage, of norm 1 along C, or 0.

    Raises:
      ValueError: If `net` is unknown, or images have another shape or type.
    """
    _check_net(net)
    if images.ndim == 4 and 0 < min(images.shape[1:3]) < MIN_SIZE[net]:
        factor = -(-MIN_SIZE[net] // min(images.shape[1:3]))
        images = jnp.repeat(jnp.repeat(images, factor, axis=1), factor, axis=2)
    return LPIPS(net, half_precision).apply(flax_variables(params), images, method="features")  # type: ignore[return-value]


def distance(params: Params, fx: tuple[Array, ...], fy: tuple[Array, ...]) -> Array:
    """LPIPS between images, given their features: the mean over pixels, summed over stages.

    Args:
      params: parameters of the network that computed the features.
      fx: as returned by `features`.
      fy: likewise; a batch of one broadcasts against a larger one.

    Returns:
      [N], nonnegative; zero for equal features.
    """
    chex.assert_rank([*fx, *fy], 4)
    maps = Heads().apply({"params": params["heads"]}, fx, fy)
    return sum((jnp.mean(m, axis=(1, 2)) for m in maps[1:]), start=jnp.mean(maps[0], axis=(1, 2)))  # type: ignore[index]


def spatial_distance(params: Params, fx: tuple[Array, ...], fy: tuple[Array, ...], size: tuple[int, int]) -> Array:
    """LPIPS at every pixel: the map of each stage resized bilinearly to `size`, summed over stages.

    Args:
      params: parameters of the network that computed the features.
      fx: as returned by `features`.
      fy: likewise; a batch of one broadcasts against a larger one.
      size: (H, W) of the result, usually those of the images.

    Returns:
      [N, H, W], nonnegative.
    """
    chex.assert_rank([*fx, *fy], 4)
    maps = Heads().apply({"params": params["heads"]}, fx, fy)
    maps = [resize_bilinear(m[..., None], size)[..., 0] for m in maps]  # type: ignore[union-attr]
    return sum(maps[1:], start=maps[0])


def lpips(params: Params, x: Array, y: Array, net: Net, spatial: bool = False) -> Array:
    """LPIPS between two batches of images.

    Args:
      params: as returned by `samjax.io.weights.load_lpips`.
      x: [N, H, W, 3] in [-1, 1].
      y: likewise; a batch of one broadcasts against a larger one.
      net: "vgg" or "alex".
      spatial: whether to return a map instead of one number per image.

    Returns:
      [N], or [N, H, W] if `spatial`.

    Raises:
      ValueError: As `features` does, or if `x` and `y` differ in size.
    """
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"LPIPS compares images of one size, not {list(x.shape)} and {list(y.shape)}")
    fx, fy = features(params, x, net), features(params, y, net)
    return spatial_distance(params, fx, fy, (x.shape[1], x.shape[2])) if spatial else distance(params, fx, fy)


def _check_net(net: str) -> None:
    if net not in get_args(Net):
        raise ValueError(f"net must be vgg or alex, not {net!r}")
