"""StyleGAN2 (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020) in Flax Linen.

The config-f generator with the "skip" architecture, 8 to 1024 px, with the same numbers as in NVIDIA's
`stylegan2-ada-pytorch` and `stylegan3` repositories. Arrays are NHWC and float32; images lie in [-1, 1], give or take
some overshoot.

Two choices serve inversion. Modulation scales activations before and after an ordinary convolution, so that frozen
weights need no gradient and a batch needs no grouped convolution. And `synthesize` takes offsets, masks and features
for the outputs of the blocks, so that forming an image from several latent layers takes one pass, and so does editing
it.

Half precision is bfloat16 for the kernels and activations of the four highest resolutions, where NVIDIA's networks use
float16. Sums, styles, filters, RGB and block outputs stay float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from samjax.nets import convolution
from samjax.nets.blocks import flax_variables
from samjax.nets.convolution import Kernel, conv3x3, interleave

Params = Mapping[str, Any]
Noise = Literal["const", "none", "random"]

_FIR = (0.25, 0.75, 0.75, 0.25)  # [1, 3, 3, 1] / 8, times 2 to keep the gain when an axis is upsampled
_SQRT2 = math.sqrt(2.0)


@dataclasses.dataclass(frozen=True)
class StyleGAN2Config:
    """Sizes of a generator; the defaults are config-f at 256 px.

    Attributes:
      img_resolution: pixels a side, a power of two from 8 to 1024.
      z_dim: size of z.
      c_dim: size of a label; 0 for an unconditional generator.
      w_dim: size of one style.
      img_channels: 3 for RGB.
      mapping_layers: number of dense layers in the mapping network.
      channel_base: a block at resolution r has min(channel_base / r, channel_max) channels.
      channel_max: see `channel_base`.
      conv_clamp: limit on the magnitude of each layer's output, after its gain; None for no limit, as in converted
        TensorFlow networks.
      mapping_lr_multiplier: factor of the weights and biases in the mapping network's dense layers.
      mapping_dim: width of the mapping network's hidden layers; w_dim if None.
      embed_dim: width of the label's embedding; w_dim if None.
      label_concat: whether a label is multiplied by a matrix and normalized together with z, as in NVIDIA's first
        TensorFlow program, rather than embedded by a dense layer and normalized by itself.
      use_noise: whether layers add noise.
      block_channels: channels of each block, where they do not follow `channel_base` and `channel_max`.
    """

    img_resolution: int = 256
    z_dim: int = 512
    c_dim: int = 0
    w_dim: int = 512
    img_channels: int = 3
    mapping_layers: int = 8
    channel_base: int = 32768
    channel_max: int = 512
    conv_clamp: float | None = None
    mapping_lr_multiplier: float = 0.01
    mapping_dim: int | None = None
    embed_dim: int | None = None
    label_concat: bool = False
    use_noise: bool = True
    block_channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        size = self.img_resolution
        if size < 8 or size > 1024 or size & (size - 1):
            raise ValueError(f"img_resolution must be a power of two from 8 to 1024, not {size}")
        if self.block_channels is not None and len(self.block_channels) != len(self.block_resolutions):
            raise ValueError(f"block_channels must list {len(self.block_resolutions)} blocks at {size} px")

    @property
    def block_resolutions(self) -> tuple[int, ...]:
        return tuple(2**i for i in range(2, self.img_resolution.bit_length()))

    @property
    def num_ws(self) -> int:
        """Number of styles of the synthesis network: one per convolution and one for the last ToRGB."""
        return 2 * len(self.block_resolutions)

    def channels(self, resolution: int) -> int:
        if self.block_channels is not None:
            return self.block_channels[self.block_resolutions.index(resolution)]
        return min(self.channel_base // resolution, self.channel_max)


class Synthesis(NamedTuple):
    """Result of `synthesize`.

    Attributes:
      image: [N, R, R, C].
      features: {r: [N, r, r, channels(r)]}, the output of each block after its offset or replacement.
    """

    image: Array
    features: dict[int, Array]


# --- operations ---


def _pad(x: Array, before: int, after: int, axes: tuple[int, ...] = (1, 2)) -> Array:
    return jnp.pad(x, [(before, after) if axis in axes else (0, 0) for axis in range(x.ndim)])


def _fir(x: Array) -> Array:
    """Filters rows and columns with `_FIR`; [N, H, W, C] to [N, H - 3, W - 3, C]."""
    for axis in (1, 2):
        size = x.shape[axis] - 3
        tap = [lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(4)]
        x = _FIR[0] * (tap[0] + tap[3]) + _FIR[1] * (tap[1] + tap[2])
    return x


@jax.custom_vjp
def _fir_but_last(x: Array) -> Array:
    """`_fir` of `x` without its last row and column. The gradient is one filter; JAX's would add 16 padded arrays."""
    return _fir(x[:, :-1, :-1])


