"""LPIPS from PyTorch's files: torchvision's backbones and the linear heads of the package `lpips`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax.errors import UserError
from samjax.nets import lpips

# Our convolution to the index of torchvision's `features.N`, in `vgg16` and `alexnet`.
_BACKBONES: Mapping[lpips.Net, Mapping[str, int]] = {
    "vgg": {
        "conv1_1": 0, "conv1_2": 2,
        "conv2_1": 5, "conv2_2": 7,
        "conv3_1": 10, "conv3_2": 12, "conv3_3": 14,
        "conv4_1": 17, "conv4_2": 19, "conv4_3": 21,
        "conv5_1": 24, "conv5_2": 26, "conv5_3": 28,
    },
    "alex": {"conv1": 0, "conv2": 3, "conv3": 6, "conv4": 8, "conv5": 10},
}  # fmt: skip


def convert(backbone: Mapping[str, np.ndarray], heads: Mapping[str, np.ndarray], net: lpips.Net) -> lpips.Params:
    """Our parameters from two PyTorch state dicts.

    Args:
      backbone: torchvision's `vgg16` or `alexnet`: `features.N.weight` [O, I, k, k] and `features.N.bias` [O];
        the classifier is left out.
      heads: version 0.1 of the package `lpips`: `linK.model.1.weight` [1, C, 1, 1], K from 0 to 4.
      net: "vgg" or "alex".

    Returns:
      The tree that `samjax.nets.lpips.init` describes, float32.

    Raises:
      UserError: arrays missing, unexpected, of another shape, or not finite; all of them are listed.
      ValueError: an unknown `net`.
    """
    if net not in _BACKBONES:
        raise ValueError(f"net must be vgg or alex, not {net!r}")
    expected = jax.eval_shape(lambda: lpips.init(net, key=jax.random.key(0)))
    sources = {"backbone": dict(backbone), "heads": dict(heads)}
    wrong: list[str] = []

    def take(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array | None:
        part, name = path[0].key, path[1].key
        if part == "heads":
            key, theirs = f"{name}.model.1.weight", (1, *leaf.shape, 1, 1)
        else:
            key, theirs = f"features.{_BACKBONES[net][name]}.{path[2].key}", leaf.shape
            if len(theirs) == 4:  # HWIO
                theirs = (theirs[3], theirs[2], theirs[0], theirs[1])
        if key not in sources[part]:
            wrong.append(f"missing {key}")
            return None
        array = np.asarray(sources[part].pop(key))
        if array.shape != theirs:
            wrong.append(f"{key} has shape {list(array.shape)} instead of {list(theirs)}")
            return None
        if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            wrong.append(f"{key} is not of finite floating-point numbers")
            return None
        array = array.transpose(2, 3, 1, 0) if len(leaf.shape) == 4 else array.reshape(leaf.shape)
        return jnp.asarray(np.ascontiguousarray(array, np.float32))

    params = jax.tree.map_with_path(take, expected)
    wrong += [f"unexpected {k}" for k in sources["backbone"] if not k.startswith("classifier.")]
    wrong += [f"unexpected {k}" for k in sources["heads"]]
    if wrong:
        raise UserError(f"not the {net} backbone and heads of LPIPS: " + "; ".join(wrong))
    return params
