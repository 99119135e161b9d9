"""SAM in a few calls: load a generator, invert an image, edit it.

    generator = samjax.load_generator("demo")
    models = samjax.load_models(generator)
    inversion = samjax.invert(models, image, segments=labels, threshold=0.4)
    images = samjax.edit(models, inversion, direction, strengths=(0, 1, 2))

`measure` and `invert_layers` are the two long parts of `invert`, for programs that keep what is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from samjax import editing, inversion, invertibility, losses, maps, segmentation
from samjax.config import InversionConfig
from samjax.inversion import Items, Networks, Progress, Terms
from samjax.invertibility import Measured
from samjax.io import checkpoints, weights
from samjax.latents import LatentLayer, init_latents, latent_layers
from samjax.nets import lpips

OnProgress = Callable[[Progress], None] | None


class Models(NamedTuple):
    """Everything an inversion needs that does not change: see `load_models`.

    Attributes:
      generator: with its configuration.
      config: settings of the inversions.
      networks: the frozen parameters, and the prior on W+.
      layers: the latent layers in use.
      vgg: LPIPS-VGG, which measures maps and results whatever the loss uses.
    """

    generator: checkpoints.LoadedGenerator
    config: InversionConfig
    networks: Networks
    layers: tuple[LatentLayer, ...]
    vgg: lpips.Params


class Inversion(NamedTuple):
    """One image, inverted.

    Attributes:
      target: [h, w, 3] in [-1, 1].
      segments: [h, w] labels.
      maps: [L, h, w] error maps, the most editable layer first.
      assignment: which segment takes which layer; one threshold.
      latents, masks: of one image, {"W+": [1, num_ws, w_dim], "F4": [1, 16, 16, C], ...}.
      image: [R, R, 3] the reconstruction, in [-1, 1] up to overshoot.
      lpips: LPIPS-VGG between reconstruction and target.
      terms: weighted loss terms of every step, [steps] each.
    """

    target: np.ndarray
    segments: np.ndarray
    maps: np.ndarray
    assignment: maps.Assignment
    latents: dict[str, Any]
    masks: dict[str, Any]
    image: np.ndarray
    lpips: float
    terms: Terms


class LayerInversions(NamedTuple):
    """Of T layer maps: latents and masks [T, ...], images [T, R, R, 3], loss terms [steps, T]."""

    latents: dict[str, Any]
    masks: dict[str, Any]
    images: np.ndarray
    terms: Terms


def load_generator(source: str | Path = "demo") -> checkpoints.LoadedGenerator:
    """A generator: "demo", a folder that `python -m ckpt_convert` wrote, or a .safetensors file of samjax.

    Raises:
      UserError: nothing there, damaged, or something else.
    """
    if source == "demo":
        from samjax import demo

        return demo.load_generator()
    return checkpoints.load_generator(source)


def load_models(
    generator: checkpoints.LoadedGenerator, config: InversionConfig | None = None, *, seed: int = 0
) -> Models:
    """Loads LPIPS and fits the prior on W+ to 5,000 mapped z (`seed` draws them).

    Raises:
      UserError: LPIPS' weights are missing or damaged; the mapping network gives values that are not finite.
    """
    config = config or InversionConfig()
    layers = latent_layers(generator.config, config.latent_names)
    vgg = weights.load_lpips("vgg")
    perceptual = vgg if config.lpips_type == "vgg" else weights.load_lpips(config.lpips_type)
    prior = losses.generator_prior(generator.config, generator.params, key=jax.random.key(seed))
    return Models(generator, config, Networks(generator.params, perceptual, prior), layers, vgg)


def start(models: Models, target: ArrayLike, *, kind: str = "mean", seed: int = 0) -> np.ndarray:
    """Where W+ starts for one target [h, w, 3]: "mean" or "best" (see `inversion.start_latents`); [num_ws, w_dim]."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    targets = np.asarray(target, np.float32)[None]
    return inversion.start_latents(
        models.generator.config, models.networks, targets, models.config, kind=kind, key=key  # type: ignore[arg-type]
    )[0]  # fmt: skip


