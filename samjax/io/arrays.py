"""Memory-mapped files, arrays that are read on demand, and stand-ins for the objects in pickles."""

from __future__ import annotations

import math
import mmap
import zlib
from pathlib import Path
from typing import Any, Protocol, cast

import ml_dtypes
import numpy as np

from samjax.errors import UserError, shown
from samjax.io import pickles

_SMALL = 4096  # bytes: shorter strings are copied, longer ones stay views of the file
_MAX_AXES = 8
_EXPANDED = 16 * 2**20  # bytes of an array that repeats its values

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class View:
    """Memory with the reading methods of a file; long reads return views rather than copies."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    def read(self, size: int, /) -> bytes | memoryview:
        part = self.data[self.position : self.position + size]
        self.position += len(part)
        return part if len(part) > _SMALL else bytes(part)

    def readline(self) -> bytes:
        line = bytearray()
        while len(line) < _SMALL:
            part = bytes(self.data[self.position + len(line) : self.position + len(line) + 64])
            end = part.find(b"\n")
            line += part if end < 0 else part[: end + 1]
            if end >= 0 or not part:
                break
        self.position += len(line)
        return bytes(line)


def map_file(path: Path) -> memoryview:
    """Memory-maps a file.

    Raises:
      UserError: if it is missing, a directory, empty, or unreadable.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory: give the checkpoint file itself (.pkl, .pt or .safetensors)")
        if path.exists() and not path.is_file():  # opening a pipe would wait
            raise UserError(f"{path} is a device or a pipe: give the checkpoint file itself")
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise UserError(f"{path} is empty: fetch or copy it again")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a checkpoint file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def release(data: memoryview) -> None:
    """Releases the resident pages of a mapped file; they are read again on the next access."""
    if isinstance(data.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        data.obj.madvise(mmap.MADV_DONTNEED)


class Stored(Protocol):
    """An array in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def array(self) -> np.ndarray:
        """Returns the values, as a view of the file where possible. Raises UserError if they cannot be read."""
        ...


class Loaded:
    """An array in memory; see `Stored`."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.shape: tuple[int, ...] = values.shape

    def array(self) -> np.ndarray:
        return self._values


def sizes(values: Any, what: str) -> tuple[int, ...]:
    """Checks that `values` are a few non-negative integers of plausible size, and returns them as a tuple.

    Raises:
      UserError: if they are not.
    """
    if not (
        isinstance(values, tuple | list)
        and len(values) <= _MAX_AXES
        and all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40 for value in values)
    ):
        raise UserError(f"the file gives {shown(values)} as {what}: damaged?")
    return tuple(values)


