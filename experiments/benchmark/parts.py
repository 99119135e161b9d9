"""Where the time of an optimization step goes: its parts, each compiled and timed alone.

Together the parts are fused and run beside one another, so a step may take less than their sum, or more if they evict
each other from the caches.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from operations import Operations, markdown, step_operations
from steps import StepArguments, random_arguments

from samjax import latents, losses, runtime
from samjax.config import InversionConfig, Precision
from samjax.nets import lpips
from samjax.nets.stylegan2 import StyleGAN2Config

_COPIED = 1 << 28  # bytes of the array whose copying gives the device's rate
_FORWARD = {"synthesis, backward": "synthesis, forward", "LPIPS-VGG, backward": "LPIPS-VGG, forward"}


class Part(NamedTuple):
    """Seconds and bytes of one pass, and the operations of its convolutions."""

    seconds: float
    bytes: float
    operations: int


class Parts:
    """The parts of a step of one image: `parts(n)` returns {name: Part}, with medians of n passes.

    The entry "copy" is the copying of a large array.
    """

    def __init__(self, config: StyleGAN2Config, precision: Precision = "highest") -> None:
        runtime.keep_freed_memory()
        arguments = random_arguments(config, InversionConfig(precision=precision))
        self._programs = dict(_programs(arguments, step_operations(config)))
        self.device = jax.devices()[0].device_kind

    def __call__(self, repeats: int) -> dict[str, Part]:
        found = {}
        for name, (program, arguments, operations) in self._programs.items():
            # XLA counts the bytes that a program reads and writes.
            moved = float((program.cost_analysis() or {}).get("bytes accessed", float("nan")))
            found[name] = Part(_time(program, arguments, repeats), moved, operations)
        for name, forward in _FORWARD.items():  # a gradient runs the forward pass as well
            both, first = found[name], found[forward]
            found[name] = Part(both.seconds - first.seconds, both.bytes - first.bytes, both.operations)
        return found


def _programs(step: StepArguments, operations: Operations) -> Iterator[tuple[str, tuple[Any, tuple[Any, ...], int]]]:
    """The compiled program of each part, its arguments, and the operations of its convolutions."""
    structure, networks, items, hyper, state = step
    half, config = structure.half_precision, structure.generator

    def synthesis(start: dict[str, Array], params: Any, masks: Any, keys: Array) -> Array:
        return latents.synthesize_latents(
            config, params, start, masks, noise=structure.noise, noise_keys=keys, half_precision=half
        ).image

    def squares(image: Array, targets: Array) -> Array:
        return losses.mean_squares(losses.comparable(image, structure.loss_resolution, *targets.shape[1:3]), targets)

    def perceptual(image: Array, params: Any, features: Any) -> Array:
        return lpips.distance(params, lpips.features(params, image, "vgg", half_precision=half), features)

    def update(start: dict[str, Array], adam: Any, prior: Any, offsets: Any) -> Any:
        def penalties(x: dict[str, Array]) -> Array:
            f_rec = hyper.lambda_f_rec * losses.offset_distance(x, offsets)
            return jnp.sum(f_rec + losses.delta(x["W+"]) + losses.prior_distance(prior, x["W+"]))

        updates, adam = optax.scale_by_adam().update(jax.grad(penalties)(start), adam)
        return jax.tree.map(lambda x, change: x - hyper.lr * change, start, updates), adam

    def compiled(function: Any, *arguments: Any, operations: int = 0, gradient: bool = False) -> Any:
        program = jax.grad(lambda *x: jnp.sum(function(*x))) if gradient else function
        with jax.default_matmul_precision(structure.precision):
            return jax.jit(program).lower(*arguments).compile(), arguments, operations

    keys = jax.vmap(jax.random.key)(items.seeds)
    latent = (state.latents, networks.generator, items.masks, keys)
    image = jnp.zeros((1, config.img_resolution, config.img_resolution, 3))
    target = (items.targets, networks.lpips, items.features)
    yield "synthesis, forward", compiled(synthesis, *latent, operations=operations.synthesis_forward)
    yield "synthesis, backward", compiled(synthesis, *latent, operations=operations.synthesis_backward, gradient=True)
    yield "resampling and squared error", compiled(squares, image, items.targets, gradient=True)
    yield "LPIPS-VGG, forward", compiled(perceptual, *target, operations=operations.lpips_forward)
    yield "LPIPS-VGG, backward", compiled(perceptual, *target, operations=operations.lpips_backward, gradient=True)
    yield "penalties and Adam", compiled(update, state.latents, state.optimizer, networks.prior, items.start)
    yield "copy", compiled(functools.partial(jnp.add, 1.0), jnp.zeros(_COPIED // 4, jnp.float32))


def _time(program: Any, arguments: tuple[Any, ...], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first is not counted
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def table(resolution: int, parts: Mapping[str, Part], step: float, rate: float) -> Iterator[str]:
    """The parts in Markdown.

    Args:
      resolution: image size of the generator.
      parts: the parts, with the entry "copy".
      step: seconds of a whole step.
      rate: operations per second of an ordinary convolution.
    """
    copy_rate = parts["copy"].bytes / parts["copy"].seconds
    rows = {name: part for name, part in parts.items() if name != "copy"}
    total = Part(*(sum(column) for column in zip(*rows.values(), strict=True)))
    rows |= {"together": total, "a step": total._replace(seconds=step)}
    yield from markdown(
        [
            f"{resolution} px, batch 1", "s", "GFLOP", f"s at {rate / 1e9:,.0f} GFLOP/s", "GB",
            f"s at {copy_rate / 1e9:.0f} GB/s",
        ],
        (
            [name, f"{part.seconds:.2f}", f"{part.operations / 1e9:.3g}" if part.operations else "–",
             f"{part.operations / rate:.2f}" if part.operations else "–", f"{part.bytes / 1e9:.2f}",
             f"{part.bytes / copy_rate:.2f}"]
            for name, part in rows.items()
        ),
    )  # fmt: skip
