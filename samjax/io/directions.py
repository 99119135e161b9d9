"""Reading directions in W+ from files: .npy, .npz and .safetensors. Nothing in a file is executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from samjax.errors import UserError

SUFFIXES = (".npy", ".npz", ".safetensors")


def read(path: str | Path, num_ws: int, w_dim: int) -> np.ndarray:
    """Reads a direction from a file.

    Args:
      path: .npy, or .npz or .safetensors with one array (or one called "direction"), of shape (1, num_ws, w_dim),
        (num_ws, w_dim), (1, w_dim) or (w_dim,); the last two move all styles alike.
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.

    Returns:
      [num_ws, w_dim] float32.

    Raises:
      UserError: if the file is missing, damaged, of another format or shape, or holds values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a direction as {listed(SUFFIXES)}")
    return check(_read_array(path), num_ws, w_dim, path)


def check(array: np.ndarray, num_ws: int, w_dim: int, path: str | Path) -> np.ndarray:
    """Checks the array of a file, and broadcasts it over the styles.

    Args:
      array: of shape (1, num_ws, w_dim), (num_ws, w_dim), (1, w_dim) or (w_dim,).
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.
      path: of the file, or another name for messages.

    Returns:
      [num_ws, w_dim] float32.

    Raises:
      UserError: if the array has another shape, does not hold numbers, or holds values that are not finite.
    """
    shape = array.shape
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path}: holds {array.dtype} and not numbers; a direction is an array of floats")
    if shape not in ((1, num_ws, w_dim), (num_ws, w_dim), (1, w_dim), (w_dim,)):
        raise UserError(
            f"{path}: shape {shape} does not fit this generator; a direction has shape (1, {num_ws}, {w_dim}), "
            f"({num_ws}, {w_dim}), (1, {w_dim}) or ({w_dim},)"
        )
    direction = np.broadcast_to(array.astype(np.float32), (1, num_ws, w_dim))[0]
    if not np.isfinite(direction).all():
        raise UserError(f"{path}: holds values that are not finite; a direction needs numbers everywhere")
    return np.array(direction)


def read_folder(
    folder: str | Path,
    num_ws: int,
    w_dim: int,
    *,
    suffixes: Sequence[str] = SUFFIXES,
    read_file: Callable[[Path, int, int], Mapping[str, np.ndarray]] | None = None,
) -> dict[str, np.ndarray]:
    """Reads all directions in a directory, by file name.

    Args:
      folder: of the files; those with other suffixes are ignored.
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.
      suffixes: of the files to read.
      read_file: returns the directions in a file by name; default: `read`, which returns one, under the file's name.

    Returns:
      {name: [num_ws, w_dim] float32}, sorted by file name.

    Raises:
      UserError: if `folder` is not a directory, holds no directions, or one of them cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory: give --edits_folder a directory of directions")
    paths = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    if not paths:
        raise UserError(f"{folder} holds no directions ({listed(suffixes)})")
    found: dict[str, np.ndarray] = {}
    for path in paths:
        found |= read_file(path, num_ws, w_dim) if read_file else {path.stem: read(path, num_ws, w_dim)}
    return found


def listed(suffixes: Sequence[str]) -> str:
    """Suffixes as a phrase: ".npy, .npz or .safetensors"."""
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def _read_array(path: Path) -> np.ndarray:
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(f"{path}: a direction is read from {listed(SUFFIXES)}, not {kind or 'a bare name'!r}")
    try:
        if kind == ".safetensors":
            import safetensors.numpy

            arrays = safetensors.numpy.load_file(path)
            return arrays[_only(path, list(arrays))]
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray) != (kind == ".npy"):
                raise ValueError("the content is of the other NumPy format")
            return found if isinstance(found, np.ndarray) else found[_only(path, list(found.files))]
    except (UserError, OSError) as error:
        if isinstance(error, UserError) or error.errno is not None:
            raise
        raise UserError(f"{path}: cannot be read as {kind} ({error}); damaged, or not whole?") from error
    except Exception as error:  # damaged files raise almost anything, from zlib's errors to MemoryError
        raise UserError(f"{path}: cannot be read as {kind} ({_short(error)}); damaged, or not whole?") from error


def _only(path: Path, names: Sequence[str]) -> str:
    if "direction" in names:
        return "direction"
    if len(names) != 1:
        raise UserError(f"{path}: holds {len(names)} arrays ({', '.join(names[:5])}); name the direction 'direction'")
    return names[0]


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
