"""What is timed: an optimization step of samjax with random weights, and an ordinary convolution to compare it with."""

from __future__ import annotations

import resource
import time
from typing import NamedTuple

import jax
import numpy as np
from operations import convolution, target_size

from samjax import inversion, latents, runtime, testing
from samjax.config import InversionConfig, Precision
from samjax.nets.convolution import direct
from samjax.nets.stylegan2 import StyleGAN2Config


class StepArguments(NamedTuple):
    """The arguments of `samjax.inversion.run_chunk`."""

    structure: inversion.Structure
    networks: inversion.Networks
    items: inversion.Items
    hyper: inversion.Hyperparameters
    state: inversion.State


def random_arguments(
    config: StyleGAN2Config, settings: InversionConfig, *, minimal: bool | None = None
) -> StepArguments:
    """A batch of random targets and masks in all latent layers, with random weights.

    Args:
      config: sizes of the generator.
      settings: settings of the inversion.
      minimal: see `samjax.inversion.prepack`.
    """
    rng = np.random.default_rng(0)
    count, layers = settings.batch_size, latents.latent_layers(config)
    networks = testing.tiny_networks(config, "vgg", samples=2 * config.w_dim)
    targets = rng.uniform(-1, 1, (count, *target_size(config.img_resolution), 3)).astype(np.float32)
    masks = {
        layer.name: rng.random((count, layer.resolution, layer.resolution, 1), np.float32)
        for layer in layers
        if layer.resolution is not None
    }
    start = latents.init_latents(layers, jax.numpy.asarray(rng.standard_normal((count, config.w_dim), np.float32)))
    items = inversion.Items(targets, masks, start, np.arange(count))
    structure = inversion.structure(config, settings)
    networks = inversion.prepack(structure, networks, targets.shape[1:3], minimal=minimal)
    prepared = inversion.prepare(structure, networks, items)
    return StepArguments(structure, networks, prepared, inversion.hyperparameters(settings), inversion.init(items))


class OurStep:
    """Steps of samjax: called with a number of steps, returns the seconds they took."""

    def __init__(self, config: StyleGAN2Config, batch_size: int, precision: Precision = "highest") -> None:
        runtime.keep_freed_memory()  # as every program does
        settings = InversionConfig(num_opt_steps=10**6, batch_size=batch_size, precision=precision)
        self._step = random_arguments(config, settings)
        self.device = jax.devices()[0].device_kind

    def __call__(self, steps: int) -> float:
        began = time.perf_counter()
        before = int(self._step.state.step)
        for _ in range(-(-steps // self._step.structure.chunk_steps)):
            state, _ = inversion.run_chunk(*self._step)
            self._step = self._step._replace(state=state)
        done = int(self._step.state.step) - before
        return (time.perf_counter() - began) * steps / done

    def peak_memory(self) -> int:
        """Peak memory in bytes: the device's, or the process's on a CPU."""
        on_device = jax.devices()[0].memory_stats() or {}
        return on_device.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Convolution:
    """An ordinary 3x3 convolution of 512 channels on 64 x 64 pixels, timed like a step."""

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
