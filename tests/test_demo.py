"""The demo's domain, networks, samples and directions."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import analysis, demo, driver, learned_start
from samjax.demo import scenes
from samjax.io import checkpoints, images
from samjax.latents import LATENT_NAMES, init_latents, latent_layers, single_layer_masks
from samjax.nets import stylegan2


def _factors(**values: float) -> jax.Array:
    """A normalized factor vector: alternately 1 and -1, except for `values`."""
    z = np.where(np.arange(scenes.NUM_FACTORS) % 2, 1.0, -1.0)
    for name, value in values.items():
        z[scenes.FACTORS.index(name)] = value
    return jnp.asarray(z / np.sqrt(np.mean(z**2)), jnp.float32)


def test_scenes_are_images_with_all_labels():
    scene = scenes.render(_factors(), 64)
    assert scene.image.shape == (64, 64, 3)
    assert float(jnp.abs(scene.image).max()) <= 1
    assert set(np.unique(scene.labels)) == set(range(len(scenes.LABELS)))


def test_a_scene_at_half_size_is_the_same_scene():
    large, small = scenes.render(_factors(), 256).image, scenes.render(_factors(), 128).image
    reduced = large.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert float(jnp.abs(reduced - small).mean()) < 0.01  # edges alone may differ


def test_factors_change_what_their_names_say():
    def car(scene: scenes.Scene) -> np.ndarray:
        return np.asarray(scene.labels) == scenes.CAR

    plain, blue = scenes.render(_factors(blue=-1.5), 64), scenes.render(_factors(blue=1.5), 64)
    assert np.asarray(blue.image - plain.image)[car(plain) & car(blue)][:, 2].mean() > 0.3
    small, large = scenes.render(_factors(scale=-1.5), 64), scenes.render(_factors(scale=1.5), 64)
    assert car(large).sum() > 1.1 * car(small).sum()
    saloon, van = scenes.render(_factors(body=-1.5), 64), scenes.render(_factors(body=1.5), 64)
    assert car(van).sum() > 1.1 * car(saloon).sum()


def test_the_length_of_z_does_not_matter():
    z = _factors()
    np.testing.assert_allclose(scenes.render(z, 32).image, scenes.render(3 * z, 32).image, atol=1e-4)


def test_hard_scenes_add_objects_and_are_reproducible():
    few = demo.hard_scenes(3, key=jax.random.key(5), resolution=64)
    more = demo.hard_scenes(4, key=jax.random.key(5), resolution=64)
    np.testing.assert_array_equal(few.labels, more.labels[:3])
    np.testing.assert_array_equal(few.image, more.image[:3])
    for labels in np.asarray(more.labels):
        assert (labels == scenes.OCCLUDER).any()
        assert (labels == scenes.CAR).mean() > 0.05


@functools.partial(jax.jit, static_argnums=0)
def _synthesize(config, params, ws):
    return jnp.clip(stylegan2.synthesize(config, params, ws, noise="none").image[0], -1, 1)


def _draw(generator, ws):
    """The image [256, 256, 3] of styles [1, num_ws, w_dim], by one program for all tests."""
    return _synthesize(generator.config, generator.params, ws)


@pytest.fixture(scope="module")
def generator():
    return demo.load_generator()


def test_generator_is_small_and_has_every_latent_layer(generator):
    assert demo.GENERATOR.stat().st_size <= 8e6
    assert sum(a.size for a in jax.tree.leaves(generator.params)) <= 4e6
    assert generator.config.img_resolution == 256


def test_generator_draws_held_out_scenes(generator):
    """At least 26 dB on scenes of its own domain: with z that training does not use."""
    z = jax.random.normal(jax.random.key(987), (8, scenes.NUM_FACTORS))
    ws = stylegan2.map_z(generator.config, generator.params, z)
    render = jax.jit(lambda z: scenes.render(z).image)
    errors = [jnp.square(_draw(generator, w[None]) - render(one)).mean() for w, one in zip(ws, z, strict=True)]
    psnr = 10 * jnp.log10(4 / jnp.stack(errors))
    assert float(psnr.mean()) >= 26


def test_samples_are_hard_scenes_with_their_segments():
    samples = sorted(demo.SAMPLES.glob("*_segments.png"))
    assert len(samples) >= 4
    for path in samples:
        image = path.with_name(path.name.replace("_segments", ""))
        assert images.read_image(image).shape == (256, 256, 3)
        labels = images.read_segments(path, 256, 256, (256, 256))
        assert scenes.CAR in labels
        assert scenes.OCCLUDER in labels


def test_the_encoders_code_is_closer_than_the_mean_style(generator):
    config, variables, _ = checkpoints.load_network(demo.ENCODER, "e4e")
    z = jax.random.normal(jax.random.key(987), (1, scenes.NUM_FACTORS))
    target = np.asarray(scenes.render(z[0]).image)
    code = analysis.encode(config, variables, target[None])
    mean = np.broadcast_to(generator.params["mapping"]["w_avg"], code.shape)
    error, worse = (float(np.square(_draw(generator, jnp.asarray(ws)) - target).mean()) for ws in (code, mean))
    assert error < 0.5 * worse


def test_the_learned_start_needs_no_step_where_the_code_cannot_follow(generator):
    """In F10, two thirds of the code's error are gone in scenes with objects that the generator cannot draw."""
    assert demo.OFFSETS.stat().st_size <= 4e6
    offsets = checkpoints.load_network(demo.OFFSETS, "offsets")
    encoder = checkpoints.load_network(demo.ENCODER, "e4e")
    paths = sorted(demo.SAMPLES.glob("scene?.png"))[:2]
    targets = np.stack([images.to_float(images.read_image(path)) for path in paths])
    layers = latent_layers(generator.config)
    codes = analysis.encode(encoder.config, encoder.params, targets)
    start = {name: np.asarray(value) for name, value in init_latents(layers, jnp.asarray(codes)).items()}
    last = {name: np.repeat(mask[-1:], 2, axis=0) for name, mask in single_layer_masks(layers).items()}
    found = learned_start.learned_latents(
        offsets.config, offsets.params, generator.config, generator.params, targets, last, start
    )

    def error(latents: Mapping[str, np.ndarray]) -> np.ndarray:
        made = driver.render(generator.config, generator.params, latents, last)
        return np.square(np.clip(made, -1, 1) - targets).mean((1, 2, 3))

    assert (error(found) < error(start) / 3).all()
    assert (error(found) < 4 / 10**2.3).all()  # 23 dB


