"""What the programs share."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

FAULTS = """
import resource, sys
sys.path.insert(0, {folder!r})
import cli, numpy as np
if {keep}:
    cli.keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(16 << 20, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_keep_freed_memory():
    """A large piece that is allocated again is not mapped again, page by page."""

    def faults(keep: bool) -> int:
        program = FAULTS.format(folder=str(EXPERIMENTS), keep=keep)
        return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)

    with_it, without = faults(True), faults(False)
    assert with_it < 10
    assert without > 20  # 64 MiB: 16,384 pages, or 32 large ones
