"""Finds directions in W along which the images of a generator change in a meaningful way.

    python experiments/find_directions.py --output_path directions                    # GANSpace, for the demo
    python experiments/find_directions.py --generator converted/ --method sefa --layers 0-5 --output_path directions
    python experiments/find_directions.py --generator converted/ --scores smiles.csv --output_path directions
    python experiments/find_directions.py --generator converted/ --scorer score.py:smile --output_path directions

`ganspace` takes the principal components of the generator's styles, `sefa` the directions to which its weights respond
most; neither needs labels, and `sefa` finds different directions for each range of layers. `supervised` takes scores of
images: from a CSV file with the columns seed and score (seeds as in generate.py), or from a Python function, from
images uint8 [N, R, R, 3] to N numbers. If all scores are 0 or 1, they are treated as class labels. OUTPUT_PATH gets a
file for each direction, which `invert.py --edits_folder OUTPUT_PATH` applies, and NAME.png: the effect of each on some
images, at five strengths.

A strength of 1 is one standard deviation of the generator's own styles along a direction. The typical strength, noted
in each file and shown at the ends of the sheet, is the one at which images have changed by --typical_change.

The first command takes half a minute on two CPU cores. Among its eight directions are the car's red, its green and its
size.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tqdm

from ckpt_convert import get
from samjax import cli, demo, directions, generation
from samjax.config import check_generator
from samjax.directions import Directions, Styles
from samjax.errors import UserError, check_least, check_positive, check_seed
from samjax.io import checkpoints, files, images, weights
from samjax.io.checkpoints import LoadedNetwork
from samjax.nets import stylegan2
from samjax.report.directions import DirectionRow, directions_sheet

Method = Literal["ganspace", "sefa", "supervised"]
SHEET_STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # multiples of the typical strength


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path
    """Directory of the directions."""
    generator: Path | None = None
    """A generator, converted or as distributed. Default: the demo's."""
    method: Method | None = None
    """How directions are found. Default: supervised with --scores or --scorer, otherwise ganspace."""
    layers: str | None = None
    """The styles that a direction acts on, such as 0-5 (coarse ones first). Default: all."""
    count: int = 8
    """Number of directions, for ganspace and sefa."""
    scores: Path | None = None
    """For supervised: a CSV file with the columns seed and score."""
    scorer: str | None = None
    """For supervised: FILE.py:NAME, a function that scores images; the file is run."""
    scored: int = 500
    """Number of images to score."""
    class_idx: int | None = None
    """Class of the images, for a generator with classes. Default: all classes."""
    name: str | None = None
    """Name of the files. Default: the method, or the name of the file of scores or of the scorer."""
    samples: int = 20_000
    """Number of z mapped to estimate the spread of the styles."""
    images: int = 3
    """Number of images on the sheet."""
    truncation_psi: float = 0.7
    """Truncation of the images on the sheet."""
    typical_change: float = 0.1
    """LPIPS between images before and after a typical edit."""
    seed: int = 0
    """Seed of the mapped z."""


def check(args: Arguments) -> None:
    """Raises a `UserError` for arguments that are wrong or exclude each other, whatever the generator."""
    check_least(args, {"count": 1, "samples": 2, "images": 1, "scored": 1})
    check_positive(args, ("typical_change",))
    check_seed(args.seed)
    if not math.isfinite(args.truncation_psi):
        raise UserError(f"--truncation_psi must be a number such as 0.7, not {args.truncation_psi}")
    if args.method not in (None, "supervised") and (args.scores or args.scorer):
        raise UserError(f"--method {args.method} uses no scores: leave out --method, or --scores and --scorer")


def find(
    args: Arguments, method: Method, layers: tuple[int, int] | None, generator: LoadedNetwork, styles: Styles
) -> Directions:
    """The directions that the arguments describe.

    Raises:
      UserError: scores that are missing, or that give no direction.
    """
    config, params, _ = generator
    if method == "ganspace":
        return directions.ganspace(styles, count=args.count)
    if method == "sefa":
        return directions.sefa(config, params, styles, layers=layers, count=args.count)
    ws, scores = directions.scored_styles(
        config, params, args.scores, args.scorer, args.scored, class_idx=args.class_idx
    )
    try:
        return directions.fit(ws, scores, styles)
    except ValueError as error:
        raise UserError(f"scores: {error}") from error


def main(args: Arguments) -> None:
    check(args)
    method: Method = args.method or ("supervised" if args.scores or args.scorer else "ganspace")
    path = demo.GENERATOR if args.generator is None else get.ready(args.generator, "generator", notify=cli.note)
    generator = checkpoints.load_generator(path)
    most = min(generator.config.w_dim, args.samples - 1) if method == "ganspace" else generator.config.w_dim
    if method != "supervised" and args.count > most:
        raise UserError(f"--count {args.count}: {method} finds at most {most} directions here")
    check_generator(generator.config, args.class_idx)
    if generator.config.c_dim and args.class_idx is None:
        cli.note(f"the generator has {generator.config.c_dim} classes: directions are of all; --class_idx chooses one")
    generator = LoadedNetwork(*stylegan2.as_rgb(generator.config, generator.params), generator.manifest)
    config, params, manifest = generator
    layers = directions.parse_layers(args.layers, config.num_ws)
    folder = cli.output_directory(args.output_path)
    styles = directions.sample_styles(
        config, params, key=jax.random.key(args.seed), samples=args.samples, class_idx=args.class_idx
    )
    found = find(args, method, layers, generator, styles)

    given = args.scores.stem if args.scores else args.scorer.rpartition(":")[2] if args.scorer else method
    name = files.safe_name(args.name or given)
    notes = {
        "method": method,
        "layers": args.layers or f"0-{config.num_ws - 1}",
        "generator": args.generator.name if args.generator else "demo",
        "source": str(manifest.get("source", {}).get("sha256"))[:16],
        "samples": args.samples,
        "seed": args.seed,
        "class_idx": args.class_idx,
    }
    lpips_params = weights.load_lpips("alex")
    ws = directions.seed_styles(config, params, range(args.images), args.truncation_psi, class_idx=args.class_idx)
    rows = []
    for i, (vector, value) in enumerate(tqdm.tqdm(list(zip(*found, strict=True)), unit="direction")):
        title = name if len(found.values) == 1 else f"{name}_{i:02d}"
        direction = directions.spread_over(vector, config, layers)
        typical = directions.typical_strength(config, params, lpips_params, ws, direction, args.typical_change)
        own = {"name": title, "value": float(value), "typical_strength": round(typical, 2)}
        metadata = {key: json.dumps(note) for key, note in (own | notes).items()}
        checkpoints.write_safetensors(folder / f"{title}.safetensors", {"direction": direction}, metadata)
        strengths = [typical * multiple for multiple in SHEET_STRENGTHS]
        edited = [generation.draw(config, params, ws + strength * direction) for strength in strengths]
        rows.append(DirectionRow(title, strengths, np.stack(edited)))
    images.save_png(folder / f"{name}.png", directions_sheet(rows))
    listed = f"{rows[0].name}.safetensors" + (f" to {rows[-1].name}.safetensors" if len(rows) > 1 else "")
    print(f"{folder}: {listed}; {name}.png shows them")


if __name__ == "__main__":
    cli.run(Arguments, main)
