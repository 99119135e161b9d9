"""LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018) in Linen.

VGG16 and AlexNet feature stacks with the learned linear heads of version 0.1, with the numbers of the PyPI package
`lpips`. Arrays are NHWC and float32; images lie in [-1, 1].

An inversion compares many images with one target, so the target's features are taken once: `features`, then
`distance` or `spatial_distance` at every step. Weights are arguments, to be passed through `jax.jit` rather than
closed over.

Precision: the convolutions follow JAX's own setting. On the CPU they are full float32; on GPUs and TPUs the
default is faster and coarser, and `with jax.default_matmul_precision("float32")` around the traced call gives full
float32, which parity and reported figures need. All else is elementwise and
float32 everywhere. With `half_precision` kernels and activations are bfloat16, sums and features float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from samjax.nets import convolution
from samjax.nets.blocks import flax_variables, imagenet, resize_bilinear
from samjax.nets.convolution import conv3x3

Params = Mapping[str, Any]
Net = Literal["vgg", "alex"]

_VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# AlexNet's stages: features, kernel, stride, padding of the convolution, and whether its input is pooled.
_ALEX_STAGES = ((64, 11, 4, 2, False), (192, 5, 1, 2, True), (384, 3, 1, 1, True), (256, 3, 1, 1, False),
                (256, 3, 1, 1, False))  # fmt: skip
STAGE_CHANNELS: Mapping[Net, tuple[int, ...]] = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
MIN_SIZE: Mapping[Net, int] = {"vgg": 16, "alex": 31}  # pixels a side that leave one for the last stage


# --- operations ---


def max_pool_2x2(x: Array) -> Array:
    """Maximum of each 2x2 window; an odd last row or column is dropped. [N, H, W, C] to [N, H // 2, W // 2, C].

    The maximum of strided slices: its backward pass is elementwise, where that of `reduce_window` is a scatter,
    on its own 10 to 20 times slower on the CPU. Where several entries of a window are the largest, the gradient is
    shared among them, while PyTorch hands it to the first. After a ReLU most ties are of zeros, whose gradient the
    ReLU stops either way; the others need equal positive activations (flat regions), where both are subgradients
    with the same sum.
    """
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    rows = jnp.maximum(x[:, 0:h:2], x[:, 1:h:2])
    return jnp.maximum(rows[:, :, 0:w:2], rows[:, :, 1:w:2])


def max_pool_3x3(x: Array) -> Array:
    """Maximum of 3x3 windows two apart that lie within `x`; [N, H, W, C] to [N, (H - 1) // 2, (W - 1) // 2, C]."""
    for axis in (1, 2):
        count = (x.shape[axis] - 1) // 2
        first, second, third = (lax.slice_in_dim(x, i, i + 2 * count - 1, 2, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def normalize_channels(x: Array, eps: float = 1e-10) -> Array:
    """`x` over its Euclidean norm plus `eps`, along the last axis.

    The norm's slope is infinite where all channels are zero, which would make gradients NaN; it is taken as zero
    there. The values are those of the plain formula.
    """
    power = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    positive = power > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, power, 1.0)), 0.0)
    return x / (norm + eps)


# --- networks ---


class Conv(nn.Module):
    """Convolution with zero padding, bias, ReLU."""

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
            frozen = self.get_variable("frozen", "kernel")
            y = conv3x3(x, weight.astype(self.dtype) if frozen is None else frozen)
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
    """VGG16's convolutions; the outputs of relu1_2, 2_2, 3_3, 4_3 and 5_3, at 1, 1/2, 1/4, 1/8 and 1/16 the size."""

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
    """AlexNet's convolutions (the one-column form of torchvision); the outputs of its five ReLUs."""

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
    """One learned weight a channel: the weighted squared difference of each stage, [N, h, w]."""

    @nn.compact
    def __call__(self, fx: tuple[Array, ...], fy: tuple[Array, ...]) -> tuple[Array, ...]:
        maps = []
        for i, (x, y) in enumerate(zip(fx, fy, strict=True)):
            weight = self.param(f"lin{i}", nn.initializers.uniform(1.0), (x.shape[-1],))
            maps.append(jnp.sum(jnp.square(x - y) * weight, axis=-1))
        return tuple(maps)


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
    """Random parameters: {"backbone": {"conv1_1": {"weight", "bias"}, …}, "heads": {"lin0": [C], …}}.

    `jax.eval_shape` of it is the tree that converters fill. AlexNet's convolutions are "conv1" to "conv5".

    Raises:
      ValueError: an unknown `net`.
    """
    _check_net(net)
    image = jnp.zeros((1, MIN_SIZE[net], MIN_SIZE[net], 3), jnp.float32)
    return LPIPS(net).init(key, image, image)["params"]


def freeze(params: Params, height: int, width: int, net: Net, *, half_precision: bool = False) -> Params:
    """`params` with VGG16's kernels as convolutions use them, for many images of one size.

    The features are the same, with the same `half_precision`; the kernels' gradient is zero. AlexNet has nothing
    worth keeping.

    Raises:
      ValueError: an unknown `net`.
    """
    _check_net(net)
    if net == "alex":
        return params
    frozen = {}
    for name, conv in params["backbone"].items():
        stage = int(name[len("conv")]) - 1
        weight = conv["weight"].astype(jnp.bfloat16 if half_precision else jnp.float32)
        frozen[name] = {"kernel": convolution.freeze(weight, height >> stage, width >> stage)}
    return {**params, "frozen": {"backbone": frozen}}


def features(params: Params, images: Array, net: Net, *, half_precision: bool = False) -> tuple[Array, ...]:
    """Channel-normalised activations of the five stages, for `distance` and `spatial_distance`.

    Args:
      params: as `samjax.io.weights.load_lpips` gives them.
      images: [N, H, W, 3] in [-1, 1], at least `MIN_SIZE[net]` pixels a side.
      net: "vgg" or "alex".
      half_precision: runs the network in bfloat16.

    Returns:
      Five arrays [N, h, w, C], C as in `STAGE_CHANNELS[net]`; unit length along C, or zero.

    Raises:
      ValueError: an unknown `net`, images of another shape or kind, or too small for the network.
    """
    _check_net(net)
    if images.ndim == 4 and min(images.shape[1:3]) < MIN_SIZE[net]:
        height, width = images.shape[1:3]
        raise ValueError(f"LPIPS with {net} needs at least {MIN_SIZE[net]} pixels a side, not {height} x {width}")
    return LPIPS(net, half_precision).apply(flax_variables(params), images, method="features")  # type: ignore[return-value]


def distance(params: Params, fx: tuple[Array, ...], fy: tuple[Array, ...]) -> Array:
    """LPIPS from two images' features: the mean over pixels of each stage, summed over stages.

    Args:
      params: of the same network as the features.
      fx: what `features` gives.
      fy: the same of other images; a batch of one broadcasts against a larger one.

    Returns:
      [N], not negative; zero for equal features.
    """
    maps = Heads().apply({"params": params["heads"]}, fx, fy)
    return sum((jnp.mean(m, axis=(1, 2)) for m in maps[1:]), start=jnp.mean(maps[0], axis=(1, 2)))  # type: ignore[index]


def spatial_distance(params: Params, fx: tuple[Array, ...], fy: tuple[Array, ...], size: tuple[int, int]) -> Array:
    """LPIPS at every pixel: each stage's map brought to `size` bilinearly, summed over stages.

    Args:
      params: of the same network as the features.
      fx: what `features` gives.
      fy: the same of other images; a batch of one broadcasts against a larger one.
      size: height and width of the result, as a rule those of the images.

    Returns:
      [N, H, W], not negative.
    """
    maps = Heads().apply({"params": params["heads"]}, fx, fy)
    maps = [resize_bilinear(m[..., None], size)[..., 0] for m in maps]  # type: ignore[union-attr]
    return sum(maps[1:], start=maps[0])


def lpips(params: Params, x: Array, y: Array, net: Net, spatial: bool = False) -> Array:
    """LPIPS between two batches of images.

    Args:
      params: as `samjax.io.weights.load_lpips` gives them.
      x: [N, H, W, 3] in [-1, 1].
      y: the same; a batch of one broadcasts against a larger one.
      net: "vgg" or "alex".
      spatial: whether to give a map instead of one number.

    Returns:
      [N], or [N, H, W] if `spatial`.

    Raises:
      ValueError: as `features` does, and for images of two sizes.
    """
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"LPIPS compares images of one size, not {list(x.shape)} and {list(y.shape)}")
    fx, fy = features(params, x, net), features(params, y, net)
    return spatial_distance(params, fx, fy, (x.shape[1], x.shape[2])) if spatial else distance(params, fx, fy)


def _check_net(net: str) -> None:
    if net not in get_args(Net):
        raise ValueError(f"net must be vgg or alex, not {net!r}")
