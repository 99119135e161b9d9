"""Process-wide settings: memory that is kept, and compiled programs that are found again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from samjax import runtime
from samjax.errors import UserError

FAULTS = """
import resource
import numpy as np
from samjax import runtime
if {keep}:
    runtime.keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(16 << 20, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_keep_freed_memory():
    """A large piece that is allocated again is not mapped again, page by page."""

    def faults(keep: bool) -> int:
        program = FAULTS.format(keep=keep)
        return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)

    with_it, without = faults(True), faults(False)
    assert with_it < 10
    assert without > 20  # 64 MiB: 16,384 pages, or 32 large ones


COMPILES = """
import jax
from samjax import runtime
runtime.keep_compiled_programs()
jax.jit(lambda x: x + 1)(1.0)
"""


def _kept(tmp_path: Path, **environment: str) -> list[str]:
    """What is in `tmp_path` after a program that compiles something."""
    environment = {**os.environ, "SAMJAX_CACHE": str(tmp_path / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, check=True, capture_output=True, text=True)
    assert not done.stderr
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*-cache"))


def test_compiled_programs_are_kept(tmp_path):
    kept = _kept(tmp_path)
    assert kept
    assert all(name.startswith(os.path.join("cache", "compiled", platform.machine())) for name in kept)
    assert _kept(tmp_path) == kept  # found, not compiled again


def test_where_compiled_programs_are_kept_is_the_users_choice(tmp_path):
    choice = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "elsewhere"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    kept = _kept(tmp_path, **choice)
    assert kept
    assert all(name.startswith("elsewhere") for name in kept)
    assert not _kept(tmp_path / "none", JAX_ENABLE_COMPILATION_CACHE="0")


def test_without_a_place_for_compiled_programs_they_are_not_kept(tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    assert not _kept(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((True, None, None, None), "--distributed: the environment does not say"),
        ((True, "localhost:1", 2, 0), "--distributed excludes --coordinator"),
        ((False, "localhost:1", None, None), "give all three"),
        ((False, None, 2, 0), "give all three"),
        ((False, "nohost", 2, 0), "HOST:PORT"),
        ((False, ":1234", 2, 0), "HOST:PORT"),
        ((False, "localhost:99999", 2, 0), "HOST:PORT"),
        ((False, "localhost:1", 0, 5), "--process_id 5 of --num_processes 0"),
        ((False, "localhost:1", 2, 2), "counted from 0"),
        ((False, "localhost:1", 2, -1), "counted from 0"),
    ],
)
def test_processes_that_cannot_be_joined(monkeypatch, given, message):
    def initialize(*address):
        raise ValueError("coordinator_address should be defined.")  # as without a cluster

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(UserError, match=message):
        runtime.connect(*given)
