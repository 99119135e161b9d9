"""Draws scenes of the demo's domain: the images on which its encoder and predictor are trained.

    python experiments/demo/make_scenes.py --output_path runs/scenes/train --count 2000 --seed 30

Writes OUTPUT_PATH/sceneSEED_NUMBER.png, about 20 a second on a CPU core. One in four scenes is easy, that is, one
that the generator can draw; the others are hard, and show objects that the generator has never seen.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from samjax import cli, demo
from samjax.errors import check_least, check_seed


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path = Path("runs/scenes/train")
    """Directory of the images."""
    count: int = 2000
    """Number of scenes."""
    seed: int = 30
    """Seed of the scenes: seeds 1 and 2 are for evaluation and tuning, seed 20 is that of the samples."""
    easy_every: int = 4
    """Every n-th scene is easy: 1 for all, 0 for none."""


def main(args: Arguments) -> None:
    check_least(args, {"count": 1, "easy_every": 0})
    check_seed(args.seed)
    paths = demo.draw_scenes(args.output_path, args.count, args.seed, args.easy_every)
    print(f"{len(paths)} scene{'s' * (len(paths) > 1)} in {args.output_path}")


if __name__ == "__main__":
    cli.run(Arguments, main)
