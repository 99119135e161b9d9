"""Times an inversion step on this device, and holds it against the device's own convolutions.

    python experiments/benchmark.py
    python experiments/benchmark.py --resolutions 256 512 --batch_sizes 1 --reference STYLEGAN3 SAM_INVERSION

For config-f generators with random weights: seconds a step (all latent layers, LPIPS-VGG at 256 px, full float32), its
operations by part, and what share that is of the rate at which the device runs an ordinary 3x3 convolution of 512
channels; what an image costs in each batch relative to the first; and where a step's time goes, beside what its parts
would take at that rate, and at the rate at which the device copies. With --reference, checkouts of NVlabs/stylegan3 and
adobe-research/sam_inversion (and PyTorch installed), the authors' step too. All of one image size run in turn, each in
a process of its own, so that all see the same minutes. With --demo, the demo's command from the shell as well; with
--quality 32, what `--preset fast` and coarser arithmetic cost on as many held-out scenes.

Prints Markdown tables; --output_path FILE.json keeps every figure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_demo
import benchmark_parts
import benchmark_quality
import cli
import jax
import jax.numpy as jnp
import numpy as np

from samjax import inversion, latents
from samjax.config import InversionConfig, Precision
from samjax.errors import UserError
from samjax.io import files
from samjax.io.weights import load_lpips
from samjax.losses import fit_prior
from samjax.nets import stylegan2
from samjax.nets.convolution import direct
from samjax.nets.stylegan2 import StyleGAN2Config

VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


@dataclasses.dataclass(frozen=True)
class Arguments:
    resolutions: tuple[int, ...] = (256, 512, 1024)
    batch_sizes: tuple[int, ...] = (1, 4)
    steps: int = 3
    """Steps of the largest batch in one turn. Smaller ones take more: processors slow down under load that lasts."""
    rounds: int = 5
    """Turns; the table shows medians over them."""
    reference: tuple[Path, Path] | None = None
    """Checkouts of NVlabs/stylegan3 and adobe-research/sam_inversion, to time the authors' step too."""
    channel_base: int = 32768
    channel_max: int = 512
    demo: bool = False
    """Times the demo's command too, and its sweep of thresholds."""
    quality: int = 0
    """On how many of the demo's held-out hard scenes presets and precisions are compared: 32 take an hour and a half
    on two CPU cores. Finished scenes are kept in quality_folder, and not made again."""
    quality_folder: Path = Path("output/benchmark_quality")
    precision: Precision = "highest"
    """Of our steps; the authors' are always float32."""
    output_path: Path | None = None
    """A JSON file for all figures."""


# --- operations ---


class Operations(NamedTuple):
    """Multiplications and additions of the convolutions in one image's step."""

    synthesis_forward: int
    synthesis_backward: int
    lpips_forward: int
    lpips_backward: int


def convolution(height: int, width: int, kernel: int, inputs: int, outputs: int) -> int:
    return 2 * height * width * kernel * kernel * inputs * outputs


