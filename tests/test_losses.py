"""Loss terms, the prior and the schedule: the reference's numbers, safe gradients, odd sizes."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden_weights import golden_generator

from samjax import losses
from samjax.errors import UserError
from samjax.nets import stylegan2
from samjax.testing import tiny_generator


@pytest.fixture(scope="module")
def reference_prior(golden):
    """The prior from the 5,000 z of the reference case, by its generator's mapping network."""
    config, params = golden_generator(golden("sam_A"))
    z = np.random.default_rng(zlib.crc32(b"A/input/zs")).standard_normal((5000, 512)).astype(np.float32)
    np.testing.assert_array_equal(z[:8], golden("sam_A")["mvg_z"])
    return losses.fit_prior(jax.jit(stylegan2.map_z, static_argnums=0)(config, params, z)[:, 0])


def test_reference_prior(golden, reference_prior):
    case = golden("sam_A")
    np.testing.assert_allclose(reference_prior.mean_v, case["mean_v"], rtol=0, atol=1e-4 * np.ptp(case["mean_v"]))
    whitening = np.asarray(reference_prior.whitening, np.float64)
    diagonal = np.sum(whitening**2, axis=1)
    # The smallest eigenvalues of the covariance are 1e-7 of the largest, so the inverse feels the rounding of float32
    # styles: PyTorch itself differs by 1e-4 relative between a batch and single samples; 2e-4 was seen here.
    np.testing.assert_allclose(diagonal, case["inv_cov_v_diag"], rtol=1e-3)


def test_reference_prior_distance_and_delta(golden, reference_prior):
    case = golden("sam_A")
    wp = jnp.asarray(case["wp"])
    # 2e-5 was seen; the rounding of the styles that the prior was fitted to, as above.
    np.testing.assert_allclose(losses.prior_distance(reference_prior, wp)[0], case["mvg"], rtol=1e-4)
    np.testing.assert_allclose(losses.delta(wp)[0], case["delta"], rtol=1e-6)


def test_prior_distance_of_few_samples_survives_float32():
    # With 8 samples of 64 dimensions the covariance is singular but for 1e-8: distances are of order 1e8.
    rng = np.random.default_rng(0)
    samples, ws = rng.standard_normal((8, 64)), rng.standard_normal((2, 3, 64)).astype(np.float32)
    v = np.where(samples >= 0, samples, 5 * samples)
    inverse = np.linalg.inv(np.cov(v.T) + 1e-8 * np.eye(64))
    mean = samples.mean(0)
    d = np.where(ws >= 0, ws, 5.0 * ws) - np.where(mean >= 0, mean, 5 * mean)
    expected = np.einsum("nki,ij,nkj->n", d, inverse, d)
    assert expected.min() > 1e9
    np.testing.assert_allclose(losses.prior_distance(losses.fit_prior(samples), jnp.asarray(ws)), expected, rtol=1e-4)


def test_prior_is_fitted_to_good_samples_only():
    with pytest.raises(UserError, match="at least two"):
        losses.fit_prior(np.zeros((1, 4)))
    with pytest.raises(UserError, match="not finite"):
        losses.fit_prior(np.full((3, 4), np.nan))


def test_generator_prior_is_the_prior_of_its_mapped_z():
    config = stylegan2.StyleGAN2Config(img_resolution=8, z_dim=4, w_dim=4, c_dim=3, mapping_layers=2, channel_max=4)
    params = tiny_generator(config)
    prior = losses.generator_prior(config, params, key=jax.random.key(1), samples=64, class_idx=2)
    z = jax.random.normal(jax.random.key(1), (64, 4))
    labels = jnp.tile(jnp.array([[0.0, 0.0, 1.0]]), (64, 1))
    ws = jax.jit(stylegan2.map_z, static_argnums=0)(config, params, z, labels)[:, 0]
    np.testing.assert_allclose(prior.mean_w, ws.mean(0), atol=1e-6)
    v = np.asarray(jax.nn.leaky_relu(ws, 5.0), np.float64)
    inverse = np.linalg.inv(np.cov(v.T) + 1e-8 * np.eye(4))
    whitening = np.asarray(prior.whitening)
    np.testing.assert_allclose(whitening @ whitening.T, inverse, rtol=1e-3, atol=1e-4 * inverse.max())


def test_delta_has_the_gradient_of_pytorch_also_where_styles_are_equal():
    ws = np.random.default_rng(0).standard_normal((2, 4, 5)).astype(np.float32)
    ws[0, 2] = ws[0, 0]  # the square root's slope is infinite here
    ws[1] = ws[1, :1]
    found = jax.grad(lambda x: jnp.sum(losses.delta(x)))(jnp.asarray(ws))
    x = torch.tensor(ws, requires_grad=True)
    torch.norm(x[:, 1:] - x[:, :1], dim=2).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(found, x.grad.numpy(), atol=1e-6)
    assert np.all(np.isfinite(found))


def test_offsets_cost_their_distance_from_the_start():
    start = {"W+": jnp.zeros((2, 3, 4)), "F4": jnp.ones((2, 2, 2, 3)), "F6": jnp.zeros((2, 4, 4, 3))}
    latents = {"W+": jnp.ones((2, 3, 4)), "F4": jnp.full((2, 2, 2, 3), 3.0), "F6": jnp.ones((2, 4, 4, 3))}
    np.testing.assert_allclose(losses.offset_distance(latents, start), [5.0, 5.0])
    assert losses.offset_distance({"W+": latents["W+"]}, start) == 0.0


def test_images_are_reduced_clipped_and_cropped_as_by_pytorch():
    images = 2 * np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    x = torch.nn.functional.interpolate(torch.tensor(images.transpose(0, 3, 1, 2)), size=(8, 8), mode="area")
    expected = x.clamp(-1, 1)[:, :, 1:-1].numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(losses.comparable(jnp.asarray(images), 8, 6, 8), expected, atol=1e-6)
    np.testing.assert_array_equal(losses.reduce_area(jnp.asarray(images), 32), images)  # smaller ones stay
    np.testing.assert_array_equal(losses.crop_letterbox(jnp.asarray(images), 16, 12), images[:, :, 2:14])
    with pytest.raises(ValueError, match="multiple"):
        losses.reduce_area(jnp.asarray(images), 6)


def test_learning_rate_is_the_references(golden):
    case = golden("sam_A")
    steps = jnp.arange(25)
    found = losses.learning_rate(steps, jnp.asarray(25), jnp.float32(0.05), jnp.float32(0.25), jnp.float32(0.05))
    np.testing.assert_allclose(found, case["trajectory"][:, 5], rtol=1e-5)


def test_learning_rate_without_ramps_is_constant():
    found = losses.learning_rate(jnp.arange(4), jnp.asarray(4), jnp.float32(0.1), jnp.float32(0), jnp.float32(0))
    np.testing.assert_allclose(found, 0.1, rtol=1e-6)
