"""Process-wide settings of JAX and the C library that make repeated steps and repeated runs faster.

`Pipeline` and every program apply them once; they do not change results.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
from pathlib import Path

import jax

from samjax.errors import UserError
from samjax.io import registry


def configure() -> None:
    """Applies both settings below. Calling it again changes nothing."""
    keep_freed_memory()
    keep_compiled_programs()


def keep_freed_memory() -> None:
    """Makes this process keep freed memory instead of returning it to the system.

    XLA on a CPU allocates its buffers anew at every step. By default glibc maps each large one afresh, and the system
    clears it page by page: a quarter of the time of the demo's steps, a tenth at 256 px. With another C library this
    does nothing. It takes effect only before JAX runs its first computation.
    """
    # glibc keeps large pieces in the main thread's arena only, so programs have to be started from that thread.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    no_mmap, no_trim = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for parameter, value in (no_mmap, no_trim):
            ctypes.CDLL(None).mallopt(parameter, value)


def keep_compiled_programs() -> None:
    """Makes JAX reuse programs that earlier runs compiled, from `registry.cache_folder()`.

    The cache holds up to 2 GB; the least recently used programs are evicted first.

    JAX_COMPILATION_CACHE_DIR names another directory; JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    directory = registry.cache_folder() / "compiled" / _processor()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # the cache cannot be written: programs are compiled in every run
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", 2 << 30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _processor() -> str:
    """Identifies the kind of processor: machines may share a home directory, and code for one may crash another."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))
        )
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def threads() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def connect(distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of a run, if there are any.

    Args:
      distributed: whether to read the addresses and the index of this process from its environment.
      coordinator: address of the first process, HOST:PORT, if the environment does not define it; needs the next two.
      num_processes: number of processes.
      process_id: index of this process.

    Raises:
      UserError: one of the three is missing.
    """
    given = (coordinator, num_processes, process_id)
    if distributed:
        jax.distributed.initialize()
    elif any(value is not None for value in given):
        if None in given:
            raise UserError("--coordinator, --num_processes and --process_id go together: give all three")
        jax.distributed.initialize(*given)
