"""3x3 convolutions, where an inversion spends most of its time; on a CPU, with fewer multiplications.

Multiplications dominate the time of a convolution on a CPU. Winograd's minimal filtering F(4, r) (Lavin and Gray,
"Fast Algorithms for Convolutional Neural Networks", CVPR 2016) computes four outputs of r taps with r + 3
multiplications instead of 4 r. Here it is applied over rows only, and each of its products is a convolution over
columns. Applying it in both directions would save more multiplications, but loses the last digits of float32 and
spends the time saved on passes over memory. The evaluation points are chosen so that rounding stays close to that of
the plain sum.

A kernel that is used many times is transformed once, by `prepack` or `prepack_up`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_POINTS = {3: (0.0, 0.625, -0.625, 1.25, -1.25), 2: (0.5, -0.5, 1.25, -1.25)}  # by number of taps; infinity is implied
_MIN_PIXELS = {"forward": 2, "backward": 4, "up": 4}  # per channel, below which minimal filtering saves no time


class Kernel(NamedTuple):
    """A prepacked kernel [3, 3, I, O]. Its own gradient is zero.

    Attributes:
      forward: [T, 3, I, O], for the convolution; T is 3, or 6 for minimal filtering.
      backward: [T, 3, O, I], for the gradient with respect to the input.
    """

    forward: Array
    backward: Array


# --- stride 1 ---


@jax.custom_vjp
def conv3x3(x: Array, kernel: Array | Kernel) -> Array:
    """3x3 convolution (cross-correlation) with zero padding that keeps the size.

    Args:
      x: [N, H, W, I].
      kernel: [3, 3, I, O], or prepacked by `prepack`.

    Returns:
      [N, H, W, O].
    """
    _check(x, kernel)
    if isinstance(kernel, Kernel):
        return _apply(x, kernel.forward)
    return _choose(_saves_time(x, kernel, "forward"), _minimal, direct)(x, kernel)


def _conv3x3_backward(saved: tuple[Array, Array | Kernel], y: Array) -> tuple[Array, Array | Kernel]:
    x, kernel = saved
    if isinstance(kernel, Kernel):
        return _apply(y, kernel.backward), jax.tree.map(jnp.zeros_like, kernel)
    (kernel_gradient,) = jax.vjp(lambda w: direct(x, w), kernel)[1](y)
    forms = (functools.partial(form, transposed=True) for form in (_minimal, direct))
    return _choose(_saves_time(y, kernel, "backward"), *forms)(y, kernel[::-1, ::-1]), kernel_gradient


conv3x3.defvjp(lambda x, kernel: (conv3x3(x, kernel), (x, kernel)), _conv3x3_backward)


def prepack(weight: Array, height: int, width: int, *, minimal: bool | None = None) -> Kernel:
    """Prepares a kernel for `conv3x3` on images of one size.

    Args:
      weight: [3, 3, I, O].
      height: height of the images.
      width: width of the images.
      minimal: whether to use minimal filtering, which needs float32 and a height divisible by 4 (otherwise the
        convolution is a plain one); default: where it saves time on JAX's default backend.
    """
    x = jax.ShapeDtypeStruct((1, height, width, 0), weight.dtype)
    transform = lambda w, use: _products(w) if _use_minimal(x, weight, use, minimal) else w  # noqa: E731
    backward = weight[::-1, ::-1].swapaxes(2, 3)
    return Kernel(transform(weight, "forward"), transform(backward, "backward"))


def direct(x: Array, weight: Array, transposed: bool = False) -> Array:
    """`conv3x3` by XLA's own convolution; `weight` is [3, 3, I, O], or [3, 3, O, I] if `transposed`."""
    return _convolve(x, weight, "SAME", transposed)


def _apply(x: Array, form: Array) -> Array:
    """`conv3x3` with a field of `Kernel`."""
    return direct(x, form) if form.shape[0] == 3 else _filter(x, form, False)


def _minimal(x: Array, weight: Array, transposed: bool = False) -> Array:
    """`direct` by minimal filtering; the height must be divisible by 4."""
    return _filter(x, _products(weight), transposed)


def _filter(x: Array, products: Array, transposed: bool) -> Array:
    run = lambda rows, kernel: _convolve(rows, kernel, "SAME", transposed)  # noqa: E731
    return _four_rows(_pad_rows(x, 1, 1), 3, [functools.partial(run, kernel=kernel[None]) for kernel in products])


