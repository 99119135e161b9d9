"""Makes what the demo ships beside its weights: sample images, and edit directions found in W.

    python experiments/make_demo_assets.py

Samples are hard scenes with their true segments. A direction comes from a regression: styles of many z against the
renderer's factors, w = A f + b by least squares; the direction of a change of factors d is A d. The same change of w
is applied to every style.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cli
import jax
import numpy as np

from samjax import demo
from samjax.demo import scenes
from samjax.io import files, images
from samjax.nets import stylegan2

CHANGES = {
    "blue_car": {"blue": 0.8, "red": -0.8, "green": -0.2},
    "red_car": {"red": 0.8, "blue": -0.8, "green": -0.4},
    "van": {"body": 1.0},
    "dusk": {"zenith": 0.8, "warmth": 0.8, "brightness": -0.6},
}
"""What one unit of each direction does to the normalised factors."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path = demo.FOLDER
    """Folder that gets `samples/` and `edits/`."""
    samples: int = 6
    seed: int = 20
    """Of the sample scenes; evaluation and tuning draw others."""


def regress_directions(generator_z: jax.Array, ws: np.ndarray) -> dict[str, np.ndarray]:
    """Directions [w_dim] from z [n, K] and their styles [n, w_dim]."""
    factors = np.asarray(scenes.normalize_factors(generator_z), np.float64)
    design = np.concatenate([factors, np.ones((len(factors), 1))], axis=1)
    slopes = np.linalg.lstsq(design, np.asarray(ws, np.float64), rcond=None)[0][:-1]  # [K, w_dim]
    changes = {name: [change.get(factor, 0.0) for factor in scenes.FACTORS] for name, change in CHANGES.items()}
    return {name: (np.asarray(change) @ slopes).astype(np.float32) for name, change in changes.items()}


def main(args: Arguments) -> None:
    generator = demo.load_generator()
    z = jax.random.normal(jax.random.key(11), (20_000, generator.config.z_dim))
    ws = np.asarray(stylegan2.map_z(generator.config, generator.params, z)[:, 0])
    for name, direction in regress_directions(z, ws).items():
        tiled = np.broadcast_to(direction, (1, generator.config.num_ws, len(direction)))
        with files.whole_file(args.output_path / "edits" / f"{name}.npy") as file:
            np.save(file, tiled)
    scene = demo.hard_scenes(args.samples, key=jax.random.key(args.seed))
    for i, (image, labels) in enumerate(zip(np.asarray(scene.image), np.asarray(scene.labels), strict=True)):
        images.save_png(args.output_path / "samples" / f"scene{i}.png", image)
        images.save_segments(args.output_path / "samples" / f"scene{i}_segments.png", labels)
    print(f"wrote {len(CHANGES)} directions and {args.samples} samples to {args.output_path}")


if __name__ == "__main__":
    cli.run(Arguments, main)