def synthesis_operations(config: StyleGAN2Config) -> int:
    """Of one image's forward pass. An up-convolution multiplies each of its input's pixels once with each tap."""
    total, before = 0, None
    for r in config.block_resolutions:
        channels = config.channels(r)
        if before is not None:
            total += convolution(r // 2, r // 2, 3, before, channels)
        total += convolution(r, r, 3, channels, channels) + convolution(r, r, 1, channels, config.img_channels)
        before = channels
    return total


def lpips_operations(height: int, width: int) -> int:
    """Of VGG16's thirteen convolutions on one image."""
    total, before = 0, 3
    for stage, widths in enumerate(VGG_STAGES):
        for outputs in widths:
            total += convolution(height >> stage, width >> stage, 3, before, outputs)
            before = outputs
    return total


def step_operations(config: StyleGAN2Config) -> Operations:
    """Weights are frozen, so the way back is one convolution for each of the way there; the target's LPIPS features
    are computed once per image, not per step."""
    synthesis, lpips = synthesis_operations(config), lpips_operations(*target_size(config.img_resolution))
    return Operations(synthesis, synthesis, lpips, lpips)


def target_size(resolution: int) -> tuple[int, int]:
    """Where the loss is taken; 512 px is the cars' generator, whose images are letterboxed."""
    side = min(256, resolution)
    return (192, 256) if resolution == 512 else (side, side)


# --- what is timed, each in a process of its own ---


class OurStep:
    """`samjax.inversion` on a batch of random targets; `step(n)` runs n steps and gives the seconds they took."""

    def __init__(self, config: StyleGAN2Config, batch_size: int, precision: Precision = "highest"):
        cli.keep_freed_memory()  # as all programs here do, and the authors' does not
        rng = np.random.default_rng(0)
        random = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
        shapes = jax.eval_shape(lambda: stylegan2.init(config, key=jax.random.key(0)))
        params = jax.tree.map(lambda x: jnp.asarray(random(*x.shape)), shapes)
        networks = inversion.Networks(params, load_lpips("vgg"), fit_prior(random(2 * config.w_dim, config.w_dim)))
        layers = latents.latent_layers(config)
        masks = {
            layer.name: jnp.asarray(rng.random((batch_size, layer.resolution, layer.resolution, 1), np.float32))
            for layer in layers
            if layer.resolution is not None
        }
        targets = rng.uniform(-1, 1, (batch_size, *target_size(config.img_resolution), 3)).astype(np.float32)
        start = latents.init_latents(layers, jnp.asarray(random(batch_size, config.w_dim)))
        items = inversion.Items(targets, masks, start, np.arange(batch_size))
        settings = InversionConfig(num_opt_steps=10**6, batch_size=batch_size, precision=precision)
        self._run = inversion.run_chunk
        structure = inversion.structure(config, settings)
        networks = inversion.prepack(structure, networks, targets.shape[1:3])
        batch = inversion.prepare(structure, networks, items)
        self.arguments = structure, networks, batch, inversion.hyperparameters(settings)
        self.operations = step_operations(config)
        self._state = inversion.init(items)
        self.chunk = structure.chunk_steps
        self.device = jax.devices()[0].device_kind

    def __call__(self, steps: int) -> float:
        began = time.perf_counter()
        before = int(self._state.step)
        for _ in range(-(-steps // self.chunk)):
            self._state, _ = self._run(*self.arguments, self._state)
        done = int(self._state.step) - before
        return (time.perf_counter() - began) * steps / done

    def peak_memory(self) -> int:
        """Bytes: on the device, or of this process where that is the CPU."""
        on_device = jax.devices()[0].memory_stats() or {}
        return on_device.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Convolution:
    """An ordinary 3x3 convolution, 512 to 512 channels, on 64 x 64 pixels; a "step" is one of them."""

    OPERATIONS = convolution(64, 64, 3, 512, 512)

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(0))
        self._inputs = jax.random.normal(keys[0], (1, 64, 64, 512)), jax.random.normal(keys[1], (3, 3, 512, 512))
        with jax.default_matmul_precision("highest"):
            self._run = jax.jit(direct).lower(*self._inputs).compile()
        self.device = jax.devices()[0].device_kind

    def __call__(self, steps: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready([self._run(*self._inputs) for _ in range(steps)])
        return time.perf_counter() - began


def _serve(connection: Connection, module: str, name: str, arguments: tuple[Any, ...]) -> None:
    """What a worker process runs: builds the step, warms it up, then runs as many as it is told to."""
    with contextlib.suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
        try:
            step = getattr(importlib.import_module(module), name)(*arguments)
            step(1)
            connection.send((step.device, None))
            while (question := connection.recv()) is not None:
                method, given = question
                connection.send((getattr(step, method)(*given), None))
        except Exception as error:
            connection.send((None, f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:200]}"))


class WorkerError(Exception):
    """Why a worker has no result."""


class Worker:
    """A step in a process of its own, so that neither threads nor memory are shared with anything else."""

    def __init__(self, module: str, name: str, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, module, name, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.device = self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> Any:
        try:
            value, error = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise WorkerError(f"the process ended with code {code}" + ": out of memory?" * (code == -9)) from None
        if error is not None:
            raise WorkerError(error)
        return value

    def seconds(self, steps: int) -> float:
        """Seconds a step, over `steps` of them."""
        return self.ask("__call__", steps) / steps

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the step gives."""
        self._connection.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        self._connection.close()  # the worker sees the end and returns
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- the figures ---


@dataclasses.dataclass
class Row:
    """One line of the table; times are seconds a step, one a round."""

    resolution: int
    batch_size: int
    operations: Operations
    ours: list[float] = dataclasses.field(default_factory=list)
    convolution: list[float] = dataclasses.field(default_factory=list)
    reference: list[float] = dataclasses.field(default_factory=list)
    peak_memory: int = 0  # bytes
    parts: dict[str, benchmark_parts.Part] = dataclasses.field(default_factory=dict)  # of a step of one image
    failure: str | None = None

    @property
    def rate(self) -> float:
        """Operations a second of the ordinary convolution."""
        return Convolution.OPERATIONS / statistics.median(self.convolution)

    @property
    def share(self) -> float:
        return self.batch_size * sum(self.operations) / statistics.median(self.ours) / self.rate

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Notes what ends a worker, and lets the others go on."""
        try:
            yield
        except WorkerError as error:
            self.failure = str(error)

    def against(self, other: Row) -> float | None:
        """An image's time in this batch relative to its time in another's: median over rounds."""
        if self.failure is not None or other.failure is not None:
            return None
        pairs = zip(self.ours, other.ours, strict=True)
        return statistics.median(ours / self.batch_size / (theirs / other.batch_size) for ours, theirs in pairs)

    @property
    def ratio(self) -> float | None:
        """Our time for an image's step, relative to the authors', who take one image at a time: median over rounds."""
        pairs = zip(self.ours, self.reference, strict=bool(self.reference))
        ratios = [ours / self.batch_size / theirs for ours, theirs in pairs]
        return statistics.median(ratios) if ratios else None


def measure(args: Arguments, resolution: int, convolution: Worker) -> list[Row]:
    """A row for each batch size: rounds of every one, an ordinary convolution beside each and, where asked for, the
    authors' step, all in turn, so that every ratio is one of neighbours in time."""
    config = StyleGAN2Config(resolution, channel_base=args.channel_base, channel_max=args.channel_max)
    rows = [Row(resolution, batch_size, step_operations(config)) for batch_size in args.batch_sizes]
    images = args.steps * max(args.batch_sizes)
    with contextlib.ExitStack() as stack:
        theirs = None
        if args.reference is not None:
            paths = tuple(str(path.resolve()) for path in args.reference)
            sizes = (resolution, args.channel_base, args.channel_max, threads())
            try:
                theirs = stack.enter_context(Worker("reference_step", "Step", *paths, *sizes))
            except WorkerError as error:
                return [dataclasses.replace(row, failure=f"the authors' step: {error}") for row in rows]
        running = []
        for row in rows:
            with row.failing():
                worker = Worker("benchmark", "OurStep", config, row.batch_size, args.precision)
                running.append((row, stack.enter_context(worker)))
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


def parts(args: Arguments, rows: list[Row]) -> Iterator[str]:
    """Times what a step of one image consists of, notes it in its row, and gives the tables, by image size."""
    for row in rows:
        if row.batch_size != 1 or row.failure is not None:
            continue
        config = StyleGAN2Config(row.resolution, channel_base=args.channel_base, channel_max=args.channel_max)
        try:
            with Worker("benchmark_parts", "Parts", config, args.precision) as worker:
                row.parts = worker.ask("__call__", args.rounds)
        except WorkerError as error:
            yield f"{row.resolution} px: the parts could not be timed: {error}"
            continue
        yield from benchmark_parts.table(row.resolution, row.parts, statistics.median(row.ours), row.rate)
        yield ""


def threads() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def table(rows: list[Row], reference: bool) -> Iterator[str]:
    """The figures in Markdown."""
    head = [
        "image",
        "batch",
        "s / step",
        "min to max",
        "GFLOP / step",
        "of the convolution rate",
        "peak memory, GB",
        "an image, of the first",
    ]
    head += ["authors' s / step", "ours / theirs"] * reference
    yield "| " + " | ".join(head) + " |"
    yield "|" + " ---: |" * len(head)
    first: dict[int, Row] = {}
    for row in rows:
        relative = row.against(first.setdefault(row.resolution, row))
        cells = [f"{row.resolution} px", str(row.batch_size)]
        if row.failure is None:
            cells += [
                f"{statistics.median(row.ours):.3g}",
                f"{min(row.ours):.3g} to {max(row.ours):.3g}",
                f"{row.batch_size * sum(row.operations) / 1e9:,.0f}",
                f"{row.share:.0%} of {row.rate / 1e9:,.0f} GFLOP/s",
                f"{row.peak_memory / 1e9:.1f}",
                "–" if relative is None else f"{relative:.2f}",
            ]
            if row.ratio is not None:
                per_image = " per image" if row.batch_size > 1 else ""
                cells += [f"{statistics.median(row.reference):.3g}", f"{row.ratio:.2f}{per_image}"]
        else:
            cells += [f"failed: {row.failure}"]
        yield "| " + " | ".join(cells + ["–"] * (len(head) - len(cells))) + " |"


def check(args: Arguments) -> None:
    """Raises UserError where the arguments cannot be meant."""
    for name in ("resolutions", "batch_sizes"):
        if not getattr(args, name):
            raise UserError(f"--{name} is empty: give at least one number")
    for name in ("batch_sizes", "steps", "rounds", "channel_base", "channel_max"):
        if np.min(getattr(args, name)) < 1:
            raise UserError(f"--{name} must be at least 1")
    for resolution in args.resolutions:
        if not 16 <= resolution <= 1024 or resolution & (resolution - 1):
            raise UserError(f"--resolutions: {resolution} is no power of two from 16 to 1024")
    if args.reference is not None:
        if min(args.resolutions) < 256:
            raise UserError("--reference needs --resolutions from 256 on: the authors' code expects all latent layers")
        wanted = ("training/networks_stylegan2.py", "src/model_utils.py")
        for path, name, repository in zip(
            args.reference, wanted, ("NVlabs/stylegan3", "adobe-research/sam_inversion"), strict=True
        ):
            if not (path / name).is_file():
                raise UserError(f"--reference: {path} is no checkout of {repository}: it has no {name}")
        if importlib.util.find_spec("torch") is None:
            raise UserError("--reference needs PyTorch: pip install torch")


def main(args: Arguments) -> None:
    check(args)
    # Several processes share the device: none may take all of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows = []
    try:
        with Worker("benchmark", "Convolution") as convolution:
            device = convolution.device
            how = "float32" if args.precision == "highest" else f"precision {args.precision}"
            print(f"{device}, {threads()} CPU threads, {how}, median of {args.rounds} rounds of {args.steps} steps")
            for resolution in args.resolutions:
                rows += measure(args, resolution, convolution)
                print(f"  {resolution} px: done", file=sys.stderr, flush=True)
    except WorkerError as error:
        raise UserError(f"the device cannot run a convolution: {error}") from error
    print("", *table(rows, args.reference is not None), "", sep="\n")
    for line in parts(args, rows):
        print(line, flush=True)
    figures = report(args, rows, device)
    keep(args, figures)
    if args.demo:
        figures["demo"] = benchmark_demo.measure()
        print(*benchmark_demo.table(figures["demo"]), "", sep="\n", flush=True)
        keep(args, figures)
    if args.quality:
        found = benchmark_quality.measure(args.quality, args.quality_folder, device)
        print(*benchmark_quality.table(found), "", sep="\n", flush=True)
        figures["quality"] = {", ".join(policy): quality._asdict() for policy, quality in found.items()}
        keep(args, figures)
    if args.output_path is not None:
        print(f"all figures: {args.output_path}")
    if all(row.failure is not None for row in rows):
        raise UserError(f"nothing could be timed: {rows[0].failure}")


def keep(args: Arguments, figures: dict[str, Any]) -> None:
    """Writes what there is so far: a later part may fail."""
    if args.output_path is not None:
        files.write_json(args.output_path, figures)


def report(args: Arguments, rows: list[Row], device: str) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    return {
        "device": device,
        "threads": threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "samjax")},
        "arguments": args,
        "rows": [
            {
                **dataclasses.asdict(row),
                "operations": row.operations._asdict(),
                "parts": {name: part._asdict() for name, part in row.parts.items()},
                "gflops_of_convolution": row.rate / 1e9 if row.failure is None else None,
                "share": row.share if row.failure is None else None,
                "ratio": row.ratio if row.failure is None else None,
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    cli.run(Arguments, main)
