"""What a predictor's training data and its training cost, on paper: operations, bytes, and hours on other devices.

    python experiments/estimate_cost.py --images 20000 --output_path docs/scale.md

Operations are XLA's count of the compiled steps (an inversion step of one image in one layer, a training step of one
batch), and for the inversion also those of its convolutions alone, counted by hand in `benchmark.py`. A step takes as
long as its operations or its bytes do, whichever is longer, at --utilisation of a device's stated peaks. That share is
an assumption until the step is timed there (`benchmark.py`); the arithmetic is printed, so that a measured time can
take its place, as --measured puts that of this machine in.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import benchmark
import cli
import jax
import jax.numpy as jnp
import numpy as np

from samjax import inversion, training
from samjax.config import LATENT_NAMES, InversionConfig
from samjax.io import files
from samjax.losses import Prior
from samjax.nets import convolution, deeplab, lpips, stylegan2
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.stylegan2 import StyleGAN2Config


class Device(NamedTuple):
    """Chips that work together.

    Attributes:
      name: for people. chips: how many.
      float32: operations a second of one chip in full float32 ("highest"), from its data sheet.
      fast: the same where matrix units round their inputs ("default": TF32, or bfloat16).
      memory: bytes a second of one chip.
      link: bytes a second between chips, for gradients.
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
    resolutions: tuple[int, ...] = (256, 512, 1024)
    """Of config-f generators."""
    steps: int = 501
    """Of each inversion."""
    epochs: int = 100
    batch_size: int = 16
    """Of the training."""
    utilisation: float = 0.3
    """Share of the stated peaks that is reached; an assumption."""
    measured: tuple[float, ...] = ()
    """Seconds that a step of one image takes on this machine, for the first resolutions, by `benchmark.py`."""
    machine: str = "this machine"
    """Its name."""
    output_path: Path | None = None
    """A Markdown file for the tables."""


class Cost(NamedTuple):
    """XLA's count of operations and of bytes to and from memory, of one compiled program."""

    flops: float
    bytes: float


def cost_of(function: Any, *shapes: Any, **static: Any) -> Cost:
    """Of a jitted function at these shapes; nothing is run."""
    # Compiled here, but with the convolutions of an accelerator: a CPU's have fewer operations and move more bytes.
    with mock.patch.object(convolution, "_suits", return_value=False):
        analysis = function.lower(*shapes, **static).compile().cost_analysis()
    return Cost(float(analysis["flops"]), float(analysis["bytes accessed"]))


def inversion_step(resolution: int) -> Cost:
    """Of one image in all layers at once, as a single-layer inversion runs too: only its masks differ."""
    config, settings = StyleGAN2Config(img_resolution=resolution), InversionConfig(chunk_steps=1)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    height, width = benchmark.target_size(resolution)
    networks = inversion.Networks(
        jax.eval_shape(lambda: stylegan2.init(config, key=jax.random.key(0))),
        jax.eval_shape(lambda: lpips.init("vgg", key=jax.random.key(0))),
        Prior(f32(config.w_dim), f32(config.w_dim), f32(config.w_dim, config.w_dim)),  # type: ignore[arg-type]
    )
    sizes = {name: r for name, r in (("F4", 16), ("F6", 32), ("F8", 64), ("F10", 128)) if r < resolution}
    start: Any = {"W+": f32(1, config.num_ws, config.w_dim)}
    start |= {name: f32(1, r, r, config.channels(r)) for name, r in sizes.items()}
    masks: Any = {name: f32(1, r, r, 1) for name, r in sizes.items()}
    features = jax.eval_shape(lambda p, x: lpips.features(p, x, "vgg"), networks.lpips, f32(1, height, width, 3))
    keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32)))
    batch = inversion.Batch(f32(1, height, width, 3), features, masks, start, keys)  # type: ignore[arg-type]
    state = jax.eval_shape(inversion.init, inversion.Items(batch.targets, masks, start, np.zeros(1)))
    hyper = jax.eval_shape(lambda: inversion.hyperparameters(settings))
    structure = inversion.structure(config, settings)
    return cost_of(inversion.run_chunk, structure, networks, batch, hyper, state)


def training_step(batch_size: int) -> tuple[Cost, int]:
    """Of one batch at 256 px through the authors' predictor, targets included; and how many parameters that has.

    The targets' layers go through VGG16 in a loop, whose inside XLA counts once.
    """
    predictor, config = PredictorConfig(), training.TrainConfig()
    size, layers = 256, len(LATENT_NAMES)
    variables = jax.eval_shape(lambda: deeplab.init(predictor, key=jax.random.key(0)))
    state = jax.eval_shape(lambda variables: training.init(predictor, config, variables), variables)
    params = jax.eval_shape(lambda: lpips.init("vgg", key=jax.random.key(0)))
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    batch = training.Batch(
        f32(batch_size, size, size, 3), f32(batch_size, layers, size, size, 3),
        jax.ShapeDtypeStruct((batch_size, size, size), jnp.int32),
    )  # fmt: skip
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables["params"]))
    whole = cost_of(training.step, predictor, config, params, state, batch)
    once = cost_of(jax.jit(lambda params, x: lpips.features(params, x, "vgg")), params, batch.images)
    more = layers - 1
    return Cost(whole.flops + more * once.flops, whole.bytes + more * once.bytes), count


