"""Training of the invertibility predictor: one step, pure and sharded; files and loops are elsewhere.

Targets are made in the step itself, if they were not made before: the spatial LPIPS between an image and its
single-layer inversions. The loss is the paper's pixel-wise mean square plus one of segment means, which are all that
the method ever uses of a map.

Everything is a function of (state, batch, key of the step): a batch divided over devices or processes gives the losses
that it gives whole, for batch normalisation and means run over the global batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from samjax import maps
from samjax.nets import deeplab, lpips
from samjax.nets.blocks import Variables
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.lpips import Params


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a predictor is trained; the defaults are the authors', but for the segment loss, which they lack.

    Attributes:
      num_steps: of the whole run, over which the learning rate falls.
      lr: of the backbone, at the start. All other layers have `head_lr_factor` times as much.
      head_lr_factor: see above.
      poly_power: the learning rate falls as (1 - step / num_steps) to this power.
      momentum, weight_decay: of SGD; the decay is added to the gradient, for every parameter.
      segment_weight: of the segment loss; 0 is the paper's loss.
      max_segments: pictures with more are trained on these many first ones.
      lpips_type: network of the targets. The authors' thresholds are for VGG's.
      bfloat16: runs the predictor in bfloat16; parameters, statistics, targets and losses stay float32.
      seed: of dropout.
    """

    num_steps: int = 10_000
    lr: float = 1e-4
    head_lr_factor: float = 10.0
    poly_power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 5e-4
    segment_weight: float = 1.0
    max_segments: int = 64
    lpips_type: lpips.Net = "vgg"
    bfloat16: bool = False
    seed: int = 0


class Batch(NamedTuple):
    """B images.

    Attributes:
      images: [B, h, w, 3] in [-1, 1].
      inversions: in single layers [B, L, h, w, 3]; or the true maps [B, L, h, w] that were made of them before.
      segments: [B, h, w], numbered from 0.
    """

    images: Any
    inversions: Any
    segments: Any


class TrainState(NamedTuple):
    """A training between two steps; a pytree of arrays, so that saving it is enough to go on later."""

    variables: Mapping[str, Any]
    momentum: optax.OptState
    step: Array


class Metrics(NamedTuple):
    """Of one batch, arrays [], or of each picture, arrays [B].

    Attributes:
      loss: what is minimised. pixel, segment: its two parts, not weighted.
      segment_error: mean absolute error of segment means, by area.
    """

    loss: Array
    pixel: Array
    segment: Array
    segment_error: Array


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.trace(config.momentum))


def init(predictor: PredictorConfig, config: TrainConfig, variables: Variables | None = None) -> TrainState:
    """The state before the first step: of `variables`, or of random ones."""
    key = jax.random.key(config.seed, impl="rbg")  # whose programs compile several times faster
    first = jax.jit(deeplab.init, static_argnums=0)(predictor, key=key) if variables is None else variables
    return TrainState(first, _optimizer(config).init(first["params"]), jnp.zeros((), jnp.int32))


def learning_rate(step: Array, config: TrainConfig) -> Array:
    """The backbone's learning rate at a step (the authors' "poly" schedule)."""
    left = 1.0 - step.astype(jnp.float32) / config.num_steps
    return config.lr * jnp.maximum(left, 0.0) ** config.poly_power


def true_maps(params: Params, batch: Batch, net: lpips.Net) -> Array:
    """The spatial LPIPS between images and their inversions, unless the batch has it already; [B, L, h, w]."""
    if batch.inversions.ndim == 4:
        return batch.inversions
    size = (batch.images.shape[1], batch.images.shape[2])
    target = lpips.features(params, batch.images, net)

    def one(inversions: Array) -> Array:  # [B, h, w, 3]
        return lpips.spatial_distance(params, lpips.features(params, inversions, net), target, size)

    # A layer at a time: the features of all would be the largest arrays by far.
    return jax.lax.stop_gradient(jnp.moveaxis(jax.lax.map(one, jnp.moveaxis(batch.inversions, 1, 0)), 0, 1))


def segment_means(error_maps: Array, segments: Array, max_segments: int) -> tuple[Array, Array]:
    """Means of B pictures' maps [B, L, h, w] in their segments [B, h, w], and each segment's share of its picture.

    Returns:
      Means [B, L, S], 0 where a picture has no such segment, and shares [B, S].
    """

    def one(error_map: Array, labels: Array) -> tuple[Array, Array]:
        def of_segment(label: Array) -> tuple[Array, Array]:
            # Products with masks, which vmap makes one product of matrices. `maps.segment_means` is exact where a
            # threshold equals a mean, which no loss needs, and takes several times as long.
            inside = (labels == label).astype(jnp.float32)
            count = jnp.sum(inside)
            total = jnp.einsum("lhw,hw->l", error_map, inside, precision="highest")
            return total / jnp.maximum(count, 1.0), count / inside.size

        return jax.vmap(of_segment, out_axes=(1, 0))(jnp.arange(max_segments))

    return jax.vmap(one)(error_maps, segments)