# --- stride 2 ---


@jax.custom_vjp
def up_conv3x3(x: Array, kernel: Array | Kernel) -> Array:
    """Transposed 3x3 convolution of stride 2, with a margin of zeros for the filter that follows.

    The zeros that the stride inserts between pixels are never multiplied: each of the four output phases is an
    ordinary convolution with its part of the kernel.

    Args:
      x: [N, H, W, I].
      kernel: [3, 3, I, O], or prepacked by `prepack_up`.

    Returns:
      [N, 2H + 4, 2W + 4, O]: pixel (t + 1, u + 1) is y[t, u] = Σ x[i, j] kernel[t - 2i, u - 2j], for t from -1 to
      2H + 2 and u from -1 to 2W + 2; it is zero where t or u is -1, t > 2H or u > 2W.
    """
    _check(x, kernel)
    if isinstance(kernel, Kernel):
        return (_up_direct if kernel.forward.shape[0] == 3 else _up_filter)(x, kernel.forward)
    return _choose(_saves_time(x, kernel, "up"), lambda x, w: _up_filter(x, _up_products(w)), _up_direct)(x, kernel)


def _up_conv3x3_backward(saved: tuple[Array, Array | Kernel], y: Array) -> tuple[Array, Array | Kernel]:
    x, kernel = saved
    if not isinstance(kernel, Kernel):
        return jax.vjp(_up_direct, x, kernel)[1](y)
    down = _down_direct if kernel.backward.shape[0] == 3 else _down_filter
    return down(y, kernel.backward), jax.tree.map(jnp.zeros_like, kernel)


up_conv3x3.defvjp(lambda x, kernel: (up_conv3x3(x, kernel), (x, kernel)), _up_conv3x3_backward)


def prepack_up(weight: Array, height: int, width: int, *, minimal: bool | None = None) -> Kernel:
    """Prepares a kernel for `up_conv3x3` on input images of one size; arguments as of `prepack`."""
    x = jax.ShapeDtypeStruct((1, height, width, 0), weight.dtype)
    backward = weight.swapaxes(2, 3)
    if not _use_minimal(x, weight, "up", minimal):
        return Kernel(weight, backward)
    return Kernel(_up_products(weight), _down_products(backward))


def _up_columns(x: Array, kernel: Array, rows: tuple[int, int]) -> Array:
    """`up_conv3x3` along columns, an ordinary convolution along rows, padded by `rows`; `kernel` is [r, 3, I, O]."""
    flipped = kernel[:, ::-1]
    odd, even = _convolve(x, flipped[:, 1:2], (rows, (1, 1))), _convolve(x, flipped[:, 0::2], (rows, (1, 2)))
    return interleave(odd, even, 2)


def _up_direct(x: Array, weight: Array) -> Array:
    # Odd output rows use row 1 of the kernel, even ones rows 0 and 2.
    flipped = weight[::-1]
    return interleave(_up_columns(x, flipped[1:2], (1, 1)), _up_columns(x, flipped[0::2], (1, 2)), 1)


def _up_products(weight: Array) -> Array:
    """[6, 3, I, O]: the kernel row of odd output rows, then the five products for even ones."""
    return jnp.concatenate([weight[1:2], _products(weight[::-2])])


def _up_filter(x: Array, products: Array) -> Array:
    height = x.shape[1]
    run = lambda rows, kernel: _up_columns(rows, kernel, (0, 0))  # noqa: E731
    even = _four_rows(_pad_rows(x, 1, 4), 2, [functools.partial(run, kernel=kernel[None]) for kernel in products[1:]])
    return interleave(_up_columns(x, products[:1], (1, 1)), even[:, : height + 2], 1)


def _parities(y: Array, axis: int) -> tuple[Array, Array]:
    """Odd and even outputs y[t] of `up_conv3x3` along `axis`: t = 1, 3, …, 2H - 1 and t = 0, 2, …, 2H."""
    count = y.shape[axis] // 2 - 2
    odd = lax.slice_in_dim(y, 2, 2 + 2 * count - 1, 2, axis=axis)
    return odd, lax.slice_in_dim(y, 1, 1 + 2 * count + 1, 2, axis=axis)


