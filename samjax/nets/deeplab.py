"""The invertibility predictor: from an image, the error that each latent layer alone would leave at every pixel.

DeepLabV3+ (Chen et al., ECCV 2018) on a ResNet-101 at stride 16 computes 8 features per pixel, from which a small head
for each latent layer predicts a map. This is the network of SAM (Parmar et al., CVPR 2022), with the same numbers as
the authors' PyTorch code. Widths and depths are configurable, so that a simple image domain can use a network of a few
MB.

Arrays are NHWC and float32; images lie in [-1, 1]. Pass variables through `jax.jit` as arguments instead of closing
over them. Convolutions follow JAX's precision setting; see `samjax.nets.lpips`.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from samjax.nets import blocks
from samjax.nets.blocks import Variables

_STRIDES = (1, 2, 2, 1)  # of the stages; after the stem (stride 4) the last two are at 1/16
_RATES = (6, 12, 18)  # dilations of the pyramid
_HEAD_FEATURES = 4
_LAYERS = ("W+", "F4", "F6", "F8", "F10")  # all that may have a head, as `samjax.latents.LATENT_NAMES`


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """Sizes of a predictor; the defaults are the authors'.

    Attributes:
      latent_names: latent layers that have a head, in the order of the maps.
      features: channels of the input that the heads share.
      blocks: residual blocks in each of the four stages; (3, 4, 23, 3) is ResNet-101.
      width: channels of the stem and of the inner convolutions of the first stage; each later stage doubles it.
      decoder_width: channels of the pyramid and of the decoder.
      low_level_width: channels to which the decoder reduces the output of the first stage.
    """

    latent_names: tuple[str, ...] = _LAYERS
    features: int = 8
    blocks: tuple[int, ...] = (3, 4, 23, 3)
    width: int = 64
    decoder_width: int = 256
    low_level_width: int = 48

    def __post_init__(self) -> None:
        names = self.latent_names
        if not names or len(set(names)) != len(names) or not set(names) <= set(_LAYERS):
            raise ValueError(f"latent_names must be some of {', '.join(_LAYERS)}, each once, not {names}")
        if len(self.blocks) != 4 or min(self.blocks) < 1:
            raise ValueError(f"blocks must be four numbers of at least 1, not {self.blocks}")
        for name in ("features", "width", "decoder_width", "low_level_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


# --- blocks ---

# In training, Flax updates running variances with the biased variance of the batch, PyTorch with the unbiased one,
# n / (n - 1) times larger for n values per channel. This only matters for small n: in the image-wide branch of the
# pyramid n is the batch size.


def _conv_norm_relu(
    x: Array, features: int, kernel: int, names: tuple[str, str], train: bool, *, stride: int = 1, dilation: int = 1
) -> Array:
    """Convolution, batch normalization, ReLU; `names` are those of the first two in the calling module."""
    x = blocks.conv(features, kernel, stride, dilation=dilation, name=names[0])(x)
    return nn.relu(blocks.batch_norm(use_running_average=not train, name=names[1])(x))


def _uniform(limit: float) -> nn.initializers.Initializer:
    """Initializer, uniform in [-limit, limit]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


