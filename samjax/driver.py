"""The host's side of inversion: batches, devices, progress, and rendering.

`run` takes any number of items through the compiled program of `samjax.inversion`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from samjax import batching
from samjax.batching import take
from samjax.config import InversionConfig
from samjax.errors import UserError
from samjax.inversion import (
    Hyperparameters,
    Items,
    Networks,
    Stage,
    State,
    Structure,
    Terms,
    begin_stage,
    check_items,
    hyperparameters,
    init,
    prepack,
    prepack_lpips,
    prepare,
    run_chunk,
    stages,
    structure,
)
from samjax.latents import Latents, Masks, draw
from samjax.nets.stylegan2 import Noise, Params, StyleGAN2Config


class DivergedError(UserError):
    """The loss of some item became infinite or NaN.

    Attributes:
      latents: latents of the whole batch after the last chunk whose losses were all finite.
      step: step at which the loss was not finite.
      items: positions of the affected items.
    """

    def __init__(self, latents: dict[str, Array], step: int, items: tuple[int, ...]):
        super().__init__(
            f"the loss is no longer finite at step {step} (item {', '.join(map(str, items))}): "
            "try a lower learning rate, or smaller weights of the loss terms"
        )
        self.latents = latents
        self.step = step
        self.items = items


class Progress(NamedTuple):
    """The state of a run, as the host sees it between chunks.

    Attributes:
      group, groups: index of this batch of items, and how many batches there are.
      items: positions of the items in this batch; the last batch may repeat its last item.
      step, num_steps: steps taken for this batch, and in total.
      terms: `Terms` of the steps since the last call, NumPy arrays [steps, N] without repeated items.
      steps_per_second: speed of this run; the first chunk, which compiles, counts only until there is a second.
      seconds_left: for all batches, at that rate.
      state: state of the optimization; its arrays are valid until the callback returns, so copy what you keep.
      masks: masks of the items in this batch, for `render`.
    """

    group: int
    groups: int
    items: np.ndarray
    step: int
    num_steps: int
    terms: Terms
    steps_per_second: float
    seconds_left: float
    state: State
    masks: Masks


OnProgress = Callable[[Progress], None]


def _placement(devices: Sequence[Any] | None, batch_size: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Two functions that put arrays on `devices`: one divides the items of a batch, the other copies all to each."""
    if devices is None or list(devices) == jax.devices()[:1]:  # a mesh of one would compile every program again
        return lambda tree: tree, lambda tree: tree
    if batch_size % len(devices):
        raise ValueError(f"a batch of {batch_size} is not divisible by {len(devices)} devices")
    mesh = Mesh(np.asarray(devices), ("items",))
    divided, whole = NamedSharding(mesh, PartitionSpec("items")), NamedSharding(mesh, PartitionSpec())
    divide = lambda x: jax.device_put(x, divided if np.ndim(x) else whole)  # noqa: E731
    return lambda tree: jax.tree.map(divide, tree), lambda tree: jax.device_put(tree, whole)


