"""Inversion: the latents whose image is the target, by one compiled Adam loop over all latent layers.

An *item* is a target image with its masks, start and seed. Items of a batch run in one program and do not touch one
another: each one's latents are what they would be alone. A batch of pictures, of thresholds for one picture and of
single-layer inversions differ only in their items.

Everything that varies between runs is an argument of the compiled function: weights, targets, masks, learning rate,
number of steps. Only shapes, the LPIPS network, the kind of noise and the chunk length are part of the program, so a
second image, threshold or direction compiles nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from samjax import losses
from samjax.config import InversionConfig
from samjax.errors import UserError
from samjax.latents import Latents, Masks, synthesize_latents
from samjax.losses import Prior
from samjax.nets import lpips, stylegan2
from samjax.nets.stylegan2 import Noise, Params, StyleGAN2Config


class Networks(NamedTuple):
    """Everything frozen: the generator's parameters, those of LPIPS, and the prior on W+."""

    generator: Params
    lpips: Params
    prior: Prior


class Items(NamedTuple):
    """What is to be inverted.

    Attributes:
      targets: [N, h, w, 3] in [-1, 1]; the loss resolution, less on one side for letterboxed images.
      masks: {"F4": [N, 16, 16, 1], ...} in [0, 1], one for each F layer in `start`.
      start: {"W+": [N, num_ws, w_dim], "F4": [N, 16, 16, C], ...}; its keys are the layers that are optimised.
      seeds: [N] integers; an item's noise depends on its own only.
    """

    targets: Any
    masks: Masks
    start: Latents
    seeds: Any


class Terms(NamedTuple):
    """The loss terms of each item, weighted, so that they add up to `total`; arrays [N], or [steps, N]."""

    mse: Array | np.ndarray
    lpips: Array | np.ndarray
    mvg: Array | np.ndarray
    delta: Array | np.ndarray
    f_rec: Array | np.ndarray
    total: Array | np.ndarray


class State(NamedTuple):
    """An optimisation between two steps; a pytree of arrays, so that saving it is enough to go on later.

    Attributes:
      latents: as in `Items.start`.
      optimizer: Adam's moments.
      step: [] int32, steps taken.
      finite: [] bool, whether every loss so far was.
    """

    latents: dict[str, Array]
    optimizer: optax.ScaleByAdamState
    step: Array
    finite: Array


class Hyperparameters(NamedTuple):
    """The numbers of an `InversionConfig` that a compiled program takes as arguments; arrays []."""

    num_opt_steps: Array
    lr: Array
    lr_rampdown_length: Array
    lr_rampup_length: Array
    beta1: Array
    beta2: Array
    lambda_mse: Array
    lambda_lpips: Array
    lambda_f_rec: Array
    lambda_delta: Array
    lambda_mvg: Array


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a compiled program is made for.

    Attributes:
      generator: sizes of the generator.
      lpips_type: LPIPS network; None leaves the term out.
      noise, loss_resolution, chunk_steps, half_precision: as in `InversionConfig`.
      precision: its `matmul_precision`.
    """

    generator: StyleGAN2Config
    lpips_type: Literal["vgg", "alex"] | None
    noise: Noise
    loss_resolution: int
    chunk_steps: int
    precision: str
    half_precision: bool


class Batch(NamedTuple):
    """A batch of `Items` on the device: `features` are LPIPS' of the targets, computed once; `keys` [N] the noise's."""

    targets: Array
    features: tuple[Array, ...]
    masks: dict[str, Array]
    start: dict[str, Array]
    keys: Array


class DivergedError(UserError):
    """The loss of some item became infinite or NaN.

    Attributes:
      latents: of the whole batch at the last step between chunks at which every loss was finite.
      step: at which the loss was not finite.
      items: positions of the items concerned.
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
    """What the host sees between chunks.

    Attributes:
      group, groups: which batch of items this is, from 0, and how many there are.
      step, num_steps: steps taken of this batch.
      terms: `Terms` of the steps since the last report, host arrays [steps, N]; repeated items not among them.
      steps_per_second: of this run; the first chunk, which compiles, counts only until there is a second.
      seconds_left: for all groups, by that rate.
      state: the state; its arrays are valid until the callback returns, copy what is to be kept.
    """

    group: int
    groups: int
    step: int
    num_steps: int
    terms: Terms
    steps_per_second: float
    seconds_left: float
    state: State


