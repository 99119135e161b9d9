"""Schedules of learning rates that trainings share."""

from __future__ import annotations

import jax.numpy as jnp
import optax


def warmup_cosine(lr: float, num_steps: int, warmup: int) -> optax.Schedule:
    """Half a cosine over the run, times a linear warm-up.

    Args:
      lr: highest learning rate.
      num_steps: length of the run.
      warmup: steps in which the rate rises.
    """
    steps = max(warmup, 1)
    rise = optax.linear_schedule(1 / steps, 1.0, steps - 1)
    cosine = optax.cosine_decay_schedule(lr, num_steps)
    return lambda count: rise(count) * cosine(jnp.asarray(count, jnp.float32))