def run(
    generator: StyleGAN2Config,
    networks: Networks,
    items: Items,
    config: InversionConfig,
    *,
    on_progress: OnProgress | None = None,
    states: Mapping[int, State] | None = None,
    devices: Sequence[Any] | None = None,
) -> tuple[dict[str, Array], Terms]:
    """Inverts any number of items, `config.batch_size` at a time.

    The last batch is filled by repeating its last item, so that every batch runs the same program.

    Args:
      generator: sizes of the generator.
      networks: its parameters, those of LPIPS, and the prior.
      items: N items.
      config: settings.
      on_progress: called after each chunk of steps.
      states: {group: state} to continue from, as in the `Progress` of an earlier run with the same arguments.
      devices: devices over which every batch is divided; the default device if None.

    Returns:
      Latents {"W+": [N, num_ws, w_dim], ...}, and the loss terms of every step, NumPy arrays [steps, N].

    Raises:
      DivergedError: a loss is not finite; the error carries the last good latents.
      ValueError: shapes are inconsistent, or a batch is not divisible by the number of devices.
    """
    program = structure(generator, config)
    items = items._replace(seeds=np.asarray(items.seeds))
    check_items(program, items)
    divide, replicate = _placement(devices, config.batch_size)
    parts = _parts(generator, networks, config, items.targets.shape[1:3], replicate)
    count, num_steps = items.targets.shape[0], config.num_opt_steps
    batches = list(batching.rows(count, config.batch_size))
    clock = _Clock(len(batches), num_steps)
    latents, history = [], Terms(*(np.full((num_steps, count), np.nan, np.float32) for _ in Terms._fields))
    for group, index in enumerate(batches):
        first = int(index[0])
        real = min(len(index), count - first)
        chosen = divide(take(items, index))
        resumed = (states or {}).get(group)
        state = init(chosen) if resumed is None else jax.tree.map(functools.partial(jnp.array, copy=True), resumed)
        state = divide(state)
        try:
            for state, terms in _chunks(parts, chosen, state):  # noqa: B020
                done = int(state.step)
                seen = Terms(*(term[:, :real] for term in terms))
                for column, term in zip(history, seen, strict=True):
                    column[done - len(term) : done, first : first + real] = term
                rate, left = clock.tick(group, done, len(seen.total))
                if on_progress is not None:
                    where = (group, len(batches), index, done, num_steps)
                    on_progress(Progress(*where, seen, rate, left, state, chosen.masks))
        except _NotFinite as stop:
            bad = tuple(first + i for i in stop.items if i < real)
            raise DivergedError(take(stop.latents, slice(real)), stop.step, bad) from None
        latents.append(take(state.latents, slice(real)))
    return {name: jnp.concatenate([part[name] for part in latents]) for name in latents[0]}, history


