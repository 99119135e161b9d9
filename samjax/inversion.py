"""Inversion, pure: the loss of latents, one Adam step over all latent layers, and a compiled chunk of steps.

SAM (CVPR 2022), sections 3.2 and 3.3. An *item* is a target with its masks, start and seed. The items of a batch run in
one program and do not affect one another: each item's latents are what they would be alone. Batches of images, of
thresholds for one image, and of single-layer inversions differ in their items only.

Everything that varies between runs is an argument of the compiled function: weights, targets, masks, learning rate,
number of steps. Only shapes, the LPIPS network, the kind of noise and the chunk length are part of the program, so a
second image, threshold or direction compiles nothing. `samjax.driver` runs it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from samjax import losses
from samjax.config import InversionConfig
from samjax.latents import RESOLUTIONS, Latents, Masks, synthesize_latents
from samjax.losses import Prior
from samjax.nets import lpips, stylegan2
from samjax.nets.stylegan2 import Noise, Params, StyleGAN2Config


class Networks(NamedTuple):
    """All frozen parameters.

    Attributes:
      generator: those of the generator.
      lpips: those of the LPIPS network of the loss.
      prior: the prior on W+.
      vgg: those of LPIPS-VGG; needed for final steps only.
    """

    generator: Params
    lpips: Params
    prior: Prior
    vgg: Params | None = None


class Items(NamedTuple):
    """N targets to invert.

    Attributes:
      targets: [N, h, w, 3] in [-1, 1]; the longer side is the loss resolution, the shorter one less if letterboxed.
      masks: {"F4": [N, 16, 16, 1], ...} in [0, 1], one for each F layer in `start`.
      start: {"W+": [N, num_ws, w_dim], "F4": [N, 16, 16, C], ...}; its keys are the layers that are optimized.
      seeds: [N] integers; an item's noise depends on its own seed only.
      features: LPIPS features of the targets, which `prepare` computes once.
    """

    targets: Any
    masks: Masks
    start: Latents
    seeds: Any
    features: tuple[Array, ...] = ()


class Terms(NamedTuple):
    """The loss terms of each item, weighted, so that they add up to `total`; arrays [N], or [steps, N]."""

    mse: Array | np.ndarray
    lpips: Array | np.ndarray
    mvg: Array | np.ndarray
    delta: Array | np.ndarray
    f_rec: Array | np.ndarray
    total: Array | np.ndarray


class State(NamedTuple):
    """An optimization between two steps; a pytree of arrays, so that saving it is enough to continue later.

    Attributes:
      latents: as in `Items.start`.
      optimizer: Adam's moments.
      step: [] int32, steps taken.
      finite: [] bool, whether every loss so far was finite.
    """

    latents: dict[str, Array]
    optimizer: optax.ScaleByAdamState
    step: Array
    finite: Array


class Hyperparameters(NamedTuple):
    """The numbers that a compiled program takes as arguments; arrays [].

    Those without a description are of the `InversionConfig`.

    Attributes:
      first_step: the first step of this stage, from which its schedule counts.
      style_rate: learning rate of W+, relative to that of the offsets.
    """

    first_step: Array
    style_rate: Array
    num_opt_steps: Array
    lr: Array
    layer_rate: Array
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
    """The settings that a compiled program depends on.

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


def structure(generator: StyleGAN2Config, config: InversionConfig) -> Structure:
    """The part of the settings that determines the compiled program."""
    return Structure(
        generator,
        None if config.lpips_type == "none" or config.lambda_lpips == 0 else config.lpips_type,
        config.noise,
        min(config.loss_resolution, generator.img_resolution),
        config.chunk_steps or (1 if jax.default_backend() == "cpu" else 25),
        config.matmul_precision,
        config.half_precision,
    )


_FINAL_LPIPS: Literal["vgg"] = "vgg"
"""The network of final steps: that of published figures, and of the authors' loss."""

_FINAL_STYLE_RATE = 0.2
"""`style_rate` in final steps: at the full rate LPIPS-VGG moves W+ so far from W that edits lose strength."""


def hyperparameters(config: InversionConfig, first_step: int = 0, style_rate: float = 1.0) -> Hyperparameters:
    """The part of the settings that the program takes as arguments."""
    numbers = (first_step, style_rate, *(getattr(config, name) for name in Hyperparameters._fields[2:]))
    return Hyperparameters(*(jnp.asarray(x, jnp.int32 if isinstance(x, int) else jnp.float32) for x in numbers))


class Stage(NamedTuple):
    """A part of a run.

    Attributes:
      first: its first step.
      end: the step after its last one.
      config: its settings.
      style_rate: see `Hyperparameters`.
    """

    first: int
    end: int
    config: InversionConfig
    style_rate: float


