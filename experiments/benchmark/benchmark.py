"""Times an inversion step on this device, and compares it with the device's own convolutions.

    python experiments/benchmark/benchmark.py
    python experiments/benchmark/benchmark.py --resolutions 256 512 --batch_sizes 1 --reference STYLEGAN3 SAM_INVERSION

For config-f generators with random weights, all latent layers, LPIPS-VGG at 256 px and full float32, it prints:

- seconds per step, and the rate of its operations relative to that of an ordinary 3x3 convolution of 512 channels;
- the time of an image in each batch, relative to the first batch size;
- the parts of a step, with the time each would take at that rate, and at the rate at which the device copies memory.

With --reference, checkouts of NVlabs/stylegan3 and adobe-research/sam_inversion (and PyTorch), the authors' step is
timed too. Everything of one image size runs in turn, each in a process of its own, so that all see the same load. With
--demo, the demo is timed from the shell; with --quality 32, the cost in quality of `--preset fast` and of lower
precision is measured on as many held-out scenes.

The tables are Markdown; --output_path FILE.json keeps every figure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import demo_command
import numpy as np
import parts
import presets
import reference_step
from operations import Operations, markdown, step_operations
from steps import Convolution, OurStep
from workers import Worker, WorkerError

from samjax import cli, runtime
from samjax.config import Precision
from samjax.errors import UserError
from samjax.io import files
from samjax.nets.stylegan2 import StyleGAN2Config


@dataclasses.dataclass(frozen=True)
class Arguments:
    resolutions: tuple[int, ...] = (256, 512, 1024)
    """Image sizes of the generators, in pixels."""
    batch_sizes: tuple[int, ...] = (1, 4)
    """Images in one step."""
    steps: int = 3
    """Steps of the largest batch in one round. Smaller batches take more: processors slow down under sustained load."""
    rounds: int = 5
    """Number of rounds; the tables show medians over them."""
    reference: tuple[Path, Path] | None = None
    """Checkouts of NVlabs/stylegan3 and adobe-research/sam_inversion, to time the authors' step too."""
    channel_base: int = 32768
    """Channels of a layer times its size in pixels, up to channel_max."""
    channel_max: int = 512
    """Most channels of a layer."""
    demo: bool = False
    """Times the demo from the shell, and its sweep of thresholds."""
    quality: int = 0
    """Number of the demo's held-out hard scenes on which presets and precisions are compared: 32 take an hour and a
    half on two CPU cores."""
    quality_folder: Path = Path("output/benchmark_quality")
    """Directory that keeps finished scenes of the comparison, which are not repeated."""
    precision: Precision = "highest"
    """Precision of our steps; the authors' step is always float32."""
    output_path: Path | None = None
    """A JSON file for all figures."""