def even_batches(config: InversionConfig, count: int) -> InversionConfig:
    """`config` with the smallest batch size that processes `count` items in as few batches as before."""
    batches = -(-count // config.batch_size)
    return dataclasses.replace(config, batch_size=-(-count // max(batches, 1)) or 1)


def starting_states(items: Items, latents: Latents, config: InversionConfig) -> dict[int, State]:
    """`states` for `run` that begin at other latents than `items.start`, to which penalties still refer.

    Args:
      items: N items.
      latents: {"W+": [N, num_ws, w_dim], ...}, such as those of an earlier run.
      config: settings of the run.
    """
    begin = items._replace(start={name: np.asarray(value) for name, value in latents.items()})
    batches = batching.rows(items.targets.shape[0], config.batch_size)
    return {group: init(take(begin, index)) for group, index in enumerate(batches)}


def render(
    config: StyleGAN2Config,
    params: Params,
    latents: Latents,
    masks: Masks,
    *,
    noise: Noise = "const",
    precision: str = "highest",
    batch_size: int = 1,
) -> np.ndarray:
    """Images of any number of latents, `batch_size` at a time.

    Args:
      config: sizes of the generator.
      params: its parameters.
      latents: {"W+": [N, num_ws, w_dim], ...}.
      masks: {"F4": [N, 16, 16, 1], ...}.
      noise: "const" or "none".
      precision: precision of matrix products and convolutions.
      batch_size: images in one pass.

    Returns:
      [N, R, R, 3] float32, in [-1, 1] up to overshoot.
    """
    made = lambda items: draw(config, params, *items, noise=noise, precision=precision)[0]  # noqa: E731
    return batching.map_batches(made, (dict(latents), dict(masks)), batch_size)


class _NotFinite(Exception):
    def __init__(self, latents: dict[str, Array], step: int, items: list[int]):
        super().__init__()
        self.latents, self.step, self.items = latents, step, items


class _Part(NamedTuple):
    """A stage of a run, with its program, and the parameters as given and as that takes them."""

    program: Structure
    given: Networks
    networks: Networks
    hyper: Hyperparameters
    stage: Stage


def _parts(
    generator: StyleGAN2Config,
    networks: Networks,
    config: InversionConfig,
    size: tuple[int, int],
    replicate: Callable[[Any], Any],
) -> list[_Part]:
    """The stages of a run; weights that two have in common are prepacked once."""
    made, packed = [], None
    for stage in stages(config):
        program = structure(generator, stage.config)
        perceptual = networks.lpips if stage.config.lpips_type == config.lpips_type else networks.vgg
        if perceptual is None:
            raise ValueError("final steps need the parameters of LPIPS-VGG")
        own = networks._replace(vgg=None, lpips=perceptual)
        if packed is None:
            packed = replicate(prepack(program, own, size))
        else:
            packed = packed._replace(lpips=replicate(prepack_lpips(program, own.lpips, size)))
        hyper = hyperparameters(stage.config, stage.first, stage.style_rate)
        made.append(_Part(program, own, packed, hyper, stage))
    return made


def _chunks(parts: Sequence[_Part], items: Items, state: State) -> Iterator[tuple[State, Terms]]:
    """Runs the rest of all stages; after each chunk, yields the state and the terms of its steps, as host arrays."""
    for part in parts:
        if int(state.step) < part.stage.end:
            # From the parameters as given: the same program then serves the metrics of the result.
            prepared = prepare(part.program, part.given, items)
            for state, terms in _steps(part, prepared, begin_stage(state, part.stage.first)):  # noqa: B020
                yield state, terms


def _steps(part: _Part, items: Items, state: State) -> Iterator[tuple[State, Terms]]:
    """Runs the rest of a stage; yields as `_chunks`."""
    good = jax.tree.map(jnp.copy, state.latents)
    while (before := int(state.step)) < part.stage.end:
        start = jax.tree.map(jnp.copy, state.latents)
        state, chunk = run_chunk(part.program, part.networks, items, part.hyper, state)
        done = int(state.step) - before
        terms = Terms(*(np.asarray(term)[:done] for term in chunk))
        if np.isfinite(terms.total[0]).all():
            good = start  # its loss is known only now
        if not bool(state.finite):
            losses_finite = np.isfinite(terms.total[-1])
            step = before + done - (not losses_finite.all())
            healthy = [
                np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in map(np.asarray, state.latents.values())
            ]
            raise _NotFinite(good, step, np.flatnonzero(~np.logical_and.reduce([losses_finite, *healthy])).tolist())
        yield state, terms


class _Clock:
    """Steps per second over all groups; the first chunk, which may compile, counts only while it is the only one."""

    def __init__(self, groups: int, num_steps: int):
        self._groups, self._num_steps = groups, num_steps
        self._began = self._last = time.perf_counter()
        self._chunks = self._steps = 0

    def tick(self, group: int, done: int, steps: int) -> tuple[float, float]:
        now = time.perf_counter()
        self._chunks += 1
        if self._chunks == 2:
            self._began, self._steps = self._last, 0
        self._steps += steps
        self._last = now
        rate = self._steps / max(now - self._began, 1e-9)
        return rate, (self._num_steps * (self._groups - group) - done) / rate


@contextlib.contextmanager
def progress_bar(description: str = "", **options: Any) -> Iterator[OnProgress]:
    """A tqdm bar as `on_progress`: loss terms (means over the batch), steps per second, time left.

    Args:
      description: text before the bar.
      **options: options of `tqdm.tqdm`, such as `disable` or `file`.
    """
    with tqdm.tqdm(desc=description, unit="step", **options) as bar:

        def update(progress: Progress) -> None:
            bar.total = progress.num_steps * progress.groups
            last = {name: float(np.mean(term[-1])) for name, term in progress.terms._asdict().items()}
            bar.set_postfix({name: f"{value:.3g}" for name, value in last.items()}, refresh=False)
            bar.update(progress.num_steps * progress.group + progress.step - bar.n)

        yield update
