"""Makes the parts of the demo other than its generator: sample images, directions found in W, and trained networks.

    python experiments/demo/make_assets.py
    python experiments/demo/make_assets.py --encoder runs/encoder/encoder --offsets runs/offsets/offsets \\
        --predictor runs/predictor/predictor

Writes `samples/`, `edits/` and, with the flags, the networks in half precision to OUTPUT_PATH, in about a minute on two
CPU cores.

Samples are hard scenes with their true segments. Directions come from a regression of styles on the renderer's factors:
w = A f + b by least squares over many z, so that a change d of the factors has the direction A d, the same for every
style.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from samjax import cli, demo
from samjax.demo import scenes
from samjax.io import checkpoints, files, images
from samjax.nets import stylegan2

CHANGES = {
    "blue_car": {"blue": 0.8, "red": -0.8, "green": -0.2},
    "red_car": {"red": 0.8, "blue": -0.8, "green": -0.4},
    "van": {"body": 1.0},
    "dusk": {"zenith": 0.8, "warmth": 0.8, "brightness": -0.6},
}
"""The change of the normalized factors by one unit of each direction."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path = demo.FOLDER
    """Directory of the results."""
    samples: int = 6
    """Number of sample scenes."""
    seed: int = 20
    """Seed of the sample scenes. Evaluation and tuning use others."""
    encoder: Path | None = None
    """An encoder from `train_encoder.py`."""
    offsets: Path | None = None
    """An offset encoder from `train_offsets.py`."""
    predictor: Path | None = None
    """A predictor from `train_invertibility.py`."""


def regress_directions(z: jax.Array, ws: np.ndarray) -> dict[str, np.ndarray]:
    """Directions [w_dim] from z [n, K] and their styles [n, w_dim]."""
    factors = np.asarray(scenes.normalize_factors(z), np.float64)
    design = np.concatenate([factors, np.ones((len(factors), 1))], axis=1)
    slopes = np.linalg.lstsq(design, np.asarray(ws, np.float64), rcond=None)[0][:-1]  # [K, w_dim]
    changes = {name: [change.get(factor, 0.0) for factor in scenes.FACTORS] for name, change in CHANGES.items()}
    return {name: (np.asarray(change) @ slopes).astype(np.float32) for name, change in changes.items()}


def embed(path: Path, network: str, output: Path, **changes: int) -> None:
    """Writes a trained network as one file in half precision, with changes of its config."""
    config, variables, manifest = checkpoints.load_network(path, network)
    config = dataclasses.replace(config, **changes)
    origin = {key: value for key, value in manifest.items() if key in ("source", "source_format")}
    checkpoints.save_safetensors(output, config, variables, np.float16, {**origin, "licence": "Apache-2.0"})
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def main(args: Arguments) -> None:
    if args.encoder is not None:
        embed(args.encoder, "e4e", args.output_path / demo.ENCODER.name)
    if args.offsets is not None:
        # Two passes are trained; a third still improves LPIPS.
        embed(args.offsets, "offsets", args.output_path / demo.OFFSETS.name, passes=3)
    if args.predictor is not None:
        embed(args.predictor, "invertibility", args.output_path / demo.PREDICTOR.name)
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
