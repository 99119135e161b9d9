"""The training step of the predictor: the paper's loss, the authors' optimizer, and independence of sharding."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from samjax.nets import deeplab
from samjax.testing import random_lpips, tiny_predictor_config
from samjax.training import predictor
from samjax.training.predictor import Batch, TrainConfig

PREDICTOR = tiny_predictor_config()
CONFIG = TrainConfig(num_steps=20, lr=1e-2, weight_decay=0.1, lpips_type="alex", max_segments=4)

# One program for all tests whose batches have the same shape.
step = jax.jit(
    chex.assert_max_traces(predictor.step.__wrapped__, n=1),
    static_argnames=("predictor", "config"),
    donate_argnames="state",
)


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


def initial_state(config: TrainConfig = CONFIG) -> predictor.TrainState:
    return predictor.init(PREDICTOR, config)


def test_segment_weight_zero_is_the_papers_loss():
    rng = np.random.default_rng(0)
    predicted, true = (jnp.asarray(rng.uniform(0, 1, (2, 3, 8, 8)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(rng.integers(0, 3, (2, 8, 8)), jnp.int32)
    plain = predictor.losses(predicted, true, segments, dataclasses.replace(CONFIG, segment_weight=0.0))
    assert float(plain.loss) == float(plain.pixel) == pytest.approx(float(np.mean((predicted - true) ** 2)), rel=1e-6)
    both = predictor.losses(predicted, true, segments, CONFIG)
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
    found = predictor.losses(*map(jnp.asarray, (predicted, true, segments)), CONFIG)
    assert float(found.segment) == pytest.approx(squared, rel=1e-4)
    assert float(found.segment_error) == pytest.approx(absolute, rel=1e-4)


def test_errors_that_average_out_within_a_segment_cost_nothing():
    true = jnp.zeros((1, 1, 4, 4), jnp.float32)
    stripes = jnp.asarray(np.tile([[1.0, -1.0]], (4, 2))[None, None], jnp.float32)
    found = predictor.losses(stripes, true, jnp.zeros((1, 4, 4), jnp.int32), CONFIG)
    assert float(found.segment) == pytest.approx(0, abs=1e-12)
    assert float(found.pixel) == 1


def test_the_schedule_is_the_references():
    steps = np.array([0, 5, 19, 20])
    rates = [float(predictor.learning_rate(CONFIG)(step)) for step in steps]
    np.testing.assert_allclose(rates, 1e-2 * (1 - steps / 20) ** 0.9, rtol=1e-5)


def test_the_first_step_is_sgd_with_decay_and_two_rates(params):
    batch, before = make_batch(), initial_state()
    old = jax.tree.map(np.array, before.variables)
    true = jax.jit(predictor.true_maps, static_argnums=2)(params, batch, "alex")

    def objective(trained):
        variables = {"params": trained, "batch_stats": old["batch_stats"]}
        key = jax.random.fold_in(jax.random.key(0), 0)
        maps, _ = deeplab.train_maps(variables, jnp.asarray(batch.images), PREDICTOR, key=key)
        return predictor.losses(maps, true, jnp.asarray(batch.segments), CONFIG).loss

    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(objective))(old["params"])
    after, _ = step(PREDICTOR, CONFIG, params, before, batch)
    trees = (old["params"], gradients, after.variables["params"])
    for pick, factor in ((lambda t: t["base"]["backbone"], 1.0), (lambda t: t["head_W+"], 10.0)):
        for w, g, new in zip(*(jax.tree.leaves(pick(tree)) for tree in trees), strict=True):
            expected = w - CONFIG.lr * factor * (g + 0.1 * w)
            # Float32 gradients that are sums over pixels.
            np.testing.assert_allclose(new, expected, rtol=0, atol=1e-5 * max(1e-2, np.abs(expected - w).max()) + 1e-7)


def test_precomputed_maps_are_used_as_they_are(params):
    batch = make_batch()
    made = predictor.true_maps(params, batch, "alex")
    assert made.shape == (4, 2, 32, 32)
    assert predictor.true_maps(params, batch._replace(inversions=made), "alex") is made


def test_training_learns_and_later_steps_compile_nothing(params):
    state, batch = initial_state(), make_batch()
    losses = []
    for _ in range(12):
        state, metrics = step(PREDICTOR, CONFIG, params, state, batch)  # raises if it is traced again
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 12


def test_a_saved_state_resumes_exactly(params):
    batches = [make_batch(seed=i) for i in range(4)]
    state = initial_state()
    for batch in batches[:2]:
        state, _ = step(PREDICTOR, CONFIG, params, state, batch)
    resumed = jax.tree.map(lambda x: jnp.asarray(np.array(x)), state)
    for batch in batches[2:]:
        state, metrics = step(PREDICTOR, CONFIG, params, state, batch)
        resumed, again = step(PREDICTOR, CONFIG, params, resumed, batch)
        chex.assert_trees_all_equal(metrics, again)
    chex.assert_trees_all_equal(state, resumed)


@pytest.mark.slow  # compiles two programs of its own; tests/test_train_invertibility.py has eight devices and processes
def test_one_device_and_two_give_the_same_losses(params):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("batch",))
    divided, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    config = dataclasses.replace(CONFIG, lr=1e-4)
    alone, shared = initial_state(config), jax.device_put(initial_state(config), whole)
    everywhere = jax.device_put(params, whole)
    for i in range(20):
        batch = make_batch(8, seed=i)
        alone, one = predictor.step(PREDICTOR, config, params, alone, batch)
        shared, many = predictor.step(PREDICTOR, config, everywhere, shared, jax.device_put(batch, divided))
        # Float32 sums in another order, accumulated over twenty steps.
        np.testing.assert_allclose(float(many.loss), float(one.loss), rtol=1e-5)


@pytest.mark.slow  # compiles a program of its own
def test_half_precision_comes_close(params):
    half = dataclasses.replace(CONFIG, bfloat16=True)
    _, exact = step(PREDICTOR, CONFIG, params, initial_state(), make_batch())
    state, rough = predictor.step(PREDICTOR, half, params, initial_state(half), make_batch())
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=0.05)  # 8 bits of mantissa, a dozen layers
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.variables))


def test_evaluation_counts_the_area_with_the_right_layer(params):
    batch = make_batch()
    tau = jnp.asarray(1e9, jnp.float32)  # every segment takes W+, whatever the maps
    variables = initial_state().variables
    metrics, same, predicted, true = predictor.evaluate(PREDICTOR, CONFIG, params, variables, batch, tau)
    assert same.shape == metrics.loss.shape == (4,)
    assert float(same.min()) == 1
    assert predicted.shape == true.shape == (4, 2, 32, 32)
    low = np.asarray(predictor.segment_means(true, jnp.asarray(batch.segments), 4)[0])
    middle = jnp.asarray(float(np.median(low[low > 0])), jnp.float32)
    _, some, _, _ = predictor.evaluate(PREDICTOR, CONFIG, params, variables, batch, middle)
    assert 0 <= float(some.min()) <= float(some.max()) <= 1
