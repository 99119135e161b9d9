"""Error maps, measured by single-layer inversions and predicted by a network, and where W+ starts."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import analysis, driver, inversion, latents
from samjax.config import InversionConfig
from samjax.inversion import Items
from samjax.nets import deeplab, e4e, lpips, stylegan2
from samjax.nets.deeplab import PredictorConfig
from samjax.testing import TINY, random_lpips, tiny_networks

LAYERS = latents.latent_layers(TINY)
CONFIG = InversionConfig(6, lpips_type="alex", lambda_mvg=1e-4, noise="const", batch_size=2, chunk_steps=4)


class Measured(NamedTuple):
    maps: np.ndarray
    latents: dict[str, Any]
    terms: inversion.Terms


@pytest.fixture(scope="module")
def tiny():
    return tiny_networks()


@pytest.fixture(scope="module")
def targets():
    return np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def found(tiny, targets):
    ws = analysis.start_latents(TINY, tiny, targets, CONFIG)
    inversion.run_chunk.clear_cache()
    return Measured(*analysis.measure_maps(TINY, tiny, targets, ws, CONFIG))


def test_every_target_is_inverted_in_every_layer(found, targets):
    assert found.maps.shape == (3, 2, 32, 32)
    assert {name: value.shape for name, value in found.latents.items()} == {
        "W+": (3, 2, TINY.num_ws, 8), "F4": (3, 2, 16, 16, 8)}  # fmt: skip
    assert found.terms.total.shape == (6, 3, 2)
    assert not found.latents["F4"][:, 0].any()  # W+ alone
    assert found.latents["F4"][:, 1].any(axis=(1, 2, 3)).all()
    assert np.isfinite(found.maps).all()
    assert found.maps.min() >= 0


def test_maps_are_the_spatial_distances_of_the_images(found, targets, tiny):
    masks = latents.single_layer_masks(LAYERS)
    third = {name: value[2] for name, value in found.latents.items()}
    images = np.clip(driver.render(TINY, tiny.generator, third, masks, batch_size=2), -1, 1)
    expected = lpips.lpips(tiny.lpips, jnp.asarray(images), jnp.asarray(targets[[2, 2]]), "alex", spatial=True)
    np.testing.assert_allclose(found.maps[2], expected, rtol=0, atol=1e-5 * float(jnp.ptp(expected)))


def test_each_is_the_inversion_with_that_layers_offset_everywhere(found, targets, tiny):
    ws = analysis.start_latents(TINY, tiny, targets[:2], CONFIG)
    masks = {"F4": jnp.ones((2, 16, 16, 1))}
    before = inversion.run_chunk._cache_size()
    items = Items(targets[:2], masks, latents.init_latents(LAYERS, ws), np.arange(2))
    alone, _ = driver.run(TINY, tiny, items, CONFIG)
    assert inversion.run_chunk._cache_size() == before == 1  # the same program as the measuring
    np.testing.assert_array_equal(alone["F4"], found.latents["F4"][:2, 1])


def test_letterboxed_targets_give_maps_of_their_size(tiny):
    target = np.zeros((1, 24, 32, 3), np.float32)
    config = dataclasses.replace(CONFIG, num_opt_steps=1, lambda_lpips=0.0)
    vgg = random_lpips("vgg")
    ws = np.zeros((1, TINY.num_ws, 8))
    maps, _, _ = analysis.measure_maps(TINY, tiny, target, ws, config, map_params=vgg, map_net="vgg")
    assert maps.shape == (1, 2, 24, 32)


# --- predicted ---

PREDICTOR = PredictorConfig(("F4", "W+"), 3, blocks=(1, 1, 1, 1), width=4, decoder_width=6, low_level_width=4)


@pytest.fixture(scope="module")
def predictor():
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(lambda: deeplab.init(PREDICTOR, key=jax.random.key(0)))
    # Positive throughout: no ReLU hides a part of the network, and variances are positive.
    return jax.tree.map(lambda leaf: rng.uniform(0.05, 0.3, leaf.shape).astype(np.float32), tree)


def test_any_number_of_targets_gets_its_maps(predictor, targets):
    analysis._predict.clear_cache()
    maps = analysis.predict_maps(PREDICTOR, predictor, targets.astype(np.float64), batch_size=2)  # 3: one is filled up
    analysis.predict_maps(PREDICTOR, predictor, targets[:1], batch_size=2)
    assert analysis._predict._cache_size() == 1
    chex.assert_shape(maps, (3, 2, 32, 32))
    assert maps.dtype == np.float32
    expected = jax.jit(deeplab.predict, static_argnames="config")(predictor, targets, PREDICTOR)
    assert np.ptp(expected, axis=(2, 3)).min() > 1e-2 * np.max(expected)  # else the comparison says little
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_prediction_is_in_full_float32_by_default(predictor, monkeypatch):
    asked = []
    monkeypatch.setattr(analysis, "_predict", lambda v, x, c, precision: asked.append(precision) or np.zeros(1))
    analysis.predict_maps(PREDICTOR, predictor, np.zeros((1, 8, 8, 3)))
    analysis.predict_maps(PREDICTOR, predictor, np.zeros((1, 8, 8, 3)), precision="default")
    assert asked == ["highest", "default"]
    monkeypatch.undo()
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    lowered = analysis._predict.lower(predictor, images, PREDICTOR, "highest").as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.convolution" in line or "dot_general" in line]
    assert len(products) > 20
    assert all(line.count("HIGHEST") == 2 for line in products)


def test_targets_of_another_shape_are_refused(predictor):
    with pytest.raises(ValueError, match=r"\[N, H, W, 3\]"):
        analysis.predict_maps(PREDICTOR, predictor, np.zeros((8, 8, 3)))


# --- where W+ starts ---

ENCODER = e4e.E4EConfig(4, style_dim=8, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), head_width=8, head_depth=1)


def test_targets_of_any_number_give_their_own_codes():
    params = e4e.init(ENCODER, key=jax.random.key(0))
    targets = np.random.default_rng(0).uniform(-1, 1, (3, 24, 32, 3)).astype(np.float32)
    codes = analysis.encode(ENCODER, params, targets, batch_size=2)
    assert codes.shape == (3, 4, 8)
    for i in range(3):
        one = analysis.encode(ENCODER, params, targets[i : i + 1])
        # A batch of one and of two are summed in another order.
        np.testing.assert_allclose(codes[i], one[0], rtol=0, atol=1e-5 * np.ptp(codes))
    with pytest.raises(ValueError, match="images must be"):
        analysis.encode(ENCODER, params, targets[..., :2])


def test_start_at_the_mean_or_at_the_closest_sample(tiny):
    samples = 6
    z = jax.random.normal(jax.random.fold_in(jax.random.key(4), 0), (4, 8))
    ws = jax.jit(stylegan2.map_z, static_argnums=0)(TINY, tiny.generator, z)
    ws = tiny.prior.mean_w + 0.5 * (ws - tiny.prior.mean_w)
    targets = np.clip(driver.render(TINY, tiny.generator, {"W+": ws[2:4]}, {}, batch_size=2), -1, 1)
    mean = analysis.start_latents(TINY, tiny, targets, CONFIG)
    np.testing.assert_array_equal(mean, np.broadcast_to(tiny.prior.mean_w, (2, TINY.num_ws, 8)))
    best = analysis.start_latents(
        TINY,
        tiny,
        targets,
        CONFIG,
        kind="best",
        samples=samples,
        truncation_psi=0.5,
        key=jax.random.key(4),
        batch_size=4,
    )
    np.testing.assert_allclose(best, ws[2:4], atol=1e-5)
    with pytest.raises(ValueError, match="key"):
        analysis.start_latents(TINY, tiny, targets, CONFIG, kind="best")
    with pytest.raises(ValueError, match="'encoder'"):
        analysis.start_latents(TINY, tiny, targets, CONFIG, kind="encoder")  # type: ignore[arg-type]
