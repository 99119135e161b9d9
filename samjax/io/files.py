"""Writing files completely or not at all, and reading NumPy archives safely.

Files are written under a temporary name in the same directory and then renamed, so that a path never holds a partial
file, whatever interrupts the writing: an error, a full disk, Ctrl-C or a power failure. Errors that the user can fix
are raised as a `UserError` of one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from samjax.errors import UserError

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space, or choose another directory",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose another directory",
    errno.EFBIG: "the file is larger than this disk or account allows: choose another directory",
    errno.EACCES: "permission denied: choose a directory that you may write to",
    errno.EPERM: "permission denied: choose a directory that you may write to",
    errno.EROFS: "the disk is read-only: choose another directory",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file, not a directory: choose another path",
    errno.EEXIST: "a part of the path is a file, not a directory: choose another path",
    errno.EISDIR: "it is a directory: choose the name of a file",
}

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _cannot_write(path: Path, error: OSError) -> UserError:
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)
    return UserError(f"cannot write {path}: {reason}")


def _create_beside(path: Path) -> tuple[BinaryIO, Path]:
    # The temporary name is short, so that a file with the longest legal name can be written.
    beside = path.parent / f".{secrets.token_hex(8)}.part"
    # Unlike `tempfile`, `os.open` leaves the permissions to the user's umask.
    descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(descriptor, "w+b"), beside


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a binary file for writing that appears at `path` only when the `with` block ends without an exception.

    Missing parent directories are created. Symbolic links are followed. If the block raises, the temporary file is
    removed and an existing file at `path` stays unchanged.

    Args:
      path: path of the file; an existing file is replaced.

    Yields:
      The open file, which can be written, read and searched.

    Raises:
      UserError: `path` is a directory or a device, the disk is full or read-only, or permission is denied.
    """
    given = Path(path)
    try:
        target = Path(os.path.realpath(given))
        if target.is_dir():
            raise UserError(f"cannot write {given}: {_REASONS[errno.EISDIR]}")
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {given}: it is a device, not a file: choose another name")
        target.parent.mkdir(parents=True, exist_ok=True)
        file, beside = _create_beside(target)
    except OSError as error:
        raise _cannot_write(given, error) from error
    except ValueError as error:  # a null byte in the name
        raise UserError(f"cannot write {str(given)!r}: not a legal file name") from error
    try:
        try:
            with file:
                yield file
                file.flush()
                # Some file systems report a full disk only here, and data must reach the disk before the rename.
                os.fsync(file.fileno())
            os.replace(beside, target)
        except OSError as error:
            raise _cannot_write(given, error) from error
    except BaseException:  # including Ctrl-C
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`, completely or not at all; see `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` in UTF-8, completely or not at all; see `whole_file`."""
    write_bytes(path, text.encode("utf-8"))


def _plain(value: Any) -> Any:
    """`value` in types that JSON has: arrays become lists, dataclasses dictionaries, non-finite numbers null."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be converted to JSON")


def to_json(value: Any) -> str:
    """`value` as indented JSON; see `write_json` for what it may hold."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` to `path` as indented JSON in UTF-8, completely or not at all.

    Args:
      path: path of the file; an existing file is replaced.
      value: nested dictionaries, sequences, strings, numbers and None, and also NumPy and JAX arrays and scalars,
        dataclasses and paths. Non-finite numbers, which JSON lacks, become null.

    Raises:
      UserError: the file cannot be written; see `whole_file`.
      TypeError: a value cannot be converted to JSON; nothing is written.
    """
    write_text(path, to_json(value))


def write_npz(path: str | Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Writes named arrays to `path` as a compressed NumPy archive, completely or not at all.

    Args:
      path: path of the file; unlike `numpy.savez`, this adds no suffix.
      arrays: name to array.

    Raises:
      UserError: the file cannot be written; see `whole_file`.
      ValueError: an array holds objects, which would need pickle.
    """
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    if objects := [name for name, array in plain.items() if array.dtype.hasobject]:
        raise ValueError(f"arrays of objects cannot be saved: {', '.join(objects)}")
    # Not `np.savez_compressed`, which does not accept an array named "file".
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in plain.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def read_npz(path: str | Path, *, max_bytes: int | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of a NumPy archive without unpickling anything.

    Args:
      path: path of the .npz file.
      max_bytes: limit on the total size of the unpacked arrays; by default 1,000 times the file's size, but at least
        256 MB and at most 4 GB.

    Returns:
      Name to array.

    Raises:
      UserError: the file does not exist, cannot be read, is not an archive of arrays, is damaged, or would unpack to
        more than `max_bytes`.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory: give the path of an .npz file")
        if not path.exists():
            raise UserError(f"{path} does not exist: give the path of an .npz file")
        limit = min(max(1000 * path.stat().st_size, 256_000_000), 4_000_000_000) if max_bytes is None else max_bytes
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if size > limit:
                raise UserError(f"{path} would unpack to {size:,} bytes, more than the limit of {limit:,}")
            # `read` gives at most the size that was checked here, whatever follows in the file.
            return {member.filename.removesuffix(".npy"): _array_in(archive.read(member)) for member in members}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise UserError(f"{path}: not enough memory to read it") from error
    except Exception as error:  # damaged archives raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or not an .npz file of arrays ({reason})") from error


def _array_in(data: bytes) -> np.ndarray:
    """The array in a .npy file; unlike `np.load`, allocates nothing that a false header asks for."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in _NPY_HEADERS:
        raise ValueError(f"unknown version {version} of the .npy format")
    shape, fortran, dtype = _NPY_HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are not read")
    count = math.prod(shape)
    flat = np.frombuffer(data, dtype, count, stream.tell()) if count else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C").copy(order="K")


def output_directory(path: str | Path) -> Path:
    """Creates the directory `path` if it is missing, and checks that files can be written to it.

    Returns:
      `path`, as given.

    Raises:
      UserError: `path` is a file, or the directory cannot be created or written to.
    """
    directory = Path(path)
    try:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"the output directory {directory} is a file: choose another name, or move the file")
        directory.mkdir(parents=True, exist_ok=True)
        file, probe = _create_beside(directory / "probe")
        try:
            with file:
                # On a full disk, empty files can still be created.
                file.write(bytes(4096))
                file.flush()
        finally:
            probe.unlink()
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)
        raise UserError(f"cannot use {directory} as the output directory: {reason}") from error
    except ValueError as error:
        raise UserError(f"cannot use {str(directory)!r} as the output directory: not a legal directory name") from error
    return directory
