"""Finds edit directions of a generator.

    python experiments/find_directions.py --output_path directions                    # GANSpace, the demo's generator
    python experiments/find_directions.py --generator converted/ --method sefa --layers 0-5 --output_path directions
    python experiments/find_directions.py --generator converted/ --scores smiles.csv --output_path directions
    python experiments/find_directions.py --generator converted/ --scorer score.py:smile --output_path directions

`ganspace` takes principal components of the generator's styles, `sefa` what its weights respond to most; neither
needs labels, and both find other things in another range of layers. `supervised` takes scores of images: from a CSV
file with the columns seed and score, seeds being those of generate.py, or from a Python function of yours, images uint8
[N, R, R, 3] to N numbers. Scores of 0 and 1 only are classes. OUTPUT_PATH gets a file for each direction, which
`invert.py --edits_folder OUTPUT_PATH` applies, and NAME.png: what each does to three images, at five strengths.

A strength of 1 is one standard deviation of the generator's own styles along a direction. The typical strength noted
in each file, and the end of the sheet, is that at which images have changed by as much as --typical_change says.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
Scorer = Callable[[np.ndarray], Any]
TRIED = (0.5, 1.0, 2.0, 4.0, 8.0)  # strengths between which the typical one is found
SHEET = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of the typical strength


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path
    """Folder for the directions."""
    generator: Path | None = None
    """A converted generator; none: the demo's."""
    method: Method | None = None
    """How; none: supervised with --scores or --scorer, otherwise ganspace."""
    layers: str | None = None
    """The styles that a direction acts on, such as 0-5 (coarse ones first); none: all."""
    count: int = 8
    """How many, for ganspace and sefa."""
    scores: Path | None = None
    """For supervised: a CSV file with columns seed and score."""
    scorer: str | None = None
    """For supervised: FILE.py:NAME, a function that scores images; the file is run."""
    scored: int = 500
    """Images that the scorer is given."""
    name: str | None = None
    """Of the files; none: the method, or the name of the scores' file or of the scorer."""
    samples: int = 20_000
    """Mapped z, for the spread of the styles."""
    images: int = 3
    """Images on the sheet."""
    truncation_psi: float = 0.7
    """Of the images on the sheet."""
    typical_change: float = 0.1
    """LPIPS between images before and after a typical edit."""
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


def load_scorer(text: str) -> Scorer:
    """The function that `FILE.py:NAME` names.

    Raises:
      UserError: no such file or function, or the file cannot be run.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise UserError(f"--scorer {text[:80]!r}: give FILE.py:NAME, a function in a Python file")
    if not Path(file).is_file():
        raise UserError(f"--scorer: there is no file {file}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's own program
        raise UserError(f"--scorer: {file} stops with {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"--scorer: {file} has no function {name[:40]!r}")
    return found


def score(scorer: Scorer, generator: LoadedGenerator, ws: np.ndarray, at_once: int = 16) -> np.ndarray:
    """Scores [N] of the images of ws [N, num_ws, w_dim].

    Raises:
      UserError: the scorer fails, or gives something else than a number an image.
    """
    scores = []
    for first in tqdm.trange(0, len(ws), at_once, unit="batch", desc="scores"):
        made = images.to_uint8(draw(generator, ws[first : first + at_once]))
        try:
            given = np.asarray(scorer(made), np.float64).reshape(-1)
        except Exception as error:  # it is the user's own program
            raise UserError(f"--scorer stops with {type(error).__name__}: {error}") from error
        if given.shape != (len(made),):
            raise UserError(f"--scorer gave {given.size} numbers for {len(made)} images {made.shape}: one each")
        scores.append(given)
    return np.concatenate(scores)


def samples(args: Arguments, generator: LoadedGenerator) -> tuple[np.ndarray, np.ndarray]:
    """Styles [N, w_dim] and their scores [N].

    Raises:
      UserError: neither a file of scores nor a scorer, both, or one that does not work.
    """
    if (args.scores is None) == (args.scorer is None):
        raise UserError("--method supervised takes --scores, a CSV file with seed and score, or --scorer FILE.py:NAME")
    if args.scores is not None:
        seeds, scores = read_scores(args.scores)
        return styles_of(generator, seeds)[:, 0], scores
    assert args.scorer is not None
    scorer = load_scorer(args.scorer)
    ws = styles_of(generator, range(args.scored))
    return ws[:, 0], score(scorer, generator, ws)


def find(
    args: Arguments, method: Method, layers: tuple[int, int] | None, generator: LoadedGenerator, styles: Styles
) -> Directions:
    """The directions that the arguments ask for.

    Raises:
      UserError: scores that are missing or that give no direction.
    """
    if method == "ganspace":
        return directions.ganspace(styles, count=args.count)
    if method == "sefa":
        return directions.sefa(generator.config, generator.params, styles, layers=layers, count=args.count)
    ws, scores = samples(args, generator)
    fit = directions.boundary if np.isin(scores, (0, 1)).all() else directions.regression
    try:
        return fit(ws, scores, styles)
    except ValueError as error:
        raise UserError(f"scores: {error}") from error


def styles_of(generator: LoadedGenerator, seeds: Sequence[int], psi: float = 1.0) -> np.ndarray:
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


class Row(NamedTuple):
    """Of the sheet: a direction's name, its strengths, and images [strengths, N, R, R, 3]."""

    name: str
    strengths: list[float]
    images: np.ndarray


