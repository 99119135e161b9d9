"""Draws a folder of the demo's scenes: the photographs that its encoder and predictor are trained on.

    python experiments/make_demo_scenes.py --output_path runs/scenes/train --count 2000 --seed 30

One scene in four is easy, as the generator draws them itself; the others have strangers in them. A scene depends on
the seed and its number alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cli
import jax
import numpy as np
import tqdm

from samjax.demo import scenes
from samjax.io import files, images

EASY = 4
"""One scene in so many is easy."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path = Path("runs/scenes/train")
    """Folder of the pictures."""
    count: int = 2000
    seed: int = 30
    """Which scenes; evaluation and tuning draw those of 1 and 2, the samples are of 20."""


@jax.jit
def draw(key: jax.Array, number: jax.Array) -> jax.Array:
    """Scene `number` of those of `key`; [256, 256, 3] in [-1, 1]."""
    key = jax.random.fold_in(key, number)
    z = jax.random.normal(jax.random.fold_in(key, 0), (scenes.NUM_FACTORS,))
    hard = scenes.render_hard(z, key=jax.random.fold_in(key, 1)).image
    return jax.numpy.where(number % EASY == 0, scenes.render(z).image, hard)


def main(args: Arguments) -> None:
    files.output_folder(args.output_path)
    for i in tqdm.trange(args.count, unit="scene"):
        path = args.output_path / f"scene{args.seed}_{i:05d}.png"
        if not path.exists():
            images.save_png(path, np.asarray(draw(jax.random.key(args.seed), i)))
    print(f"{args.count} scenes in {args.output_path}")


if __name__ == "__main__":
    cli.run(Arguments, main)