def losses(predicted: Array, true: Array, segments: Array, config: TrainConfig) -> Metrics:
    """The loss of maps [B, L, h, w] and its parts.

    The segment loss is the squared error of segment means, weighted by the segments' areas: a pixel counts as much as
    in the pixel loss, but what averages out within its segment costs nothing.
    """
    pixel = jnp.mean(jnp.square(predicted - true))
    difference, shares = segment_means(predicted - true, segments, config.max_segments)
    whole = jnp.maximum(jnp.sum(shares, axis=1), 1e-6)[:, None, None]  # less than 1 where segments are left out
    weights = shares[:, None] / whole
    segment = jnp.mean(jnp.sum(weights * jnp.square(difference), axis=2))
    error = jnp.mean(jnp.sum(weights * jnp.abs(difference), axis=2))
    return Metrics(pixel + config.segment_weight * segment, pixel, segment, error)


@functools.partial(jax.jit, static_argnames=("predictor", "config"), donate_argnames="state")
def step(
    predictor: PredictorConfig, config: TrainConfig, params: Params, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One step of SGD.

    Args:
      predictor: sizes of the predictor.
      config: settings.
      params: LPIPS', which make the targets.
      state: is donated.
      batch: divided over devices or not.

    Returns:
      The new state, and the metrics of the old one.
    """
    with jax.default_matmul_precision("default" if config.bfloat16 else "highest"):
        with jax.default_matmul_precision("highest"):
            true = true_maps(params, batch, config.lpips_type)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        stats = state.variables["batch_stats"]

        def objective(trained: Any) -> tuple[Array, tuple[Metrics, Any]]:
            variables = {"params": trained, "batch_stats": stats}
            images = batch.images
            if config.bfloat16:
                variables["params"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained)
                images = images.astype(jnp.bfloat16)
            with jax.numpy_dtype_promotion("standard"):  # normalisation has float32 statistics of bfloat16 values
                predicted, changed = deeplab.train_maps(variables, images, predictor, key=key)
            metrics = losses(predicted.astype(jnp.float32), true, batch.segments, config)
            return metrics.loss, (metrics, changed)

        gradients, (metrics, changed) = jax.grad(objective, has_aux=True)(state.variables["params"])
    changed = jax.tree.map(lambda x: x.astype(jnp.float32), changed)
    updates, momentum = _optimizer(config).update(gradients, state.momentum, state.variables["params"])
    rate = learning_rate(state.step, config)

    def apply(path: tuple[Any, ...], x: Array, update: Array) -> Array:
        names = [part.key for part in path]
        factor = 1.0 if names[:2] == ["base", "backbone"] else config.head_lr_factor
        return x - factor * rate * update

    trained = jax.tree_util.tree_map_with_path(apply, state.variables["params"], updates)
    return TrainState({"params": trained, "batch_stats": changed}, momentum, state.step + 1), metrics


@functools.partial(jax.jit, static_argnames=("predictor", "config"))
def evaluate(
    predictor: PredictorConfig, config: TrainConfig, params: Params, variables: Variables, batch: Batch, tau: Array
) -> tuple[Metrics, Array, Array, Array]:
    """What a predictor is worth on a batch.

    Args:
      predictor: sizes of the predictor.
      config: settings.
      params: LPIPS'.
      variables: the predictor's.
      batch: to compare on.
      tau: the threshold at which layers are chosen.

    Returns:
      The metrics of each picture, [B] each; the share [B] of its area whose segments get the layer that the true maps
      give; and predicted and true maps [B, L, h, w].
    """
    with jax.default_matmul_precision("highest"):
        true = true_maps(params, batch, config.lpips_type)
        predicted = deeplab.predict(variables, batch.images, predictor)
    found, shares = segment_means(predicted, batch.segments, config.max_segments)
    expected, _ = segment_means(true, batch.segments, config.max_segments)
    choose = jax.vmap(maps.select_layers, in_axes=(0, None))
    equal = (choose(found, tau) == choose(expected, tau)).astype(jnp.float32)
    same = jnp.sum(shares * equal, axis=1) / jnp.sum(shares, axis=1)
    one = lambda *picture: losses(*(x[None] for x in picture), config=config)  # noqa: E731
    return jax.vmap(one)(predicted, true, batch.segments), same, predicted, true