class Result(NamedTuple):
    """Inverted latents, {"W+": [N, num_ws, w_dim], ...}, and the loss terms of every step, host arrays [steps, N]."""

    latents: dict[str, Array]
    terms: Terms
    seconds: float


# --- pure ---


def structure(generator: StyleGAN2Config, config: InversionConfig) -> Structure:
    """The part of the settings that a program is compiled for."""
    return Structure(
        generator,
        config.lpips_type if config.lambda_lpips > 0 else None,
        config.noise,
        min(config.loss_resolution, generator.img_resolution),
        config.chunk_steps or (1 if jax.default_backend() == "cpu" else 25),
        config.matmul_precision,
        config.half_precision,
    )


def default_batch_size(generator: StyleGAN2Config, most: int = 8) -> int:
    """How many items to optimise at once where nobody says: one on a CPU, elsewhere what fits, at most `most`.

    An item takes about six times the generator's activations (XLA's own count for 256 to 1024 px); twice that is
    reckoned with, and with LPIPS.
    """
    if jax.default_backend() == "cpu":
        return 1
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:
        return most
    activations = 4 * sum(r * r * generator.channels(r) for r in generator.block_resolutions)
    return max(1, min(most, int((memory - 2**30) / (12 * activations + 2**28))))


def hyperparameters(config: InversionConfig) -> Hyperparameters:
    """The part of the settings that a program takes as arguments."""
    numbers = (getattr(config, name) for name in Hyperparameters._fields)
    return Hyperparameters(*(jnp.asarray(x, jnp.int32 if isinstance(x, int) else jnp.float32) for x in numbers))


def init(items: Items) -> State:
    """The state before the first step; it shares no memory with `items`, so that it can be donated."""
    latents = {name: jnp.array(value, jnp.float32, copy=True) for name, value in items.start.items()}
    optimizer = optax.scale_by_adam().init(latents)
    assert isinstance(optimizer, optax.ScaleByAdamState)
    return State(latents, optimizer, jnp.zeros((), jnp.int32), jnp.ones((), bool))


def loss_terms(
    structure: Structure, networks: Networks, batch: Batch, hyper: Hyperparameters, latents: Latents, keys: Array
) -> Terms:
    """The loss of latents, term by term; `keys` [N] are the noise's at this step."""
    image = synthesize_latents(
        structure.generator, networks.generator, latents, batch.masks, noise=structure.noise, noise_keys=keys,
        half_precision=structure.half_precision,
    ).image  # fmt: skip
    image = losses.comparable(image, structure.loss_resolution, *batch.targets.shape[1:3])
    mse = hyper.lambda_mse * losses.mean_squares(image, batch.targets)
    perceptual = jnp.zeros_like(mse)
    if structure.lpips_type is not None:
        features = lpips.features(networks.lpips, image, structure.lpips_type, half_precision=structure.half_precision)
        perceptual = hyper.lambda_lpips * lpips.distance(networks.lpips, features, batch.features)
    mvg = hyper.lambda_mvg * losses.prior_distance(networks.prior, latents["W+"])
    delta = hyper.lambda_delta * losses.delta(latents["W+"])
    f_rec = hyper.lambda_f_rec * losses.offset_distance(latents, batch.start) + jnp.zeros_like(mse)
    return Terms(mse, perceptual, mvg, delta, f_rec, mse + perceptual + mvg + delta + f_rec)


