"""The Python API on a tiny generator: the calls of the README."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import samjax
from samjax import api
from samjax.io import checkpoints
from samjax.nets import stylegan2

SIZE = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("generator") / "own.safetensors"
    config = stylegan2.StyleGAN2Config(SIZE, z_dim=8, w_dim=8, mapping_layers=2, channel_base=256, channel_max=8)
    checkpoints.save_safetensors(path, config, stylegan2.init(config, key=jax.random.key(0)))
    settings = samjax.InversionConfig(
        latent_names=("W+", "F4", "F6"), num_opt_steps=3, lpips_type="alex", loss_resolution=SIZE, chunk_steps=3
    )
    return samjax.load_models(samjax.load_generator(path), settings)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).uniform(-1, 1, (SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def inverted(models, image):
    labels = np.zeros((SIZE, SIZE), np.int32)
    labels[:, SIZE // 2 :] = 3
    maps = np.stack([np.where(labels == 3, 0.9, 0.1), np.full(labels.shape, 0.5), np.full(labels.shape, 0.5)])
    return samjax.invert(models, image, segments=labels, threshold=0.6, error_maps=maps)


def test_invert_gives_each_segment_its_layer(inverted):
    assert inverted.assignment.values.tolist() == [0, 3]
    assert inverted.assignment.layers.tolist() == [[0, 1]]
    assert inverted.masks["F4"][0, :, 12:].min() > 0.9
    assert inverted.masks["F4"][0, :, :4].max() < 0.1
    assert inverted.image.shape == (SIZE, SIZE, 3)
    assert np.isfinite(inverted.terms.total).all()
    assert inverted.lpips > 0


def test_all_directions_at_once_are_each_alone(models, inverted):
    directions = np.random.default_rng(1).standard_normal((3, 10, 8)).astype(np.float32)
    images = api.edit_all(models, inverted.latents, inverted.masks, directions, (-1.0, 2.0))
    assert images.shape == (3, 2, SIZE, SIZE, 3)
    for direction, pair in zip(directions, images, strict=True):
        alone = api.edit_latents(models, inverted.latents, inverted.masks, direction, (-1.0, 2.0))
        np.testing.assert_allclose(pair, alone, atol=1e-5 * np.ptp(alone))  # another batch, another order of sums
    assert api.edit_all(models, inverted.latents, inverted.masks, directions[:0], (1.0,)).shape[:2] == (0, 1)


@pytest.mark.parametrize(("size", "count", "expected"), [(8, 1, 1), (8, 11, 6), (16, 11, 11), (4, 8, 4), (1, 5, 1)])
def test_batches_are_no_larger_than_needed(size, count, expected):
    config = samjax.InversionConfig(batch_size=size)
    assert api._even_batches(config, count).batch_size == expected


def test_editing_with_strength_zero_is_the_reconstruction(models, inverted):
    # Of hard masks: where a mask is soft, the reference's edited pass mixes the offset in twice, by m squared.
    masks = {name: np.round(mask) for name, mask in inverted.masks.items()}
    direction = np.ones((1, 10, 8), np.float32)
    images = api.edit_latents(models, inverted.latents, masks, direction, (0.0, 1.0))
    plain = api.render(models, inverted.latents, masks)[0]
    spread = np.ptp(plain)
    np.testing.assert_allclose(images[0], plain, atol=1e-5 * spread)  # float32, another order of sums
    assert np.abs(images[1] - images[0]).max() > 1e-2 * spread
    assert samjax.edit(models, inverted, direction).shape == (4, SIZE, SIZE, 3)


def test_distances_are_lpips_of_each_image(models, image):
    both = api.distances(models, np.stack([image, -image]), image)
    assert both[0] == pytest.approx(0, abs=1e-6)
    assert both[1] > 0.05
