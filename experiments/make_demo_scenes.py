"""Draws a folder of the demo's scenes: the photographs that its encoder and predictor are trained on.

    python experiments/make_demo_scenes.py --output_path runs/scenes/train --count 2000 --seed 30

Some scenes are easy, as the generator draws them itself; the others have strangers in them. A scene depends on the
seed and its number alone.
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


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path = Path("runs/scenes/train")
    """Folder of the pictures."""
    count: int = 2000
    seed: int = 30
    """Which scenes; evaluation and tuning draw those of 1 and 2, the samples are of 20."""
    easy_every: int = 4
    """One scene in so many is easy: 1 for all, 0 for none."""


@jax.jit
def draw(key: jax.Array, number: jax.Array, easy: jax.Array) -> jax.Array:
    """Scene `number` of those of `key`, without strangers if `easy`; [256, 256, 3] in [-1, 1]."""
    key = jax.random.fold_in(key, number)
    z = jax.random.normal(jax.random.fold_in(key, 0), (scenes.NUM_FACTORS,))
    hard = scenes.render_hard(z, key=jax.random.fold_in(key, 1)).image
    return jax.numpy.where(easy, scenes.render(z).image, hard)


def main(args: Arguments) -> None:
    files.output_folder(args.output_path)
    key = jax.random.key(args.seed)
    for i in tqdm.trange(args.count, unit="scene"):
        path = args.output_path / f"scene{args.seed}_{i:05d}.png"
        if not path.exists():
            easy = args.easy_every > 0 and i % args.easy_every == 0
            images.save_png(path, np.asarray(draw(key, i, easy)))
    print(f"{args.count} scenes in {args.output_path}")


if __name__ == "__main__":
    cli.run(Arguments, main)
