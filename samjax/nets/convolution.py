"""3x3 convolutions, which are most of every step; on a CPU with fewer multiplications.

A CPU convolves as fast as it multiplies, so fewer multiplications are less time. Winograd's minimal filtering F(4, r)
(Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016) gives four outputs of r taps each with
r + 3 multiplications instead of 4 r. Here it runs over rows only, and each of its products is a convolution over
columns: in both directions it would save more multiplications, but lose float32's last digits, and the time again in
passes over memory. The points of evaluation were chosen for their rounding, which is close to that of the plain sum.

Whoever convolves with the same kernel many times has it transformed once, by `freeze` or `freeze_up`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_POINTS = {3: (0.0, 0.625, -0.625, 1.25, -1.25), 2: (0.5, -0.5, 1.25, -1.25)}  # by taps; and infinity
_PIXELS = {"there": 2, "back": 4, "up": 4}  # for each channel, from which on it saves time


class Kernel(NamedTuple):
    """A kernel [3, 3, I, O] as the convolution uses it, and as its gradient does. It has no gradient itself.

    Attributes:
      there: [T, 3, I, O]; T is 3, or 6 for minimal filtering.
      back: [T, 3, O, I].
    """

    there: Array
    back: Array


# --- stride 1 ---


@jax.custom_vjp
def conv3x3(x: Array, kernel: Array | Kernel) -> Array:
    """Correlation with zero padding that keeps the size.

    Args:
      x: [N, H, W, I].
      kernel: [3, 3, I, O], or what `freeze` makes of it.

    Returns:
      [N, H, W, O].
    """
    if isinstance(kernel, Kernel):
        return _correlate(x, kernel.there)
    return _choose(_suits(x, kernel, "there"), _minimal, direct)(x, kernel)


def _conv3x3_back(saved: tuple[Array, Array | Kernel], y: Array) -> tuple[Array, Array | Kernel]:
    x, kernel = saved
    if isinstance(kernel, Kernel):
        return _correlate(y, kernel.back), jax.tree.map(jnp.zeros_like, kernel)
    (to_kernel,) = jax.vjp(lambda w: direct(x, w), kernel)[1](y)
    forms = (functools.partial(form, transposed=True) for form in (_minimal, direct))
    return _choose(_suits(y, kernel, "back"), *forms)(y, kernel[::-1, ::-1]), to_kernel


conv3x3.defvjp(lambda x, kernel: (conv3x3(x, kernel), (x, kernel)), _conv3x3_back)


def freeze(weight: Array, height: int, width: int) -> Kernel:
    """Prepares a kernel [3, 3, I, O] for `conv3x3` on images of such a size, on JAX's default device."""
    x = jax.ShapeDtypeStruct((1, height, width, 0), weight.dtype)
    back = weight[::-1, ::-1].swapaxes(2, 3)
    prepare = lambda w, use: _products(w) if _on_cpu() and _suits(x, weight, use) else w  # noqa: E731
    return Kernel(prepare(weight, "there"), prepare(back, "back"))


def direct(x: Array, weight: Array, transposed: bool = False) -> Array:
    """`conv3x3` by the platform's own convolution; `weight` is [3, 3, O, I] if `transposed`."""
    return _convolve(x, weight, "SAME", transposed)


def _correlate(x: Array, form: Array) -> Array:
    return direct(x, form) if form.shape[0] == 3 else _filter(x, form, False)


def _minimal(x: Array, weight: Array, transposed: bool = False) -> Array:
    """`direct` for a height that four divides."""
    return _filter(x, _products(weight), transposed)


def _filter(x: Array, products: Array, transposed: bool) -> Array:
    run = lambda rows, kernel: _convolve(rows, kernel, "SAME", transposed)  # noqa: E731
    return _four_rows(_pad_rows(x, 1, 1), 3, [functools.partial(run, kernel=kernel[None]) for kernel in products])


# --- stride 2 ---


