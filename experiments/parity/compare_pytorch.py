"""Compares samjax with the authors' PyTorch code, stage by stage, on the same weights, image and noise.

    git clone --recurse-submodules https://github.com/adobe-research/sam_inversion
    git clone https://github.com/facebookresearch/detectron2       # beside it, for cats; or installed
    pip install -e '.[compare]'
    python experiments/compare_pytorch.py --reference sam_inversion --weights DIR --image_path car.png \
        --image_category cars

Their script runs first, in a process of its own (see `reference_sam.py`), then samjax. Every stage of ours starts from
what theirs made in the stages before it, so that an error shows where it arises. Both run on the CPU in float32, with
the generator's stored noise: the authors draw new noise at every step, which cannot be compared.

Prints a table in Markdown; with --output_path it is kept, and with it pictures of both sides. Exit codes: 0 if every
stage is within its tolerance, 1 if one is not, 2 for bad input.
Their loaders execute code that files of weights carry: give it files that you trust.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import benchmark
import cli
import jax
import jax.numpy as jnp
import networks
import numpy as np
import reference_sam
from numpy.typing import ArrayLike

from ckpt_convert import get
from samjax import api, editing, inversion, latents, losses, maps, segmentation
from samjax.config import CATEGORIES, LATENT_NAMES, InversionConfig
from samjax.errors import UserError
from samjax.io import files, images, registry, report, sheets, training_report, weights
from samjax.nets import stylegan2

T = TypeVar("T")

PACKAGES = ("torch", "torchvision", "lpips", "matplotlib", "yacs", "click")
DETECTRON2_PACKAGES = (
    "fvcore", "iopath", "omegaconf", "pycocotools", "cloudpickle", "tabulate", "termcolor", "packaging"
)  # fmt: skip
STRENGTHS = (0.0, 1.0, 2.0, 3.0)
"""Multiples of the edit direction, those of the authors' script."""


class Tolerance(NamedTuple):
    """How far a stage may be from theirs, and in what that is counted."""

    limit: float
    unit: str


SPREAD, PIXELS = "of the spread", "of the pixels"

TOLERANCES: Mapping[str, Tolerance] = {
    "target image": Tolerance(1e-6, "absolute"),
    # Sums of float32 products in another order: some 1e-6 in networks of a hundred layers.
    "encoder code": Tolerance(1e-4, SPREAD),
    "error maps": Tolerance(1e-4, SPREAD),
    # Rounding decides where two classes are equally likely, and which of two like instances comes first.
    "segments": Tolerance(1e-3, PIXELS),
    "segments (instances)": Tolerance(1e-2, PIXELS),
    "layer map": Tolerance(1e-3, PIXELS),
    "masks": Tolerance(1e-6, "absolute"),
    "prior: mean": Tolerance(1e-4, SPREAD),
    # The inverse magnifies rounding in the directions in which styles vary least; it enters as a term of the loss.
    "prior: inverse covariance": Tolerance(1e-3, SPREAD),
    "first image": Tolerance(1e-4, SPREAD),
    # Adam divides each gradient by its own size: where it is all but zero, rounding decides which way an entry goes,
    # and courses part. On weights filled by rule, ten steps of their own code with one thread and with two were 1e-3
    # apart in a term and 9e-3 in the image.
    "losses of every step": Tolerance(1e-3, "relative"),
    "image after the steps": Tolerance(1e-2, SPREAD),
    "edit": Tolerance(1e-4, SPREAD),
}
"""By stage, in the table's order."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    reference: Path
    """A checkout of adobe-research/sam_inversion, with its submodules."""
    image_path: Path
    """Is fitted to the category's size; both sides get the same pixels."""
    image_category: Literal["cars", "faces", "cats"]
    weights: Path | None = None
    """A folder with the category's files under their authors' names; none: those of `python -m ckpt_convert get`."""
    detectron2: Path | None = None
    """A checkout of detectron2, for cats; none: the installed one, or one beside the reference."""
    fit: Literal["stretch", "letterbox", "crop"] = "stretch"
    """How an image of another shape is brought to the category's size."""
    threshold: float | Literal["auto"] | None = None
    """Mean error up to which a segment may use a layer; auto: so that layers share the picture evenly; none: by
    category."""
    edit: str | None = None
    """Name of a direction of the category; none: the first."""
    steps: int = 5
    """Of the optimisation: the first ones of a run of 1001, the authors' default."""
    seed: int = 0
    """Of the samples from which their code takes its prior."""
    output_path: Path | None = None
    """Folder for the table and for pictures of both sides; none: nothing is written."""


