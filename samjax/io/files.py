"""Writing files completely or not at all, and reading NumPy archives safely.

Files are written under a temporary name in the same directory and then renamed, so that a path never holds a partial
file, whatever interrupts the writing: an error, a full disk, Ctrl-C or a power failure. Errors that the user can fix
are raised as a `UserError` of one line.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from samjax.errors import UserError, brief, shown

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

MAX_NAME_BYTES = 120
"""Names made by `safe_name` are no longer, in UTF-8, so that suffixes can be added to them."""

_PUNCTUATION = frozenset(" -_.+,()")
_RESERVED = frozenset(["CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in "0123456789¹²³")])

# The parts of the header of a .npy file, a Python dictionary, for arrays of plain types.
_DESCR = re.compile(r"""['"]descr['"]\s*:\s*['"]([<>|=]?[a-zA-Z]\d{0,9}(?:\[\w{1,9}\])?)['"]""")
_ORDER = re.compile(r"""['"]fortran_order['"]\s*:\s*(True|False)""")
_SHAPE = re.compile(r"""['"]shape['"]\s*:\s*\(([\d\sL,]*)\)""")
_MAX_HEADER = 65_536  # bytes; NumPy writes 128
_MAX_INDEX = 2 * 2**20  # bytes of a zip archive's index; Python's reader takes ten times as much
_PART = 2**20  # bytes that are read and unpacked at once


def safe_name(name: str) -> str:
    """A name for a file or a directory, made of a name that comes from a file.

    What it returns is a single component of a path on every system: letters and digits of any script, spaces and
    `-_.+,()`, without a dot or space at either end, no device of Windows, and at most `MAX_NAME_BYTES` long.

    Args:
      name: any text, such as an image's stem or a key in a file.

    Returns:
      `name` itself if it is safe. Otherwise other characters become underscores, and a hash of `name` is appended, so
      that names that differ stay different; "image" if `name` is empty.

    >>> safe_name("photo (1)"), safe_name(".."), safe_name("a/b")
    ('photo (1)', 'image_5ec1f7e7', 'a_b_c14cddc0')
    """
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" or c in _PUNCTUATION else "_" for c in name)
    short = kept.strip(" .").encode()[:MAX_NAME_BYTES].decode(errors="ignore").rstrip(" .") or "image"
    if short.partition(".")[0].rstrip().upper() in _RESERVED:
        short = f"_{short}"
    if short == name or not name:
        return short
    tag = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{short.encode()[: MAX_NAME_BYTES - 9].decode(errors='ignore')}_{tag}"


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
      UserError: `path` is a directory or a device, the disk is full or read-only, or permission is denied; or it is in
        an `exclusive_directory` that has been removed.
    """
    given = Path(path)
    try:
        target = Path(os.path.realpath(given))
        within = [held for held in _held.get() if target.is_relative_to(held.directory)]
        for held in within:
            held.check()
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
            for held in within:
                held.written.add(target)
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
      max_bytes: limit on the total size of the unpacked arrays; by default 256 MB and 4 times the file's size.

    Returns:
      Name to array, of numbers, booleans or text.

    Raises:
      UserError: the file does not exist, cannot be read, is not an archive of arrays, is damaged, or would unpack to
        more than `max_bytes`.
    """
    path = Path(path)
    with _reading(path, ".npz", "an .npz file of arrays"), _Indexed(path) as file:
        length = path.stat().st_size
        limit = 4 * length + 256_000_000 if max_bytes is None else max_bytes
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if size > limit:
                raise UserError(f"{path} would unpack to {size:,} bytes, more than the limit of {limit:,}")
            if sum(member.compress_size for member in members) > length:
                raise ValueError("its members overlap")
            if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
                raise ValueError("it is packed in a way that NumPy does not use")
            found = {}
            for member in members:
                # In small parts: other sizes than this one, which was checked, are in the file where it is damaged.
                with archive.open(member) as stream:
                    found[member.filename.removesuffix(".npy")] = _read_array(stream, member.file_size)
                    while stream.read(_PART):  # to the end, where the checksum is verified
                        pass
            return found


def read_npy(path: str | Path) -> np.ndarray:
    """Reads the array in a .npy file without unpickling anything.

    Args:
      path: path of the .npy file.

    Returns:
      The array, of numbers, booleans or text.

    Raises:
      UserError: the file does not exist, cannot be read, is not an array in NumPy's format, or is damaged.
    """
    path = Path(path)
    with _reading(path, ".npy", "a .npy file"), path.open("rb") as file:
        return _read_array(file, path.stat().st_size)


@contextlib.contextmanager
def _reading(path: Path, suffix: str, what: str) -> Iterator[None]:
    """Turns the errors of reading a file into a `UserError`."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory: give the path of an {suffix} file")
        if not path.is_file():
            state = "is a device or a pipe" if path.exists() else "does not exist"
            raise UserError(f"{path} {state}: give the path of an {suffix} file")
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path}: not enough memory to read it") from error
    except Exception as error:  # damaged archives raise almost anything
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # the latter of places outside the file
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        raise UserError(f"{path} is damaged or not {what} ({brief(error)})") from error


class _Indexed(io.FileIO):
    """A file in which a zip archive's index can be found; one that would take much memory is an error."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        if size > _MAX_INDEX:
            raise ValueError("its index is too long")
        return super().read(size) or b""


def _read_array(stream: BinaryIO | IO[bytes], available: int) -> np.ndarray:
    """Reads an array in NumPy's format.

    Unlike NumPy, it allocates nothing that a false header asks for, and does not evaluate the header as Python.

    Args:
      stream: at the beginning of the format.
      available: number of bytes that follow.

    Raises:
      ValueError: if they are not an array of numbers, booleans or text.
    """
    magic, version = stream.read(6), stream.read(2)
    if magic != b"\x93NUMPY" or version not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("it does not begin as NumPy's format does")
    width = 2 if version == b"\1\0" else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > _MAX_HEADER:
        raise ValueError("its header is too long")
    header = stream.read(length).decode("utf-8" if version == b"\3\0" else "latin1")
    descr, order, sizes = (pattern.search(header) for pattern in (_DESCR, _ORDER, _SHAPE))
    if not descr or not order or not sizes:
        raise ValueError("it holds records, or has no readable header")
    dtype = np.dtype(descr[1])
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are not read")
    shape = tuple(int(size.rstrip(" L")) for size in sizes[1].split(",") if size.strip())
    size = math.prod(shape) * dtype.itemsize
    if size > available - 8 - width - length or not dtype.itemsize:
        raise ValueError("it is shorter than its header says")
    array = np.empty(math.prod(shape), dtype)
    target, filled = array.view(np.uint8).data, 0
    while filled < size:
        part = stream.read(min(_PART, size - filled))
        if not part:
            raise ValueError("it ends early")
        target[filled : filled + len(part)] = part
        filled += len(part)
    if dtype.kind == "U" and array.view(dtype.str[0] + "u4").max(initial=0) > sys.maxunicode:
        raise ValueError("it holds text that is none")
    return array.reshape(shape, order="F" if order[1] == "True" else "C")


def output_directory(path: str | Path) -> Path:
    """Creates the directory `path` if it is missing, and checks that files can be written to it.

    Returns:
      `path`, as given.

    Raises:
      UserError: `path` is a file, or the directory cannot be created or written to.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"give the path of the output directory, not {shown(path)}")
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


# --- directories of one program at a time ---


@dataclasses.dataclass(frozen=True)
class _Held:
    """A directory that this program holds; see `exclusive_directory`."""

    given: Path
    directory: Path
    lock: Path
    identity: tuple[int, int]
    written: set[Path] = dataclasses.field(default_factory=set)

    def check(self) -> None:
        """Raises a UserError unless the directory is the one that was locked."""
        if _identity(self.lock) != self.identity:
            raise UserError(f"{self.given} was removed or replaced while results were written to it: run again")


_held: contextvars.ContextVar[tuple[_Held, ...]] = contextvars.ContextVar("held", default=())


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from others that had or get its name; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def locked(path: str | Path, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock file `path`, which exists only while a program holds or wants it.

    The system releases the lock of a process that ends, however it ends, so that a file left behind blocks nobody.

    Args:
      path: of the lock file; its directory must exist.
      wait: called once if another process holds the lock, before waiting for it. By default this is an error.

    Raises:
      TimeoutError: another process holds the lock, and `wait` is None.
      UserError: the file cannot be created or locked.
    """
    import filelock

    path = Path(path)
    # Not a singleton and not reentrant: a second holder in the same process waits, too.
    lock = filelock.FileLock(path, thread_local=False)
    while True:
        try:
            try:
                lock.acquire(blocking=False)
            except TimeoutError:
                if wait is None:
                    raise
                wait()
                lock.acquire()
        except TimeoutError:
            raise
        except (OSError, NotImplementedError) as error:
            reason = _REASONS.get(getattr(error, "errno", 0), str(error))
            raise UserError(f"cannot use {path.parent}: no file in it can be locked: {reason}") from error
        if path.exists():
            break
        lock.release()  # its last holder has removed the file meanwhile: the lock of a removed file excludes nobody
    try:
        yield
    finally:
        # Removed while it is held, so that nobody's lock is removed; Windows permits that only afterwards.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
        if os.name == "nt":
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def exclusive_directory(path: str | Path) -> Iterator[Path]:
    """Keeps other programs out of the directory `path` until the `with` block ends.

    A hidden lock file is in the directory meanwhile. Programs that only read the directory do not notice. If the block
    raises, a directory that was created here and is still empty is removed.

    Args:
      path: of the directory, which is created if it is missing.

    Yields:
      `path`, as given.

    Raises:
      UserError: the directory cannot be created or written to, another program holds it; or it, or a file that
        `whole_file` wrote to it within the block, has been removed when the block ends.
    """
    given = Path(path)
    created = [one for one in (given, *given.parents) if not one.exists()]
    directory = Path(os.path.realpath(output_directory(given)))
    lock = directory / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock))
        except TimeoutError:
            raise UserError(
                f"{given} is in use by another program: wait until it ends, or choose another directory"
            ) from None
        held = _Held(given, directory, lock, _identity(lock) or (0, 0))
        token = _held.set((*_held.get(), held))
        try:
            yield given
            held.check()
            # Hidden files are temporary.
            kept = [
                file for file in held.written if not any(part[0] == "." for part in file.relative_to(directory).parts)
            ]
            if lost := sorted(file for file in kept if not file.exists()):
                raise UserError(f"{lost[0]} was removed while results were written to {given}: run again")
        except BaseException:
            stack.close()
            with contextlib.suppress(OSError):
                for one in created:
                    one.rmdir()
            raise
        finally:
            _held.reset(token)
