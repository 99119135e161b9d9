"""The 3x3 convolution of stride 1, which is most of every step; on a CPU with half of the multiplications.

A CPU convolves as fast as it multiplies, so fewer multiplications are less time. Winograd's minimal filtering F(4, 3)
(Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016) gives four outputs of three taps each
with six multiplications instead of twelve. Here it runs over rows only, and each of the six is a 1x3 convolution over
columns: in both directions it would save more multiplications, but lose float32's last digits, and the time again in
passes over memory. Lavin and Gray evaluate at 0, 1, -1, 2 and -2; at 0, 5/8, -5/8, 5/4 and -5/4 the rounding is a third
less, and close to that of the plain sum.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_A, _B = 5 / 8, 5 / 4
_A2, _B2 = _A * _A, _B * _B
_NORM_A, _NORM_B = 2 * _A2 * (_A2 - _B2), 2 * _B2 * (_B2 - _A2)
# A kernel's three rows as the values of a polynomial at the five points, and its highest coefficient.
_VALUES = np.array(
    [[1 / (_A2 * _B2), 0, 0]]
    + [[1 / norm, p / norm, p * p / norm] for p, norm in ((_A, _NORM_A), (-_A, _NORM_A), (_B, _NORM_B), (-_B, _NORM_B))]
    + [[0, 0, 1]],
    np.float32,
)


@jax.custom_vjp
def conv3x3(x: Array, weight: Array) -> Array:
    """Correlation with zero padding that keeps the size.

    Args:
      x: [N, H, W, I].
      weight: [3, 3, I, O].

    Returns:
      [N, H, W, O].
    """
    return _convolve(x, weight, False)


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return conv3x3(x, weight), (x, weight)


def _backward(saved: tuple[Array, Array], y: Array) -> tuple[Array, Array]:
    x, weight = saved
    (to_weight,) = jax.vjp(lambda w: direct(x, w), weight)[1](y)
    return _convolve(y, weight[::-1, ::-1], True), to_weight


conv3x3.defvjp(_forward, _backward)


def _convolve(x: Array, weight: Array, transposed: bool) -> Array:
    """Of `x` [N, H, W, I] with `weight` [3, 3, I, O], or [3, 3, O, I] if `transposed`, in the form that is fastest."""
    height, width = x.shape[1:3]
    # Measured: with few channels passes over memory cost more than is saved, with few pixels those over the weights.
    pixels = max(weight.shape[2:]) * (4 if transposed else 2)
    suits = x.dtype == jnp.float32 and height % 4 == 0
    if not (suits and min(weight.shape[2:]) >= 128 and height * width >= pixels):
        return direct(x, weight, transposed)
    minimal, default = (functools.partial(form, transposed=transposed) for form in (_minimal, direct))
    return lax.platform_dependent(x, weight, cpu=minimal, default=default)


def direct(x: Array, weight: Array, transposed: bool = False) -> Array:
    """`conv3x3` by the platform's own convolution; `weight` is [3, 3, O, I] if `transposed`."""
    numbers = ("NHWC", "HWOI" if transposed else "HWIO", "NHWC")
    return lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=numbers)


def _minimal(x: Array, weight: Array, transposed: bool) -> Array:
    """`direct` for a height that four divides."""
    n, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    r = [lax.slice_in_dim(padded, i, i + height - 3, 4, axis=1) for i in range(6)]  # row i of each group's six
    even, odd = lambda c: r[4] - c * r[2], lambda c: r[3] - c * r[1]
    rows = (
        _A2 * _B2 * r[0] - (_A2 + _B2) * r[2] + r[4],
        even(_B2) + _A * odd(_B2),
        even(_B2) - _A * odd(_B2),
        even(_A2) + _B * odd(_A2),
        even(_A2) - _B * odd(_A2),
        _A2 * _B2 * r[1] - (_A2 + _B2) * r[3] + r[5],
    )
    # As a product: sums would be fused with the transposition that follows, and read the weights against the grain.
    kernels = jnp.einsum("py,yxio->pxio", _VALUES, weight, precision="highest")
    zero, a, minus_a, b, minus_b, infinity = (
        direct(row, kernel[None], transposed) for row, kernel in zip(rows, kernels, strict=True)
    )
    y = (
        zero + (a + minus_a) + (b + minus_b),
        _A * (a - minus_a) + _B * (b - minus_b),
        _A2 * (a + minus_a) + _B2 * (b + minus_b),
        _A * _A2 * (a - minus_a) + _B * _B2 * (b - minus_b) + infinity,
    )
    return jnp.stack(y, axis=2).reshape(n, height, width, weight.shape[2 if transposed else 3])