def measure(
    models: Models,
    target: ArrayLike,
    ws: ArrayLike,
    *,
    num_opt_steps: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = None,
) -> Measured:
    """Inverts one target [h, w, 3] in each layer alone: error maps (LPIPS-VGG), images and latents, N = 1.

    Args:
      models: of `load_models`.
      target: [h, w, 3] in [-1, 1].
      ws: [num_ws, w_dim], where W+ starts.
      num_opt_steps: steps of each inversion; those of the settings if None.
      seed: of the noise.
      on_progress: called between chunks of steps.
    """
    config = _even_batches(models.config, len(models.layers))
    config = dataclasses.replace(config, num_opt_steps=num_opt_steps or config.num_opt_steps)
    return invertibility.measured(
        models.generator.config, models.networks, np.asarray(target)[None], np.asarray(ws)[None], config,
        seed=seed, map_params=models.vgg, map_net="vgg", on_progress=on_progress,
    )  # fmt: skip


def invert_layers(
    models: Models,
    target: ArrayLike,
    layer_maps: ArrayLike,
    ws: ArrayLike,
    *,
    seed: int = 0,
    on_progress: OnProgress = None,
) -> LayerInversions:
    """Inverts one target with each of T layer maps [T, h, w] (indices into `models.layers`), as one batch.

    Raises:
      DivergedError: a loss that is not finite.
    """
    layer_maps = np.asarray(layer_maps)
    count = len(layer_maps)
    repeat = lambda x: np.broadcast_to(np.asarray(x, np.float32), (count, *np.shape(x)))  # noqa: E731
    masks: dict[str, Any] = {
        name: jnp.asarray(mask) for name, mask in maps.stack_masks(layer_maps, models.layers).items()
    }
    start_at = init_latents(models.layers, jnp.asarray(repeat(ws)))
    items = Items(repeat(target), masks, start_at, np.full(count, seed))
    config = _even_batches(models.config, count)
    result = inversion.run(models.generator.config, models.networks, items, config, on_progress=on_progress)
    return LayerInversions(result.latents, masks, render(models, result.latents, masks), result.terms)