# --- differences ---


def of_spread(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Largest difference, relative to the spread of theirs."""
    difference, spread = absolute(ours, theirs), float(np.ptp(np.asarray(theirs, np.float64)))
    return difference / spread if spread else math.inf if difference else difference


def each_of_spread(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest of `of_spread` along the leading axis."""
    return max(of_spread(x, y) for x, y in zip(ours, theirs, strict=True))


def absolute(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Largest difference; infinite for arrays of another shape, NaN where there is one."""
    x, y = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.max(np.abs(x - y))) if x.shape == y.shape else math.inf


def relative(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Largest difference of two numbers, relative to the one of theirs; where that is 0, ours must be."""
    x, y = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if x.shape != y.shape:
        return math.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(x == y, 0.0, np.abs(x - y) / np.abs(y))))


def of_pixels(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Share of pixels with another label."""
    return float(np.mean(np.asarray(ours) != np.asarray(theirs))) if np.shape(ours) == np.shape(theirs) else math.inf


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; seconds without compilation, which is apart."""

    stage: str
    difference: float
    tolerance: Tolerance
    theirs: float
    ours: float
    compilation: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance.limit  # not so for NaN


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The rows in Markdown."""
    yield "| stage | largest difference | tolerance | verdict | theirs, s | ours, s | compilation, s |"
    yield "|---|--:|--:|---|--:|--:|--:|"
    for row in rows:
        cells = [
            row.stage,
            f"{row.difference:.1e} {row.tolerance.unit}",
            f"{row.tolerance.limit:.0e}",
            "pass" if row.passed else "**fail**",
            *("" if math.isnan(x) else f"{x:.2f}" for x in (row.theirs, row.ours, row.compilation)),
        ]
        yield "| " + " | ".join(cells) + " |"


# --- their side ---


class Theirs(NamedTuple):
    """What their script gave: arrays in our layout (see `reference_sam`), and the seconds of its stages."""

    arrays: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]

    def masks(self) -> dict[str, Any]:
        return {name: self.arrays[f"mask_{name}"][None] for name in LATENT_NAMES[1:]}

    def latents(self) -> dict[str, Any]:
        return {name: self.arrays[f"latent_{name}"][None] for name in LATENT_NAMES}


def check(args: Arguments) -> Path | None:
    """The checkout of detectron2, where one is needed and it is not installed.

    Raises:
      UserError: arguments that cannot be meant; something is missing.
    """
    if args.steps < 2:
        raise UserError("--steps must be at least 2: the first compiles")
    if args.threshold not in (None, "auto") and not math.isfinite(float(args.threshold or 0)):
        raise UserError(f"--threshold must be a number, or auto, not {args.threshold}")
    source = args.reference / "src"
    if not (source / "sam_inv_optimization.py").is_file():
        raise UserError(f"--reference: {args.reference} is no checkout of adobe-research/sam_inversion")
    absent = [name for name in reference_sam.NETS if not any((source / "nets" / name).glob("*.*"))]
    if absent:
        raise UserError(
            f"--reference: {args.reference} lacks the submodules {', '.join(absent)}: "
            "run `git submodule update --init` in it"
        )
    cats = args.image_category == "cats"
    packages = [name for name in PACKAGES + DETECTRON2_PACKAGES * cats if importlib.util.find_spec(name) is None]
    if packages:
        raise UserError(f"the authors' code needs {', '.join(packages)}: pip install -e '.[compare]'")
    return find_detectron2(args) if cats else None


def find_detectron2(args: Arguments) -> Path | None:
    """`--detectron2`, or one beside the reference; None where it is installed."""
    if args.detectron2 is None and importlib.util.find_spec("detectron2") is not None:
        return None
    path = args.detectron2 or args.reference.resolve().parent / "detectron2"
    if not (path / "detectron2" / "__init__.py").is_file():
        raise UserError(
            f"{path} is no checkout of detectron2, which the authors' code needs for cats: "
            "clone facebookresearch/detectron2 and give --detectron2"
        )
    return path.resolve()


def files_of(args: Arguments) -> tuple[dict[str, str], Path]:
    """Paths of the category's files by name, and that of the direction.

    Raises:
      UserError: files are missing, or there is no such direction.
    """
    category = args.image_category
    folders = [*([args.weights] if args.weights else []), registry.cache_folder() / "downloads"]
    wanted = [file for file in registry.CATEGORY_FILES[category] if file.role != "edits"]
    found = {file: registry.find(file, category, folders) for file in wanted}
    if absent := [file for file, path in found.items() if path is None]:
        raise registry.missing(category, absent)
    edits = get.edits_folder(category, args.weights)
    directions = sorted(edits.glob("*.npy")) if edits else []
    chosen = [path for path in directions if args.edit in (None, path.stem, path.name)]
    if not chosen:
        edits_wanted = [file for file in registry.CATEGORY_FILES[category] if file.role == "edits"]
        if directions:
            raise UserError(f"--edit: no {args.edit} among {', '.join(path.stem for path in directions)}")
        raise registry.missing(category, edits_wanted[:1])
    return {file.name: str(path.resolve()) for file, path in found.items() if path}, chosen[0]


def run_theirs(job: reference_sam.Job) -> Theirs:
    """Runs their script in a process of its own.

    Raises:
      UserError: it failed; with the last of what it said.
    """
    folder = Path(job.folder)
    (folder / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    command = [sys.executable, str(Path(reference_sam.__file__)), str(folder / "job.json")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        killed = ", killed: out of memory?" if done.returncode < 0 else ""
        raise UserError(
            f"the authors' code ended with code {done.returncode}{killed}; it said last:",
            done.stdout.strip().splitlines()[-8:],
        )
    with np.load(folder / "output.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return Theirs(arrays, json.loads((folder / "seconds.json").read_text()))


def vgg16(path: Path) -> Path:
    """Writes LPIPS's VGG16 as `reference_sam.Job.vgg` says."""
    arrays = {}
    for name, layer in weights.load_lpips("vgg")["backbone"].items():
        arrays[f"{name}.weight"] = np.asarray(layer["weight"]).transpose(3, 2, 0, 1)
        arrays[f"{name}.bias"] = np.asarray(layer["bias"])
    np.savez(path, **arrays)
    return path


# --- our side, stage by stage ---


class Ours:
    """Compares one stage after the other; `row` times what it is given twice, as the first time compiles.

    Attributes:
      made: what the stages gave, by the keys of their seconds.
    """

    def __init__(self, nets: networks.Networks, theirs: Theirs) -> None:
        self.nets, self.theirs = nets, theirs
        self.made: dict[str, Any] = {}
        self.config, self.params, _ = nets.generator
        self.target = theirs.arrays["image"]
        self.layers = latents.latent_layers(self.config)
        self.start: dict[str, Any] = {
            layer.name: np.zeros((1, *layer.shape), np.float32) if layer.resolution else theirs.arrays["code"][None]
            for layer in self.layers
        }

    def row(
        self, stage: str, seconds_of: str, make: Callable[[], T], compare: Callable[[T], float], name: str = ""
    ) -> Row:
        """A stage's row: `make` is ours, `compare` its difference from theirs, `seconds_of` their stage's key."""
        began = time.perf_counter()
        made = make()
        once = time.perf_counter() - began
        jax.block_until_ready(make())
        again = time.perf_counter() - began - once
        self.made[seconds_of] = made
        theirs = self.theirs.seconds.get(seconds_of, math.nan)
        return Row(name or stage, compare(made), TOLERANCES[stage], theirs, again, max(once - again, 0.0))

    def rows(self, picture: np.ndarray, direction: np.ndarray, settings: InversionConfig) -> Iterator[Row]:
        """Every stage.

        Args:
          picture: [h, w, 3] uint8, as their code got it.
          direction: [num_ws, w_dim].
          settings: of the optimisation.
        """
        arrays, nets = self.theirs.arrays, self.nets
        yield self.row("target image", "", lambda: images.to_float(picture), lambda x: absolute(x, self.target))
        yield self.row(
            "encoder code", "code", lambda: networks.encode(nets, self.target), lambda x: of_spread(x, arrays["code"])
        )
        yield self.row(
            "error maps",
            "maps",
            lambda: networks.predicted_maps(nets, self.target, LATENT_NAMES),
            lambda x: each_of_spread(x, arrays["maps"]),
        )
        yield self.segments()
        yield self.row(
            "layer map",
            "layer_map",
            lambda: maps.assign_layers(arrays["maps"], arrays["segments"], float(arrays["threshold"])),
            lambda x: of_pixels(x.layer_maps[0], arrays["layer_map"]),
        )
        yield self.row(
            "masks",
            "masks",
            lambda: maps.soft_masks(arrays["layer_map"], self.layers),
            lambda x: max(absolute(x[name], arrays[f"mask_{name}"]) for name in LATENT_NAMES[1:]),
        )
        yield from self.prior()
        yield self.row("first image", "first", lambda: self.render(self.start), lambda x: of_spread(x, arrays["first"]))
        yield from self.optimisation(settings)
        yield self.edit(direction)

    def segments(self) -> Row:
        """By the category's network, for cats with its channels swapped as theirs are."""
        assert self.nets.segmenter is not None
        name = self.nets.category.segmenter
        made: Mapping[str, Callable[..., segmentation.Segmenter]] = {
            "ade20k": segmentation.ade20k,
            "bisenet": segmentation.face_parsing,
            "mask_rcnn": functools.partial(segmentation.instances, swap_channels=True),
        }
        config, variables, _ = self.nets.segmenter
        segmenter = made[name](variables, config)
        return self.row(
            "segments (instances)" if name == "mask_rcnn" else "segments",
            "segments",
            lambda: segmenter(self.target),
            lambda x: of_pixels(x, self.theirs.arrays["segments"]),
            name="segments",
        )

    def prior(self) -> Iterator[Row]:
        """The statistics of W+, from the samples that theirs took; the second row's seconds are in the first's."""
        arrays = self.theirs.arrays

        @jax.jit
        def styles(params: Any, z: jax.Array) -> jax.Array:
            with jax.default_matmul_precision("highest"):
                return stylegan2.map_z(self.config, params, z)[:, 0]

        roots: list[np.ndarray] = []

        def means(prior: losses.Prior) -> float:
            roots.append(np.asarray(prior.whitening, np.float64))
            return max(of_spread(getattr(prior, key), arrays[f"prior_{key}"]) for key in ("mean_w", "mean_v"))

        yield self.row(
            "prior: mean",
            "prior",
            lambda: losses.fit_prior(styles(self.params, jnp.asarray(arrays["z"]))),
            means,
        )
        stage, (root,) = "prior: inverse covariance", roots
        difference = of_spread(root @ root.T, arrays["prior_inv_cov_v"])
        yield Row(stage, difference, TOLERANCES[stage], math.nan, math.nan, math.nan)

    def render(self, chosen: Mapping[str, Any]) -> np.ndarray:
        return inversion.render(self.config, self.params, chosen, self.theirs.masks())[0]

    def optimisation(self, settings: InversionConfig) -> Iterator[Row]:
        """The terms of the loss at every step, and the image at the end; from their start, masks and prior."""
        arrays, steps = self.theirs.arrays, settings.num_opt_steps
        settings = dataclasses.replace(settings, loss_resolution=max(self.target.shape))
        root = np.linalg.cholesky(arrays["prior_inv_cov_v"])
        prior = losses.Prior(
            *(jnp.asarray(x, jnp.float32) for x in (arrays["prior_mean_w"], arrays["prior_mean_v"], root))
        )
        parts = inversion.Networks(self.params, weights.load_lpips("vgg"), prior)
        items = inversion.Items(self.target[None], self.theirs.masks(), self.start, np.zeros(1, np.int64))
        ticks = [time.perf_counter()]
        result = inversion.run(
            self.config, parts, items, settings, on_progress=lambda _: ticks.append(time.perf_counter())
        )
        step = (ticks[-1] - ticks[1]) / (steps - 1)
        weighted = theirs_weighted(arrays["terms"], settings)
        ours = np.stack([np.asarray(getattr(result.terms, name), np.float64)[:, 0] for name in weighted], axis=1)
        stage = "losses of every step"
        yield Row(
            f"losses of {steps} steps",
            relative(ours, np.stack(list(weighted.values()), axis=1)),
            TOLERANCES[stage],
            self.theirs.seconds["losses"],
            step * steps,
            max(ticks[1] - ticks[0] - step, 0.0),
        )
        yield self.row(
            "image after the steps",
            "final",
            lambda: self.render(result.latents),
            lambda x: of_spread(x, arrays["final"]),
            name=f"image after {steps} steps",
        )

    def edit(self, direction: np.ndarray) -> Row:
        """From their latents after the steps, at all their strengths; each image against its own spread."""
        start = {name: jnp.asarray(value) for name, value in self.theirs.latents().items()}
        return self.row(
            "edit",
            "edits",
            lambda: editing.edit(
                self.config, self.params, start, self.theirs.masks(), direction[None], STRENGTHS, batch_size=1
            )[0],
            lambda x: each_of_spread(x, self.theirs.arrays["edits"]),
            name=f"edit at {len(STRENGTHS)} strengths",
        )


def pictures(theirs: Mapping[str, np.ndarray], made: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their results over ours, by names for files; uint8 [H, W, 3] each.

    `images` has the target, the first image and the one after the steps; `maps` the error maps, dark for 0; `layers`
    the segments and the layer of each; `edits` an edit at all strengths.

    Args:
      theirs: `Theirs.arrays`.
      made: `Ours.made`, of all stages.
    """
    ours = {**made, "layer_map": made["layer_map"].layer_maps[0]}
    target, high = theirs["image"], float(np.max(theirs["maps"])) or 1.0
    palette = np.array([report.layer_colour(name) for name in LATENT_NAMES], np.uint8)

    def sized(made: ArrayLike) -> np.ndarray:
        return np.nan_to_num(api.comparable(made, target))

    def rows(side: Mapping[str, Any]) -> dict[str, np.ndarray]:
        segments = images.label_colours(int(np.max(side["segments"])) + 1)[side["segments"]]
        return {
            "images": np.concatenate([target[None], sized(np.stack([side["first"], side["final"]]))]),
            "maps": images.to_float(sheets.heat(side["maps"], high)),
            "layers": images.to_float(np.stack([segments, palette[side["layer_map"]]])),
            "edits": sized(side["edits"]),
        }

    pairs = zip(rows(theirs).items(), rows(ours).values(), strict=True)
    return {name: training_report.pairs_picture(x, y, ("PyTorch", "samjax"), height=192) for (name, x), y in pairs}


def first_steps(count: int) -> InversionConfig:
    """The settings by which `count` steps are the first of the authors' default run, before its rate falls.

    At the highest rate from the start, rounding would within a few steps grow into another course.
    """
    full = InversionConfig(noise="const")
    if count > (1 - full.lr_rampdown_length) * full.num_opt_steps:
        return dataclasses.replace(full, num_opt_steps=count)
    rise = full.lr_rampup_length * full.num_opt_steps / count
    return dataclasses.replace(full, num_opt_steps=count, lr_rampup_length=rise, lr_rampdown_length=0.5 / count)


def theirs_weighted(terms: np.ndarray, settings: InversionConfig) -> dict[str, np.ndarray]:
    """Their terms [steps, 5] times their weights, by the names of `inversion.Terms`, and the total."""
    found = {
        name: terms[:, i] * getattr(settings, f"lambda_{name}") for i, name in enumerate(reference_sam.TERMS)
    }  # fmt: skip
    return found | {"total": np.sum(list(found.values()), axis=0)}


# --- the program ---


def caption(args: Arguments, theirs: Theirs) -> str:
    """What was compared with what."""
    chosen = np.bincount(theirs.arrays["layer_map"].ravel(), minlength=len(LATENT_NAMES))
    percent = 100 * chosen / chosen.sum()
    shares = ", ".join(
        f"{name} {f'{x:.0f}' if x >= 1 else '<1'}%" for name, x in zip(LATENT_NAMES, percent, strict=True) if x
    )
    count = len(np.unique(theirs.arrays["segments"]))
    return (
        f"{args.image_category}: {count} segments, threshold {float(theirs.arrays['threshold']):.4g}, layers {shares}. "
        f"Both on the CPU ({benchmark.threads()} threads), float32, the generator's stored noise."
    )


def compare(args: Arguments, folder: Path, detectron2: Path | None) -> tuple[Theirs, Sequence[Row]]:
    """Runs both sides; `folder` is for what passes between the processes."""
    files, direction = files_of(args)
    category = CATEGORIES[args.image_category]
    height, width = category.target_size
    picture = images.fit(images.read_image(args.image_path), height, width, args.fit)
    nets = networks.load(networks.Flags(image_category=args.image_category, weights=args.weights))
    config = nets.generator.config
    change = editing.load_direction(direction, config.num_ws, config.w_dim)
    images.save_png(folder / "image.png", images.to_float(picture))
    threshold = category.threshold if args.threshold is None else args.threshold
    settings = first_steps(args.steps)
    tell("running the authors' code")
    theirs = run_theirs(
        reference_sam.Job(
            reference=str(args.reference.resolve()),
            detectron2=str(detectron2) if detectron2 else None,
            category=args.image_category,
            weights=files,
            vgg=str(vgg16(folder / "vgg.npz")),
            image=str(folder / "image.png"),
            height=height,
            width=width,
            direction=str(direction.resolve()),
            threshold=None if threshold == "auto" else float(threshold),
            steps=settings.num_opt_steps,
            lr_rampup_length=settings.lr_rampup_length,
            lr_rampdown_length=settings.lr_rampdown_length,
            threads=benchmark.threads(),
            seed=args.seed,
            folder=str(folder),
        )
    )
    ours, rows = Ours(nets, theirs), []
    for row in ours.rows(picture, change, settings):
        rows.append(row)
        tell(f"{row.stage}: {'pass' if row.passed else 'fail'}")
    if args.output_path is not None:
        for name, image in pictures(theirs.arrays, ours.made).items():
            images.save_png(args.output_path / f"{name}.png", image)
    return theirs, rows


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(args: Arguments) -> None:
    jax.config.update("jax_platforms", "cpu")
    detectron2 = check(args)
    if args.output_path is not None:
        files.output_folder(args.output_path)
    with tempfile.TemporaryDirectory() as name:
        theirs, rows = compare(args, Path(name).resolve(), detectron2)
    text = "\n".join((caption(args, theirs), "", *table(rows)))
    print(text)
    if args.output_path is not None:
        files.write_text(args.output_path / "comparison.md", text + "\n")
    if not all(row.passed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(Arguments, main)
