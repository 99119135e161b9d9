"""Safetensors files of generators, as `export` writes them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from safetensors import SafetensorError

from samjax.errors import UserError
from samjax.io import values


class Array:
    """An array in a safetensors file; see `arrays.Stored`.

    The library maps the file while it is open, so the file is opened for each array: the pages that an array was read
    from are then released, and no second copy of the file builds up in memory.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        self._path, self._name, self.shape = path, name, shape

    def array(self) -> np.ndarray:
        try:
            with values.open_safetensors(self._path) as file:
                return file.get_tensor(self._name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._name[:80]} in the file cannot be read: damaged, or not whole?") from error
        except (AttributeError, TypeError) as error:  # NumPy has no such type
            raise UserError(f"{self._name[:80]} in the file is of a type that NumPy does not have") from error


def looks_like(data: memoryview) -> bool:
    """Whether `data` starts like a safetensors file: with the length of a JSON object, and the object."""
    return len(data) > 8 and data[8:9] == b"{" and data[6:8] == b"\0\0"


def read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Reads the names and shapes of the arrays in a file, and its metadata.

    Raises:
      UserError: if the file is damaged or incomplete.
    """
    try:
        with values.open_safetensors(path) as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError("not a readable safetensors file: damaged, or not whole?") from error
    return {name: Array(path, name, shape) for name, shape in shapes.items()}, metadata
