"""What a file holds, in any format in which programs save arrays: NumPy's, torch's, safetensors, and pickles.

The format is that of the content, whatever the file is called. Nothing in a file is executed, and arrays are read when
they are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samjax.errors import UserError, brief
from samjax.io import arrays, files, pickles, torch_files
from samjax.io.arrays import BFLOAT16, Loaded, PickledArray
from samjax.io.torch_files import Tensor

SUFFIXES = (".npy", ".npz", ".safetensors", ".pt", ".pth", ".pkl")
"""Suffixes of the files that are read, in lower case."""

# Bytes of a safetensors file's header. That of a thousand arrays takes a tenth of 1 MB, and reading it several times
# as much.
_MAX_HEADER = 8 * 2**20


def listed(suffixes: Sequence[str] = SUFFIXES) -> str:
    """Suffixes as a phrase: ".npy, .npz or .pt"."""
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def read(path: Path) -> Any:
    """Reads the value in a file.

    Returns:
      Arrays that `array` unpacks, or dictionaries and lists with such arrays in them, and anything else.

    Raises:
      UserError: the file is missing, damaged, or of another format, or names something that is not on the allow list.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give one in {listed()}")
    data = arrays.map_file(path)
    kind = _format(data, path.suffix.lower())
    if kind not in _READERS:
        raise UserError(f"{path}: not read from {kind or 'files without a suffix'}; give {listed()}")
    with naming(path):
        return _READERS[kind](path, data)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a UserError of one line, which names the file."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{path}: not enough memory to read it") from error
    except Exception as error:  # damaged files raise almost anything
        raise UserError(f"{path}: cannot be read ({brief(error)}): damaged, or not whole?") from error


def array(value: Any) -> np.ndarray | None:
    """The array that `value` is, in a file or in memory, of NumPy, JAX or torch; None if it is something else.

    Raises:
      UserError: it cannot be read.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, PickledArray):
        return value.array() if value.is_numeric else None
    if isinstance(value, Tensor | Loaded):
        return value.array()
    return np.asarray(value) if hasattr(value, "__array__") else None


def find(value: Any, keys: Collection[str]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Finds the arrays in a value.

    Args:
      value: as `read` returns it, or made of arrays in memory.
      keys: names in lower case, the most telling first. Of a dictionary that has one of them, in any case, only that
        entry counts.

    Yields:
      The keys and positions that lead to an array, without those of `keys`; and the array.
    """
    if (found := array(value)) is not None:
        yield (), found
        return
    for name, entry in _entries(value, keys):
        for inner, found in find(entry, keys):
            yield (*name, *inner), found


def _entries(value: Any, keys: Collection[str]) -> Iterable[tuple[tuple[str, ...], Any]]:
    """What a container holds that may be or hold arrays, each with the name that `find` gives it, if any."""
    if isinstance(value, Mapping):
        names = {name.lower(): name for name in value if isinstance(name, str)}
        wanted = next((names[key] for key in keys if key in names), None)
        if wanted is not None:
            return [((), value[wanted])]
        return (((str(name),), entry) for name, entry in value.items() if _may_hold(entry))
    if isinstance(value, list | tuple):
        return (((f"{i:02d}",), entry) for i, entry in enumerate(value) if _may_hold(entry))
    return ()


def _may_hold(value: Any) -> bool:
    return not isinstance(value, str | bytes | int | float | None)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a type is of floats, bfloat16 included, which NumPy does not count among them."""
    return dtype.kind == "f" or dtype == BFLOAT16


def finite(array: np.ndarray, advice: str = "") -> np.ndarray:
    """An array as float32. Raises UserError, with `advice`, if values are not finite, or too large for that."""
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"holds values that are not finite{advice}")
    return array


# --- formats ---


def _format(data: memoryview, suffix: str) -> str:
    """The suffix of the format that the content has, or else `suffix`, in whose format it may be damaged."""
    start = bytes(data[:64])
    if start[:6] == b"\x93NUMPY":
        return ".npy"
    if start[:4] == b"PK\x03\x04":
        first = bytes(data[30 : 30 + int.from_bytes(start[26:28], "little")])
        return ".npz" if first.endswith(b".npy") or suffix == ".npz" else ".pt"
    if start.startswith(torch_files.LEGACY_START):
        return ".pt"
    if pickles.looks_like(start):
        return ".pkl"
    return suffix


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """Opens a file with safetensors' `safe_open`, unless its header is longer than that of any network.

    Raises:
      UserError: reading the header would take much memory.
      OSError: the file cannot be read.
      SafetensorError: it is damaged, or of another format.
    """
    import safetensors

    with Path(path).open("rb") as file:
        if (size := int.from_bytes(file.read(8), "little")) > _MAX_HEADER:
            raise UserError(f"its header has {size:,} bytes: not a safetensors file of a network, or damaged")
    with safetensors.safe_open(path, framework="np") as file:
        yield file


def _safetensors(path: Path, _: memoryview) -> dict[str, np.ndarray]:
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary


def _pickle(_: Path, data: memoryview) -> Any:
    allowed = {**torch_files.names(), ("torch.storage", "_load_from_bytes"): torch_files.storage_reader()}
    return pickles.load(arrays.View(data), allowed, encoding="latin1", size=len(data), unknown="inert")


_READERS: Mapping[str, Callable[[Path, memoryview], Any]] = {
    ".npy": lambda path, _: files.read_npy(path),
    ".npz": lambda path, _: files.read_npz(path),
    ".safetensors": _safetensors,
    ".pt": lambda _, data: torch_files.read(data),
    ".pth": lambda _, data: torch_files.read(data),
    ".pkl": _pickle,
}
