"""Edit directions as people have them: the authors' .npy, InterFaceGAN's .npy and .pt, GANSpace's .pt and .npz.

A file of GANSpace holds many: its principal components, of which one unit here is one standard deviation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ckpt_convert.formats import torch_file
from ckpt_convert.formats.torch_file import Tensor
from samjax import editing
from samjax.errors import UserError

SUFFIXES = (".npy", ".npz", ".safetensors", ".pt")
# Names of components, mean and standard deviations: in e4e's files, and as GANSpace itself writes them.
_GANSPACE = (("comp", "std"), ("lat_comp", "lat_stdev"))


def read(path: str | Path, num_ws: int, w_dim: int, *, most: int = 8) -> dict[str, np.ndarray]:
    """The directions in a file, by name: the file's, with a number where there are several.

    Args:
      path: one of `SUFFIXES`.
      num_ws: styles that the generator takes.
      w_dim: entries of each.
      most: components of a GANSpace file that are taken.

    Returns:
      {name: [num_ws, w_dim] float32}.

    Raises:
      UserError: no such file, damaged, of another kind or shape. Nothing in the file is executed.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a direction as {', '.join(SUFFIXES)}")
    if kind == ".pt":
        found = _torch(path)
    elif kind == ".npz":
        found = _archive(path)
    else:
        found = None
    if not isinstance(found, dict):
        one = editing.load_direction(path, num_ws, w_dim) if found is None else found
        return {path.stem: editing.check_direction(one, num_ws, w_dim, path)}
    for components, deviations in _GANSPACE:
        if components in found and deviations in found:
            return _components(found[components], found[deviations], num_ws, w_dim, most, path)
    raise UserError(
        f"{path}: holds {', '.join(map(str, list(found)[:5])) or 'nothing'}, neither a direction nor GANSpace's"
        " components (comp and std)"
    )


def _components(
    components: np.ndarray, deviations: np.ndarray, num_ws: int, w_dim: int, most: int, path: Path
) -> dict[str, np.ndarray]:
    count = len(deviations.ravel())
    if components.size != count * w_dim:
        raise UserError(
            f"{path}: components of shape {components.shape} with {count} standard deviations do not fit this"
            f" generator, whose styles have {w_dim} entries"
        )
    scaled = components.reshape(count, w_dim) * deviations.reshape(count, 1)
    return {
        f"{path.stem}_{i:02d}": editing.check_direction(direction, num_ws, w_dim, path)
        for i, direction in enumerate(scaled[:most])
    }


def _torch(path: Path) -> np.ndarray | dict[str, Any]:
    try:
        held = torch_file.read(memoryview(path.read_bytes()))
        if isinstance(held, Tensor):
            return held.array()
        if isinstance(held, dict):
            return {str(name): value.array() for name, value in held.items() if isinstance(value, Tensor)}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: holds a {type(held).__name__}, not a tensor or GANSpace's components")


def _archive(path: Path) -> dict[str, Any] | None:
    """GANSpace's own dump; None where it is a direction like others."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            if {"lat_comp", "lat_stdev"} <= set(saved.files):
                return {name: saved[name] for name in ("lat_comp", "lat_stdev")}
    except Exception:  # told by whoever reads it as a direction
        return None
    return None