def _even_batches(config: InversionConfig, count: int) -> InversionConfig:
    """As few batches as `config` asks for, none larger than `count` items need."""
    batches = -(-count // config.batch_size)
    return dataclasses.replace(config, batch_size=-(-count // max(batches, 1)) or 1)


def render(models: Models, latents: Mapping[str, Any], masks: Mapping[str, Any]) -> np.ndarray:
    """Images [T, R, R, 3] of latents, with the stored noise."""
    return inversion.render(
        models.generator.config, models.generator.params, latents, masks,
        noise=models.config.stored_noise, precision=models.config.matmul_precision, batch_size=models.config.batch_size,
    )  # fmt: skip


def distances(models: Models, images: ArrayLike, target: ArrayLike) -> np.ndarray:
    """LPIPS-VGG of a generator's images [T, R, R, 3] and one target [h, w, 3], compared as the loss does it; [T]."""
    y = jnp.asarray(target, jnp.float32)[None]
    return np.concatenate([_vgg_distance(models.vgg, jnp.asarray(x)[None], y) for x in comparable(images, target)])


@jax.jit
def _vgg_distance(params: lpips.Params, x: Array, y: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return lpips.lpips(params, x, y, "vgg")


def comparable(images: ArrayLike, target: ArrayLike) -> np.ndarray:
    """A generator's images [T, R, R, 3] at the size of a target [h, w, 3]: reduced, clipped, letterbox removed."""
    height, width = np.shape(target)[:2]
    return np.asarray(losses.comparable(jnp.asarray(images, jnp.float32), max(height, width), height, width))


def invert(
    models: Models,
    image: ArrayLike,
    *,
    segments: ArrayLike | None = None,
    threshold: float = 0.225,
    error_maps: ArrayLike | None = None,
    ws: ArrayLike | None = None,
    start_kind: str = "mean",
    seed: int = 0,
    on_progress: OnProgress = None,
) -> Inversion:
    """Inverts one image with SAM.

    Args:
      models: of `load_models`.
      image: [h, w, 3] in [-1, 1]; its longer side is that of the loss (256, or the generator's if smaller).
      segments: [h, w] labels; found by Felzenszwalb's method if None.
      threshold: mean error up to which a segment may use a layer.
      error_maps: [L, h, w], as a predictor gives them; measured by an inversion in each layer if None.
      ws: [num_ws, w_dim], where W+ starts, as an encoder gives it; by `start_kind` if None.
      start_kind: see `start`.
      seed: of the noise and of "best"'s samples.
      on_progress: called between chunks of steps.

    Raises:
      DivergedError: a loss that is not finite.
      ValueError: arrays whose shapes do not belong together.
    """
    target = np.asarray(image, np.float32)
    labels = segmentation.segment(target) if segments is None else np.asarray(segments)
    ws = start(models, target, kind=start_kind, seed=seed) if ws is None else np.asarray(ws, np.float32)
    if error_maps is None:
        errors = measure(models, target, ws, seed=seed, on_progress=on_progress).maps[0]
    else:
        errors = np.asarray(error_maps, np.float32)
    assignment = maps.assign_layers(errors, labels, threshold)
    done = invert_layers(models, target, assignment.layer_maps, ws, seed=seed, on_progress=on_progress)
    terms = Terms(*(term[:, 0] for term in done.terms))
    distance = float(distances(models, done.images, target)[0])
    return Inversion(target, labels, errors, assignment, done.latents, done.masks, done.images[0], distance, terms)


def edit(
    models: Models,
    inverted: Inversion,
    direction: ArrayLike | str | Path,
    strengths: Sequence[float] = (0.0, 1.0, 2.0, 3.0),
) -> np.ndarray:
    """Edits an inverted image; [S, R, R, 3] in [-1, 1] up to overshoot.

    Args:
      models: of `load_models`.
      inverted: of `invert`.
      direction: [num_ws, w_dim] (leading axes of 1 are fine), or the file of one (see `editing.load_direction`).
      strengths: multiples of it; 0 gives the reconstruction, but for the soft edges of masks, as in the reference.

    Raises:
      UserError: a file that is no direction of this generator.
    """
    return edit_latents(models, inverted.latents, inverted.masks, direction, strengths)


def edit_latents(
    models: Models,
    latents: Mapping[str, Any],
    masks: Mapping[str, Any],
    direction: ArrayLike | str | Path,
    strengths: Sequence[float],
) -> np.ndarray:
    """`edit`, from the latents and masks of one image (leading axis 1)."""
    config = models.generator.config
    if isinstance(direction, str | Path):
        direction = editing.load_direction(direction, config.num_ws, config.w_dim)
    array = np.asarray(direction, np.float32).reshape(1, config.num_ws, config.w_dim)
    return edit_all(models, latents, masks, array, strengths)[0]


def edit_all(
    models: Models,
    latents: Mapping[str, Any],
    masks: Mapping[str, Any],
    directions: ArrayLike,
    strengths: Sequence[float],
) -> np.ndarray:
    """Edits of one image (leading axis 1) along directions [D, num_ws, w_dim], in few passes; [D, S, R, R, 3]."""
    config, count = models.generator.config, len(np.asarray(directions)) * len(strengths)
    at_once = 4 if jax.default_backend() == "cpu" else 16  # a CPU is not faster with more
    return editing.edit(
        config, models.generator.params, latents, masks, directions, strengths,
        noise=models.config.stored_noise, precision=models.config.matmul_precision, batch_size=max(min(at_once, count), 1),
    )  # fmt: skip