def seconds(cost: Cost, device: Device, fast: bool, utilisation: float) -> float:
    """That one chip takes for a step: the longer of computing and of moving bytes."""
    return max(cost.flops / (device.fast if fast else device.float32), cost.bytes / device.memory) / utilisation


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"


def main(args: Arguments) -> None:
    layers = len(LATENT_NAMES)
    inversion_steps = args.images * layers * args.steps
    lines = [
        f"# What {args.images:,} training images cost",
        "",
        "On paper. Operations and bytes are XLA's count of the compiled steps; a step takes as long as its operations "
        f"or its bytes do, whichever is longer, at {args.utilisation:.0%} of a device's stated peaks. That share is an "
        "assumption, not a measurement: where a step has been timed, put its time in its place. Made by "
        "`python experiments/estimate_cost.py`.",
        "",
        "## Making the data",
        "",
        f"images × layers × steps = {args.images:,} × {layers} × {args.steps} = "
        f"{inversion_steps:,} steps of one image. They do not depend on one another, so chips share "
        "them without talking, and hours fall with their number.",
        "",
        "| generator | TFLOP a step (its convolutions alone) | GB a step | EFLOP in all | "
        + " | ".join(f"{device.name}: float32, fast" for device in DEVICES)
        + " |",
        "|---|--:|--:|--:|" + "--:|" * len(DEVICES),
    ]
    for resolution in args.resolutions:
        cost = inversion_step(resolution)
        by_hand = sum(benchmark.step_operations(StyleGAN2Config(img_resolution=resolution)))
        times = [
            ", ".join(hours(seconds(cost, device, fast, args.utilisation) * share) for fast in (False, True))
            for device in DEVICES
            for share in [inversion_steps / device.chips]
        ]
        lines.append(
            f"| config-f, {resolution} px | {cost.flops / 1e12:.3f} ({by_hand / 1e12:.3f}) | {cost.bytes / 1e9:.1f} "
            f"| {cost.flops * inversion_steps / 1e18:,.0f} | " + " | ".join(times) + " |"
        )
    for resolution, taken in zip(args.resolutions, args.measured, strict=False):
        lines += [
            "",
            f"Measured on {args.machine}, {resolution} px: {taken:g} s a step, × "
            f"{inversion_steps:,} = {hours(taken * inversion_steps)}.",
        ]
    cost, count = training_step(args.batch_size)
    steps = args.epochs * (args.images // args.batch_size)
    lines += [
        "",
        "## Training the predictor",
        "",
        f"epochs × images / batch = {args.epochs} × {args.images:,} / {args.batch_size} = {steps:,} steps; the "
        f"authors' predictor, {count / 1e6:.1f} million parameters, with {layers + 1} passes of VGG16 an image for the "
        f"targets, is {cost.flops / 1e12:.2f} TFLOP and {cost.bytes / 1e9:.0f} GB a step. Several chips exchange "
        f"{4 * count / 1e6:.0f} MB of gradients a step, and a checkpoint has {8 * count / 1e6:.0f} MB. A batch of "
        f"{args.batch_size} has work for {args.batch_size} chips: 64 hosts train with one of them, or with larger "
        "batches, which is another recipe.",
        "",
        "| | float32 | fast (bfloat16, TF32 targets) | gradients, in all |",
        "|---|--:|--:|--:|",
    ]
    for device in DEVICES[:2]:
        each = [seconds(cost, device, fast, args.utilisation) * steps / device.chips for fast in (False, True)]
        exchange = 2 * 4 * count * (device.chips - 1) / device.chips / device.link * steps
        lines.append(
            f"| {device.name} | {hours(each[0])} | {hours(each[1])} | {hours(exchange) if device.chips > 1 else '–'} |"
        )
    lines += [
        "",
        "Peaks: "
        + "; ".join(
            f"{d.name.removeprefix('one ')}: {d.chips} × {d.float32 / 1e12:.0f} TFLOP/s in float32, "
            f"{d.fast / 1e12:.0f} fast, {d.memory / 1e12:.2f} TB/s"
            for d in DEVICES
        )
        + ".",
        "",
    ]
    text = "\n".join(lines)
    if args.output_path is not None:
        files.write_text(args.output_path, text)
    print(text)


if __name__ == "__main__":
    cli.run(Arguments, main)