def stages(config: InversionConfig) -> list[Stage]:
    """The parts of a run: the steps with the settings' own network and schedule, and the final steps.

    >>> [(one.first, one.end, one.config.lpips_type) for one in stages(InversionConfig(9, 2, lpips_type="alex"))]
    [(0, 7, 'alex'), (7, 9, 'vgg')]
    """
    end = config.num_opt_steps
    first = max(end - config.final_steps, 0)
    final = dataclasses.replace(
        config, lpips_type=_FINAL_LPIPS, lr=config.final_lr, lr_rampdown_length=1.0, lr_rampup_length=0.0
    )
    usual = dataclasses.replace(config, num_opt_steps=first)
    found = (Stage(0, first, usual, 1.0), Stage(first, end, final, _FINAL_STYLE_RATE))
    return [stage for stage in found if stage.end > stage.first]


def init(items: Items) -> State:
    """The state before the first step; it shares no memory with `items`, so that it can be donated."""
    latents = {name: jnp.array(value, jnp.float32, copy=True) for name, value in items.start.items()}
    return State(latents, _new_moments(latents), jnp.zeros((), jnp.int32), jnp.ones((), bool))


def _new_moments(latents: dict[str, Array]) -> optax.ScaleByAdamState:
    optimizer = optax.scale_by_adam().init(latents)
    assert isinstance(optimizer, optax.ScaleByAdamState)
    return optimizer


def begin_stage(state: State, first_step: int) -> State:
    """`state` at the beginning of a stage other than the first, with new moments; unchanged later in the stage."""
    return state._replace(optimizer=_new_moments(state.latents)) if first_step == int(state.step) > 0 else state


def loss_terms(
    structure: Structure, networks: Networks, items: Items, hyper: Hyperparameters, latents: Latents, keys: Array
) -> Terms:
    """The loss of latents, term by term.

    Args:
      structure: settings that the program depends on.
      networks: the frozen parameters.
      items: as returned by `prepare`.
      hyper: hyperparameters, with the weights of the terms.
      latents: {"W+": [N, num_ws, w_dim], ...}.
      keys: [N] random keys of the noise at this step.
    """
    image = synthesize_latents(
        structure.generator, networks.generator, latents, items.masks, noise=structure.noise, noise_keys=keys,
        half_precision=structure.half_precision,
    ).image  # fmt: skip
    image = losses.comparable(image, structure.loss_resolution, *items.targets.shape[1:3])
    mse = hyper.lambda_mse * losses.mean_squares(image, items.targets)
    perceptual = jnp.zeros_like(mse)
    if structure.lpips_type is not None:
        features = lpips.features(networks.lpips, image, structure.lpips_type, half_precision=structure.half_precision)
        perceptual = hyper.lambda_lpips * lpips.distance(networks.lpips, features, items.features)
    mvg = hyper.lambda_mvg * losses.prior_distance(networks.prior, latents["W+"])
    delta = hyper.lambda_delta * losses.delta(latents["W+"])
    f_rec = hyper.lambda_f_rec * losses.offset_distance(latents, items.start) + jnp.zeros_like(mse)
    return Terms(mse, perceptual, mvg, delta, f_rec, mse + perceptual + mvg + delta + f_rec)


def step(
    structure: Structure, networks: Networks, items: Items, hyper: Hyperparameters, state: State
) -> tuple[State, Terms]:
    """One Adam step of every item; returns the new state and the loss terms before the step."""
    chex.assert_equal_shape_prefix((*state.latents.values(), items.targets), 1)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), state.step))(items.seeds)

    def objective(latents: dict[str, Array]) -> tuple[Array, Terms]:
        terms = loss_terms(structure, networks, items, hyper, latents, keys)
        return jnp.sum(terms.total), terms  # a sum, so that each item's gradient is its own

    gradients, terms = jax.grad(objective, has_aux=True)(state.latents)
    adam = optax.scale_by_adam(b1=hyper.beta1, b2=hyper.beta2)  # type: ignore[arg-type]  # traced, so any values do
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float32 to an int32 power
        updates, optimizer = adam.update(gradients, state.optimizer)
    rate = losses.learning_rate(
        state.step - hyper.first_step, hyper.num_opt_steps - hyper.first_step, hyper.lr, hyper.lr_rampdown_length,
        hyper.lr_rampup_length,
    )  # fmt: skip
    relative = {"W+": hyper.style_rate, **{name: hyper.layer_rate**i for i, name in enumerate(RESOLUTIONS)}}
    rates = {name: rate * relative[name] for name in state.latents}
    latents = jax.tree.map(lambda x, rate, update: x - rate * update, state.latents, rates, updates)
    assert isinstance(optimizer, optax.ScaleByAdamState)
    return State(latents, optimizer, state.step + 1, jnp.all(jnp.isfinite(terms.total))), terms