def strided(
    data: memoryview, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """A view of `data` as an array, whose elements are all checked to be inside.

    Args:
      data: data of the storage.
      dtype: type of the elements.
      offset: offset of the first element, in elements.
      shape: shape of the array.
      strides: strides in elements; zero where a value is repeated, as after torch's `expand`.

    Raises:
      UserError: if an element is outside of `data`, or the array is over 16 MB and takes more than the whole `data`.
    """
    size = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if size and (last + 1) * dtype.itemsize > len(data):
        raise UserError(f"an array of shape {list(shape)} reaches beyond its storage: damaged, or not whole?")
    if size * dtype.itemsize > max(len(data), _EXPANDED):
        # A small file could otherwise take any amount of memory.
        raise UserError(f"an array of shape {list(shape)} repeats the few values that the file has: damaged?")
    if not size:
        return np.zeros(shape, dtype)
    steps = tuple(stride * dtype.itemsize for stride in strides)
    return np.ndarray(shape, dtype, data, offset * dtype.itemsize, steps)  # type: ignore[arg-type]


def checked(data: memoryview, crc: int, name: str) -> None:
    """Verifies the checksum of `data`.

    Raises:
      UserError: if it differs.
    """
    if zlib.crc32(data) != crc:
        raise UserError(f"{name} in the file does not match its checksum: damaged; fetch or copy it again")


# Stand-ins for NumPy's arrays in pickles.

_DTYPES = {name: np.dtype(name) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")}


class PickledDtype:
    """Stand-in for `numpy.dtype`."""

    name, order = "", "|"

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name if isinstance(name, str) else ""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and isinstance(state[1], str):
            self.order = state[1]

    @property
    def is_numeric(self) -> bool:
        """Whether it is a type of numbers, in the order of bytes of current machines."""
        return self.order in ("<", "=", "|") and self.name.lstrip("<=|") in _DTYPES

    def dtype(self) -> np.dtype[Any]:
        """The type. Raises UserError if it is not numeric."""
        if not self.is_numeric:
            raise UserError(f"the file holds an array of the type {shown(self.order + self.name)}, not of numbers")
        return _DTYPES[self.name.lstrip("<=|")]


class PickledArray:
    """Stand-in for `numpy.ndarray`."""

    _state: tuple[tuple[int, ...], Any, bool, Any] | None = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # Arrays of other kinds, such as masked ones, have states of other forms.
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, data = state
            self._state = (sizes(shape, "an array's shape"), dtype, bool(fortran), data)

    def _parts(self) -> tuple[tuple[int, ...], PickledDtype, bool, Any]:
        if self._state is None or not isinstance(self._state[1], PickledDtype):
            raise UserError("the file holds an array without contents: damaged?")
        return self._state

    @property
    def shape(self) -> tuple[int, ...]:
        return self._parts()[0]

    @property
    def is_numeric(self) -> bool:
        """Whether it has contents, and these are numbers."""
        return self._state is not None and isinstance(self._state[1], PickledDtype) and self._state[1].is_numeric

    @property
    def nbytes(self) -> int:
        """The size of the contents."""
        data = self._state[3] if self._state else b""
        return len(data) if isinstance(data, str | bytes | bytearray | memoryview) else 0

    def array(self) -> np.ndarray:
        shape, dtype, fortran, data = self._parts()
        if isinstance(data, str):  # pickled by Python 2
            data = data.encode("latin1")
        if not isinstance(data, bytes | bytearray | memoryview):
            raise UserError("the file holds an array without contents: damaged?")
        if len(data) != math.prod(shape) * dtype.dtype().itemsize:
            raise UserError(f"an array of shape {list(shape)} has {len(data):,} bytes of data: damaged?")
        flat = np.frombuffer(data, dtype.dtype())
        return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def _reconstruct(*_: Any) -> PickledArray:
    return PickledArray()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    array = PickledArray()
    array.__setstate__((1, shape, dtype, isinstance(order, str) and order == "F", data))
    return array


def _scalar(dtype: Any, data: Any = None) -> Any:
    if isinstance(dtype, PickledDtype) and dtype.is_numeric and isinstance(data, bytes):
        return np.frombuffer(data, dtype.dtype(), 1)[0].item()
    return None


def _mapping(items: Any = (), *_: Any, **__: Any) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(items)
    # Some classes take arguments of their own, which are no entries.
    pairs = items if isinstance(items, list | tuple) else ()
    return pickles.fill({}, [part for pair in pairs if _is_pair(pair) for part in pair])


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _default_mapping(*_: Any) -> dict[Any, Any]:
    return {}


def _list(items: Any = ()) -> list[Any]:
    return list(items) if isinstance(items, list | tuple) else []


def _set(items: Any = ()) -> set[Any]:
    return set(filter(pickles.is_plain, items)) if isinstance(items, list | tuple | set | frozenset) else set()


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _reconstructor(cls: Any, base: Any = None, state: Any = None) -> Any:
    """Stand-in for `copyreg._reconstructor`, by which the first protocols make objects."""
    if isinstance(state, dict):
        return dict(state)
    return cast(Any, cls).__new__(cls) if isinstance(cls, type) else pickles.INERT


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Stand-in for `_codecs.encode`, by which Python 3 writes bytes to pickles for Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are expected as latin-1 text")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stand-in for `bytes`, by which Python 3 writes empty bytes to pickles for Python 2."""
    return b""


_DICTIONARIES = {  # dictionaries with attributes, and where they are defined
    "EasyDict": ("dnnlib", "dnnlib.util", "easydict"),
    "Munch": ("munch", "munch._munch", "bunch_py3"),
    "Dict": ("addict", "addict.addict"),
    "AttrDict": ("attrdict", "attrdict.dictionary"),
    "CfgNode": ("yacs.config", "fvcore.common.config", "detectron2.config", "detectron2.config.config"),
    "AttributeDict": (
        "pytorch_lightning.utilities.parsing",
        "lightning.pytorch.utilities.parsing",
        "lightning.fabric.utilities.data",
        "lightning_fabric.utilities.data",
    ),
}


def numpy_names() -> dict[tuple[str, str], Any]:
    """Stand-ins for the names that pickled arrays of NumPy consist of."""
    names: dict[tuple[str, str], Any] = {("numpy", "ndarray"): PickledArray, ("numpy", "dtype"): PickledDtype}
    for core in ("numpy.core", "numpy._core"):
        names |= {
            (f"{core}.multiarray", "_reconstruct"): _reconstruct,
            (f"{core}.multiarray", "scalar"): _scalar,
            (f"{core}.numeric", "_frombuffer"): _frombuffer,
        }
    return names


def python_names() -> dict[tuple[str, str], Any]:
    """Stand-ins for names of NumPy and for containers, which the pickles of all formats use."""
    names: dict[tuple[str, str], Any] = {
        **numpy_names(),
        ("collections", "OrderedDict"): _mapping,
        ("collections", "Counter"): _mapping,
        ("collections", "defaultdict"): _default_mapping,
        ("_codecs", "encode"): _encode,
        ("copyreg", "_reconstructor"): _reconstructor,
        ("copy_reg", "_reconstructor"): _reconstructor,
    }
    for builtins in ("builtins", "__builtin__"):
        names |= {
            (builtins, "set"): _set,
            (builtins, "frozenset"): _frozenset,
            (builtins, "bytes"): _no_bytes,
            (builtins, "dict"): _mapping,
            (builtins, "list"): _list,
        }
    names |= {(module, name): _mapping for name, modules in _DICTIONARIES.items() for module in modules}
    return names
