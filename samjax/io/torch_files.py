"""Files of `torch.save`, read and written without torch: zip archives (since 1.6) and the legacy format.

Both hold a pickle, in which a tensor is a reference to a storage, an offset, sizes and strides, and the bytes of the
storages.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from samjax.errors import UserError, brief
from samjax.io import arrays, files, pickles
from samjax.io.arrays import View, sizes
from samjax.io.pickles import INERT, Inert

LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of legacy files: the pickle of their magic number."""

_DTYPES = {
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": arrays.BFLOAT16,
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "ShortStorage": np.dtype("<i2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "BoolStorage": np.dtype("?"),
}
_MODULES = ("torch", "torch.cuda", "torch.storage")
_MAX_PICKLE = 256 * 2**20  # bytes; a large training state has a few MB
_MAX_INDEX = 8 * 2**20  # bytes of a zip archive's index; Python's reader takes ten times as much
_MAX_KEY = 100  # characters of a storage's key; torch numbers them
_SHOWN = 80  # characters of a name in messages
_MAX_INNER = 10_000  # torch files in a pickle; a training state of NVIDIA's programs has a few hundred
_UNREAD = (
    "Size", "Tensor", "device", "float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64",
    "bool", "strided", "channels_last", "contiguous_format", "preserve_format",
)  # fmt: skip


@dataclasses.dataclass(eq=False)
class Storage:
    """The elements that tensors share, read when the first of the tensors is.

    Attributes:
      dtype: type of the elements.
      count: number of elements.
      load: returns their bytes, or raises UserError.
    """

    dtype: np.dtype[Any]
    count: int
    load: Callable[[], memoryview]

    @functools.cached_property
    def data(self) -> memoryview:
        data = self.load()
        if len(data) < self.count * self.dtype.itemsize:
            raise UserError("a storage in the file is shorter than stated: damaged, or not whole?")
        return data[: self.count * self.dtype.itemsize]


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor; see `arrays.Stored`. Offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        """The size of the array, more than the storage's if strides are zero."""
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        return arrays.strided(self.storage.data, self.dtype, self.offset, self.shape, self.strides)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor | Inert:
    if storage is INERT:
        return INERT
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    (offset,) = sizes((offset,), "a tensor's offset")
    shape, strides = sizes(shape, "a tensor's shape"), sizes(strides, "a tensor's strides")
    if len(shape) != len(strides):
        raise ValueError("a tensor with as many strides as axes is expected")
    return Tensor(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_with_attributes(rebuild: Any, _kind: Any, args: Any, *_: Any) -> Any:
    """A tensor of a subclass or with attributes, which are left out."""
    known = rebuild in (_rebuild_tensor, _rebuild_parameter)
    return rebuild(*args) if known and isinstance(args, tuple) else INERT


class _StorageType:
    """Stand-in for a class such as `torch.FloatStorage`, which pickles name but do not call."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype


def names() -> dict[tuple[str, str], Any]:
    """Stand-ins for the names in the pickles of torch files."""
    found: dict[tuple[str, str], Any] = {
        **arrays.python_names(),
        ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
        ("torch._utils", "_rebuild_device_tensor_from_numpy"): _rebuild_parameter,
        ("torch._tensor", "_rebuild_from_type"): _rebuild_with_attributes,
        ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_attributes,
        ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
        ("torch.serialization", "_get_layout"): INERT,
        ("torch.torch_version", "TorchVersion"): INERT,
        **{("torch", name): INERT for name in _UNREAD},
    }
    for module in _MODULES:
        found |= {(module, name): _StorageType(dtype) for name, dtype in _DTYPES.items()}
    return found


def _is_class(identity: Any) -> bool:
    """Whether a pickle refers to the class of a module, beside which legacy files keep its source code."""
    return isinstance(identity, tuple) and len(identity) > 1 and identity[0] == "module" and identity[1] is INERT


def _storage_reference(identity: Any) -> tuple[np.dtype[Any] | None, str, int]:
    """Type, key and number of elements of a storage that a pickle refers to; no type if NumPy has none such."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise ValueError("a reference to something other than a storage")
    kind, key, _, count = identity[1:5]
    if not (isinstance(kind, _StorageType) or kind is INERT) or not isinstance(key, str) or len(key) > _MAX_KEY:
        raise ValueError("a storage of an unknown type")
    if len(identity) > 5 and identity[5] is not None:
        raise ValueError("a view of a storage, as torch before 0.4 wrote them")
    dtype = kind.dtype if isinstance(kind, _StorageType) else None
    return dtype, key, sizes((count,), "a storage's size")[0]


def read(data: memoryview, allowed: pickles.Allowed | None = None, *, met: set[str] | None = None) -> Any:
    """Reads the object in a torch file.

    Args:
      data: the whole file, zip or legacy.
      allowed: further stand-ins; see `pickles.load`.
      met: a set, to which names that no stand-in is for are added; see `pickles.load`.

    Returns:
      The object, with `Tensor` for tensors, plain Python types for the rest, and `pickles.INERT` for objects of other
      types.

    Raises:
      UserError: if the file is damaged, incomplete, of another format, or names something that runs.
    """
    known = {**names(), **(allowed or {})}
    if data[:2] == b"PK":
        return _read_zip(data, known, met)
    if data[: len(LEGACY_START)] == LEGACY_START:
        return _read_legacy(data, known, met)
    raise UserError("not a file of torch.save")


# Zip archives.


def _read_zip(data: memoryview, known: pickles.Allowed, met: set[str] | None) -> Any:
    try:
        with zipfile.ZipFile(_Seekable(data)) as archive:  # type: ignore[arg-type]
            members = {member.filename: member for member in archive.infolist()}
    except Exception as error:  # damaged archives raise almost anything
        raise UserError(f"not a readable zip archive ({brief(error)}): damaged, or not whole?") from error
    if sum(member.compress_size for member in members.values()) > len(data):
        raise UserError("the members of the zip archive overlap: damaged?")
    heads = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(heads) != 1:
        raise UserError("a zip archive, but not a checkpoint of torch.save (it has no data.pkl)")
    head = heads[0]
    if head + "constants.pkl" in members:
        raise UserError("a TorchScript program, not a checkpoint: save the state dict with torch.save instead")
    member = functools.partial(_member, data, members)
    if head + "byteorder" in members and member(head + "byteorder") != b"little":
        raise UserError("a big-endian torch file: save it again on a little-endian machine")
    text = member(head + "data.pkl")
    if len(text) > _MAX_PICKLE:
        raise UserError(f"the pickle in the torch file has {len(text):,} bytes: not a checkpoint")
    storages: dict[str, Storage] = {}

    def persistent_load(identity: Any) -> Storage | Inert:
        dtype, key, count = _storage_reference(identity)
        if dtype is None:
            return INERT
        if key not in storages:
            # The checksum is verified once, however many references of different sizes there are.
            load = functools.cache(functools.partial(member, f"{head}data/{key}"))
            storages[key] = Storage(dtype, count, load)
        return _same(storages[key], dtype, count)

    return _load(View(text), known, persistent_load, len(data), met)


def _load(view: View, known: pickles.Allowed, persistent_load: Any, size: int, met: set[str] | None) -> Any:
    return pickles.load(
        view, known, persistent_load=persistent_load, encoding="latin1", size=size, unknown="inert", met=met
    )


def _same(storage: Storage, dtype: np.dtype[Any], count: int) -> Storage:
    """`storage` with the type and the size that a later reference states."""
    if (storage.dtype, storage.count) == (dtype, count):
        return storage
    return Storage(dtype, count, storage.load)


def _member(data: memoryview, members: dict[str, zipfile.ZipInfo], name: str) -> memoryview:
    """The bytes of a member of an archive, as a view."""
    try:
        member = members[name]
    except KeyError:
        raise UserError(f"the torch file lacks {name[:_SHOWN]}: damaged, or not whole?") from None
    name = name[:_SHOWN]
    # torch does not compress members, so that nothing here can expand to more than the size of the file.
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.file_size != member.compress_size:
        raise UserError(f"{name} in the zip archive is packed, which torch.save never does: save it again with torch")
    header = data[member.header_offset : member.header_offset + 30]
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UserError(f"{name} in the zip archive has no header: damaged?")
    start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    content = data[start : start + member.file_size]
    if len(content) != member.file_size:
        raise UserError(f"{name} in the zip archive ends early: damaged, or not whole?")
    arrays.checked(content, member.CRC, name)
    return content


class _Seekable(io.RawIOBase):
    """Memory as the seekable file that `zipfile` needs."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        start = (0, self._position, len(self._data))[whence]
        if start + offset < 0:
            raise OSError("a position before the file's start")
        self._position = start + offset
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        if size > _MAX_INDEX:
            raise OSError("its index is too long")
        end = len(self._data) if size is None or size < 0 else self._position + size
        part = bytes(self._data[self._position : end])
        self._position += len(part)
        return part


# Legacy files.


def _read_legacy(data: memoryview, known: pickles.Allowed, met: set[str] | None) -> Any:
    view = View(data)
    view.position = len(LEGACY_START)
    if pickles.load(view, {}) != 1001:
        raise UserError("a torch file of an unknown protocol: save it again with a current torch")
    system = pickles.load(view, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UserError("a big-endian torch file: save it again on a little-endian machine")
    storages: dict[str, Storage] = {}
    contents: dict[str, memoryview] = {}

    def content(key: str) -> memoryview:
        try:
            return contents[key]
        except KeyError:
            raise UserError(f"the torch file lacks storage {key[:_SHOWN]}: damaged, or not whole?") from None

    def persistent_load(identity: Any) -> Storage | Inert:
        if _is_class(identity):
            return INERT
        dtype, key, count = _storage_reference(identity)
        if dtype is None:
            raise UserError(
                "the torch file holds tensors of a type that is not read: save it again with a current torch"
            )
        if key not in storages:
            storages[key] = Storage(dtype, count, functools.partial(content, key))
        return _same(storages[key], dtype, count)

    found = _load(view, known, persistent_load, len(data), met)
    keys = pickles.load(view, {})
    if not isinstance(keys, list):
        raise UserError("the torch file lacks its list of storages: damaged?")
    # The storages follow in the order of that list, each as its number of elements and the elements.
    for key in keys:
        if not isinstance(key, str) or key not in storages:
            raise UserError("the torch file lists a storage that nothing uses: damaged?")
        count = data[view.position : view.position + 8]
        if len(count) < 8 or struct.unpack("<q", count)[0] != storages[key].count:
            raise UserError("a storage in the torch file has another size than stated: damaged, or not whole?")
        start, size = view.position + 8, storages[key].count * storages[key].dtype.itemsize
        contents[key] = data[start : start + size]
        if len(contents[key]) < size:
            raise UserError("the torch file ends early: damaged, or not whole? Fetch or copy it again")
        view.position = start + size
    return found


def storage_reader() -> Callable[[Any], Storage]:
    """Stand-in for `torch.storage._load_from_bytes` in one pickle: the storage in a torch file that is given as bytes.

    It raises UserError if the bytes hold something else, and reads the same bytes once.
    """
    read_before: dict[int, tuple[Any, Storage]] = {}  # the bytes are kept, so that no others get their place

    def storage_from_bytes(data: Any) -> Storage:
        if id(data) not in read_before:
            found = read(memoryview(data)) if isinstance(data, bytes | memoryview) else None
            if not isinstance(found, Storage) or len(read_before) >= _MAX_INNER:
                raise UserError("the pickle holds a storage that is not a torch file: damaged?")
            read_before[id(data)] = data, found
        return read_before[id(data)][1]

    return storage_from_bytes


# Writing.


def write(path: str | Path, found: Mapping[str, Any]) -> None:
    """Writes nested dictionaries of arrays atomically, as `torch.save` writes tensors on the CPU.

    `torch.load` returns the same dictionaries, also with `weights_only=True`.

    Args:
      path: path of the file; one that exists is replaced.
      found: arrays, and dictionaries of them, by name.

    Raises:
      UserError: if the path cannot be written.
      ValueError: if torch has no tensors of an array's type.
    """
    storages: list[np.ndarray] = []
    program = b"\x80\x02" + _emit(found, storages) + b"."  # protocol 2, as torch has
    with files.whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(storages):
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as entry:
                entry.write(array.view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


def _emit(value: Any, storages: list[np.ndarray]) -> bytes:
    """Returns the pickle opcodes that push `value` on the stack, and appends the data of arrays to `storages`.

    Python's own pickler would import the names that it writes, and torch may not be installed.
    """
    emit = functools.partial(_emit, storages=storages)
    match value:
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"\x8a\x08" + struct.pack("<q", value)
        case str():
            text = value.encode("utf-8")
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + b"".join(map(emit, value)) + b"t"
        case Mapping():
            return b"}(" + b"".join(emit(key) + emit(entry) for key, entry in value.items()) + b"u"
    array = np.asarray(value)
    kinds = [name for name, dtype in _DTYPES.items() if dtype == array.dtype]
    if not kinds:
        raise ValueError(f"torch has no tensors of {array.dtype}")
    strides = tuple(int(np.prod(array.shape[i + 1 :], dtype=np.int64)) for i in range(array.ndim))
    key = str(len(storages))
    storages.append(np.ascontiguousarray(array).reshape(-1))
    storage = b"(" + emit("storage") + _name("torch", kinds[0]) + emit(key) + emit("cpu") + emit(array.size) + b"tQ"
    hooks = _name("collections", "OrderedDict") + b")R"
    shape = emit(tuple(map(int, array.shape)))
    return (
        _name("torch._utils", "_rebuild_tensor_v2")
        + b"(" + storage + emit(0) + shape + emit(strides) + emit(False) + hooks + b"tR"
    )  # fmt: skip


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
