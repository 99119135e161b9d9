"""Where the time of an optimisation step goes, for `benchmark.py`: its parts, each compiled and timed alone.

Parts alone are not parts in place: together they are fused and run beside one another, so that a step may take less
than their sum, or more where they crowd each other out of the caches.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from samjax import inversion, latents, losses
from samjax.config import Precision
from samjax.nets import lpips
from samjax.nets.stylegan2 import StyleGAN2Config

if TYPE_CHECKING:
    from benchmark import Operations

COPIED = 1 << 28  # bytes of the array whose copying gives the device's rate


class Part(NamedTuple):
    """Seconds and bytes of one pass; operations are the convolutions' by `benchmark.step_operations`."""

    seconds: float
    bytes: float
    operations: int


class Parts:
    """`parts(n)` gives {name: Part} as medians of n passes, and "copy" as that of a large array."""

    def __init__(self, config: StyleGAN2Config, precision: Precision = "highest"):
        from benchmark import OurStep  # which imports this module for its table

        step = OurStep(config, 1, precision)
        self.device = step.device
        self._programs = dict(_programs(*step.arguments, step.operations))

    def __call__(self, repeats: int) -> dict[str, Part]:
        passes = {name: _time(program, arguments, repeats) for name, (program, arguments, _) in self._programs.items()}
        found = {}
        for name, (program, _, operations) in self._programs.items():
            whole = Part(passes[name], _bytes(program), operations)
            there = found.get(_THERE.get(name, ""), Part(0.0, 0.0, 0))
            found[name] = Part(whole.seconds - there.seconds, whole.bytes - there.bytes, operations)
        return found


_THERE = {"back to the latents": "synthesis", "back to the image": "LPIPS-VGG"}
"""Of a way there and back the way there is taken off."""


def _programs(
    structure: inversion.Structure,
    networks: inversion.Networks,
    batch: inversion.Batch,
    hyper: inversion.Hyperparameters,
    operations: Operations,
) -> Iterator[tuple[str, tuple[Any, tuple[Any, ...], int]]]:
    """Of each part: the compiled program, its arguments, and the operations of its convolutions."""
    size, shape, half = structure.loss_resolution, batch.targets.shape[1:3], structure.half_precision

    def synthesis(start: dict[str, Array], params: Any, masks: Any, keys: Array) -> Array:
        return latents.synthesize_latents(
            structure.generator, params, start, masks, noise=structure.noise, noise_keys=keys, half_precision=half
        ).image

    def squares(image: Array, targets: Array) -> Array:
        return losses.mean_squares(losses.comparable(image, size, *shape), targets)

    def perceptual(image: Array, params: Any, features: Any) -> Array:
        return lpips.distance(params, lpips.features(params, image, "vgg", half_precision=half), features)

    def update(start: dict[str, Array], state: Any, prior: Any, offsets: Any) -> Any:
        def penalties(x: dict[str, Array]) -> Array:
            f_rec = hyper.lambda_f_rec * losses.offset_distance(x, offsets)
            return jnp.sum(f_rec + losses.delta(x["W+"]) + losses.prior_distance(prior, x["W+"]))

        updates, state = optax.scale_by_adam().update(jax.grad(penalties)(start), state)
        return jax.tree.map(lambda x, change: x - hyper.lr * change, start, updates), state

    def compiled(function: Callable[..., Any], *arguments: Any, operations: int = 0) -> Any:
        with jax.default_matmul_precision(structure.precision):
            return jax.jit(function).lower(*arguments).compile(), arguments, operations

    back = lambda function: jax.grad(lambda *arguments: jnp.sum(function(*arguments)))  # noqa: E731
    formed = (batch.start, networks.generator, batch.masks, batch.keys)
    image = jnp.zeros((1, structure.generator.img_resolution, structure.generator.img_resolution, 3))
    compared = (batch.targets, networks.lpips, batch.features)
    yield "synthesis", compiled(synthesis, *formed, operations=operations.synthesis_forward)
    yield "back to the latents", compiled(back(synthesis), *formed, operations=operations.synthesis_backward)
    yield "resampling, squared error, and back", compiled(back(squares), image, batch.targets)
    yield "LPIPS-VGG", compiled(perceptual, *compared, operations=operations.lpips_forward)
    yield "back to the image", compiled(back(perceptual), *compared, operations=operations.lpips_backward)
    state = optax.scale_by_adam().init(batch.start)
    yield "penalties and Adam", compiled(update, batch.start, state, networks.prior, batch.start)
    yield "copy", compiled(functools.partial(jnp.add, 1.0), jnp.zeros(COPIED // 4, jnp.float32))


def _time(program: Any, arguments: tuple[Any, ...], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first is not counted
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _bytes(program: Any) -> float:
    """That the program reads and writes, as XLA counts them."""
    return float((program.cost_analysis() or {}).get("bytes accessed", float("nan")))


def table(resolution: int, parts: dict[str, Part], step: float, rate: float) -> Iterator[str]:
    """In Markdown: `step` seconds of the whole, `rate` operations a second of an ordinary convolution."""
    copy_rate = parts["copy"].bytes / parts["copy"].seconds
    rates = f"GFLOP | s at {rate / 1e9:,.0f} GFLOP/s | GB | s at {copy_rate / 1e9:.0f} GB/s"
    yield f"| {resolution} px, batch 1 | s | {rates} |"
    yield "|---" + "|--:" * 5 + "|"
    rows = {name: part for name, part in parts.items() if name != "copy"}
    total = Part(*(sum(column) for column in zip(*rows.values(), strict=True)))
    for name, part in {**rows, "together": total, "a step": total._replace(seconds=step)}.items():
        computed = f"{part.operations / 1e9:.3g} | {part.operations / rate:.2f}" if part.operations else "– | –"
        yield f"| {name} | {part.seconds:.2f} | {computed} | {part.bytes / 1e9:.2f} | {part.bytes / copy_rate:.2f} |"
