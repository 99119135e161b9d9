"""Finds edit directions of a generator.

    python experiments/find_directions.py --output_path directions                    # GANSpace, the demo's generator
    python experiments/find_directions.py --generator converted/ --method sefa --layers 0-5 --output_path directions
    python experiments/find_directions.py --generator converted/ --scores smiles.csv --output_path directions

`ganspace` takes principal components of the generator's styles, `sefa` what its weights respond to most; neither
needs labels. `supervised` takes a CSV file with the columns seed and score, seeds being those of generate.py; scores
of 0 and 1 only are classes. OUTPUT_PATH gets a file for each direction, which `invert.py --edits_folder OUTPUT_PATH`
applies, and sheet.png: what each does to three images, at five strengths.

A strength of 1 is one standard deviation of the generator's own styles along a direction. The typical strength noted
in each file is that at which the image has changed by as much as --typical_change says, by LPIPS.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import cli
import generate
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from samjax import demo, directions, inversion
from samjax.directions import Directions, Styles
from samjax.errors import UserError
from samjax.io import checkpoints, files, images
from samjax.io.checkpoints import LoadedGenerator
from samjax.io.sheets import Sheet, resize
from samjax.io.weights import load_lpips
from samjax.nets import lpips

Method = Literal["ganspace", "sefa", "supervised"]
TRIED = (0.5, 1.0, 2.0, 4.0, 8.0)  # strengths between which the typical one is found


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path
    """Folder for the directions."""
    generator: Path | None = None
    """A converted generator; none: the demo's."""
    method: Method | None = None
    """How; none: supervised with --scores, otherwise ganspace."""
    layers: str | None = None
    """The styles that a direction acts on, such as 0-5 (coarse ones first); none: all."""
    count: int = 8
    """How many, for ganspace and sefa."""
    scores: Path | None = None
    """For supervised: a CSV file with columns seed and score."""
    name: str | None = None
    """Of the files; none: the method, or the name of the scores' file."""
    samples: int = 20_000
    """Mapped z, for the spread of the styles."""
    images: int = 3
    """Images on the sheet."""
    truncation_psi: float = 0.7
    """Of the images on the sheet."""
    typical_change: float = 0.2
    """LPIPS of a typical edit."""
    seed: int = 0


