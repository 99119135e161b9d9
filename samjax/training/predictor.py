"""Training of the invertibility predictor: the loss and one pure, shardable step.

The true error maps are the spatial LPIPS between an image and its single-layer inversions. The step computes them,
unless the batch holds precomputed ones. The loss is the paper's pixel-wise mean squared error plus the squared error
of segment means, the only part of a map that the method uses.

A step depends on the state and the batch alone. Batch normalization and means run over the global batch, so a batch
divided over devices or processes has the same losses as one on a single device.

`samjax.training.recipes.train_predictor` runs a whole training.
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

from samjax import layer_selection
from samjax.nets import deeplab, lpips
from samjax.nets.blocks import Variables
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.lpips import Params


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a predictor is trained. The defaults are the authors', except for the segment loss, which they do not have.

    Attributes:
      num_steps: length of the run, over which the learning rate falls to 0.
      lr: initial learning rate of the backbone.
      head_lr_factor: learning rate of all other layers, relative to the backbone's.
      poly_power: the learning rate falls as (1 - step / num_steps) to this power.
      momentum: momentum of SGD.
      weight_decay: weight decay of SGD, added to the gradient of every parameter.
      segment_weight: weight of the segment loss; 0 gives the paper's loss.
      max_segments: the segment loss ignores segments with this or a higher number.
      lpips_type: LPIPS network of the true maps. The authors' thresholds belong to "vgg".
      bfloat16: runs the predictor in bfloat16; parameters, statistics, true maps and losses stay float32.
      seed: seed of the initial weights and of dropout.
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
    """A batch of B images.

    Attributes:
      images: [B, h, w, 3] in [-1, 1].
      inversions: [B, L, h, w, 3] in [-1, 1], the images' inversions in each layer alone, or their precomputed true maps
        [B, L, h, w].
      segments: [B, h, w], labels from 0.
    """

    images: Any
    inversions: Any
    segments: Any


class TrainState(NamedTuple):
    """The state of a training between two steps: a pytree of arrays, from which a run resumes exactly.

    Attributes:
      variables: parameters and batch statistics of the predictor.
      optimizer: momentum and schedule.
      step: [] int32, steps taken.
    """

    variables: Mapping[str, Any]
    optimizer: optax.OptState
    step: Array


class Metrics(NamedTuple):
    """Losses of a batch, arrays [], or of each image, arrays [B].

    Attributes:
      loss: the training objective.
      pixel: its first term, the mean squared error of all pixels.
      segment: its second term before weighting, the squared error of segment means, weighted by area.
      segment_error: the absolute error of segment means, weighted by area.
    """

    loss: Array
    pixel: Array
    segment: Array
    segment_error: Array


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The schedule of the backbone's learning rate (the authors' "poly" schedule)."""
    return optax.polynomial_schedule(config.lr, 0.0, config.poly_power, config.num_steps)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """SGD with momentum and weight decay as in PyTorch, and a higher learning rate outside the backbone."""

    def outside_backbone(params: Any) -> Any:
        names = lambda path: [part.key for part in path[:2]]  # noqa: E731
        return jax.tree_util.tree_map_with_path(lambda path, _: names(path) != ["base", "backbone"], params)

    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate(config), momentum=config.momentum),
        optax.masked(optax.scale(config.head_lr_factor), outside_backbone),
    )


def init(predictor: PredictorConfig, config: TrainConfig, variables: Variables | None = None) -> TrainState:
    """The state before the first step.

    Args:
      predictor: sizes of the predictor.
      config: settings.
      variables: variables to start from; random ones if None.
    """
    key = jax.random.key(config.seed, impl="rbg")  # its programs compile several times faster
    first = jax.jit(deeplab.init, static_argnums=0)(predictor, key=key) if variables is None else variables
    return TrainState(first, optimizer(config).init(first["params"]), jnp.zeros((), jnp.int32))


def true_maps(params: Params, batch: Batch, net: lpips.Net) -> Array:
    """The true error maps of a batch: spatial LPIPS between its images and their inversions.

    Args:
      params: LPIPS parameters.
      batch: the batch; precomputed maps are returned as they are.
      net: LPIPS network.

    Returns:
      [B, L, h, w].
    """
    if batch.inversions.ndim == 4:
        return batch.inversions
    size = (batch.images.shape[1], batch.images.shape[2])
    target = lpips.features(params, batch.images, net)

    def one(inversions: Array) -> Array:  # [B, h, w, 3]
        return lpips.spatial_distance(params, lpips.features(params, inversions, net), target, size)

    # One layer at a time, because the features of all layers together would dominate memory.
    return jax.lax.stop_gradient(jnp.moveaxis(jax.lax.map(one, jnp.moveaxis(batch.inversions, 1, 0)), 0, 1))


