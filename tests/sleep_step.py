"""A step for the workers of `test_benchmark.py`, in a module of its own that a new process imports quickly."""

import sys
import time


class Sleep:
    """Sleeps instead of computing."""

    device = "bed"

    def __init__(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("cannot sleep\nbackwards")
        self.seconds = seconds

    def __call__(self, steps: int) -> float:
        if steps > 99:
            sys.exit(3)
        time.sleep(steps * self.seconds)
        return steps * self.seconds

    def peak_memory(self) -> int:
        return 3 << 30