def sheet(rows: list[Row], side: int = 128) -> np.ndarray:
    """What each direction does to each of N images; uint8 [h, w, 3]."""
    strengths, count = rows[0].images.shape[:2]
    label, gap, head, seam = 170, 14, 26, 3
    block = strengths * (side + seam) + gap
    page = Sheet(label + count * block + gap, len(rows) * (side + head) + gap)
    for i, row in enumerate(rows):
        top = gap + i * (side + head)
        page.text(gap, top + side / 2 - 8, row.name, 16, width=label - 2 * gap, strong=True)
        for k, strength in enumerate(row.strengths):
            text = f"{strength:+.1f}" if strength else "0"
            for n in range(count):
                left = label + n * block + k * (side + seam)
                page.image(left, top, resize(images.to_uint8(row.images[k, n]), side, side))
                page.text(left + side / 2, top + side + 2, text, 12, align="centre")
    return page.array()


def check(args: Arguments) -> None:
    """Raises a `UserError` for numbers out of range."""
    for flag, least in {"count": 1, "samples": 2, "images": 1, "scored": 1}.items():
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} must be at least {least}, not {getattr(args, flag)}")
    if not args.typical_change > 0:
        raise UserError("--typical_change must be above 0")


def main(args: Arguments) -> None:
    check(args)
    generator = demo.load_generator() if args.generator is None else checkpoints.load_generator(args.generator)
    config = generator.config
    method: Method = args.method or ("supervised" if args.scores or args.scorer else "ganspace")
    layers = parse_layers(args.layers, config.num_ws)
    folder = files.output_folder(args.output_path)
    styles = directions.sample_styles(config, generator.params, key=jax.random.key(args.seed), samples=args.samples)
    found = find(args, method, layers, generator, styles)
    given = args.scores.stem if args.scores else args.scorer.rpartition(":")[2] if args.scorer else method
    name = args.name or given
    notes = {
        "method": method,
        "layers": args.layers or f"0-{config.num_ws - 1}",
        "generator": args.generator.name if args.generator else "demo",
        "source": str(generator.manifest.get("source", {}).get("sha256"))[:16],
        "samples": args.samples,
        "seed": args.seed,
    }
    params = load_lpips("alex")
    ws = styles_of(generator, range(args.images), args.truncation_psi)
    rows = []
    for i, (vector, value) in enumerate(tqdm.tqdm(list(zip(*found, strict=True)), unit="direction")):
        title = name if len(found.values) == 1 else f"{name}_{i:02d}"
        way = directions.spread_over(vector, config, layers)
        typical = typical_strength(generator, params, ws, way, args.typical_change)
        own = {"name": title, "value": float(value), "typical_strength": round(typical, 2)}
        metadata = {key: json.dumps(note) for key, note in (own | notes).items()}
        checkpoints.write_safetensors(folder / f"{title}.safetensors", {"direction": way}, metadata)
        strengths = [typical * step for step in SHEET]
        rows.append(Row(title, strengths, np.stack([draw(generator, ws + s * way) for s in strengths])))
    images.save_png(folder / f"{name}.png", sheet(rows))
    listed = f"{rows[0].name}.safetensors" + (f" to {rows[-1].name}.safetensors" if len(rows) > 1 else "")
    print(f"{folder}: {listed}; {name}.png shows them")


if __name__ == "__main__":
    cli.run(Arguments, main)