_fir_but_last.defvjp(lambda x: (_fir_but_last(x), None), lambda _, y: (_fir(_pad(y, 3, 4)),))


def upsample(x: Array) -> Array:
    """Doubles height and width with the filter [1, 3, 3, 1] (`upfirdn2d.upsample2d`); [N, H, W, C]."""
    for axis in (1, 2):
        size = x.shape[axis]
        x = _pad(x, 1, 1, (axis,))
        before, here, after = (lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(3))
        x = interleave(0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after, axis)
    return x


def up_conv(x: Array, kernel: Array | Kernel) -> Array:
    """Transposed 3x3 convolution of stride 2, then the filter [1, 3, 3, 1]; [N, H, W, I] to [N, 2H, 2W, O].

    The fastest form, also for the gradient with respect to `x`. Use `up_conv_folded` to train the kernel.
    """
    return _fir_but_last(convolution.up_conv3x3(x, kernel).astype(jnp.float32))


def up_conv_folded(x: Array, weight: Array) -> Array:
    """`up_conv` with its filter folded into the weights: one 3x3 convolution to 4 O channels, then depth to space.

    This takes four times the operations, but its gradient with respect to `weight` is that of an ordinary convolution,
    which suits training.
    """
    n, h, w, _ = x.shape
    features = weight.shape[-1]
    padded = jnp.pad(weight[::-1, ::-1], ((3, 3), (3, 3), (0, 0), (0, 0)))
    shifted = (_FIR[i] * _FIR[j] * padded[i : i + 6, j : j + 6] for i in range(4) for j in range(4))
    kernel = sum(shifted, start=jnp.zeros(()))
    phases = jnp.concatenate([kernel[1 - a :: 2, 1 - b :: 2] for a in (0, 1) for b in (0, 1)], -1)
    y = conv3x3(x, phases).reshape(n, h, w, 2, 2, features)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, features)


class PrepackedConv(NamedTuple):
    """A kernel prepacked for `modulated_conv`, with its `kernel_energy` [I, O]."""

    kernel: Kernel
    energy: Array


def kernel_energy(weight: Array) -> Array:
    """Sum of squares over the taps of a kernel; [h, w, I, O] to [I, O]."""
    # Written out, this is one pass over the weights; as a reduction it takes several times longer on a CPU.
    return sum((jnp.square(tap) for row in weight for tap in row), start=jnp.zeros(()))


def modulated_conv(
    x: Array, weight: Array | PrepackedConv, styles: Array, convolve: Callable[[Array, Any], Array] = conv3x3
) -> Array:
    """Convolution whose input channels are scaled by styles, demodulated to unit gain (equations 1 to 3 of the paper).

    Args:
      x: [N, H, W, I]; the convolution runs in its precision.
      weight: [3, 3, I, O], or prepacked.
      styles: [N, I].
      convolve: `conv3x3` or `up_conv`.

    Returns:
      float32 [N, H, W, O], or [N, 2H, 2W, O] for `up_conv`.
    """
    chex.assert_rank([x, styles], [4, 2])
    kernel, energy = weight if isinstance(weight, PrepackedConv) else (weight, kernel_energy(weight))
    gain = lax.rsqrt(jnp.square(styles) @ energy + 1e-8)  # [N, O]
    scaled = (x.astype(jnp.float32) * styles[:, None, None, :]).astype(x.dtype)
    kernel = jax.tree.map(lambda form: form.astype(x.dtype), kernel)
    return convolve(scaled, kernel).astype(jnp.float32) * gain[:, None, None, :]


def _activate(x: Array, bias: Array, clamp: float | None) -> Array:
    x = x + bias
    return _clamp(x * jnp.where(x >= 0, _SQRT2, 0.2 * _SQRT2), clamp)  # leaky ReLU times its gain


def _clamp(x: Array, limit: float | None) -> Array:
    return x if limit is None else jnp.clip(x, -limit, limit)


def _normalize(x: Array) -> Array:
    """Scales the last axis to a mean square of 1."""
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-8)


# --- blocks ---


