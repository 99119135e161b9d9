"""The training step: the paper's loss, the authors' optimiser, and the same figures however a batch is divided."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import random_lpips

from samjax import training
from samjax.nets import deeplab
from samjax.nets.deeplab import PredictorConfig
from samjax.training import Batch, TrainConfig

PREDICTOR = PredictorConfig(("W+", "F4"), blocks=(1, 1, 1, 1), width=4, decoder_width=8, low_level_width=4)
CONFIG = TrainConfig(num_steps=20, weight_decay=0.1, lpips_type="alex", max_segments=4)


def make_batch(count: int = 4, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (count, 32, 32, 3)).astype(np.float32)
    noise = rng.normal(0, 0.3, (count, 2, 32, 32, 3)).astype(np.float32)
    segments = np.zeros((count, 32, 32), np.int32)
    segments[:, 10:] = 1
    segments[:, 20:, 5:] = 2
    return Batch(images, np.clip(images[:, None] + noise, -1, 1), segments)


@pytest.fixture(scope="module")
def params():
    return random_lpips("alex")


def fresh(config: TrainConfig = CONFIG) -> training.TrainState:
    return training.init(PREDICTOR, config)


def test_segment_weight_zero_is_the_papers_loss():
    rng = np.random.default_rng(0)
    predicted, true = (jnp.asarray(rng.uniform(0, 1, (2, 3, 8, 8)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(rng.integers(0, 3, (2, 8, 8)), jnp.int32)
    plain = training.losses(predicted, true, segments, dataclasses.replace(CONFIG, segment_weight=0.0))
    assert float(plain.loss) == float(plain.pixel) == pytest.approx(float(np.mean((predicted - true) ** 2)), rel=1e-6)
    both = training.losses(predicted, true, segments, CONFIG)
    assert float(both.loss) == pytest.approx(float(both.pixel + both.segment), rel=1e-6)


def test_segment_loss_is_of_means_by_area():
    rng = np.random.default_rng(1)
    predicted, true = rng.uniform(0, 1, (2, 1, 2, 6, 6)).astype(np.float32)
    segments = rng.integers(0, 3, (1, 6, 6)).astype(np.int32)
    squared = absolute = 0.0
    for layer in range(2):
        for s in range(3):
            inside = segments[0] == s
            difference = predicted[0, layer][inside].mean() - true[0, layer][inside].mean()
            squared += inside.mean() * difference**2 / 2
            absolute += inside.mean() * abs(difference) / 2
    found = training.losses(*map(jnp.asarray, (predicted, true, segments)), CONFIG)
    assert float(found.segment) == pytest.approx(squared, rel=1e-4)
    assert float(found.segment_error) == pytest.approx(absolute, rel=1e-4)


def test_what_averages_out_within_a_segment_costs_nothing():
    true = jnp.zeros((1, 1, 4, 4), jnp.float32)
    stripes = jnp.asarray(np.tile([[1.0, -1.0]], (4, 2))[None, None], jnp.float32)
    found = training.losses(stripes, true, jnp.zeros((1, 4, 4), jnp.int32), CONFIG)
    assert float(found.segment) == pytest.approx(0, abs=1e-12)
    assert float(found.pixel) == 1


def test_the_schedule_is_the_references():
    steps = np.array([0, 5, 19, 20])
    rates = [float(training.learning_rate(jnp.asarray(step), CONFIG)) for step in steps]
    np.testing.assert_allclose(rates, 1e-4 * (1 - steps / 20) ** 0.9, rtol=1e-5)


def test_the_first_step_is_sgd_with_decay_and_two_rates(params):
    batch, before = make_batch(), fresh()
    old = jax.tree.map(np.array, before.variables)
    true = jax.jit(training.true_maps, static_argnums=2)(params, batch, "alex")

    def objective(trained):
        variables = {"params": trained, "batch_stats": old["batch_stats"]}
        key = jax.random.fold_in(jax.random.key(0), 0)
        maps, _ = deeplab.train_maps(variables, jnp.asarray(batch.images), PREDICTOR, key=key)
        return training.losses(maps, true, jnp.asarray(batch.segments), CONFIG).loss

    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(objective))(old["params"])
    after, _ = training.step(PREDICTOR, CONFIG, params, before, batch)
    trees = (old["params"], gradients, after.variables["params"])
    for pick, factor in ((lambda t: t["base"]["backbone"], 1.0), (lambda t: t["head_W+"], 10.0)):
        for w, g, new in zip(*(jax.tree.leaves(pick(tree)) for tree in trees), strict=True):
            expected = w - 1e-4 * factor * (g + 0.1 * w)
            # Float32, of gradients that are sums over pixels.
            np.testing.assert_allclose(new, expected, rtol=0, atol=1e-5 * max(1e-2, np.abs(expected - w).max()) + 1e-7)


def test_maps_made_before_are_taken_as_they_are(params):
    batch = make_batch()
    made = training.true_maps(params, batch, "alex")
    assert made.shape == (4, 2, 32, 32)
    assert training.true_maps(params, batch._replace(inversions=made), "alex") is made


def test_training_learns(params):
    config = dataclasses.replace(CONFIG, lr=1e-2)
    state, batch = fresh(config), make_batch()
    first = last = None
    for _ in range(12):
        state, metrics = training.step(PREDICTOR, config, params, state, batch)
        first = first or float(metrics.loss)
        last = float(metrics.loss)
    assert last < 0.7 * first


@pytest.mark.slow  # compiles two programs of its own; tests/test_train_invertibility.py has eight devices and processes
def test_one_device_and_two_give_the_same_losses(params):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("batch",))
    divided, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    alone, shared = fresh(), jax.device_put(fresh(), whole)
    everywhere = jax.device_put(params, whole)
    for i in range(20):
        batch = make_batch(8, seed=i)
        alone, one = training.step(PREDICTOR, CONFIG, params, alone, batch)
        shared, many = training.step(PREDICTOR, CONFIG, everywhere, shared, jax.device_put(batch, divided))
        # Float32 sums in another order, carried on over twenty steps.
        np.testing.assert_allclose(float(many.loss), float(one.loss), rtol=1e-5)


def test_half_precision_comes_close(params):
    half = dataclasses.replace(CONFIG, bfloat16=True)
    _, exact = training.step(PREDICTOR, CONFIG, params, fresh(), make_batch())
    state, rough = training.step(PREDICTOR, half, params, fresh(half), make_batch())
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=0.05)  # 8 bits of mantissa, a dozen layers
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.variables))


def test_evaluation_counts_the_area_with_the_right_layer(params):
    batch = make_batch()
    tau = jnp.asarray(1e9, jnp.float32)  # every segment takes W+, whatever the maps
    variables = fresh().variables
    metrics, same, predicted, true = training.evaluate(PREDICTOR, CONFIG, params, variables, batch, tau)
    assert same.shape == metrics.loss.shape == (4,)
    assert float(same.min()) == 1
    assert predicted.shape == true.shape == (4, 2, 32, 32)
    low = np.asarray(training.segment_means(true, jnp.asarray(batch.segments), 4)[0])
    middle = jnp.asarray(float(np.median(low[low > 0])), jnp.float32)
    _, some, _, _ = training.evaluate(PREDICTOR, CONFIG, params, variables, batch, middle)
    assert 0 <= float(some.min()) <= float(some.max()) <= 1
