"""Measured invertibility: single-layer inversions and their maps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, random_lpips, tiny_generator

from samjax import inversion, invertibility, latents, losses
from samjax.config import InversionConfig
from samjax.inversion import Items, Networks
from samjax.nets import lpips

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