class Dense(nn.Module):
    """Dense layer with equalized learning rate: weights are stored without the factor lr_multiplier / sqrt(inputs)."""

    features: int
    lr_multiplier: float = 1.0
    bias_init: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        weight = self.param("weight", nn.initializers.normal(1 / self.lr_multiplier), (fan_in, self.features))
        bias = self.param("bias", nn.initializers.constant(self.bias_init), (self.features,))
        return x @ (weight * (self.lr_multiplier / math.sqrt(fan_in))) + bias * self.lr_multiplier


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias and leaky ReLU; `up` doubles height and width."""

    features: int
    resolution: int
    up: bool
    conv_clamp: float | None
    use_noise: bool
    up_conv: Callable[[Array, Array], Array]

    @nn.compact
    def __call__(self, x: Array, w: Array, noise: Noise, noise_key: Array | None) -> Array:
        fan_in = x.shape[-1]
        styles = Dense(fan_in, bias_init=1.0, name="affine")(w)
        weight = self.param("weight", nn.initializers.normal(1.0), (3, 3, fan_in, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        prepacked = self.get_variable("prepacked", "conv")
        x = modulated_conv(x, weight if prepacked is None else prepacked, styles, self.up_conv if self.up else conv3x3)
        if self.use_noise:
            size = (self.resolution, self.resolution)
            noise_const = self.param("noise_const", nn.initializers.normal(1.0), size)
            noise_strength = self.param("noise_strength", nn.initializers.zeros, ())
            if noise == "const":
                x = x + (noise_const * noise_strength)[None, :, :, None]
            elif noise == "random":
                assert noise_key is not None
                x = x + jax.random.normal(noise_key, (x.shape[0], *size, 1), x.dtype) * noise_strength
        return _activate(x, bias, self.conv_clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to the image's channels, without demodulation."""

    features: int
    conv_clamp: float | None

    @nn.compact
    def __call__(self, x: Array, w: Array) -> Array:
        fan_in = x.shape[-1]
        styles = Dense(fan_in, bias_init=1.0, name="affine")(w) / math.sqrt(fan_in)
        weight = self.param("weight", nn.initializers.normal(1.0), (1, 1, fan_in, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # With few outputs, scaling the weights rather than x saves a pass over x.
        kernel = (styles[:, :, None] * weight[0, 0]).astype(x.dtype)
        rgb = jnp.einsum("nhwi,nio->nhwo", x, kernel, preferred_element_type=jnp.float32)
        return _clamp(rgb + bias, self.conv_clamp)


class SynthesisBlock(nn.Module):
    """The layers of one resolution, and their RGB, added to the upsampled image of the previous block."""

    config: StyleGAN2Config
    resolution: int
    up_conv: Callable[[Array, Array], Array]
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array | None, image: Array | None, ws: Array, noise: Noise, noise_key: Array | None
    ) -> tuple[Array, Array]:
        cfg, features = self.config, self.config.channels(self.resolution)
        keys = (None, None) if noise_key is None else tuple(jax.random.split(noise_key))
        layer = lambda up, name: SynthesisLayer(  # noqa: E731
            features, self.resolution, up, cfg.conv_clamp, cfg.use_noise, self.up_conv, name=name
        )
        if x is None:
            const = self.param("const", nn.initializers.normal(1.0), (4, 4, features))
            x = jnp.broadcast_to(const, (ws.shape[0], 4, 4, features))
        else:
            x = layer(True, "conv0")(x.astype(self.dtype), ws[:, 0], noise, keys[0])
            ws = ws[:, 1:]
        x = layer(False, "conv1")(x.astype(self.dtype), ws[:, 0], noise, keys[1]).astype(self.dtype)
        rgb = ToRGB(cfg.img_channels, cfg.conv_clamp, name="torgb")(x, ws[:, 1])
        return x, rgb if image is None else upsample(image) + rgb


# --- network ---


def _is_high(config: StyleGAN2Config, resolution: int) -> bool:
    """Whether `resolution` is among the four highest, which may run in half precision."""
    return resolution in config.block_resolutions[-4:]


class SynthesisNetwork(nn.Module):
    """From styles to an image; see `synthesize`."""

    config: StyleGAN2Config
    up_conv: Callable[[Array, Array], Array] = up_conv
    half_precision: bool = False

    @nn.compact
    def __call__(
        self,
        ws: Array,
        noise: Noise,
        noise_key: Array | None,
        offsets: Mapping[int, Array],
        features: Mapping[int, Array],
        masks: Mapping[int, Array],
        max_resolution: int | None = None,
    ) -> Synthesis:
        x = image = None
        outputs = {}
        first = 0
        for resolution in self.config.block_resolutions:
            if max_resolution is not None and resolution > max_resolution:
                break
            dtype = jnp.bfloat16 if self.half_precision and _is_high(self.config, resolution) else jnp.float32
            block = SynthesisBlock(self.config, resolution, self.up_conv, dtype, name=f"b{resolution}")
            block_ws = ws[:, first : first + (2 if x is None else 3)]
            first += 1 if x is None else 2
            key = None if noise_key is None else jax.random.fold_in(noise_key, resolution)
            x, image = block(x, image, block_ws, noise, key)
            x = x.astype(jnp.float32)
            if resolution in offsets:
                x = x + offsets[resolution] * masks.get(resolution, 1.0)
            if resolution in features:
                mask = masks.get(resolution, 1.0)
                x = x * (1 - mask) + features[resolution] * mask
            outputs[resolution] = x
        assert image is not None
        return Synthesis(image, outputs)


class MappingNetwork(nn.Module):
    """From z to styles; see `map_z`."""

    config: StyleGAN2Config

    @nn.compact
    def __call__(
        self, z: Array, c: Array | None, truncation_psi: Array | float, truncation_cutoff: int | None
    ) -> Array:
        cfg, embed_dim = self.config, self.config.embed_dim or self.config.w_dim
        if cfg.c_dim == 0:
            x = _normalize(z)
        elif c is None:
            raise ValueError(f"this generator is conditional: pass labels c of shape [N, {cfg.c_dim}]")
        elif cfg.label_concat:
            matrix = self.param("label_matrix", nn.initializers.normal(1.0), (cfg.c_dim, embed_dim))
            x = _normalize(jnp.concatenate([z, c @ matrix], -1))
        else:
            x = jnp.concatenate([_normalize(z), _normalize(Dense(embed_dim, name="embed")(c))], -1)
        for i in range(cfg.mapping_layers):
            width = cfg.w_dim if i == cfg.mapping_layers - 1 else cfg.mapping_dim or cfg.w_dim
            x = Dense(width, lr_multiplier=cfg.mapping_lr_multiplier, name=f"fc{i}")(x)
            x = nn.leaky_relu(x, 0.2) * _SQRT2
        w_avg = self.param("w_avg", nn.initializers.zeros, (cfg.w_dim,))
        ws = jnp.broadcast_to(x[:, None], (x.shape[0], cfg.num_ws, cfg.w_dim))
        cut = jnp.arange(cfg.num_ws)[:, None] < (cfg.num_ws if truncation_cutoff is None else truncation_cutoff)
        return jnp.where(cut, w_avg + (ws - w_avg) * truncation_psi, ws)


class Generator(nn.Module):
    """Mapping and synthesis network; use it through the functions below, which take `(config, params, …)`.

    Attributes:
      config: sizes of the generator.
      up_conv: form of the up-convolutions, `up_conv` (inference, inversion) or `up_conv_folded` (training).
      half_precision: whether to run the four highest resolutions in bfloat16.
    """

    config: StyleGAN2Config
    up_conv: Callable[[Array, Array], Array] = up_conv
    half_precision: bool = False

    def setup(self) -> None:
        self.mapping = MappingNetwork(self.config)
        self.synthesis = SynthesisNetwork(self.config, self.up_conv, self.half_precision)

    def __call__(self, z: Array, c: Array | None = None) -> Array:
        return self.synthesize(self.map_z(z, c)).image

    def map_z(
        self,
        z: Array,
        c: Array | None = None,
        *,
        truncation_psi: Array | float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Array:
        return self.mapping(z, c, truncation_psi, truncation_cutoff)

    def synthesize(
        self,
        ws: Array,
        *,
        noise: Noise = "const",
        noise_key: Array | None = None,
        offsets: Mapping[int, Array] | None = None,
        features: Mapping[int, Array] | None = None,
        masks: Mapping[int, Array] | None = None,
        max_resolution: int | None = None,
    ) -> Synthesis:
        if noise not in ("const", "none", "random"):
            raise ValueError(f"noise must be const, none or random, not {noise!r}")
        if noise == "random" and noise_key is None:
            raise ValueError("random noise needs noise_key")
        key = noise_key if noise == "random" else None
        return self.synthesis(ws, noise, key, offsets or {}, features or {}, masks or {}, max_resolution)


# --- functions ---


def init(config: StyleGAN2Config, *, key: Array) -> Params:
    """Random parameters, as at the start of training: a nested dict named after the modules of this file."""
    c = jnp.zeros((1, config.c_dim)) if config.c_dim else None
    return Generator(config).init(key, jnp.zeros((1, config.z_dim)), c)["params"]


def prepack(
    config: StyleGAN2Config, params: Params, *, half_precision: bool = False, minimal: bool | None = None
) -> Params:
    """Transforms the kernels once for many calls of `synthesize`.

    The images stay the same up to rounding. The gradient with respect to the kernels becomes zero.

    Args:
      config: sizes of the generator.
      params: as returned by `init` or converted from a checkpoint.
      half_precision: as it will be passed to `synthesize`.
      minimal: see `convolution.prepack`.

    Returns:
      `params` with the entry "prepacked".
    """
    blocks: dict[str, dict[str, dict[str, PrepackedConv]]] = {}
    for r in config.block_resolutions:
        block = blocks[f"b{r}"] = {}
        layers = {"conv0": (convolution.prepack_up, r // 2), "conv1": (convolution.prepack, r)}
        for name, (transform, size) in layers.items():
            if name in params["synthesis"][f"b{r}"]:
                weight = params["synthesis"][f"b{r}"][name]["weight"]
                used = weight.astype(jnp.bfloat16) if half_precision and _is_high(config, r) else weight
                kernel = transform(used, size, size, minimal=minimal)
                block[name] = {"conv": PrepackedConv(kernel, kernel_energy(weight))}
    return {**params, "prepacked": {"synthesis": blocks}}


def as_rgb(config: StyleGAN2Config, params: dict[str, Any]) -> tuple[StyleGAN2Config, dict[str, Any]]:
    """A generator of gray images as one of RGB images with three equal channels; others are returned as they are."""
    if config.img_channels != 1:
        return config, params
    synthesis = dict(params["synthesis"])
    for r in config.block_resolutions:
        block = dict(synthesis[f"b{r}"])
        block["torgb"] = {
            name: jnp.repeat(value, 3, axis=-1) if name in ("weight", "bias") else value
            for name, value in block["torgb"].items()
        }
        synthesis[f"b{r}"] = block
    return dataclasses.replace(config, img_channels=3), {**params, "synthesis": synthesis}


def draw_labels(config: StyleGAN2Config, count: int, class_idx: int | None, *, key: Array) -> Array | None:
    """One-hot labels [count, c_dim]: of a class, or of classes drawn uniformly if None; None without classes."""
    if not config.c_dim:
        return None
    drawn = jax.random.randint(key, (count,), 0, config.c_dim) if class_idx is None else jnp.full(count, class_idx)
    return jax.nn.one_hot(drawn, config.c_dim)


def map_z(
    config: StyleGAN2Config,
    params: Params,
    z: Array,
    c: Array | None = None,
    *,
    truncation_psi: Array | float = 1.0,
    truncation_cutoff: int | None = None,
) -> Array:
    """Maps z to styles.

    Args:
      config: sizes of the generator.
      params: as returned by `init` or converted from a checkpoint.
      z: [N, z_dim], standard normal.
      c: [N, c_dim], one-hot labels for a conditional generator.
      truncation_psi: interpolates between the average style (0) and the style of `z` (1).
      truncation_cutoff: number of leading styles to truncate; default: all.

    Returns:
      [N, num_ws, w_dim].

    Raises:
      ValueError: If the generator is conditional and `c` is missing.
    """
    return Generator(config).apply(
        flax_variables(params), z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff, method="map_z"
    )  # type: ignore[return-value]


def synthesize(
    config: StyleGAN2Config,
    params: Params,
    ws: Array,
    *,
    noise: Noise = "const",
    noise_key: Array | None = None,
    offsets: Mapping[int, Array] | None = None,
    features: Mapping[int, Array] | None = None,
    masks: Mapping[int, Array] | None = None,
    half_precision: bool = False,
) -> Synthesis:
    """Renders styles, optionally shifting or replacing the outputs of blocks.

    The output x of the block at resolution r first becomes x + offsets[r] * masks[r], then
    x * (1 - masks[r]) + features[r] * masks[r]. Both change only the blocks that follow, not the RGB of the block
    itself.

    Args:
      config: sizes of the generator.
      params: as returned by `init` or `prepack`, or converted from a checkpoint.
      ws: [N, num_ws, w_dim].
      noise: "const" for the stored noise, "none", or "random".
      noise_key: for random noise.
      offsets: {r: [N, r, r, channels(r)]}.
      features: {r: [N, r, r, channels(r)]}.
      masks: {r: [N, r, r, 1]} in [0, 1]; 1 at resolutions that are not given.
      half_precision: whether to run the four highest resolutions in bfloat16.

    Returns:
      The image, in [-1, 1] give or take some overshoot, and the output of each block.

    Raises:
      ValueError: If `noise` is unknown, or random without `noise_key`.
    """
    return Generator(config, half_precision=half_precision).apply(
        flax_variables(params), ws, noise=noise, noise_key=noise_key, offsets=offsets, features=features, masks=masks,
        method="synthesize",
    )  # type: ignore[return-value]  # fmt: skip
