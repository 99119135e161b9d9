"""Safetensors files, as samjax writes them for others: a JSON of names, types and places, then the bytes.

They are read here rather than through the library so that arrays stay views of the mapped file.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from ckpt_convert.formats import arrays
from ckpt_convert.formats.arrays import sizes
from samjax.errors import UserError

_DTYPES = {
    "F16": np.dtype("<f2"), "BF16": arrays.BFLOAT16, "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"), "U8": np.dtype("u1"), "I16": np.dtype("<i2"), "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"), "BOOL": np.dtype("?"),
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes, as in the library


class Array:
    """An array in a safetensors file; see `arrays.Stored`."""

    def __init__(self, data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._data, self.dtype, self.shape = data, dtype, shape

    def array(self) -> np.ndarray:
        return np.frombuffer(self._data, self.dtype).reshape(self.shape)


def looks_like(data: memoryview) -> bool:
    """Whether `data` begins as these files do: with the length of a JSON object, and that."""
    return len(data) > 8 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < _MAX_HEADER


def read(data: memoryview) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and metadata of a file.

    Raises:
      UserError: it is damaged or not whole.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(bytes(data[8:start]))
        metadata = header.pop("__metadata__", {})
        held = {name: _array(data[start:], name, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError("not a readable safetensors file: damaged, or not whole?") from error
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UserError("the safetensors file has damaged metadata")
    return held, metadata


def _array(data: memoryview, name: str, entry: Any) -> Array:
    shape, (first, end) = sizes(entry["shape"], "an array's shape"), sizes(entry["data_offsets"], "an array's place")
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UserError(f"{name[:80]} in the file is of the type {str(entry['dtype'])[:20]}, not of plain numbers")
    if end > len(data) or end - first != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{name[:80]} in the file has another size than stated: damaged, or not whole?")
    return Array(data[first:end], dtype, shape)
