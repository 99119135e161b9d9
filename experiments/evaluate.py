"""Compares SAM with inversion in each single layer, over many images.

    python experiments/evaluate.py --single_layers --steps 0                   # 32 held-out hard scenes of the demo
    python experiments/evaluate.py --images DIR --gan_weights converted/
    python experiments/evaluate.py --images DIR --image_category cars          # after `python -m ckpt_convert get cars`

Prints a Markdown table of PSNR, SSIM, LPIPS (VGG), seconds, and how much of an edit remains: the change of color that
it makes (for the demo inside the true car segment), relative to the inversion in W+. Writes the table, and the results
of every image, to OUTPUT_PATH. Finished images are kept: the same command continues where it was stopped. If error maps
are predicted rather than measured, which is the default of all categories, only --single_layers adds the inversions in
single layers.

The first command takes a quarter of an hour on two CPU cores: W+ reaches LPIPS 0.274, F10 0.087 without following
edits, and SAM 0.131 with 105% of W+'s edit.

Several --thresholds give a row of SAM each. To choose one, use other scenes (--scene_seed 2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax

from ckpt_convert import get
from samjax import cli, evaluation
from samjax.config import Options
from samjax.errors import UserError, check_seed
from samjax.io import files


@dataclasses.dataclass(frozen=True)
class Arguments(Options):
    images: Path | None = None
    """A directory of images, each with or without a label image NAME_segments.png beside it. Default: hard scenes of
    the demo."""
    output_path: Path = Path("output/evaluation")
    """Directory of the table and of the results of each image."""
    scenes: int = 32
    """Number of hard scenes."""
    scene_seed: int = 1
    """Seed of the hard scenes: seed 1 is held out; the demo's threshold was chosen on seed 2."""
    thresholds: tuple[float, ...] = ()
    """Mean errors up to which a segment may use a layer; the table has one row for each. Default: the value of
    --threshold."""
    steps: tuple[int, ...] = ()
    """Other numbers of steps; the table has a row of SAM for each. 0 is the start alone."""
    single_layers: bool = False
    """Also inverts in each layer alone if error maps are predicted."""
    edit: str | None = None
    """The direction whose effect is measured: the name of one in edits_folder, or a file. Default: the demo's
    blue_car."""
    edit_strength: float = 2.0
    """Multiple of that direction."""


def check(args: Arguments) -> None:
    """Raises a `UserError` for numbers that cannot be used."""
    check_seed(args.scene_seed, "--scene_seed")
    if any(steps < 0 for steps in args.steps):
        raise UserError(f"--steps takes numbers of at least 0, not {' '.join(map(str, args.steps))}")
    for flag, values in {"thresholds": args.thresholds, "edit_strength": (args.edit_strength,)}.items():
        if not all(map(math.isfinite, values)):
            raise UserError(f"--{flag} takes finite numbers, not {' '.join(map(str, values))}")


def main(args: Arguments) -> None:
    check(args)
    examples = evaluation.load_examples(args, args.images, args.scenes, args.scene_seed)
    given = args.images is None
    sam = evaluation.load(get.prepare(args, segmenter=not given), segments_given=given)
    direction = evaluation.load_direction(sam, args.edit)
    thresholds = args.thresholds or (sam.category.threshold,)
    folder = cli.output_directory(args.output_path)

    evaluate = functools.partial(
        evaluation.evaluate, sam, thresholds=thresholds, steps=args.steps, single_layers=args.single_layers,
        direction=direction, strength=args.edit_strength,
    )  # fmt: skip
    choices = (thresholds, args.steps, args.single_layers, direction, args.edit_strength)
    settings = evaluation.fingerprint(sam, *choices)
    rows = evaluation.run(examples, evaluate, folder, settings, evaluation.read_rows)

    final = f", the last {sam.config.final_steps} with LPIPS-vgg" if sam.config.final_steps else ""
    usual = "squared error" if sam.config.lpips_type == "none" else f"LPIPS-{sam.config.lpips_type}"
    steps = f"{sam.config.num_opt_steps} steps at {sam.config.lr:g} with {usual}{final}"
    shown = ", ".join(f"{threshold:g}" for threshold in thresholds)
    caption = evaluation.caption(args.images, len(rows), f"{steps}, threshold {shown}")
    text = evaluation.table(rows, caption)
    files.write_text(folder / "table.md", text)
    files.write_json(
        folder / "table.json",
        {"mean": evaluation.means(rows), "images": rows, "config": sam.config, "thresholds": thresholds,
         "device": jax.devices()[0].device_kind},
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    cli.run(Arguments, main)