def _down_columns(y: Array, kernel: Array) -> Array:
    """The gradient of `_up_columns`, without padding along rows; `kernel` is [r, 3, O, I]."""
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


# --- shared ---


def interleave(first: Array, second: Array, axis: int) -> Array:
    """Interleaves two arrays of the same shape along `axis`: first[0], second[0], first[1], …"""
    shape = list(first.shape)
    shape[axis] *= 2
    return jnp.stack([first, second], axis + 1).reshape(shape)


def _check(x: Array, kernel: Array | Kernel) -> None:
    chex.assert_rank(x, 4)
    if not isinstance(kernel, Kernel):
        chex.assert_shape(kernel, (3, 3, x.shape[-1], None))


def _saves_time(x: Array | jax.ShapeDtypeStruct, weight: Array, use: str) -> bool:
    """Whether minimal filtering is faster on a CPU, as measured.

    With few channels, its passes over memory cost more than it saves; with few pixels, those over the weights do.
    """
    height, width = x.shape[1:3]
    channels = weight.shape[2:]
    enough = min(channels) >= 128 and height * width >= _MIN_PIXELS[use] * max(channels)
    return enough and _is_possible(x)


def _is_possible(x: Array | jax.ShapeDtypeStruct) -> bool:
    return x.dtype == jnp.float32 and x.shape[1] % 4 == 0


def _use_minimal(x: jax.ShapeDtypeStruct, weight: Array, use: str, minimal: bool | None) -> bool:
    if minimal is None:
        return jax.default_backend() == "cpu" and _saves_time(x, weight, use)
    return minimal and _is_possible(x)


def _choose(
    saves_time: bool, minimal: Callable[[Array, Array], Array], default: Callable[[Array, Array], Array]
) -> Callable[[Array, Array], Array]:
    """On a CPU `minimal` where that saves time; `default` otherwise."""
    if not saves_time:
        return default
    return lambda x, weight: lax.platform_dependent(x, weight, cpu=minimal, default=default)


def _convolve(x: Array, weight: Array, padding: str | Sequence[tuple[int, int]], transposed: bool = False) -> Array:
    numbers = ("NHWC", "HWOI" if transposed else "HWIO", "NHWC")
    return lax.conv_general_dilated(x, weight, (1, 1), padding, dimension_numbers=numbers)


def _pad_rows(x: Array, before: int, after: int) -> Array:
    return jnp.pad(x, ((0, 0), (before, after), (0, 0), (0, 0)))


@functools.cache
def _transforms(taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F(4, taps) by the Toom-Cook algorithm, with P = taps + 3 products.

    Returns:
      Three matrices: of input rows [P, P], of kernel rows [P, taps], and from products to output rows [P, 4].
    """
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
    """Transforms a kernel's rows for minimal filtering; [taps, w, I, O] to [taps + 3, w, I, O]."""
    # A matrix product: XLA would fuse sums with the transposition that follows, and read the weights column by column.
    return jnp.einsum("py,yxio->pxio", _transforms(weight.shape[0])[1], weight, precision="highest")


def _four_rows(x: Array, taps: int, products: Sequence[Callable[[Array], Array]]) -> Array:
    """Correlates rows with `taps` taps, four output rows at a time.

    Args:
      x: [N, 4 g + taps - 1 or more, W, I].
      taps: 2 or 3.
      products: convolution of each transformed kernel row over columns, [N, g, W, I] to [N, g, W', O].

    Returns:
      [N, 4 g, W', O].
    """
    row_matrix, _, output_matrix = _transforms(taps)
    groups = (x.shape[1] - taps + 1) // 4
    rows = [lax.slice_in_dim(x, i, i + 4 * groups - 3, 4, axis=1) for i in range(taps + 3)]  # each [N, g, W, I]
    multiplied = [product(_combine(c, rows)) for c, product in zip(row_matrix, products, strict=True)]
    y = jnp.stack([_combine(c, multiplied) for c in output_matrix.T], axis=2)  # [N, g, 4, W', O]
    return y.reshape(y.shape[0], 4 * groups, *y.shape[3:])


def _combine(coefficients: np.ndarray, arrays: Sequence[Array]) -> Array:
    """Linear combination of `arrays`; terms with coefficient 0 are left out."""
    terms = [x if c == 1 else c * x for c, x in zip(coefficients, arrays, strict=True) if c]
    return functools.reduce(jnp.add, terms)
