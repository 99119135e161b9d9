"""What every script here shares: arguments in, one clear line and an exit code out."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from samjax.errors import UserError
from samjax.io import registry

IMAGE_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

Args = TypeVar("Args")


def run(arguments: type[Args], main: Callable[[Args], None]) -> None:
    """Parses the command line into the dataclass `arguments` (dashes or underscores) and calls `main` with it.

    Exit codes: 0; 2 for bad input, with one line and no traceback; 130 for Ctrl-C.
    """
    args = tyro.cli(arguments)
    keep_freed_memory()
    keep_compiled_programs()
    try:
        main(args)
    except UserError as error:
        print(f"error: {error.shown}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; finished outputs are kept, run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def keep_freed_memory() -> None:
    """Has this process keep what it frees instead of giving it back to the system: to be called before JAX runs.

    XLA on a CPU allocates its buffers anew at every step. By default glibc maps each large one afresh, and the system
    clears it page by page: a quarter of the time of the demo's steps, a tenth at 256 px. Nothing happens where there
    is another C library.
    """
    import jax

    # glibc keeps large pieces in the main thread's arena alone, so programs must be started from there.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    no_mmap, no_trim = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for parameter, value in (no_mmap, no_trim):
            ctypes.CDLL(None).mallopt(parameter, value)


def keep_compiled_programs() -> None:
    """Has JAX find again what an earlier run compiled, in `registry.cache_folder()`: the oldest go beyond 2 GB.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    folder = registry.cache_folder() / "compiled" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # nowhere to keep them: compiled each time, as without
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 2 << 30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _processor() -> str:
    """Tells processors apart: a home folder may be shared by machines, and code for one crash on another."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))
        )
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def connect(distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of a run, where there are any.

    Args:
      distributed: takes this process's place among them from its surroundings.
      coordinator: address of the first one, where the surroundings do not tell; with the next two.
      num_processes: how many there are.
      process_id: which one this is.

    Raises:
      UserError: one of the three is missing.
    """
    import jax

    given = (coordinator, num_processes, process_id)
    if distributed:
        jax.distributed.initialize()
    elif any(value is not None for value in given):
        if None in given:
            raise UserError("--coordinator, --num_processes and --process_id go together: give all three")
        jax.distributed.initialize(*given)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, in order; label images, NAME_segments.png, are not among them.

    Raises:
      UserError: there are none, or two whose names differ only in their endings, for results carry names without.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: it must be a folder of images")
    images = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_KINDS)
    found = sorted(path for path in images if not path.stem.endswith("_segments"))
    if not found:
        raise UserError(f"{folder} holds no images ({', '.join(IMAGE_KINDS)})")
    seen: dict[str, Path] = {}
    for path in found:
        if path.stem in seen:
            raise UserError(f"{seen[path.stem]} and {path.name} would have the same results: rename one")
        seen[path.stem] = path
    return found