def step(
    structure: Structure, networks: Networks, batch: Batch, hyper: Hyperparameters, state: State
) -> tuple[State, Terms]:
    """One Adam step of every item; the terms are those before it."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(batch.keys, state.step)

    def objective(latents: dict[str, Array]) -> tuple[Array, Terms]:
        terms = loss_terms(structure, networks, batch, hyper, latents, keys)
        return jnp.sum(terms.total), terms  # a sum, so that each item's gradient is its own

    gradients, terms = jax.grad(objective, has_aux=True)(state.latents)
    adam = optax.scale_by_adam(b1=hyper.beta1, b2=hyper.beta2)  # type: ignore[arg-type]  # traced, so any values do
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float32 to an int32 power
        updates, optimizer = adam.update(gradients, state.optimizer)
    rate = losses.learning_rate(
        state.step, hyper.num_opt_steps, hyper.lr, hyper.lr_rampdown_length, hyper.lr_rampup_length
    )
    latents = jax.tree.map(lambda x, update: x - rate * update, state.latents, updates)
    assert isinstance(optimizer, optax.ScaleByAdamState)
    return State(latents, optimizer, state.step + 1, jnp.all(jnp.isfinite(terms.total))), terms


@functools.partial(jax.jit, static_argnames="structure", donate_argnames="state")
def run_chunk(
    structure: Structure, networks: Networks, batch: Batch, hyper: Hyperparameters, state: State
) -> tuple[State, Terms]:
    """`structure.chunk_steps` steps in one `lax.scan`; those beyond the run's end or a non-finite loss do nothing.

    Returns:
      The new state (the old one is donated), and the terms of each step [chunk_steps, N]; NaN where nothing was done.
    """

    def body(state: State, _: None) -> tuple[State, Terms]:
        active = (state.step < hyper.num_opt_steps) & state.finite
        after, terms = step(structure, networks, batch, hyper, state)
        # Not `lax.cond`: XLA runs what is inside a conditional on one thread of a CPU.
        state = jax.tree.map(lambda new, old: jnp.where(active, new, old), after, state)
        return state, jax.tree.map(lambda term: jnp.where(active, term, jnp.nan), terms)

    with jax.default_matmul_precision(structure.precision):
        if structure.chunk_steps == 1:  # a loop of one step would still be a loop: see `InversionConfig.chunk_steps`
            state, terms = body(state, None)
            terms = jax.tree.map(lambda term: term[None], terms)
        else:
            state, terms = lax.scan(body, state, None, length=structure.chunk_steps)
    # The last step's own loss is never computed: look at the latents themselves once a chunk.
    healthy = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), state.latents)
    return state._replace(finite=state.finite & jnp.all(jnp.stack(jax.tree.leaves(healthy)))), terms


@functools.partial(jax.jit, static_argnames=("net", "precision", "half_precision"))
def _features(
    params: Params, images: Array, net: lpips.Net, precision: str, half_precision: bool = False
) -> tuple[Array, ...]:
    with jax.default_matmul_precision(precision):
        return lpips.features(params, images, net, half_precision=half_precision)


@functools.partial(jax.jit, static_argnames=("structure", "size"))
def freeze(structure: Structure, networks: Networks, size: tuple[int, int]) -> Networks:
    """Computes once what every step would compute from frozen weights; `size` is height and width of the targets."""
    half = structure.half_precision
    generator = stylegan2.freeze(structure.generator, networks.generator, half_precision=half)
    if structure.lpips_type is None:
        return networks._replace(generator=generator)
    perceptual = lpips.freeze(networks.lpips, *size, structure.lpips_type, half_precision=half)
    return networks._replace(generator=generator, lpips=perceptual)


def prepare(structure: Structure, networks: Networks, items: Items) -> Batch:
    """Puts items on the device, with their targets' LPIPS features.

    Raises:
      ValueError: shapes that do not belong together.
    """
    _check(structure, items)
    to_device = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    targets = to_device(items.targets)
    keys = jax.vmap(jax.random.key)(jnp.asarray(items.seeds, jnp.uint32))
    net = structure.lpips_type
    half = structure.half_precision
    features = () if net is None else _features(networks.lpips, targets, net, structure.precision, half)
    return Batch(targets, features, to_device(dict(items.masks)), to_device(dict(items.start)), keys)


def _check(structure: Structure, items: Items) -> None:
    size = structure.loss_resolution
    if items.targets.ndim != 4 or max(items.targets.shape[1:3]) != size or items.targets.shape[3] != 3:
        raise ValueError(f"targets of shape {items.targets.shape}; the longer side must be {size} px: [N, h, w, 3]")
    if set(items.masks) != set(items.start) - {"W+"}:
        raise ValueError(f"masks for {sorted(items.masks)} and latents {sorted(items.start)}")
    counts = {x.shape[0] for x in jax.tree.leaves((items.targets, items.masks, items.start, np.asarray(items.seeds)))}
    if len(counts) != 1:
        raise ValueError(f"targets, masks, latents and seeds for different numbers of items: {sorted(counts)}")


# --- host ---


def take(tree: Any, index: Any) -> Any:
    """Indexes the leading axis of every array in a pytree of items, latents or masks."""
    index = np.asarray(index) if isinstance(index, list) else index
    return jax.tree.map(lambda x: x[index], tree)


def _placement(devices: Sequence[Any] | None, batch_size: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Two functions that put arrays on `devices`: one divides the items of a batch, one puts all on each."""
    if devices is None:
        return lambda tree: tree, lambda tree: tree
    if batch_size % len(devices):
        raise ValueError(f"a batch of {batch_size} does not divide by {len(devices)} devices")
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
    on_progress: Callable[[Progress], None] | None = None,
    states: Mapping[int, State] | None = None,
    devices: Sequence[Any] | None = None,
) -> Result:
    """Inverts any number of items, `config.batch_size` at a time.

    The last batch is filled up by repeating its last item, so that every batch runs the same program.

    Args:
      generator: sizes of the generator.
      networks: its parameters, LPIPS' and the prior.
      items: what to invert.
      config: settings.
      on_progress: called after each chunk of steps.
      states: {group: state} from which to go on, as `Progress` of an earlier run with the same arguments gave them.
      devices: over which every batch is divided; the default device if None.

    Raises:
      DivergedError: a loss that is not finite; it carries the last good latents.
      ValueError: shapes that do not belong together, or a batch that does not divide by the devices.
    """
    program, hyper = structure(generator, config), hyperparameters(config)
    items = items._replace(seeds=np.asarray(items.seeds))
    _check(program, items)
    divide, replicate = _placement(devices, config.batch_size)
    networks = replicate(freeze(program, networks, items.targets.shape[1:3]))
    began = time.perf_counter()
    count, size, num_steps = items.targets.shape[0], config.batch_size, config.num_opt_steps
    groups = -(-count // size)
    clock = _Clock(groups, num_steps)
    latents, history = [], Terms(*(np.full((num_steps, count), np.nan, np.float32) for _ in Terms._fields))
    for group in range(groups):
        first = group * size
        real = min(size, count - first)
        chosen = take(items, np.minimum(np.arange(first, first + size), count - 1))
        chosen = divide(chosen)
        batch = prepare(program, networks, chosen)
        resumed = (states or {}).get(group)
        state = init(chosen) if resumed is None else jax.tree.map(functools.partial(jnp.array, copy=True), resumed)
        state = divide(state)
        try:
            for state, terms in _chunks(program, networks, batch, hyper, state, num_steps):  # noqa: B020
                done = int(state.step)
                seen = Terms(*(term[:, :real] for term in terms))
                for column, term in zip(history, seen, strict=True):
                    column[done - len(term) : done, first : first + real] = term
                rate, left = clock.tick(group, done, len(seen.total))
                if on_progress is not None:
                    on_progress(Progress(group, groups, done, num_steps, seen, rate, left, state))
        except _NotFinite as stop:
            bad = tuple(first + i for i in stop.items if i < real)
            raise DivergedError(take(stop.latents, slice(real)), stop.step, bad) from None
        latents.append(take(state.latents, slice(real)))
    joined = {name: jnp.concatenate([part[name] for part in latents]) for name in latents[0]}
    return Result(joined, history, time.perf_counter() - began)


@functools.partial(jax.jit, static_argnames=("config", "noise", "precision"))
def _render(
    config: StyleGAN2Config, params: Params, latents: Latents, masks: Masks, noise: Noise, precision: str
) -> Array:
    with jax.default_matmul_precision(precision):
        return synthesize_latents(config, params, latents, masks, noise=noise).image


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
    """Images of any number of latents, `batch_size` at a time; [N, R, R, 3], in [-1, 1] up to overshoot.

    Args:
      config: sizes of the generator.
      params: its parameters.
      latents: [N, ...] each.
      masks: [N, ...] each.
      noise: "const" or "none".
      precision: of matrix products and convolutions.
      batch_size: images in one pass; the last one is filled up.
    """
    count = np.shape(latents["W+"])[0]
    parts = []
    for first in range(0, count, batch_size):
        index = np.minimum(np.arange(first, first + batch_size), count - 1)
        image = _render(config, params, *take((dict(latents), dict(masks)), index), noise, precision)
        parts.append(np.asarray(image)[: count - first])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("config", "size", "net", "precision"))
