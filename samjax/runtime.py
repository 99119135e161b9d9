"""Process-wide settings of JAX and the C library that make repeated steps and repeated runs faster.

`Pipeline` and every program apply them once; they do not change results.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax

from samjax.errors import UserError, brief
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
      num_processes: number of processes, at least 1.
      process_id: index of this process, below that number.

    Raises:
      UserError: one of the three is missing or impossible, or the processes cannot be joined.
    """
    given = (coordinator, num_processes, process_id)
    if distributed and given == (None, None, None):
        _initialize(
            "--distributed: the environment does not say which processes belong to this run; give --coordinator,"
            " --num_processes and --process_id instead"
        )
    elif given != (None, None, None):
        if distributed:
            raise UserError(
                "--distributed excludes --coordinator, --num_processes and --process_id: give one or the other"
            )
        if coordinator is None or num_processes is None or process_id is None:
            raise UserError("--coordinator, --num_processes and --process_id go together: give all three")
        host, _, port = coordinator.rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
            raise UserError(f"--coordinator {coordinator!r}: give the address of the first process as HOST:PORT")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id {process_id} of --num_processes {num_processes}: processes are counted from 0"
            )
        _initialize(f"--coordinator {coordinator}: cannot join the other processes", *given)


def _initialize(message: str, *address: Any) -> None:
    """`jax.distributed.initialize`, with one line if it fails."""
    try:
        jax.distributed.initialize(*address)
    except (ValueError, RuntimeError) as error:  # no cluster found, or no connection
        raise UserError(f"{message} ({brief(error)})") from error
