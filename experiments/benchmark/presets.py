"""What faster courses and coarser arithmetic cost in quality, for `benchmark.py`: SAM on the demo's held-out scenes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from samjax.config import Precision, Preset
from samjax.errors import UserError

PROGRAM = Path(__file__).with_name("evaluate.py")


class Policy(NamedTuple):
    preset: Preset
    precision: Precision


class Quality(NamedTuple):
    """One figure a scene each: LPIPS-VGG to the target, change of colour by the edit, seconds of the inversion."""

    lpips: list[float]
    edit: list[float]
    seconds: list[float]


def measure(scenes: int, folder: Path, device: str) -> dict[Policy, Quality]:
    """Runs `evaluate.py` for each preset and precision; finished scenes of an earlier run are kept in `folder`.

    Raises:
      UserError: it ended with an error.
    """
    # A CPU has one precision for float32.
    precisions = ("highest", "bfloat16") if device == "cpu" else get_args(Precision)
    policies = [Policy("reference", "highest"), *(Policy("fast", precision) for precision in precisions)]
    return {policy: _evaluate(policy, scenes, folder / "_".join(policy)) for policy in policies}


def _evaluate(policy: Policy, scenes: int, output: Path) -> Quality:
    flags = {**policy._asdict(), "scenes": scenes, "output_path": output}
    options = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(PROGRAM), *options]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"evaluate.py {' '.join(options)} ended with code {code}")
    rows = [rows["SAM"] for rows in json.loads((output / "table.json").read_text())["images"].values()]
    return Quality(*([row[name] for row in rows] for name in Quality._fields))


def table(qualities: dict[Policy, Quality]) -> Iterator[str]:
    """In Markdown: means over scenes, their difference from the first row's with its standard error, and time as the
    median ratio."""
    first = next(iter(qualities.values()))
    count = len(first.lpips)
    yield f"| preset, precision; {count} scenes | LPIPS | against the first | edit effect | against it | time |"
    yield "|---" + "|--:" * 5 + "|"
    for policy, quality in qualities.items():
        cells = [", ".join(policy)]
        for ours, theirs in ((quality.lpips, first.lpips), (quality.edit, first.edit)):
            cells += [f"{statistics.mean(ours):.3f}", "–" if ours is theirs else _difference(ours, theirs)]
        pairs = zip(quality.seconds, first.seconds, strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        yield "| " + " | ".join([*cells, f"{ratio:.2f}"]) + " |"


def _difference(ours: list[float], theirs: list[float]) -> str:
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return f"{statistics.mean(differences):+.4f} ± {error:.4f}"
