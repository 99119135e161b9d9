"""Compares samjax with the authors' PyTorch code, stage by stage, on the same weights, image and noise.

    git clone --recurse-submodules https://github.com/adobe-research/sam_inversion
    git clone https://github.com/facebookresearch/detectron2       # for cats: beside it, or installed
    pip install -e '.[compare]'
    python experiments/parity/compare_pytorch.py --reference sam_inversion --weights DIR --image_path car.png \
        --image_category cars

Their script runs first, in a process of its own (`reference_sam.py`), then samjax. Each of our stages starts from their
results of the stages before it, so that a difference shows where it arises. Both run on the CPU in float32, with the
generator's stored noise: the authors draw new noise at every step, which cannot be compared.

Prints a table in Markdown; --output_path keeps it, with images of both sides. Exit codes: 0 if every stage is within
its tolerance, 1 if a stage is not, 2 for bad input.
Their loaders execute code from weight files: use files that you trust.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import stages
from reference_job import NETS, Job
from stages import Ours, Row, Theirs

from ckpt_convert import get
from samjax import Pipeline, cli, runtime
from samjax.config import InversionConfig, Options
from samjax.errors import UserError
from samjax.io import directions, files, images, registry, weights
from samjax.latents import LATENT_NAMES

REFERENCE_SAM = Path(__file__).with_name("reference_sam.py")

PACKAGES = ("torch", "torchvision", "lpips", "matplotlib", "yacs", "click")
DETECTRON2_PACKAGES = (
    "fvcore", "iopath", "omegaconf", "pycocotools", "cloudpickle", "tabulate", "termcolor", "packaging"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    reference: Path
    """A checkout of adobe-research/sam_inversion, with its submodules."""
    image_path: Path
    """The image; it is fitted to the category's size, and both sides get the same pixels."""
    image_category: Literal["cars", "faces", "cats"]
    weights: Path | None = None
    """A directory with the category's files under the names their authors gave them. Default: the files fetched by
    `python -m ckpt_convert get`."""
    detectron2: Path | None = None
    """A checkout of detectron2, for cats. Default: the installed one, or one beside the reference."""
    fit: Literal["stretch", "letterbox", "crop"] = "stretch"
    """How an image of another aspect ratio is fitted to the category's size."""
    threshold: float | Literal["auto"] | None = None
    """Mean error up to which a segment may use a layer; "auto" shares the image evenly among the layers. Default: the
    category's."""
    edit: str | None = None
    """Name of a direction of the category. Default: the first."""
    steps: int = 5
    """Number of optimization steps: the first steps of a run of 1001, the authors' default."""
    seed: int = 0
    """Seed of the samples from which their code computes its prior."""
    output_path: Path | None = None
    """Directory for the table and images of both sides. Default: nothing is written."""


# --- what the comparison needs ---


def check(args: Arguments) -> Path | None:
    """Checks the arguments, the checkouts and the installed packages.

    Returns:
      The checkout of detectron2, if one is needed and detectron2 is not installed.

    Raises:
      UserError: arguments that cannot be used, or something is missing.
    """
    if args.steps < 2:
        raise UserError("--steps must be at least 2: the first compiles")
    if args.threshold not in (None, "auto") and not math.isfinite(float(args.threshold or 0)):
        raise UserError(f"--threshold must be a number, or auto, not {args.threshold}")
    source = args.reference / "src"
    if not (source / "sam_inv_optimization.py").is_file():
        raise UserError(f"--reference: {args.reference} is not a checkout of adobe-research/sam_inversion")
    absent = [name for name in NETS if not any((source / "nets" / name).glob("*.*"))]
    if absent:
        raise UserError(
            f"--reference: {args.reference} lacks the submodules {', '.join(absent)}: "
            "run `git submodule update --init` in it"
        )
    cats = args.image_category == "cats"
    packages = [name for name in PACKAGES + DETECTRON2_PACKAGES * cats if importlib.util.find_spec(name) is None]
    if packages:
        raise UserError(f"the authors' code needs {', '.join(packages)}: pip install -e '.[compare]'")
    if not cats or (args.detectron2 is None and importlib.util.find_spec("detectron2") is not None):
        return None
    path = args.detectron2 or args.reference.resolve().parent / "detectron2"
    if not (path / "detectron2" / "__init__.py").is_file():
        raise UserError(
            f"{path} is not a checkout of detectron2, which the authors' code needs for cats: "
            "clone facebookresearch/detectron2 and give --detectron2"
        )
    return path.resolve()


def find_files(args: Arguments) -> tuple[dict[str, str], Path]:
    """The paths of the category's files by name, and the path of the direction.

    Raises:
      UserError: files are missing, or there is no such direction.
    """
    category = args.image_category
    places = [*([args.weights] if args.weights else []), registry.cache_folder() / "downloads"]
    wanted = [file for file in registry.CATEGORY_FILES[category] if file.role != "edits"]
    found = {file: registry.find(file, category, places) for file in wanted}
    if absent := [file for file, path in found.items() if path is None]:
        raise registry.missing(category, absent)
    edits = registry.find_edits(category, args.weights)
    if edits is None:
        raise registry.missing(category, [f for f in registry.CATEGORY_FILES[category] if f.role == "edits"][:1])
    known = sorted(edits.glob("*.npy"))
    chosen = [path for path in known if args.edit in (None, path.stem, path.name)]
    if not chosen:
        raise UserError(f"--edit: no {args.edit} among {', '.join(path.stem for path in known)}")
    return {file.name: str(path.resolve()) for file, path in found.items() if path}, chosen[0]