def _candidates(
    config: StyleGAN2Config,
    networks: Networks,
    features: tuple[Array, ...],
    target: Array,
    z: Array,
    psi: Array,
    size: int,
    net: lpips.Net,
    precision: str,
) -> tuple[Array, Array]:
    """Styles [B, num_ws, w_dim] of z, truncated to the mean style, and their images' LPIPS to every target [N, B]."""
    with jax.default_matmul_precision(precision):
        c = jnp.zeros((z.shape[0], config.c_dim)) if config.c_dim else None
        ws = networks.prior.mean_w + psi * (stylegan2.map_z(config, networks.generator, z, c) - networks.prior.mean_w)
        images = losses.comparable(stylegan2.synthesize(config, networks.generator, ws).image, size, *target.shape[1:3])
        found = lpips.features(networks.lpips, images, net)

        def to_target(features: tuple[Array, ...]) -> Array:
            same = jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape), features, found)
            return lpips.distance(networks.lpips, found, same)

        return ws, lax.map(to_target, features)


def start_latents(
    generator: StyleGAN2Config,
    networks: Networks,
    targets: Any,
    config: InversionConfig,
    *,
    kind: Literal["mean", "best"] = "mean",
    samples: int = 256,
    truncation_psi: float = 0.7,
    key: Array | None = None,
    batch_size: int = 8,
) -> np.ndarray:
    """Where W+ starts: the mean style, or that of the sampled image closest to each target.

    Args:
      generator: sizes of the generator.
      networks: its parameters, LPIPS' and the prior.
      targets: [N, h, w, 3] in [-1, 1].
      config: of the inversion.
      kind: "mean", or "best" of `samples` by LPIPS (the mean style is one of them).
      samples: mapped z to try.
      truncation_psi: 1 samples the generator's whole range, less stays nearer to its mean.
      key: random key, for "best".
      batch_size: sampled images in one pass.

    Returns:
      [N, num_ws, w_dim] float32.

    Raises:
      ValueError: an unknown `kind`, or no key where one is needed.
    """
    count = len(targets)
    mean = np.broadcast_to(np.asarray(networks.prior.mean_w), (count, generator.num_ws, generator.w_dim))
    if kind == "mean":
        return np.array(mean)
    if kind != "best":
        raise ValueError(f"W+ starts at 'mean' or 'best', not at {kind!r}")
    if key is None:
        raise ValueError("sampling needs a random key")
    size = structure(generator, config).loss_resolution
    targets = jnp.asarray(targets, jnp.float32)
    features = _features(networks.lpips, targets, config.lpips_type, config.matmul_precision)
    best, chosen = np.full(count, np.inf), np.array(mean)
    for first in range(0, samples, batch_size):
        z = jax.random.normal(jax.random.fold_in(key, first), (batch_size, generator.z_dim))
        # Truncated to nothing, the first sample of all is the mean style itself.
        psi = np.full((batch_size, 1, 1), truncation_psi, np.float32)
        psi[0] *= first > 0
        ws, distances = _candidates(
            generator, networks, features, targets, z, jnp.asarray(psi), size, config.lpips_type,
            config.matmul_precision,
        )  # fmt: skip
        distances = np.asarray(distances)[:, : samples - first]
        nearest = distances.argmin(axis=1)
        closer = distances.min(axis=1) < best
        best = np.where(closer, distances.min(axis=1), best)
        chosen[closer] = np.asarray(ws)[nearest[closer]]
    return chosen


