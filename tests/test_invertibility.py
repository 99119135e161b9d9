"""Invertibility maps, measured by single-layer inversions and predicted by a network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, random_lpips, tiny_generator

from samjax import inversion, invertibility, latents, losses
from samjax.config import InversionConfig
from samjax.inversion import Items, Networks
from samjax.nets import deeplab, lpips
from samjax.nets.deeplab import PredictorConfig

LAYERS = latents.latent_layers(TINY)
CONFIG = InversionConfig(6, lpips_type="alex", lambda_mvg=1e-4, noise="const", batch_size=2, chunk_steps=4)


@pytest.fixture(scope="module")
def tiny():
    params = tiny_generator()
    prior = losses.generator_prior(TINY, params, key=jax.random.key(1), samples=100)
    return Networks(params, random_lpips("alex"), prior)


@pytest.fixture(scope="module")
def targets():
    return np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def found(tiny, targets):
    ws = inversion.start_latents(TINY, tiny, targets, CONFIG)
    inversion.run_chunk.clear_cache()
    return invertibility.measured(TINY, tiny, targets, ws, CONFIG)


def test_every_target_is_inverted_in_every_layer(found, targets):
    assert found.maps.shape == (3, 2, 32, 32)
    assert found.images.shape == (3, 2, 32, 32, 3)
    assert {name: value.shape for name, value in found.latents.items()} == {
        "W+": (3, 2, TINY.num_ws, 8), "F4": (3, 2, 16, 16, 8)}  # fmt: skip
    assert found.terms.total.shape == (6, 3, 2)
    assert not found.latents["F4"][:, 0].any()  # W+ alone
    assert found.latents["F4"][:, 1].any(axis=(1, 2, 3)).all()
    assert np.isfinite(found.maps).all()
    assert found.maps.min() >= 0


def test_maps_are_the_spatial_distances_of_the_images(found, targets, tiny):
    images = np.clip(found.images[2], -1, 1)
    expected = lpips.lpips(tiny.lpips, jnp.asarray(images), jnp.asarray(targets[[2, 2]]), "alex", spatial=True)
    np.testing.assert_allclose(found.maps[2], expected, rtol=0, atol=1e-5 * float(jnp.ptp(expected)))


def test_each_is_the_inversion_with_that_layers_offset_everywhere(found, targets, tiny):
    ws = inversion.start_latents(TINY, tiny, targets[:2], CONFIG)
    masks = {"F4": jnp.ones((2, 16, 16, 1))}
    before = inversion.run_chunk._cache_size()
    alone = inversion.run(TINY, tiny, Items(targets[:2], masks, latents.init_latents(LAYERS, ws), np.arange(2)), CONFIG)
    assert inversion.run_chunk._cache_size() == before == 1  # the same program as the measuring
    np.testing.assert_array_equal(alone.latents["F4"], found.latents["F4"][:2, 1])


def test_letterboxed_targets_give_maps_of_their_size(tiny):
    target = np.zeros((1, 24, 32, 3), np.float32)
    config = dataclasses.replace(CONFIG, num_opt_steps=1, lambda_lpips=0.0)
    vgg = random_lpips("vgg")
    ws = np.zeros((1, TINY.num_ws, 8))
    measured = invertibility.measured(TINY, tiny, target, ws, config, map_params=vgg, map_net="vgg")
    assert measured.maps.shape == (1, 2, 24, 32)


def test_measuring_is_a_source_of_maps(found, targets, tiny):
    ws = inversion.start_latents(TINY, tiny, targets[:1], CONFIG)[0]
    source: invertibility.InvertibilitySource = invertibility.measuring(TINY, tiny, ws, CONFIG)
    np.testing.assert_allclose(source(targets), found.maps, rtol=0, atol=1e-6)


# --- predicted ---

PREDICTOR = PredictorConfig(("F4", "W+"), 3, blocks=(1, 1, 1, 1), width=4, decoder_width=6, low_level_width=4)


@pytest.fixture(scope="module")
def predictor():
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(lambda: deeplab.init(PREDICTOR, key=jax.random.key(0)))
    # Positive throughout: no ReLU hides a part of the network, and variances are positive.
    return jax.tree.map(lambda leaf: rng.uniform(0.05, 0.3, leaf.shape).astype(np.float32), tree)


def test_predicting_is_a_source_of_maps(predictor, targets):
    source: invertibility.InvertibilitySource = invertibility.predicted(predictor, PREDICTOR, batch_size=2)
    invertibility._predict.clear_cache()
    maps = source(targets.astype(np.float64))  # three: the second batch is filled up
    source(targets[:1])
    assert invertibility._predict._cache_size() == 1
    assert maps.shape == (3, 2, 32, 32)
    assert maps.dtype == np.float32
    expected = jax.jit(deeplab.predict, static_argnames="config")(predictor, targets, PREDICTOR)
    assert np.ptp(expected, axis=(2, 3)).min() > 1e-2 * np.max(expected)  # else the comparison says little
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_prediction_is_in_full_float32_unless_told_otherwise(predictor, monkeypatch):
    asked = []
    monkeypatch.setattr(invertibility, "_predict", lambda v, x, c, precision: asked.append(precision) or np.zeros(1))
    invertibility.predicted(predictor, PREDICTOR)(np.zeros((1, 8, 8, 3)))
    invertibility.predicted(predictor, PREDICTOR, precision="default")(np.zeros((1, 8, 8, 3)))
    assert asked == ["highest", "default"]
    monkeypatch.undo()
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    lowered = invertibility._predict.lower(predictor, images, PREDICTOR, "highest").as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.convolution" in line or "dot_general" in line]
    assert len(products) > 20
    assert all(line.count("HIGHEST") == 2 for line in products)


def test_targets_of_another_shape_are_refused(predictor):
    with pytest.raises(ValueError, match=r"\[N, H, W, 3\]"):
        invertibility.predicted(predictor, PREDICTOR)(np.zeros((8, 8, 3)))
