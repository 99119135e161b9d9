"""Writing files whole: under a temporary name beside the file, then renamed over it.

Whoever looks at a path sees the old file or the new one, never a part, whatever ends the writing: an error, a full
disk, Ctrl-C, or the power. What a person can mend comes as one `UserError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
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
    errno.ENOSPC: "the disk is full: free some space, or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose another folder",
    errno.EFBIG: "the file is larger than this disk or account allows: choose another folder",
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "permission denied: choose a folder that you may write to",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.EEXIST: "a part of the path is a file, not a folder: choose another path",
    errno.EISDIR: "it is a folder: choose the name of a file",
}


def _cannot_write(path: Path, error: OSError) -> UserError:
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)
    return UserError(f"cannot write {path}: {reason}")


def _create_beside(path: Path) -> tuple[BinaryIO, Path]:
    # The temporary name does not grow with the file's, so that the longest legal name can be written.
    beside = path.parent / f".{secrets.token_hex(8)}.part"
    # Unlike `tempfile`, plain creation leaves the permissions to the user's umask, as for any file.
    descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(descriptor, "w+b"), beside


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file for writing in binary mode that takes its name only when the `with` block ends well.

    Missing folders on the way are made. A link is followed, so that it stays a link. If the block raises anything,
    the temporary file is removed and what was at `path` before stays as it was.

    Args:
      path: of the file; one that exists is replaced.

    Yields:
      The open file; it can be written, read and searched.

    Raises:
      UserError: the path is a folder or a device, or the system refuses: a full or read-only disk, no permission.
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
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"cannot write {str(given)!r}: not a legal file name") from error
    try:
        try:
            with file:
                yield file
                file.flush()
                # Some file systems report a full disk only here; and a rename must not overtake its data.
                os.fsync(file.fileno())
            os.replace(beside, target)
        except OSError as error:
            raise _cannot_write(given, error) from error
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`, whole. Raises as `whole_file` does."""
    with whole_file(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` in UTF-8, whole. Raises as `whole_file` does."""
    write_bytes(path, text.encode("utf-8"))


def _plain(value: Any) -> Any:
    """What JSON knows, out of what programs hold: NumPy and JAX arrays, dataclasses, paths, numbers not finite."""
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
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` to `path` as JSON, indented, in UTF-8, whole.

    Args:
      path: of the file.
      value: dictionaries, sequences, strings, numbers, None; also arrays, scalars of NumPy and JAX, dataclasses and
        paths. Numbers that are not finite, which JSON lacks, become null.

    Raises:
      UserError: as `whole_file`.
      TypeError: a value has no form in JSON; nothing is written.
    """
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_npz(path: str | Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Writes named arrays to `path` as a compressed NumPy archive, whole. Raises as `whole_file` does.

    Args:
      path: of the file; unlike NumPy, no ending is added.
      arrays: name to array. Object arrays, which only a pickle could hold, raise ValueError.
    """
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    if objects := [name for name, array in plain.items() if array.dtype.hasobject]:
        raise ValueError(f"arrays of objects cannot be saved: {', '.join(objects)}")
    # Not `np.savez_compressed`, to which some names ("file") mean something else.
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in plain.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def output_folder(path: str | Path) -> Path:
    """Makes the folder `path` if it is missing, and makes sure that files can be written in it.

    Returns:
      The folder's path, as given.

    Raises:
      UserError: it is a file, or it cannot be made or written in.
    """
    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"the output folder {folder} is a file: choose another name, or move the file")
        folder.mkdir(parents=True, exist_ok=True)
        file, probe = _create_beside(folder / "probe")
        try:
            with file:
                # A full disk still makes empty files.
                file.write(bytes(4096))
                file.flush()
        finally:
            probe.unlink()
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)
        raise UserError(f"cannot use {folder} as the output folder: {reason}") from error
    except ValueError as error:
        raise UserError(f"cannot use {str(folder)!r} as the output folder: not a legal folder name") from error
    return folder