def parse_layers(text: str | None, num_ws: int) -> tuple[int, int] | None:
    """ "0-5" as (0, 6).

    Raises:
      UserError: another syntax, or styles that the generator does not have.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,3})(?:\s*-\s*(\d{1,3}))?\s*", text, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < num_ws:
        raise UserError(
            f"--layers {text[:40]!r}: give the first and the last style, such as 0-5; there are {num_ws}, from 0"
        )
    return first, last + 1


def read_scores(path: Path) -> tuple[list[int], np.ndarray]:
    """Seeds and their scores.

    Raises:
      UserError: no such file, no such columns, or what is in them are no seeds and numbers.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--scores: {path} cannot be read: {error}") from error
    try:
        seeds = [int(row["seed"]) for row in rows]
        scores = np.array([float(row["score"]) for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--scores: {path} needs the columns seed and score, with a number in every row") from error
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"--scores: {path}: seeds lie between 0 and 4294967295")
    return seeds, scores


def find(
    args: Arguments, method: Method, layers: tuple[int, int] | None, generator: LoadedGenerator, styles: Styles
) -> Directions:
    """The directions that the arguments ask for.

    Raises:
      UserError: scores that are missing or that give no direction.
    """
    config, params = generator.config, generator.params
    if method == "ganspace":
        return directions.ganspace(styles, count=args.count)
    if method == "sefa":
        return directions.sefa(config, params, styles, layers=layers, count=args.count)
    if args.scores is None:
        raise UserError("--method supervised needs --scores, a CSV file with the columns seed and score")
    seeds, scores = read_scores(args.scores)
    fit = directions.boundary if np.isin(scores, (0, 1)).all() else directions.regression
    try:
        return fit(styles_of(generator, seeds)[:, 0], scores, styles)
    except ValueError as error:
        raise UserError(f"--scores: {args.scores}: {error}") from error


def styles_of(generator: LoadedGenerator, seeds: list[int], psi: float = 1.0) -> np.ndarray:
    """[N, num_ws, w_dim] of seeds, those of generate.py; of the first class where there are classes."""
    config = generator.config
    z = np.stack([generate.random_z(seed, config.z_dim) for seed in seeds]) if seeds else np.zeros((0, config.z_dim))
    label = jnp.zeros((len(z), config.c_dim)).at[:, 0].set(1.0) if config.c_dim else None
    return np.asarray(generate.styles(config, generator.params, jnp.asarray(z), label, jnp.float32(psi), None))


def draw(generator: LoadedGenerator, ws: np.ndarray) -> np.ndarray:
    """Images [N, R, R, 3] in [-1, 1] of ws [N, num_ws, w_dim]."""
    return np.clip(
        inversion.render(generator.config, generator.params, {"W+": jnp.asarray(ws)}, {}, batch_size=4), -1, 1
    )


def typical_strength(
    generator: LoadedGenerator, params: lpips.Params, ws: np.ndarray, way: np.ndarray, change: float
) -> float:
    """The strength at which images of ws [N, num_ws, w_dim] have changed by `change` on average; by interpolation
    between `TRIED`, at most the last of them."""
    still = draw(generator, ws)
    reached = [0.0]
    for strength in TRIED:
        moved = draw(generator, ws + strength * way)
        reached.append(float(np.mean(_distance(params, jnp.asarray(still), jnp.asarray(moved)))))
        if reached[-1] >= change:
            break
    strengths = [0.0, *TRIED][: len(reached)]
    return float(np.interp(change, np.maximum.accumulate(reached), strengths))


@jax.jit
def _distance(params: lpips.Params, x: Any, y: Any) -> Any:
    return lpips.lpips(params, x, y, "alex")


def sheet(rows: list[tuple[str, list[float], np.ndarray]], side: int = 128) -> np.ndarray:
    """A row for each direction: its name, its five strengths, and images [5, N, R, R, 3]."""
    count = rows[0][2].shape[1]
    label, gap, head = 170, 14, 26
    block = 5 * side + gap
    page = Sheet(label + count * block + gap, len(rows) * (side + head) + gap)
    for i, (name, strengths, made) in enumerate(rows):
        top = gap + i * (side + head)
        page.text(gap, top + side / 2 - 8, name, 16, width=label - 2 * gap, strong=True)
        for k, strength in enumerate(strengths):
            text = f"{strength:+.1f}" if strength else "0"
            for n in range(count):
                left = label + n * block + k * side
                page.image(left, top, resize(images.to_uint8(made[k, n]), side, side))
                page.text(left + side / 2, top + side + 2, text, 12, align="centre")
    return page.array()


def main(args: Arguments) -> None:
    for flag in ("count", "samples", "images"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    if not args.typical_change > 0:
        raise UserError("--typical_change must be above 0")
    generator = demo.load_generator() if args.generator is None else checkpoints.load_generator(args.generator)
    config = generator.config
    method: Method = args.method or ("supervised" if args.scores else "ganspace")
    layers = parse_layers(args.layers, config.num_ws)
    folder = files.output_folder(args.output_path)
    styles = directions.sample_styles(config, generator.params, key=jax.random.key(args.seed), samples=args.samples)
    found = find(args, method, layers, generator, styles)
    name = args.name or (args.scores.stem if args.scores else method)
    params = load_lpips("alex")
    ws = styles_of(generator, list(range(args.images)), args.truncation_psi)
    rows = []
    for i, (vector, value) in enumerate(tqdm.tqdm(list(zip(*found, strict=True)), unit="direction")):
        title = name if len(found.values) == 1 else f"{name}_{i:02d}"
        way = directions.spread_over(vector, config, layers)
        strength = typical_strength(generator, params, ws, way, args.typical_change)
        notes = {
            "name": title,
            "method": method,
            "layers": args.layers or f"0-{config.num_ws - 1}",
            "value": float(value),
            "typical_strength": round(strength, 2),
            "generator": args.generator.name if args.generator else "demo",
            "source": str(generator.manifest.get("source", {}).get("sha256"))[:16],
            "samples": args.samples,
            "seed": args.seed,
        }
        checkpoints.write_safetensors(
            folder / f"{title}.safetensors", {"direction": way}, {key: json.dumps(note) for key, note in notes.items()}
        )
        strengths = [strength * step for step in (-2, -1, 0, 1, 2)]
        rows.append((f"{title}", strengths, np.stack([draw(generator, ws + s * way) for s in strengths])))
    images.save_png(folder / "sheet.png", sheet(rows))
    print(f"{len(rows)} directions in {folder}: {rows[0][0]}.safetensors, …, sheet.png")


if __name__ == "__main__":
    cli.run(Arguments, main)
