"""Encoders: from a picture to W+, where an inversion starts."""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from samjax.nets import e4e as e4e_network
from samjax.nets.blocks import Variables


class Encoder(Protocol):
    """Anything that gives W+ of targets."""

    def __call__(self, targets: ArrayLike) -> np.ndarray:
        """Takes targets [N, h, w, 3] in [-1, 1]; gives W+ [N, num_ws, w_dim] float32."""
        ...


@functools.partial(jax.jit, static_argnames=("config", "precision"))
def _encode(variables: Variables, images: Array, config: e4e_network.E4EConfig, precision: str) -> Array:
    with jax.default_matmul_precision(precision):
        return e4e_network.encode(variables, images, config)


def e4e(
    variables: Variables, config: e4e_network.E4EConfig, *, precision: str = "highest", batch_size: int = 1
) -> Encoder:
    """The e4e encoder (Tov et al., SIGGRAPH 2021), with which the authors start.

    Args:
      variables: of `samjax.nets.e4e`.
      config: its sizes.
      precision: of convolutions; "highest" is full float32 on every device.
      batch_size: targets in one pass; the last one is filled up.

    Returns:
      The encoder. It raises ValueError for targets that are not [N, h, w, 3], or too large.
    """

    def encoder(targets: ArrayLike) -> np.ndarray:
        targets = np.asarray(targets, np.float32)
        parts = []
        for first in range(0, len(targets), batch_size):
            index = np.minimum(np.arange(first, first + batch_size), len(targets) - 1)
            codes = _encode(variables, jnp.asarray(targets[index]), config, precision)
            parts.append(np.asarray(codes)[: len(targets) - first])
        return np.concatenate(parts)

    return encoder
