"""Estimates what a predictor's training data and its training cost: operations, bytes, and hours on other devices.

    python experiments/benchmark/estimate_cost.py --images 20000 --output_path docs/scale.md

Operations are XLA's count for the compiled steps (an inversion step of one image in one layer, a training step of one
batch), and for the inversion also those of its convolutions alone, counted by hand. A step takes as long as its
operations or its memory traffic, whichever is longer, at a fraction --utilization of a device's peaks. That fraction is
an assumption until the step is timed on the device by `benchmark.py`; --measured adds times of this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from operations import markdown, step_operations
from steps import random_arguments

from samjax import cli, inversion
from samjax.config import InversionConfig
from samjax.io import files
from samjax.latents import LATENT_NAMES
from samjax.nets import deeplab, lpips
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.stylegan2 import StyleGAN2Config
from samjax.training import predictor


class Device(NamedTuple):
    """Chips that work together.

    Attributes:
      name: name of the device.
      chips: number of chips.
      float32: operations per second of one chip in full float32 ("highest").
      fast: operations per second of one chip whose matrix units round their inputs to TF32 or bfloat16 ("default").
      memory: bytes per second of one chip.
      link: bytes per second between chips, for gradients.
    """

    name: str
    chips: int
    float32: float
    fast: float
    memory: float
    link: float


DEVICES = (
    # NVIDIA's data sheet of the H100 SXM: 67 TFLOP/s in float32, 494 in TF32 without sparsity, 3.35 TB/s.
    Device("one H100", 1, 67e12, 494e12, 3.35e12, 450e9),
    # Google's page on v5e: 197 TFLOP/s in bfloat16, 819 GB/s, 1.6 Tbit/s between chips. Full float32 is six passes.
    Device("one v5e-8", 8, 197e12 / 6, 197e12, 819e9, 200e9),
    Device("64 hosts of v5e-8", 512, 197e12 / 6, 197e12, 819e9, 200e9),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    images: int = 20_000
    """Number of training images."""
    resolutions: tuple[int, ...] = (256, 512, 1024)
    """Image sizes of config-f generators."""
    steps: int = 501
    """Steps of each inversion."""
    epochs: int = 100
    """Epochs of the training."""
    batch_size: int = 16
    """Batch size of the training."""
    utilization: float = 0.3
    """Fraction of the peaks that a step reaches; an assumption."""
    measured: tuple[float, ...] = ()
    """Seconds that a step of one image takes on this machine, for the first resolutions, by `benchmark.py`."""
    machine: str = "this machine"
    """Name of this machine."""
    output_path: Path | None = None
    """A Markdown file for the tables."""


class Cost(NamedTuple):
    """XLA's count of operations and of bytes to and from memory, for one compiled program."""

    flops: float
    bytes: float


def cost_of(function: Any, *arguments: Any) -> Cost:
    """The cost of a jitted function for arguments, or their shapes; it is not run."""
    analysis = function.lower(*arguments).compile().cost_analysis()
    return Cost(float(analysis["flops"]), float(analysis["bytes accessed"]))


def inversion_step(resolution: int) -> Cost:
    """The cost of a step of one image in all layers; a single-layer inversion differs only in its masks."""
    # Compiled on this machine, but with an accelerator's convolutions: minimal filtering has fewer operations and
    # moves more bytes.
    settings = InversionConfig(chunk_steps=1)
    return cost_of(inversion.run_chunk, *random_arguments(StyleGAN2Config(resolution), settings, minimal=False))


def training_step(batch_size: int) -> tuple[Cost, int]:
    """The cost of a training step of one batch at 256 px, its targets included, and the predictor's parameters.

    The targets of all layers pass through VGG16 in a loop, whose body XLA counts once.
    """
    network, config, size, layers = PredictorConfig(), predictor.TrainConfig(), 256, len(LATENT_NAMES)
    variables = jax.eval_shape(lambda: deeplab.init(network, key=jax.random.key(0)))
    state = jax.eval_shape(lambda variables: predictor.init(network, config, variables), variables)
    params = jax.eval_shape(
        lambda: lpips.prepack(lpips.init("vgg", key=jax.random.key(0)), size, size, "vgg", minimal=False)
    )
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    batch = predictor.Batch(
        f32(batch_size, size, size, 3), f32(batch_size, layers, size, size, 3),
        jax.ShapeDtypeStruct((batch_size, size, size), jnp.int32),
    )  # fmt: skip
    whole = cost_of(predictor.step, network, config, params, state, batch)
    once = cost_of(jax.jit(lambda params, x: lpips.features(params, x, "vgg")), params, batch.images)
    more, count = layers - 1, sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables["params"]))
    return Cost(whole.flops + more * once.flops, whole.bytes + more * once.bytes), count


