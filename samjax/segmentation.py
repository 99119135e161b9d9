"""Segmentation: the regions of an image that share a latent layer.

A `Segmenter` takes an image and returns integer labels. The classical methods need no weights; the networks merge the
classes that the authors of SAM merge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from samjax.config import CLASSICAL_SEGMENTERS
from samjax.errors import UserError
from samjax.io.checkpoints import LoadedNetwork
from samjax.io.images import to_uint8
from samjax.nets import ade20k as ade20k_network
from samjax.nets import bisenet, mask_rcnn
from samjax.nets.blocks import Variables

Method = Literal["felzenszwalb", "slic"]

ADE20K_MERGED: Mapping[int, int] = {
    6: 3, 13: 3,  # road, earth: floor
    21: 60,  # water: river
    102: 20, 83: 20,  # van, truck: car
    29: 9,  # field: grass
}  # fmt: skip
"""ADE20K's classes (counted from 0) that SAM merges: old to new."""

FACE_MERGED: Mapping[int, int] = {
    1: 3, 2: 3, 4: 3, 5: 3,  # skin, brows (3 is one of them), eyes
    7: 3, 8: 3, 10: 3,  # ears, nose
    11: 3, 12: 3, 13: 3, 14: 3,  # mouth, lips, neck
}  # fmt: skip
"""The face parser's classes that SAM merges into one: skin, and everything within it."""


class Segmenter(Protocol):
    """A function that segments an image."""

    def __call__(self, image: ArrayLike) -> np.ndarray:
        """Takes an image [H, W, 3] in [-1, 1]; returns labels [H, W] int32, of any values."""
        ...


def segment(image: ArrayLike, method: Method = "felzenszwalb", **options: Any) -> np.ndarray:
    """Segments an image by color.

    Args:
      image: [H, W, 3] in [-1, 1].
      method: "felzenszwalb" (Felzenszwalb and Huttenlocher, IJCV 2004): few regions that follow edges; or "slic"
        (Achanta et al., PAMI 2012): compact regions of similar size.
      **options: arguments of the function of that name in `skimage.segmentation`; they override the defaults here.

    Returns:
      [H, W] int32 labels, from 0.

    Raises:
      UserError: an unknown method, or an image of another shape.
    """
    image = _checked(image)
    if method not in get_args(Method):
        raise UserError(f"unknown segmentation method {method!r}: choose {' or '.join(get_args(Method))}")
    import skimage.segmentation as classical  # slow to import

    unit = np.clip((image + 1.0) / 2.0, 0.0, 1.0)
    area = image.shape[0] * image.shape[1]
    if method == "felzenszwalb":
        settings = {"scale": 400.0, "sigma": 0.8, "min_size": max(area // 200, 1), **options}
        labels = classical.felzenszwalb(unit, **settings)
    else:
        settings = {"n_segments": 32, "compactness": 10.0, "sigma": 1.0, "start_label": 0, **options}
        labels = classical.slic(unit, **settings)
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)


def load(name: str, network: LoadedNetwork | None = None, *, swap_channels: bool = False) -> Segmenter:
    """The segmenter with a given name, one of `samjax.config.Segmenter`.

    Args:
      name: name of a classical method, or of a network.
      network: its parameters; None for a classical method.
      swap_channels: see `instances`.

    Raises:
      ValueError: the name is that of a network, but `network` is None.
    """
    if name in CLASSICAL_SEGMENTERS:
        return functools.partial(segment, method=name)  # type: ignore[arg-type]
    if network is None:
        raise ValueError(f"the segmenter {name} is a network: load its parameters first")
    if name == "ade20k":
        return ade20k(network.params, network.config)
    if name == "bisenet":
        return face_parsing(network.params, network.config)
    return instances(network.params, network.config, swap_channels=swap_channels)


# --- networks ---


def merge_classes(labels: ArrayLike, merged: Mapping[int, int]) -> np.ndarray:
    """Renames classes. Each label is renamed once, so the order of `merged` does not matter.

    Args:
      labels: integers of any shape.
      merged: new class by old class, such as `ADE20K_MERGED`; other labels are unchanged.

    Returns:
      A new array of the shape and type of `labels`.
    """
    labels = np.asarray(labels)
    result = labels.copy()
    for old, new in merged.items():
        result[labels == old] = new
    return result


def ade20k(variables: Variables, config: ade20k_network.ADE20KConfig) -> Segmenter:
    """The ADE20K segmenter, SAM's for cars (at labels of 192 x 256).

    Args:
      variables: variables of `samjax.nets.ade20k`.
      config: the network's.

    Returns:
      A segmenter, with classes merged as in `ADE20K_MERGED`: compiled once for each image size, in full float32. It
      raises UserError for images of another shape.
    """
    return _segmenter(functools.partial(ade20k_network.labels, config=config), variables, ADE20K_MERGED)


def face_parsing(variables: Variables, config: bisenet.BiSeNetConfig) -> Segmenter:
    """The face parser, SAM's for faces.

    Args:
      variables: variables of `samjax.nets.bisenet`.
      config: the network's.

    Returns:
      A segmenter, with classes merged as in `FACE_MERGED`: compiled once for each image size, in full float32. It
      raises UserError for images of another shape.
    """
    return _segmenter(functools.partial(bisenet.labels, config=config), variables, FACE_MERGED)


def instances(
    variables: Variables,
    config: mask_rcnn.MaskRCNNConfig,
    *,
    score_threshold: float = 0.1,
    swap_channels: bool = False,
) -> Segmenter:
    """Instances by Mask R-CNN, SAM's segmenter for cats, painted with their class: lower scores over higher ones.

    Args:
      variables: variables of `samjax.nets.mask_rcnn`.
      config: the network's.
      score_threshold: instances with this score or less are left out.
      swap_channels: whether to swap red and blue, as SAM's authors do: they pass an RGB image to a
        predictor that expects BGR.

    Returns:
      A segmenter: compiled once for each size of the resized image's canvas and each size of labels, in full float32.
      Label 0 is both the first class (people) and everything outside of instances. It raises UserError for images of
      another shape.
    """
    detect = jax.jit(functools.partial(mask_rcnn.detect, config=config))
    paint = jax.jit(mask_rcnn.paint, static_argnames=("height", "width"))

    def segmenter(image: ArrayLike) -> np.ndarray:
        pixels = to_uint8(_checked(image))
        height, width = pixels.shape[:2]
        canvas, size = mask_rcnn.preprocess(pixels if swap_channels else pixels[..., ::-1])
        with jax.default_matmul_precision("highest"):
            found = detect(
                variables, canvas, size=size, output_size=(height, width), score_threshold=float(score_threshold)
            )
            return np.array(paint(found, height=height, width=width))

    return segmenter


def _segmenter(
    labels: Callable[[Variables, Array], Array], variables: Variables, merged: Mapping[int, int]
) -> Segmenter:
    compiled = jax.jit(labels)

    def segmenter(image: ArrayLike) -> np.ndarray:
        images = jnp.asarray(_checked(image)[None])
        with jax.default_matmul_precision("highest"):
            return merge_classes(compiled(variables, images)[0], merged)

    return segmenter


def _checked(image: ArrayLike) -> np.ndarray:
    image = np.asarray(image, np.float32)
    if image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"an image to segment is [H, W, 3], not {image.shape}")
    return image
