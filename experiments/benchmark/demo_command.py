"""Times the demo from the shell: with nothing cached, again, and with a sweep of thresholds."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from operations import markdown

from samjax.errors import UserError

PROGRAM = Path(__file__).parents[1] / "invert.py"


class Run(NamedTuple):
    """One run of `invert.py`.

    Attributes:
      seconds: seconds until the program ends.
      first_image: seconds until the first image of the result is on disk.
      inversions: seconds of the inversions alone.
      layer_maps: number of different layer maps.
      thresholds: number of thresholds.
    """

    seconds: float
    first_image: float
    inversions: float
    layer_maps: int
    thresholds: int


def measure() -> dict[str, Run]:
    """Runs the program three times, with a cache of its own."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        return {
            "nothing cached": _run(directory, "first"),
            "cached": _run(directory, "second"),
            "sweep, cached": _run(directory, "sweep", "--sweep_thresholds"),
        }


def _run(directory: Path, name: str, *options: str) -> Run:
    output, log = directory / name, directory / f"{name}.txt"
    command = [sys.executable, str(PROGRAM), "--output_path", str(output), *options]
    environment = {**os.environ, "SAMJAX_CACHE": str(directory / "cache")}
    began, first_image = time.perf_counter(), math.nan
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            if math.isnan(first_image) and any(output.glob("*/start.png")):
                first_image = time.perf_counter() - began
            time.sleep(0.05)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise UserError(f"the demo's command ended with code {process.returncode}: {log.read_text().strip()[-300:]}")
    (metrics,) = output.glob("*/metrics.json")
    summary = json.loads(metrics.read_text())
    layer_maps = {json.dumps([row["layer"] for row in one["segments"]]) for one in summary["thresholds"].values()}
    return Run(seconds, first_image, summary["seconds"]["sam"], len(layer_maps), len(summary["thresholds"]))


def table(runs: Mapping[str, Run]) -> Iterator[str]:
    """The runs in Markdown."""
    yield from markdown(
        ["demo", "s", "to the first image", "inversions, s", "thresholds", "layer maps", "inversions, relative"],
        (
            [name, f"{run.seconds:.1f}", f"{run.first_image:.1f}", f"{run.inversions:.1f}", str(run.thresholds),
             str(run.layer_maps), f"{run.inversions / runs['cached'].inversions:.1f}"]
            for name, run in runs.items()
        ),
    )  # fmt: skip
