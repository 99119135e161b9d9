"""From error maps and segments to a latent layer for each segment, and from there to a soft mask for each layer.

SAM (CVPR 2022), section 3.2: every segment takes the most editable layer whose error, averaged over the segment, is at
most a threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike
from PIL import Image

from samjax.latents import LatentLayer


class Assignment(NamedTuple):
    """The layer of each segment, for T thresholds; NumPy arrays.

    Attributes:
      values: [S] the labels of the segments, as given, ascending.
      means: [L, S] mean of each layer's map in each segment.
      layers: [T, S] index of the layer that each segment takes.
      layer_maps: [T, H, W] int32, the same for each pixel.
    """

    values: np.ndarray
    means: np.ndarray
    layers: np.ndarray
    layer_maps: np.ndarray


def contiguous(segments: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Renumbers labels from 0: returns [H, W] int32, and [S] the original labels, ascending."""
    values, labels = np.unique(np.asarray(segments), return_inverse=True)
    return labels.reshape(np.shape(segments)).astype(np.int32), values


def segment_means(maps: Array, segments: Array, max_segments: int) -> Array:
    """Mean of each map in each segment.

    Args:
      maps: [L, H, W].
      segments: [H, W] labels from 0 to `max_segments` - 1.
      max_segments: number of means; static, so that images with fewer segments share one program.

    Returns:
      [L, max_segments]; infinity for labels that no pixel has, so that no threshold admits them.
    """

    def one(label: Array) -> Array:
        inside = segments == label
        count = jnp.maximum(jnp.sum(inside), 1).astype(maps.dtype)
        mean = jnp.sum(jnp.where(inside, maps, 0.0), axis=(1, 2)) / count
        # A second pass over the residual removes the rounding error of a long float32 sum: if a map is constant in a
        # segment, the mean is exactly that constant, and a threshold of the same value admits it.
        rest = jnp.sum(jnp.where(inside, maps - mean[:, None, None], 0.0), axis=(1, 2)) / count
        return jnp.where(jnp.any(inside), mean + rest, jnp.inf)

    return jax.vmap(one, out_axes=1)(jnp.arange(max_segments))


def select_layers(means: Array, tau: Array | float) -> Array:
    """The most editable layer of each segment: the first whose mean is at most `tau`, or the last if there is none.

    Args:
      means: [L, S], layers ordered with the most editable first.
      tau: threshold.

    Returns:
      [S] int32 indices of layers.
    """
    admitted = means <= tau
    last = means.shape[0] - 1
    return jnp.where(jnp.any(admitted, axis=0), jnp.argmax(admitted, axis=0), last).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="max_segments")
def _assign(maps: Array, labels: Array, taus: Array, max_segments: int) -> tuple[Array, Array, Array]:
    means = segment_means(maps, labels, max_segments)
    layers = jax.vmap(select_layers, in_axes=(None, 0))(means, taus)  # [T, S]
    return means, layers, layers[:, labels]


def assign_layers(maps: ArrayLike, segments: ArrayLike, taus: ArrayLike, max_segments: int = 64) -> Assignment:
    """Chooses a layer for every segment at every threshold.

    Args:
      maps: [L, H, W] error maps, the most editable layer first.
      segments: [H, W] labels of any integer values.
      taus: [T] thresholds, or one.
      max_segments: padded number of segments; raised to the next power of two for images with more.

    Raises:
      ValueError: maps and segments of different size.

    >>> maps = [[[0.1, 0.9]], [[0.1, 0.3]], [[0.1, 0.2]]]  # of W+, F4 and F6
    >>> chosen = assign_layers(maps, [[7, 9]], [0.25, 0.4])
    >>> chosen.values.tolist(), chosen.layers.tolist()
    ([7, 9], [[0, 2], [0, 1]])
    """
    maps = np.asarray(maps, np.float32)
    labels, values = contiguous(segments)
    if maps.shape[1:] != labels.shape:
        raise ValueError(f"maps of {maps.shape[1:]} px do not match segments of {labels.shape} px")
    count = len(values)
    size = max(max_segments, 1 << (count - 1).bit_length())
    means, layers, layer_maps = _assign(maps, labels, np.atleast_1d(np.asarray(taus, np.float32)), size)
    return Assignment(values, np.asarray(means)[:, :count], np.asarray(layers)[:, :count], np.asarray(layer_maps))


def force_layers(assignment: Assignment, segments: ArrayLike, forced: Mapping[int, int]) -> Assignment:
    """Assigns chosen layers to some segments, at every threshold.

    Args:
      assignment: as returned by `assign_layers`.
      segments: [H, W] labels, as given to it.
      forced: label to index of a layer; labels that no pixel has are ignored.
    """
    labels, values = contiguous(segments)
    layers = np.array(assignment.layers)
    for value, layer in forced.items():
        layers[:, values == value] = layer
    return assignment._replace(layers=layers, layer_maps=layers[:, labels])


def everywhere(segments: ArrayLike, layer: str) -> dict[int, str]:
    """The choice of one layer by hand for every segment: {label: layer}, for the labels of `segments` [h, w]."""
    return dict.fromkeys(np.unique(segments).tolist(), layer)


def unique_layer_maps(layer_maps: ArrayLike) -> tuple[list[int], list[int]]:
    """Finds equal layer maps, which need only one optimization.

    Args:
      layer_maps: [T, H, W], one for each threshold.

    Returns:
      Indices of the first of each distinct map, in order; and for each of the T maps its position among these.

    >>> unique_layer_maps([[[0, 1]], [[2, 2]], [[0, 1]]])
    ([0, 1], [0, 1, 0])
    """
    seen: dict[bytes, int] = {}
    first: list[int] = []
    inverse = []
    for i, layer_map in enumerate(np.asarray(layer_maps)):
        position = seen.setdefault(layer_map.tobytes(), len(first))
        if position == len(first):
            first.append(i)
        inverse.append(position)
    return first, inverse


def letterbox(mask: np.ndarray) -> np.ndarray:
    """Pads the shorter side of [H, W] with zeros, equally on both ends, to a square."""
    height, width = mask.shape
    size = max(height, width)
    top, left = (size - height) // 2, (size - width) // 2
    return np.pad(mask, ((top, size - height - top), (left, size - width - left)))


def soft_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resizes a binary mask [H, W] to [size, size] float32 by Pillow's Lanczos, clipped to the mask's own range."""
    mask = letterbox(np.asarray(mask, np.float32))
    resized = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.LANCZOS))
    return np.clip(resized, 0.0, mask.max())


def soft_masks(layer_map: ArrayLike, layers: Sequence[LatentLayer]) -> dict[str, np.ndarray]:
    """The masks of one layer map: {"F4": [16, 16, 1], ...}, float32 in [0, 1], with soft edges.

    Args:
      layer_map: [H, W] indices into `layers`; not square for letterboxed images.
      layers: as returned by `latent_layers`.
    """
    layer_map = np.asarray(layer_map)
    return {
        layer.name: soft_mask(layer_map == i, layer.resolution)[:, :, None]
        for i, layer in enumerate(layers)
        if layer.resolution is not None
    }


def stack_masks(layer_maps: ArrayLike, layers: Sequence[LatentLayer]) -> dict[str, np.ndarray]:
    """`soft_masks` of [N, H, W] layer maps: {"F4": [N, 16, 16, 1], ...}."""
    masks = [soft_masks(layer_map, layers) for layer_map in np.asarray(layer_maps)]
    return {name: np.stack([mask[name] for mask in masks]) for name in masks[0]}
