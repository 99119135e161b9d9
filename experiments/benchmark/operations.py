"""The convolutions of an optimization step, counted by hand, and how tables of such figures are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax

from samjax.nets import lpips
from samjax.nets.stylegan2 import StyleGAN2Config


class Operations(NamedTuple):
    """Multiplications and additions of the convolutions in one image's step."""

    synthesis_forward: int
    synthesis_backward: int
    lpips_forward: int
    lpips_backward: int


def convolution(height: int, width: int, kernel: int, inputs: int, outputs: int) -> int:
    """Operations of one convolution with a square kernel."""
    return 2 * height * width * kernel * kernel * inputs * outputs


def synthesis_operations(config: StyleGAN2Config) -> int:
    """Operations of one image's forward pass. An up-convolution multiplies each input pixel once by each tap."""
    total, before = 0, None
    for r in config.block_resolutions:
        channels = config.channels(r)
        if before is not None:
            total += convolution(r // 2, r // 2, 3, before, channels)
        total += convolution(r, r, 3, channels, channels) + convolution(r, r, 1, channels, config.img_channels)
        before = channels
    return total


def lpips_operations(height: int, width: int) -> int:
    """Operations of VGG16's thirteen convolutions on one image."""
    layers = jax.eval_shape(lambda: lpips.init("vgg", key=jax.random.key(0)))["backbone"]
    shapes = {name: (int(name[len("conv")]) - 1, layer["weight"].shape) for name, layer in layers.items()}
    return sum(convolution(height >> stage, width >> stage, 3, *shape[2:]) for stage, shape in shapes.values())


def step_operations(config: StyleGAN2Config) -> Operations:
    """Operations of one image's step.

    Weights are frozen, so the backward pass has one convolution for each of the forward pass. The target's LPIPS
    features are computed once an image, not at every step.
    """
    synthesis, perceptual = synthesis_operations(config), lpips_operations(*target_size(config.img_resolution))
    return Operations(synthesis, synthesis, perceptual, perceptual)


def target_size(resolution: int) -> tuple[int, int]:
    """Height and width at which the loss is computed. Images of 512 px are cars, which are letterboxed."""
    side = min(256, resolution)
    return (192, 256) if resolution == 512 else (side, side)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table: the first column is aligned left, the others right."""
    yield f"| {' | '.join(head)} |"
    yield "|---" + "|--:" * (len(head) - 1) + "|"
    for row in rows:
        yield f"| {' | '.join([*row, *['–'] * (len(head) - len(row))])} |"
