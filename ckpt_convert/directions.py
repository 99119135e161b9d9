"""Reading directions as other programs write them: SAM's .npy, InterFaceGAN's .npy and .pt, GANSpace's .pt and .npz.

A file of GANSpace holds many directions, its principal components. They are scaled to one standard deviation each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from samjax.errors import UserError
from samjax.io import directions, torch_files
from samjax.io.torch_files import Tensor

SUFFIXES = (*directions.SUFFIXES, ".pt")
# Names of components and standard deviations: in e4e's files, and in those that GANSpace itself writes.
_GANSPACE = (("comp", "std"), ("lat_comp", "lat_stdev"))


def read(path: str | Path, num_ws: int, w_dim: int, *, max_components: int = 8) -> dict[str, np.ndarray]:
    """Reads the directions in a file. Nothing in it is executed.

    Args:
      path: of the file, with one of `SUFFIXES`.
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.
      max_components: how many components of a GANSpace file to return.

    Returns:
      {name: [num_ws, w_dim] float32}; the name is the file's, followed by a number for GANSpace's components.

    Raises:
      UserError: if the file is missing, damaged, or of another format or shape.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a direction as {directions.listed(SUFFIXES)}")
    if kind == ".pt":
        found = _torch(path)
    elif kind == ".npz":
        found = _archive(path)
    else:
        found = None
    if not isinstance(found, dict):
        one = directions.read(path, num_ws, w_dim) if found is None else found
        return {path.stem: directions.check(one, num_ws, w_dim, path)}
    for components, deviations in _GANSPACE:
        if components in found and deviations in found:
            return _components(found[components], found[deviations], num_ws, w_dim, max_components, path)
    raise UserError(
        f"{path}: holds {', '.join(map(str, list(found)[:5])) or 'nothing'}, neither a direction nor GANSpace's"
        " components (comp and std)"
    )


def read_folder(folder: str | Path, num_ws: int, w_dim: int) -> dict[str, np.ndarray]:
    """Reads all directions in a directory; see `samjax.io.directions.read_folder`.

    Args:
      folder: of the files with one of `SUFFIXES`; others are ignored.
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.

    Returns:
      {name: [num_ws, w_dim] float32}, as `read` names them.

    Raises:
      UserError: if `folder` is not a directory, holds no directions, or one of them cannot be read.
    """
    return directions.read_folder(folder, num_ws, w_dim, suffixes=SUFFIXES, read_file=read)


def _components(
    components: np.ndarray, deviations: np.ndarray, num_ws: int, w_dim: int, max_components: int, path: Path
) -> dict[str, np.ndarray]:
    count = len(deviations.ravel())
    if components.size != count * w_dim:
        raise UserError(
            f"{path}: components of shape {components.shape} with {count} standard deviations do not fit this"
            f" generator, whose styles have {w_dim} entries"
        )
    scaled = components.reshape(count, w_dim) * deviations.reshape(count, 1)
    return {
        f"{path.stem}_{i:02d}": directions.check(direction, num_ws, w_dim, path)
        for i, direction in enumerate(scaled[:max_components])
    }


def _torch(path: Path) -> np.ndarray | dict[str, Any]:
    try:
        held = torch_files.read(memoryview(path.read_bytes()))
        if isinstance(held, Tensor):
            return held.array()
        if isinstance(held, dict):
            return {str(name): value.array() for name, value in held.items() if isinstance(value, Tensor)}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: holds a {type(held).__name__}, not a tensor or GANSpace's components")


def _archive(path: Path) -> dict[str, Any] | None:
    """The components in GANSpace's own dump; None for any other .npz file."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            if {"lat_comp", "lat_stdev"} <= set(saved.files):
                return {name: saved[name] for name in ("lat_comp", "lat_stdev")}
    except Exception:  # damaged: `directions.read` raises the error
        return None
    return None