class ResNet(nn.Module):
    """Bottleneck ResNet at stride 16; the outputs of its first stage (at 1/4 of the size) and of its last (at 1/16).

    The last stage has dilations 2, 4, 8, … in its blocks instead of a stride (a multi-grid of 1, 2, 4, …; Chen et al.,
    "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017).
    """

    config: PredictorConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = _conv_norm_relu(x, self.config.width, 7, ("conv1", "bn1"), self.train, stride=2)
        x = blocks.max_pool(x)
        stages = []
        for stage, count in enumerate(self.config.blocks):
            for block in range(count):
                x = blocks.Bottleneck(
                    self.config.width * 2**stage,
                    stride=1 if block else _STRIDES[stage],
                    dilation=2 * 2**block if stage == 3 else 1,
                    project=block == 0,
                    train=self.train,
                    name=f"layer{stage + 1}_{block}",
                )(x)
            stages.append(x)
        return stages[0], stages[-1]


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: joins convolutions of several dilations and the mean over the image."""

    features: int
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        branches = [_conv_norm_relu(x, self.features, 1, ("aspp1_conv", "aspp1_bn"), self.train)]
        for i, rate in enumerate(_RATES, 2):
            names = (f"aspp{i}_conv", f"aspp{i}_bn")
            branches.append(_conv_norm_relu(x, self.features, 3, names, self.train, dilation=rate))
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        mean = _conv_norm_relu(mean, self.features, 1, ("pool_conv", "pool_bn"), self.train)
        branches.append(jnp.broadcast_to(mean, branches[0].shape))
        x = _conv_norm_relu(jnp.concatenate(branches, axis=-1), self.features, 1, ("conv1", "bn1"), self.train)
        return nn.Dropout(0.5, deterministic=not self.train)(x)


class Decoder(nn.Module):
    """Joins the outputs of the pyramid and of the first stage and refines them, at 1/4 of the size."""

    config: PredictorConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: Array, low: Array) -> Array:
        width = self.config.decoder_width
        low = _conv_norm_relu(low, self.config.low_level_width, 1, ("conv1", "bn1"), self.train)
        x = blocks.resize_aligned(x, (low.shape[1], low.shape[2]))
        x = _conv_norm_relu(jnp.concatenate((x, low), axis=-1), width, 3, ("conv2", "bn2"), self.train)
        x = nn.Dropout(0.5, deterministic=not self.train)(x)
        x = _conv_norm_relu(x, width, 3, ("conv3", "bn3"), self.train)
        x = nn.Dropout(0.1, deterministic=not self.train)(x)
        bias = _uniform(1 / math.sqrt(width))
        return nn.Conv(
            self.config.features, (1, 1), kernel_init=nn.initializers.he_normal(), bias_init=bias, name="conv4"
        )(x)


class Head(nn.Module):
    """The map of one latent layer, [N, H, W], nonnegative.

    The authors use transposed convolutions of stride 1, which are ordinary ones with a kernel rotated by 180 degrees.
    Parameters are initialized as PyTorch does for those: uniform within 1 / sqrt(k * k * outputs).
    """

    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, (features, kernel) in enumerate(((_HEAD_FEATURES, 3), (1, 1)), 1):
            init = _uniform(1 / math.sqrt(kernel * kernel * features))
            x = nn.Conv(features, (kernel, kernel), kernel_init=init, bias_init=init, name=f"conv{i}")(x)
            if i == 1:
                x = blocks.batch_norm(use_running_average=not self.train, name="bn1")(x)
                x = nn.leaky_relu(x, 0.2)
        return nn.relu(x[..., 0])


# --- network ---


class DeepLab(nn.Module):
    """DeepLabV3+; [N, H, W, 3] to [N, H, W, features]."""

    config: PredictorConfig
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        low, high = ResNet(self.config, self.train, name="backbone")(x)
        high = ASPP(self.config.decoder_width, self.train, name="aspp")(high)
        features = Decoder(self.config, self.train, name="decoder")(high, low)
        return blocks.resize_aligned(features, (x.shape[1], x.shape[2]))


class Predictor(nn.Module):
    """Base and heads; use it through the functions below, which take `variables`."""

    config: PredictorConfig
    train: bool = False

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = DeepLab(self.config, self.train, name="base")(images)
        maps = [Head(self.train, name=f"head_{name}")(x) for name in self.config.latent_names]
        return jnp.stack(maps, axis=1)  # [N, L, H, W]


# --- functions ---


def init(config: PredictorConfig, *, key: Array) -> Variables:
    """Random variables, as in the authors' training without ImageNet weights.

    Convolutions are normal with variance 2 / fan (He et al., ICCV 2015): fan-out in the backbone, fan-in after it.

    Returns:
      {"params": …, "batch_stats": …}, each {"base": {"backbone", "aspp", "decoder"}, "head_W+": …, …};
      `jax.eval_shape` of this function is the tree that converters fill.
    """
    variables = Predictor(config).init(key, jnp.zeros((1, 16, 16, 3), jnp.float32))
    params, base = variables["params"], variables["params"]["base"]
    # `blocks.conv` initializes by fan-in.
    fan_out = lambda a: a * math.sqrt(a.shape[2] / a.shape[3]) if a.ndim == 4 else a  # noqa: E731
    base = {**base, "backbone": jax.tree.map(fan_out, base["backbone"])}
    return {"params": {**params, "base": base}, "batch_stats": variables["batch_stats"]}


def base(variables: Variables, images: Array, config: PredictorConfig) -> Array:
    """Features that the heads share.

    Args:
      variables: variables of the whole predictor.
      images: [N, H, W, 3] in [-1, 1], of any size.
      config: sizes of the predictor.

    Returns:
      [N, H, W, features].

    Raises:
      ValueError: If images have another shape or type.
    """
    _check(images)
    base_variables = {collection: variables[collection]["base"] for collection in ("params", "batch_stats")}
    return DeepLab(config).apply(base_variables, images)  # type: ignore[return-value]


def predict(variables: Variables, images: Array, config: PredictorConfig) -> Array:
    """Predicts maps: at every pixel, the spatial LPIPS after an inversion in each latent layer alone.

    Args:
      variables: as returned by `init` or converted from a checkpoint.
      images: [N, H, W, 3] in [-1, 1], of any size.
      config: sizes of the predictor.

    Returns:
      [N, L, H, W], nonnegative; layers in the order of `config.latent_names`.

    Raises:
      ValueError: If images have another shape or type.
    """
    _check(images)
    return Predictor(config).apply(variables, images)  # type: ignore[return-value]


def train_maps(variables: Variables, images: Array, config: PredictorConfig, *, key: Array) -> tuple[Array, Variables]:
    """Predicts maps in training mode, normalizing by the statistics of the batch and with dropout.

    Args:
      variables: as for `predict`.
      images: [N, H, W, 3] in [-1, 1]; N is at least 2, since the image-wide branch has one value per image.
      config: sizes of the predictor.
      key: random key of dropout.

    Returns:
      Maps [N, L, H, W] and the updated "batch_stats": 0.9 times the old plus 0.1 times the batch's.

    Raises:
      ValueError: If images have another shape or type, or there are fewer than two.
    """
    _check(images)
    if images.shape[0] < 2:
        raise ValueError("training needs at least two images per batch, for batch normalization")
    maps, changed = Predictor(config, train=True).apply(
        variables, images, rngs={"dropout": key}, mutable=["batch_stats"]
    )
    return maps, changed["batch_stats"]  # type: ignore[return-value]


def _check(images: Array) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be [N, H, W, 3], not {list(images.shape)}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floating point in [-1, 1], not {images.dtype}")