@jax.custom_vjp
def up_conv3x3(x: Array, kernel: Array | Kernel) -> Array:
    """Transposed convolution of stride 2, with a margin of zeros for the filter that follows.

    The zeros that a stride puts between pixels are never multiplied: each of the four output phases is an ordinary
    convolution with its share of the kernel.

    Args:
      x: [N, H, W, I].
      kernel: [3, 3, I, O], or what `freeze_up` makes of it.

    Returns:
      [N, 2H + 4, 2W + 4, O]: pixel (t + 1, u + 1) is y[t, u] = Σ x[i, j] kernel[t - 2i, u - 2j], for t from -1 to
      2H + 2 and u likewise; it is zero where t or u is -1 or beyond 2H or 2W.
    """
    if isinstance(kernel, Kernel):
        return (_up_direct if kernel.there.shape[0] == 3 else _up_filter)(x, kernel.there)
    return _choose(_suits(x, kernel, "up"), lambda x, w: _up_filter(x, _up_products(w)), _up_direct)(x, kernel)


def _up_back(saved: tuple[Array, Array | Kernel], y: Array) -> tuple[Array, Array | Kernel]:
    x, kernel = saved
    if not isinstance(kernel, Kernel):
        return jax.vjp(_up_direct, x, kernel)[1](y)
    to_x = _down_direct if kernel.back.shape[0] == 3 else _down_filter
    return to_x(y, kernel.back), jax.tree.map(jnp.zeros_like, kernel)


up_conv3x3.defvjp(lambda x, kernel: (up_conv3x3(x, kernel), (x, kernel)), _up_back)


def freeze_up(weight: Array, height: int, width: int) -> Kernel:
    """Prepares a kernel [3, 3, I, O] for `up_conv3x3` from images of such a size, on JAX's default device."""
    x = jax.ShapeDtypeStruct((1, height, width, 0), weight.dtype)
    back = weight.swapaxes(2, 3)
    if not (_suits(x, weight, "up") and _on_cpu()):
        return Kernel(weight, back)
    return Kernel(_up_products(weight), _down_products(back))


def _up_columns(x: Array, kernel: Array, rows: tuple[int, int]) -> Array:
    """Along columns all, along rows an ordinary convolution; `kernel` is [r, 3, I, O]."""
    flipped = kernel[:, ::-1]
    odd, even = _convolve(x, flipped[:, 1:2], (rows, (1, 1))), _convolve(x, flipped[:, 0::2], (rows, (1, 2)))
    return interleave(odd, even, 2)


def _up_direct(x: Array, weight: Array) -> Array:
    # Row t sees kernel row 1 where t is odd, rows 0 and 2 where it is even.
    flipped = weight[::-1]
    return interleave(_up_columns(x, flipped[1:2], (1, 1)), _up_columns(x, flipped[0::2], (1, 2)), 1)


def _up_products(weight: Array) -> Array:
    """[6, 3, I, O]: the kernel row of odd rows, and what minimal filtering takes of those of even ones."""
    return jnp.concatenate([weight[1:2], _products(weight[::-2])])


def _up_filter(x: Array, products: Array) -> Array:
    height = x.shape[1]
    run = lambda rows, kernel: _up_columns(rows, kernel, (0, 0))  # noqa: E731
    even = _four_rows(_pad_rows(x, 1, 4), 2, [functools.partial(run, kernel=kernel[None]) for kernel in products[1:]])
    return interleave(_up_columns(x, products[:1], (1, 1)), even[:, : height + 2], 1)


def _parities(y: Array, axis: int) -> tuple[Array, Array]:
    """Of what `up_conv3x3` gives, t = 2 i + 1 for each pixel i, and t = 2 i for those and one more."""
    count = y.shape[axis] // 2 - 2
    odd = lax.slice_in_dim(y, 2, 2 + 2 * count - 1, 2, axis=axis)
    return odd, lax.slice_in_dim(y, 1, 1 + 2 * count + 1, 2, axis=axis)


def _down_columns(y: Array, kernel: Array) -> Array:
    """The gradient of `_up_columns`, whose rows are not padded here; `kernel` is [r, 3, O, I]."""
    odd, even = _parities(y, 2)
    return _convolve(odd, kernel[:, 1:2], "VALID") + _convolve(even, kernel[:, 0::2], "VALID")


def _down_direct(y: Array, weight: Array) -> Array:
    """The gradient of `_up_direct`; `weight` is [3, 3, O, I]."""
    odd, even = _parities(y, 1)
    return _down_columns(odd, weight[1:2]) + _down_columns(even, weight[0::2])