@dataclasses.dataclass
class Row:
    """One line of the table.

    Attributes:
      resolution: image size of the generator.
      batch_size: images in one step.
      operations: operations of one image's step.
      ours, convolution, reference: seconds per step in each round.
      peak_memory: peak memory of our step, in bytes.
      parts: the parts of a step of one image.
      failure: why there are no figures.
    """

    resolution: int
    batch_size: int
    operations: Operations
    ours: list[float] = dataclasses.field(default_factory=list)
    convolution: list[float] = dataclasses.field(default_factory=list)
    reference: list[float] = dataclasses.field(default_factory=list)
    peak_memory: int = 0
    parts: dict[str, parts.Part] = dataclasses.field(default_factory=dict)
    failure: str | None = None

    @property
    def rate(self) -> float:
        """Operations per second of the ordinary convolution."""
        return Convolution.OPERATIONS / statistics.median(self.convolution)

    @property
    def share(self) -> float:
        """Operations per second of our step, relative to those of the ordinary convolution."""
        return self.batch_size * sum(self.operations) / statistics.median(self.ours) / self.rate

    @property
    def ratio(self) -> float | None:
        """Our time of an image's step relative to the authors', whose batch size is 1; median over rounds."""
        return self._relative(self.reference, 1)

    def against(self, other: Row) -> float | None:
        """Our time per image and step, relative to another row; median over rounds."""
        return None if self.failure or other.failure else self._relative(other.ours, other.batch_size)

    def _relative(self, theirs: Sequence[float], batch_size: int) -> float | None:
        pairs = zip(self.ours, theirs, strict=bool(theirs))
        ratios = [ours / self.batch_size / (other / batch_size) for ours, other in pairs]
        return statistics.median(ratios) if ratios else None

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Keeps the reason if a worker fails."""
        try:
            yield
        except WorkerError as error:
            self.failure = str(error)


def generator(args: Arguments, resolution: int) -> StyleGAN2Config:
    """The generator that is timed."""
    return StyleGAN2Config(resolution, channel_base=args.channel_base, channel_max=args.channel_max)


def measure(args: Arguments, resolution: int, convolution: Worker) -> list[Row]:
    """A row for each batch size.

    In each round every batch size runs, and next to each the ordinary convolution and the authors' step, so that the
    times in a ratio are of the same moment.
    """
    config = generator(args, resolution)
    rows = [Row(resolution, batch_size, step_operations(config)) for batch_size in args.batch_sizes]
    images = args.steps * max(args.batch_sizes)
    with contextlib.ExitStack() as stack:
        theirs = None
        if args.reference is not None:
            checkouts = (str(path.resolve()) for path in args.reference)
            sizes = (resolution, args.channel_base, args.channel_max)
            try:
                theirs = stack.enter_context(Worker(reference_step.Step, *checkouts, *sizes, runtime.threads()))
            except WorkerError as error:
                return [dataclasses.replace(row, failure=f"the authors' step: {error}") for row in rows]
        running = []
        for row in rows:
            with row.failing():
                running.append((row, stack.enter_context(Worker(OurStep, config, row.batch_size, args.precision))))
        for _ in range(args.rounds):
            for row, ours in running:
                if row.failure is None:
                    with row.failing():
                        row.ours.append(ours.seconds(-(-images // row.batch_size)))
                        row.convolution.append(convolution.seconds(5))
                        if theirs is not None:
                            row.reference.append(theirs.seconds(args.steps))
        for row, ours in running:
            if row.failure is None:
                row.peak_memory = ours.ask("peak_memory")
    return rows


def measure_parts(args: Arguments, rows: Sequence[Row]) -> Iterator[str]:
    """Times the parts of a step of one image, keeps them in its row, and gives their tables."""
    for row in rows:
        if row.batch_size != 1 or row.failure is not None:
            continue
        try:
            with Worker(parts.Parts, generator(args, row.resolution), args.precision) as worker:
                row.parts = worker.ask("__call__", args.rounds)
        except WorkerError as error:
            yield f"{row.resolution} px: the parts could not be timed: {error}"
            continue
        yield from parts.table(row.resolution, row.parts, statistics.median(row.ours), row.rate)
        yield ""


def table(rows: Sequence[Row], reference: bool) -> Iterator[str]:
    """The figures in Markdown."""
    first: dict[int, Row] = {}

    def cells(row: Row) -> list[str]:
        size, against = [f"{row.resolution} px", str(row.batch_size)], first.setdefault(row.resolution, row)
        if row.failure is not None:
            return [*size, f"failed: {row.failure}"]
        relative = row.against(against)
        figures = [
            f"{statistics.median(row.ours):.3g}",
            f"{min(row.ours):.3g} to {max(row.ours):.3g}",
            f"{row.batch_size * sum(row.operations) / 1e9:,.0f}",
            f"{row.share:.0%} of {row.rate / 1e9:,.0f} GFLOP/s",
            f"{row.peak_memory / 1e9:.1f}",
            "–" if relative is None else f"{relative:.2f}",
        ]
        if row.ratio is not None:
            per_image = " per image" if row.batch_size > 1 else ""
            figures += [f"{statistics.median(row.reference):.3g}", f"{row.ratio:.2f}{per_image}"]
        return size + figures

    head = ["image", "batch", "s / step", "min to max", "GFLOP / step", "of the convolution rate", "peak memory, GB",
            "an image, of the first"]  # fmt: skip
    yield from markdown(head + ["authors' s / step", "ours / theirs"] * reference, map(cells, rows))


def check(args: Arguments) -> None:
    """Raises UserError if the arguments cannot be used."""
    for name in ("resolutions", "batch_sizes"):
        if not getattr(args, name):
            raise UserError(f"--{name} is empty: give at least one number")
    for name in ("batch_sizes", "steps", "rounds", "channel_base", "channel_max"):
        if np.min(getattr(args, name)) < 1:
            raise UserError(f"--{name} must be at least 1")
    for resolution in args.resolutions:
        if not 16 <= resolution <= 1024 or resolution & (resolution - 1):
            raise UserError(f"--resolutions: {resolution} is not a power of two from 16 to 1024")
    if args.reference is not None:
        if min(args.resolutions) < 256:
            raise UserError("--reference needs --resolutions from 256 on: the authors' code expects all latent layers")
        wanted = {"NVlabs/stylegan3": "training/networks_stylegan2.py",
                  "adobe-research/sam_inversion": "src/model_utils.py"}  # fmt: skip
        for path, (repository, name) in zip(args.reference, wanted.items(), strict=True):
            if not (path / name).is_file():
                raise UserError(f"--reference: {path} is not a checkout of {repository}: it has no {name}")
        if importlib.util.find_spec("torch") is None:
            raise UserError("--reference needs PyTorch: pip install torch")


def main(args: Arguments) -> None:
    check(args)
    # Several processes share the device: none may take all of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows: list[Row] = []
    try:
        with Worker(Convolution) as convolution:
            device = convolution.device
            how = "float32" if args.precision == "highest" else f"precision {args.precision}"
            rounds = f"median of {args.rounds} rounds of {args.steps} steps"
            print(f"{device}, {runtime.threads()} CPU threads, {how}, {rounds}")
            for resolution in args.resolutions:
                rows += measure(args, resolution, convolution)
                print(f"  {resolution} px: done", file=sys.stderr, flush=True)
    except WorkerError as error:
        raise UserError(f"the device cannot run a convolution: {error}") from error
    print("", *table(rows, args.reference is not None), "", sep="\n")
    for line in measure_parts(args, rows):
        print(line, flush=True)
    figures = describe(args, rows, device)

    def keep(*lines: str) -> None:  # after each measurement, as a later one may fail
        if lines:
            print(*lines, "", sep="\n", flush=True)
        if args.output_path is not None:
            files.write_json(args.output_path, figures)

    keep()
    if args.demo:
        figures["demo"] = demo_command.measure()
        keep(*demo_command.table(figures["demo"]))
    if args.quality:
        found = presets.measure(args.quality, args.quality_folder, device)
        figures["quality"] = {", ".join(policy): quality._asdict() for policy, quality in found.items()}
        keep(*presets.table(found))
    if args.output_path is not None:
        print(f"all figures: {args.output_path}")
    if all(row.failure is not None for row in rows):
        raise UserError(f"nothing could be timed: {rows[0].failure}")


def describe(args: Arguments, rows: Sequence[Row], device: str) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    return {
        "device": device,
        "threads": runtime.threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "samjax")},
        "arguments": args,
        "rows": [
            {
                **dataclasses.asdict(row),
                "operations": row.operations._asdict(),
                "parts": {name: part._asdict() for name, part in row.parts.items()},
                "gflops_of_convolution": None if row.failure else row.rate / 1e9,
                "share": None if row.failure else row.share,
                "ratio": None if row.failure else row.ratio,
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    cli.run(Arguments, main)
