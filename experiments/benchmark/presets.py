"""What a shorter schedule and lower precision cost in quality: SAM on held-out hard scenes of the demo."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, get_args

from operations import markdown

from samjax.config import Precision, Preset
from samjax.errors import UserError

PROGRAM = Path(__file__).parents[1] / "evaluate.py"


class Policy(NamedTuple):
    """How images are inverted."""

    preset: Preset
    precision: Precision


class Quality(NamedTuple):
    """A figure for each scene: LPIPS-VGG to the target, change of color by the edit, seconds of the inversion."""

    lpips: list[float]
    edit: list[float]
    seconds: list[float]


def measure(scenes: int, directory: Path, device: str) -> dict[Policy, Quality]:
    """Runs `evaluate.py` for each preset and precision.

    Args:
      scenes: number of scenes.
      directory: keeps finished scenes, which are not repeated.
      device: kind of the device; a CPU has one precision for float32.

    Raises:
      UserError: `evaluate.py` failed.
    """
    precisions = ("highest", "bfloat16") if device == "cpu" else get_args(Precision)
    policies = [Policy("reference", "highest"), *(Policy("fast", precision) for precision in precisions)]
    return {policy: _evaluate(policy, scenes, directory / "_".join(policy)) for policy in policies}


def _evaluate(policy: Policy, scenes: int, output: Path) -> Quality:
    # Official weights have no learned start.
    flags = {**policy._asdict(), "start": "encoder", "scenes": scenes, "output_path": output}
    options = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    if code := subprocess.run([sys.executable, str(PROGRAM), *options], stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"evaluate.py {' '.join(options)} ended with code {code}")
    rows = [rows["SAM"] for rows in json.loads((output / "table.json").read_text())["images"].values()]
    return Quality(*([row[name] for row in rows] for name in Quality._fields))


def table(qualities: Mapping[Policy, Quality]) -> Iterator[str]:
    """In Markdown: means over scenes, their differences from the first row with standard errors, median time ratios."""
    first = next(iter(qualities.values()))
    rows = []
    for policy, quality in qualities.items():
        cells = [", ".join(policy)]
        for ours, theirs in ((quality.lpips, first.lpips), (quality.edit, first.edit)):
            cells += [f"{statistics.mean(ours):.3f}", "–" if ours is theirs else _difference(ours, theirs)]
        pairs = zip(quality.seconds, first.seconds, strict=True)
        rows.append([*cells, f"{statistics.median(ours / theirs for ours, theirs in pairs):.2f}"])
    head = f"preset, precision; {len(first.lpips)} scenes"
    yield from markdown([head, "LPIPS", "difference", "edit effect", "difference", "time"], rows)


def _difference(ours: list[float], theirs: list[float]) -> str:
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return f"{statistics.mean(differences):+.4f} ± {error:.4f}"
