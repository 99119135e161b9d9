"""The demo's command from the shell, for `benchmark.py`: with nothing cached, again, and with a sweep of thresholds."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from samjax.errors import UserError

PROGRAM = Path(__file__).with_name("invert.py")


class Run(NamedTuple):
    """One run of `invert.py`.

    Attributes:
      seconds: until the shell has its prompt again.
      first_picture: until the first picture of the result is on disk.
      inversions: until all inversions were done, without what came before and after.
      layer_maps: how many different ones there were.
      thresholds: how many thresholds.
    """

    seconds: float
    first_picture: float
    inversions: float
    layer_maps: int
    thresholds: int


def measure() -> dict[str, Run]:
    """Runs it three times, in a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        return {
            "nothing cached": _run(place, "first"),
            "cached": _run(place, "second"),
            "sweep, cached": _run(place, "sweep", "--sweep_thresholds"),
        }


def _run(place: Path, name: str, *options: str) -> Run:
    output, log = place / name, place / f"{name}.txt"
    command = [sys.executable, str(PROGRAM), "--output_path", str(output), *options]
    environment = {**os.environ, "SAMJAX_CACHE": str(place / "cache")}
    began, picture = time.perf_counter(), float("nan")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            if math.isnan(picture) and any(output.glob("*/start.png")):
                picture = time.perf_counter() - began
            time.sleep(0.05)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise UserError(f"the demo's command ended with code {process.returncode}: {log.read_text().strip()[-300:]}")
    (metrics,) = output.glob("*/metrics.json")
    summary = json.loads(metrics.read_text())
    segments = {json.dumps([row["layer"] for row in one["segments"]]) for one in summary["thresholds"].values()}
    return Run(seconds, picture, summary["seconds"]["sam"], len(segments), len(summary["thresholds"]))


def table(runs: dict[str, Run]) -> Iterator[str]:
    """In Markdown."""
    yield "| demo | s | to the first picture | inversions, s | thresholds | layer maps | inversions, of one |"
    yield "|---" + "|--:" * 6 + "|"
    one = runs["cached"].inversions
    for name, run in runs.items():
        yield (
            f"| {name} | {run.seconds:.1f} | {run.first_picture:.1f} | {run.inversions:.1f} | {run.thresholds}"
            f" | {run.layer_maps} | {run.inversions / one:.1f} |"
        )