def segment_means(error_maps: Array, segments: Array, max_segments: int) -> tuple[Array, Array]:
    """Mean error of every segment, and the segment's share of its image.

    Args:
      error_maps: [B, L, h, w].
      segments: [B, h, w], labels from 0.
      max_segments: S; labels from S on are ignored.

    Returns:
      Means [B, L, S], 0 for segments that an image does not have, and shares [B, S].
    """

    def one(error_map: Array, labels: Array) -> tuple[Array, Array]:
        def of_segment(label: Array) -> tuple[Array, Array]:
            # Under vmap the products with masks become one matrix product, several times as fast as
            # `layer_selection.segment_means`, whose exactness at the threshold a loss does not need.
            inside = (labels == label).astype(jnp.float32)
            count = jnp.sum(inside)
            total = jnp.einsum("lhw,hw->l", error_map, inside, precision="highest")
            return total / jnp.maximum(count, 1.0), count / inside.size

        return jax.vmap(of_segment, out_axes=(1, 0))(jnp.arange(max_segments))

    return jax.vmap(one)(error_maps, segments)


def losses(predicted: Array, true: Array, segments: Array, config: TrainConfig) -> Metrics:
    """The loss of predicted maps and its parts.

    The segment loss is the squared error of segment means, weighted by area: every pixel has the same weight as in the
    pixel loss, but errors that average out within a segment cost nothing.

    Args:
      predicted: predicted maps [B, L, h, w].
      true: true maps [B, L, h, w].
      segments: [B, h, w], labels from 0.
      config: settings.
    """
    pixel = jnp.mean(jnp.square(predicted - true))
    difference, shares = segment_means(predicted - true, segments, config.max_segments)  # [B, L, S], [B, S]
    whole = jnp.maximum(jnp.sum(shares, axis=1), 1e-6)[:, None, None]  # below 1 if segments are ignored
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
      params: LPIPS parameters, for the true maps.
      state: the current state; its buffers are donated.
      batch: the batch, on one device or sharded along its first axis.

    Returns:
      The new state, and the metrics of the batch before the update.
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
            with jax.numpy_dtype_promotion("standard"):  # float32 statistics of bfloat16 activations
                predicted, changed = deeplab.train_maps(variables, images, predictor, key=key)
            metrics = losses(predicted.astype(jnp.float32), true, batch.segments, config)
            return metrics.loss, (metrics, changed)

        gradients, (metrics, changed) = jax.grad(objective, has_aux=True)(state.variables["params"])
    changed = jax.tree.map(lambda x: x.astype(jnp.float32), changed)
    params_before = state.variables["params"]
    updates, optimizer_state = optimizer(config).update(gradients, state.optimizer, params_before)
    trained = optax.apply_updates(params_before, updates)
    return TrainState({"params": trained, "batch_stats": changed}, optimizer_state, state.step + 1), metrics


@functools.partial(jax.jit, static_argnames=("predictor", "config"))
def evaluate(
    predictor: PredictorConfig, config: TrainConfig, params: Params, variables: Variables, batch: Batch, tau: Array
) -> tuple[Metrics, Array, Array, Array]:
    """Compares a predictor's maps with the true ones.

    Args:
      predictor: sizes of the predictor.
      config: settings.
      params: LPIPS parameters.
      variables: variables of the predictor.
      batch: the images to compare on.
      tau: threshold of the layer selection, [].

    Returns:
      The metrics of each image, [B] each; the share [B] of its area whose segments get the same layer as from the true
      maps; the predicted and the true maps [B, L, h, w].
    """
    with jax.default_matmul_precision("highest"):
        true = true_maps(params, batch, config.lpips_type)
        predicted = deeplab.predict(variables, batch.images, predictor)
    found, shares = segment_means(predicted, batch.segments, config.max_segments)
    expected, _ = segment_means(true, batch.segments, config.max_segments)
    choose = jax.vmap(layer_selection.select_layers, in_axes=(0, None))
    equal = (choose(found, tau) == choose(expected, tau)).astype(jnp.float32)
    same = jnp.sum(shares * equal, axis=1) / jnp.sum(shares, axis=1)
    one = lambda *image: losses(*(x[None] for x in image), config=config)  # noqa: E731
    return jax.vmap(one)(predicted, true, batch.segments), same, predicted, true