def _down_products(weight: Array) -> Array:
    return jnp.concatenate([weight[1:2], _products(weight[0::2])])


def _down_filter(y: Array, products: Array) -> Array:
    odd, even = _parities(y, 1)
    forms = [functools.partial(_down_columns, kernel=kernel[None]) for kernel in products[1:]]
    return _down_columns(odd, products[:1]) + _four_rows(even, 2, forms)


# --- both ---


def interleave(first: Array, second: Array, axis: int) -> Array:
    """Weaves two arrays of the same shape along `axis`."""
    shape = list(first.shape)
    shape[axis] *= 2
    return jnp.stack([first, second], axis + 1).reshape(shape)


def _suits(x: Array | jax.ShapeDtypeStruct, weight: Array, use: str) -> bool:
    """Whether minimal filtering is the faster form on a CPU.

    Measured: with few channels passes over memory cost more than is saved, with few pixels those over the weights.
    """
    height, width = x.shape[1:3]
    narrow, small = min(weight.shape[2:]) < 128, height * width < _PIXELS[use] * max(weight.shape[2:])
    return x.dtype == jnp.float32 and height % 4 == 0 and not narrow and not small


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _choose(
    suits: bool, minimal: Callable[[Array, Array], Array], default: Callable[[Array, Array], Array]
) -> Callable[[Array, Array], Array]:
    if not suits:
        return default
    return lambda x, weight: lax.platform_dependent(x, weight, cpu=minimal, default=default)


def _convolve(x: Array, weight: Array, padding: str | Sequence[tuple[int, int]], transposed: bool = False) -> Array:
    numbers = ("NHWC", "HWOI" if transposed else "HWIO", "NHWC")
    return lax.conv_general_dilated(x, weight, (1, 1), padding, dimension_numbers=numbers)


def _pad_rows(x: Array, before: int, after: int) -> Array:
    return jnp.pad(x, ((0, 0), (before, after), (0, 0), (0, 0)))


@functools.cache
def _transforms(taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of F(4, taps) by Toom and Cook: of rows [P, P], of kernels [P, taps], and of products to outputs [P, 4]."""
    points = np.array(_POINTS[taps])
    count = taps + 3
    rows, kernels, outputs = np.zeros((count, count)), np.zeros((count, taps)), np.zeros((count, 4))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        rows[i, :-1] = np.poly(others)[::-1]
        kernels[i] = point ** np.arange(taps) / np.prod(point - others)
        outputs[i] = point ** np.arange(4)
    rows[-1], kernels[-1, -1], outputs[-1, -1] = np.poly(points)[::-1], 1, 1
    return tuple(x.astype(np.float32) for x in (rows, kernels, outputs))  # type: ignore[return-value]


def _products(weight: Array) -> Array:
    """A kernel's rows [taps, w, I, O] as minimal filtering multiplies with them: [taps + 3, w, I, O]."""
    # As a product: sums would be fused with the transposition that follows, and read the weights against the grain.
    return jnp.einsum("py,yxio->pxio", _transforms(weight.shape[0])[1], weight, precision="highest")


def _four_rows(x: Array, taps: int, products: Sequence[Callable[[Array], Array]]) -> Array:
    """Correlates rows with `taps` taps, four outputs at a time; of [N, 4 g + taps - 1 or more, W, I] the 4 g rows."""
    rows, _, outputs = _transforms(taps)
    groups = (x.shape[1] - taps + 1) // 4
    parts = [lax.slice_in_dim(x, i, i + 4 * groups - 3, 4, axis=1) for i in range(taps + 3)]
    made = [product(_combine(c, parts)) for c, product in zip(rows, products, strict=True)]
    y = jnp.stack([_combine(c, made) for c in outputs.T], axis=2)
    return y.reshape(y.shape[0], 4 * groups, *y.shape[3:])


def _combine(coefficients: np.ndarray, arrays: Sequence[Array]) -> Array:
    """Their sum with such coefficients."""
    terms = [x if c == 1 else c * x for c, x in zip(coefficients, arrays, strict=True) if c]
    return functools.reduce(jnp.add, terms)