@functools.partial(jax.jit, static_argnames="structure", donate_argnames="state")
def run_chunk(
    structure: Structure, networks: Networks, items: Items, hyper: Hyperparameters, state: State
) -> tuple[State, Terms]:
    """`structure.chunk_steps` steps in one `lax.scan`; steps after the run's end or a non-finite loss do nothing.

    Returns:
      The new state (the old one is donated), and the terms of each step [chunk_steps, N]; NaN for steps not taken.
    """

    def body(state: State, _: None) -> tuple[State, Terms]:
        active = (state.step < hyper.num_opt_steps) & state.finite
        after, terms = step(structure, networks, items, hyper, state)
        # Not `lax.cond`: XLA runs the branches of a conditional on one thread of a CPU.
        state = jax.tree.map(lambda new, old: jnp.where(active, new, old), after, state)
        return state, jax.tree.map(lambda term: jnp.where(active, term, jnp.nan), terms)

    with jax.default_matmul_precision(structure.precision):
        if structure.chunk_steps == 1:  # no loop, even of one step: see `InversionConfig.chunk_steps`
            state, terms = body(state, None)
            terms = jax.tree.map(lambda term: term[None], terms)
        else:
            state, terms = lax.scan(body, state, None, length=structure.chunk_steps)
    # The loss after the last step is never computed: check the latents themselves once a chunk.
    healthy = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), state.latents)
    return state._replace(finite=state.finite & jnp.all(jnp.stack(jax.tree.leaves(healthy)))), terms


@functools.partial(jax.jit, static_argnames=("net", "precision", "half_precision"))
def lpips_features(
    params: Params, images: Array, net: lpips.Net, precision: str, half_precision: bool = False
) -> tuple[Array, ...]:
    """LPIPS features of images [N, h, w, 3] in [-1, 1]; one program serves targets and, for the metrics, results."""
    with jax.default_matmul_precision(precision):
        return lpips.features(params, images, net, half_precision=half_precision)


@functools.partial(jax.jit, static_argnames=("structure", "size", "minimal"))
def prepack(
    structure: Structure, networks: Networks, size: tuple[int, int], *, minimal: bool | None = None
) -> Networks:
    """Computes once what every step would compute from the frozen weights.

    Args:
      structure: settings that the program depends on.
      networks: the parameters as loaded.
      size: height and width of the targets.
      minimal: whether 3x3 convolutions use minimal filtering; None to use it where it saves time. See
        `samjax.nets.convolution`.
    """
    half = structure.half_precision
    generator = stylegan2.prepack(structure.generator, networks.generator, half_precision=half, minimal=minimal)
    perceptual = prepack_lpips(structure, networks.lpips, size, minimal=minimal)
    return networks._replace(generator=generator, lpips=perceptual)


@functools.partial(jax.jit, static_argnames=("structure", "size", "minimal"))
def prepack_lpips(
    structure: Structure, params: Params, size: tuple[int, int], *, minimal: bool | None = None
) -> Params:
    """The part of `prepack` that concerns LPIPS; its arguments are those of `prepack`, with the parameters of LPIPS."""
    if structure.lpips_type is None:
        return params
    return lpips.prepack(params, *size, structure.lpips_type, half_precision=structure.half_precision, minimal=minimal)


def prepare(structure: Structure, networks: Networks, items: Items) -> Items:
    """Puts items on the device, with the LPIPS features of their targets.

    Raises:
      ValueError: shapes are inconsistent.
    """
    check_items(structure, items)
    to_device = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    targets, seeds = to_device(items.targets), jnp.asarray(items.seeds, jnp.uint32)
    net, half = structure.lpips_type, structure.half_precision
    features = () if net is None else lpips_features(networks.lpips, targets, net, structure.precision, half)
    return Items(targets, to_device(dict(items.masks)), to_device(dict(items.start)), seeds, features)


def check_items(structure: Structure, items: Items) -> None:
    """Checks that the arrays of items fit together.

    Raises:
      ValueError: they do not.
    """
    size = structure.loss_resolution
    if items.targets.ndim != 4 or max(items.targets.shape[1:3]) != size or items.targets.shape[3] != 3:
        raise ValueError(f"targets have shape {items.targets.shape}: expected [N, h, w, 3], longer side {size}")
    if set(items.masks) != set(items.start) - {"W+"}:
        raise ValueError(f"masks for {sorted(items.masks)} and latents {sorted(items.start)}")
    counts = {x.shape[0] for x in jax.tree.leaves((items.targets, items.masks, items.start, np.asarray(items.seeds)))}
    if len(counts) != 1:
        raise ValueError(f"targets, masks, latents and seeds for different numbers of items: {sorted(counts)}")