def test_the_predictor_finds_the_added_objects():
    config, variables, _ = checkpoints.load_network(demo.PREDICTOR, "invertibility")
    paths = sorted(demo.SAMPLES.glob("scene?.png"))
    targets = np.stack([images.to_float(images.read_image(path)) for path in paths])
    found = analysis.predict_maps(config, variables, targets)
    assert config.latent_names == LATENT_NAMES
    for path, error_maps in zip(paths, found, strict=True):
        labels = images.read_segments(path.with_name(f"{path.stem}_segments.png"), 256, 256, (256, 256))
        added, scene = (error_maps[:, mask].mean(1) for mask in (labels == scenes.OCCLUDER, labels < scenes.CAR))
        assert added[0] > 1.5 * scene[0]  # W+ cannot render them
        assert added[-1] < added[0]


def test_blue_direction_makes_the_car_blue_and_leaves_the_sky(generator):
    direction = np.load(demo.EDITS / "blue_car.npy", allow_pickle=False)
    z = _factors(blue=-1.0, red=1.0)[None]
    ws = stylegan2.map_z(generator.config, generator.params, z)
    change = np.asarray(_draw(generator, ws + 2 * direction) - _draw(generator, ws))
    labels = np.asarray(scenes.render(z[0]).labels)
    inside = change[labels == scenes.CAR].mean(0)
    assert inside[2] > 0.2
    assert inside[0] < -0.1
    assert np.abs(change[labels == 0]).mean() < 0.05


def test_body_direction_makes_the_car_taller(generator):
    direction = np.load(demo.EDITS / "van.npy", allow_pickle=False)
    assert direction.shape == (1, generator.config.num_ws, generator.config.w_dim)
    z = _factors(body=-1.0)[None]
    ws = stylegan2.map_z(generator.config, generator.params, z)
    change = np.abs(np.asarray(_draw(generator, ws + direction) - _draw(generator, ws))).mean(-1)
    saloon = np.asarray(scenes.render(z[0]).labels) == scenes.CAR
    van = np.asarray(scenes.render(_factors(body=1.0)).labels) == scenes.CAR
    assert change[van & ~saloon].mean() > 5 * change[~van & ~saloon].mean()


def test_scenes_are_drawn_once_and_depend_on_seed_and_number_only(tmp_path):
    few = demo.draw_scenes(tmp_path / "few", 2, seed=5)
    written = [path.stat().st_mtime_ns for path in few]
    assert demo.draw_scenes(tmp_path / "few", 2, seed=5) == few
    assert [path.stat().st_mtime_ns for path in few] == written
    more = demo.draw_scenes(tmp_path / "more", 3, seed=5)
    assert [path.name for path in more] == [f"scene5_{i:05d}.png" for i in range(3)]
    assert [path.read_bytes() for path in few] == [path.read_bytes() for path in more[:2]]