class _NotFinite(Exception):
    def __init__(self, latents: dict[str, Array], step: int, items: list[int]):
        super().__init__()
        self.latents, self.step, self.items = latents, step, items


def _chunks(
    program: Structure, networks: Networks, batch: Batch, hyper: Hyperparameters, state: State, num_steps: int
) -> Iterator[tuple[State, Terms]]:
    """Runs chunks to the end; each yields the state and the terms of the steps it took, as host arrays."""
    good = jax.tree.map(jnp.copy, state.latents)
    while (before := int(state.step)) < num_steps:
        start = jax.tree.map(jnp.copy, state.latents)
        state, chunk = run_chunk(program, networks, batch, hyper, state)
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
def progress_bar(description: str = "", **options: Any) -> Iterator[Callable[[Progress], None]]:
    """A tqdm bar as `on_progress`: loss terms (means over the batch), steps per second, time left.

    Args:
      description: written before the bar.
      **options: of `tqdm.tqdm`, such as `disable` or `file`.
    """
    with tqdm.tqdm(desc=description, unit="step", **options) as bar:

        def update(progress: Progress) -> None:
            bar.total = progress.num_steps * progress.groups
            last = {name: float(np.mean(term[-1])) for name, term in progress.terms._asdict().items()}
            bar.set_postfix({name: f"{value:.3g}" for name, value in last.items()}, refresh=False)
            bar.update(progress.num_steps * progress.group + progress.step - bar.n)

        yield update