def vgg16(path: Path) -> Path:
    """Writes the VGG16 of LPIPS in the layout that `Job.vgg` describes."""
    arrays = {}
    for name, layer in weights.load_lpips("vgg")["backbone"].items():
        arrays[f"{name}.weight"] = np.asarray(layer["weight"]).transpose(3, 2, 0, 1)
        arrays[f"{name}.bias"] = np.asarray(layer["bias"])
    np.savez(path, **arrays)
    return path


def first_steps(count: int) -> InversionConfig:
    """The settings with which `count` steps are the first steps of the authors' default run, before its rate falls.

    At the highest rate from the start, rounding would within a few steps grow into another trajectory.
    """
    full = InversionConfig(noise="const")
    if count > (1 - full.lr_rampdown_length) * full.num_opt_steps:
        return dataclasses.replace(full, num_opt_steps=count)
    rise = full.lr_rampup_length * full.num_opt_steps / count
    return dataclasses.replace(full, num_opt_steps=count, lr_rampup_length=rise, lr_rampdown_length=0.5 / count)


# --- both sides ---


def run_theirs(job: Job) -> Theirs:
    """Runs the authors' script in a process of its own.

    Raises:
      UserError: it failed; the details are the last lines of its output.
    """
    folder = Path(job.folder)
    (folder / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    command = [sys.executable, str(REFERENCE_SAM), str(folder / "job.json")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        killed = ", killed: out of memory?" if done.returncode < 0 else ""
        raise UserError(
            f"the authors' code ended with code {done.returncode}{killed}; its last lines:",
            done.stdout.strip().splitlines()[-8:],
        )
    with np.load(folder / "output.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return Theirs(arrays, json.loads((folder / "seconds.json").read_text()))


def compare(args: Arguments, folder: Path, detectron2: Path | None) -> tuple[Theirs, Sequence[Row]]:
    """Runs both sides; `folder` holds what passes between the processes."""
    paths, direction_path = find_files(args)
    # The authors give Mask R-CNN red for blue.
    options = Options(
        image_category=args.image_category, weights=args.weights, fit=args.fit, swap_channels=True, generate_edits=False
    )
    sam = Pipeline.from_options(get.prepare(options, notify=notify), notify=notify)
    height, width = sam.category.target_size
    image = images.fit(images.read_image(args.image_path), height, width, args.fit)
    images.save_png(folder / "image.png", images.to_float(image))
    direction = directions.read_one(direction_path, *sam.layers_shape)
    threshold = sam.category.threshold if args.threshold is None else args.threshold
    settings = first_steps(args.steps)
    notify("running the authors' code")
    theirs = run_theirs(
        Job(
            reference=str(args.reference.resolve()),
            detectron2=str(detectron2) if detectron2 else None,
            category=args.image_category,
            weights=paths,
            vgg=str(vgg16(folder / "vgg.npz")),
            image=str(folder / "image.png"),
            height=height,
            width=width,
            direction=str(direction_path.resolve()),
            threshold=None if threshold == "auto" else float(threshold),
            steps=settings.num_opt_steps,
            lr_rampup_length=settings.lr_rampup_length,
            lr_rampdown_length=settings.lr_rampdown_length,
            threads=runtime.threads(),
            seed=args.seed,
            folder=str(folder),
        )
    )
    ours, rows = Ours(sam, theirs), []
    for row in ours.rows(image, direction, settings):
        rows.append(row)
        notify(f"{row.stage}: {'pass' if row.passed else 'fail'}")
    if args.output_path is not None:
        for name, figure in stages.figures(theirs.arrays, ours.made).items():
            images.save_png(args.output_path / f"{name}.png", figure)
    return theirs, rows


def caption(args: Arguments, theirs: Theirs) -> str:
    """The line above the table."""
    chosen = np.bincount(theirs.arrays["layer_map"].ravel(), minlength=len(LATENT_NAMES))
    percent = 100 * chosen / chosen.sum()
    shares = ", ".join(
        f"{name} {f'{x:.0f}' if x >= 1 else '<1'}%" for name, x in zip(LATENT_NAMES, percent, strict=True) if x
    )
    count = len(np.unique(theirs.arrays["segments"]))
    return (
        f"{args.image_category}: {count} segments, threshold {float(theirs.arrays['threshold']):.4g}, layers {shares}. "
        f"Both on the CPU ({runtime.threads()} threads), float32, the generator's stored noise."
    )


def notify(line: str) -> None:
    """Prints a line on standard error."""
    print(line, file=sys.stderr, flush=True)


def main(args: Arguments) -> None:
    jax.config.update("jax_platforms", "cpu")
    detectron2 = check(args)
    if args.output_path is not None:
        files.output_directory(args.output_path)
    with tempfile.TemporaryDirectory() as name:
        theirs, rows = compare(args, Path(name).resolve(), detectron2)
    text = "\n".join((caption(args, theirs), "", *stages.table(rows)))
    print(text)
    if args.output_path is not None:
        files.write_text(args.output_path / "comparison.md", text + "\n")
    if not all(row.passed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(Arguments, main)
