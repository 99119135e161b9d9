"""Segments of a picture: what decides together on a latent layer.

One interface, image in and integer labels out. The classical methods here need no weights; networks join behind the
same interface.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike

from samjax.errors import UserError

Method = Literal["felzenszwalb", "slic"]


class Segmenter(Protocol):
    """Anything that gives segments of pictures."""

    def __call__(self, image: ArrayLike) -> np.ndarray:
        """Takes an image [H, W, 3] in [-1, 1]; gives labels [H, W] int32, of any values."""
        ...


def segment(image: ArrayLike, method: Method = "felzenszwalb", **options: Any) -> np.ndarray:
    """Cuts a picture into segments by colour.

    Args:
      image: [H, W, 3] in [-1, 1].
      method: "felzenszwalb" (Felzenszwalb and Huttenlocher, IJCV 2004): few regions that follow edges; or "slic"
        (Achanta et al., PAMI 2012): compact regions of similar size.
      **options: of the function of that name in `skimage.segmentation`, over the defaults here.

    Returns:
      [H, W] int32 labels, from 0.

    Raises:
      UserError: an unknown method, or an image of another shape.
    """
    image = np.asarray(image, np.float32)
    if image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"an image to segment is [H, W, 3], not {image.shape}")
    if method not in get_args(Method):
        raise UserError(f"unknown segmentation {method!r}: choose {' or '.join(get_args(Method))}")
    import skimage.segmentation as classical  # slow to import, and needed here only

    unit = np.clip((image + 1.0) / 2.0, 0.0, 1.0)
    area = image.shape[0] * image.shape[1]
    if method == "felzenszwalb":
        settings = {"scale": 400.0, "sigma": 0.8, "min_size": max(area // 200, 1), **options}
        labels = classical.felzenszwalb(unit, **settings)
    else:
        settings = {"n_segments": 32, "compactness": 10.0, "sigma": 1.0, "start_label": 0, **options}
        labels = classical.slic(unit, **settings)
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)