def seconds(cost: Cost, device: Device, fast: bool, utilization: float) -> float:
    """Seconds of a step on one chip: the longer of its computation and its memory traffic."""
    return max(cost.flops / (device.fast if fast else device.float32), cost.bytes / device.memory) / utilization


def hours(seconds: float) -> str:
    """A duration as text."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"


def page(args: Arguments) -> Iterator[str]:
    """The lines of the page."""
    layers = len(LATENT_NAMES)
    inversion_steps = args.images * layers * args.steps
    yield from (
        f"# The cost of {args.images:,} training images",
        "",
        "Estimates, made by `python experiments/benchmark/estimate_cost.py`. Operations and bytes are XLA's count for "
        "the compiled steps. A step takes as long as its operations or its memory traffic, whichever is longer, at "
        f"{args.utilization:.0%} of a device's peaks. That fraction is an assumption: where a step has been timed, use "
        "its time instead.",
        "",
        "## Making the data",
        "",
        f"images × layers × steps = {args.images:,} × {layers} × {args.steps} = {inversion_steps:,} steps of one "
        "image. They do not depend on one another, so chips share them without communication, and the hours fall with "
        "the number of chips.",
        "",
    )
    rows = []
    for resolution in args.resolutions:
        cost, by_hand = inversion_step(resolution), sum(step_operations(StyleGAN2Config(resolution)))
        times = [
            [seconds(cost, device, fast, args.utilization) * inversion_steps / device.chips for fast in (False, True)]
            for device in DEVICES
        ]
        rows.append([
            f"config-f, {resolution} px", f"{cost.flops / 1e12:.3f} ({by_hand / 1e12:.3f})",
            f"{cost.bytes / 1e9:.1f}", f"{cost.flops * inversion_steps / 1e18:,.0f}",
            *(", ".join(map(hours, both)) for both in times),
        ])  # fmt: skip
    head = ["generator", "TFLOP per step (its convolutions alone)", "GB per step", "EFLOP in total"]
    yield from markdown(head + [f"{device.name}: float32, fast" for device in DEVICES], rows)
    for resolution, taken in zip(args.resolutions, args.measured, strict=False):
        yield ""
        yield (
            f"Measured on {args.machine}, {resolution} px: {taken:g} s per step, × {inversion_steps:,} = "
            f"{hours(taken * inversion_steps)}."
        )
    cost, count = training_step(args.batch_size)
    steps = args.epochs * (args.images // args.batch_size)
    yield from (
        "",
        "## Training the predictor",
        "",
        f"epochs × images / batch = {args.epochs} × {args.images:,} / {args.batch_size} = {steps:,} steps. A step of "
        f"the authors' predictor, {count / 1e6:.1f} million parameters, with {layers + 1} passes of VGG16 per image "
        f"for the targets, takes {cost.flops / 1e12:.2f} TFLOP and {cost.bytes / 1e9:.0f} GB. Several chips exchange "
        f"{4 * count / 1e6:.0f} MB of gradients per step, and a checkpoint has {8 * count / 1e6:.0f} MB. A batch of "
        f"{args.batch_size} has work for at most {args.batch_size} chips; more chips need larger batches, and "
        "with them another recipe.",
        "",
    )
    rows = []
    for device in DEVICES[:2]:
        each = [seconds(cost, device, fast, args.utilization) * steps / device.chips for fast in (False, True)]
        exchange = 2 * 4 * count * (device.chips - 1) / device.chips / device.link * steps
        rows.append([device.name, *map(hours, each), hours(exchange) if device.chips > 1 else "–"])
    yield from markdown(["", "float32", "fast (bfloat16, TF32 targets)", "gradients, in total"], rows)
    peaks = (
        f"{d.name.removeprefix('one ')}: {d.chips} × {d.float32 / 1e12:.0f} TFLOP/s in float32, "
        f"{d.fast / 1e12:.0f} fast, {d.memory / 1e12:.2f} TB/s"
        for d in DEVICES
    )
    yield from ("", f"Peaks: {'; '.join(peaks)}.", "")


def main(args: Arguments) -> None:
    text = "\n".join(page(args))
    if args.output_path is not None:
        files.write_text(args.output_path, text)
    print(text)


if __name__ == "__main__":
    cli.run(Arguments, main)
