"""Edits: the reference's edited image, and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden_generator, seeded, seeded_latents

from samjax import editing, latents, layer_selection
from samjax.nets import stylegan2
from samjax.testing import TINY, tiny_generator


@pytest.fixture(scope="module")
def tiny():
    """Parameters, latents of one image and masks of half of it."""
    params = tiny_generator()
    found = {
        "W+": jax.random.normal(jax.random.key(1), (1, TINY.num_ws, 8)),
        "F4": jax.random.normal(jax.random.key(2), (1, 16, 16, 8)),
    }
    return params, found, {"F4": jnp.zeros((1, 16, 16, 1)).at[:, :, :8].set(1.0)}


def directions(count: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, TINY.num_ws, 8)).astype(np.float32)


def test_reference_edit(golden):
    case = golden("sam_A")
    config, params = golden_generator(case)
    layers = latents.latent_layers(config)
    error_maps = np.stack([case[f"inv_{layer.name}"][0, 0] for layer in layers])
    masks = layer_selection.stack_masks(
        layer_selection.assign_layers(error_maps, case["segments"], 0.45).layer_maps, layers
    )
    direction = np.float32(0.5) * seeded("edit", case["wp"].shape)
    image = editing.edit(config, params, seeded_latents(config, case["wp"]), masks, direction, [1.0], batch_size=1)
    expected = case["edited"].transpose(0, 2, 3, 1)
    # float32 through 14 layers, summed in another order.
    np.testing.assert_allclose(image[0], expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_strength_zero_is_the_reconstruction(tiny):
    params, found, masks = tiny
    image = editing.edit(TINY, params, found, masks, directions(1), [0.0])[0]
    expected = jax.jit(latents.synthesize_latents, static_argnums=0)(TINY, params, found, masks).image
    np.testing.assert_allclose(image, expected, atol=1e-5 * float(jnp.ptp(expected)))


def test_under_a_full_mask_an_edit_moves_only_the_rgb_so_far(tiny):
    params, found, _ = tiny
    early = directions(1)
    early[:, 5:] = 0  # styles 0 to 4 serve the blocks up to 16 px alone
    everywhere = {"F4": jnp.ones((1, 16, 16, 1))}
    before, after = editing.edit(TINY, params, found, everywhere, early, [0.0, 1.0])[0]

    @jax.jit
    def small(params, ws):  # the generator's image at 16 px, upsampled as its last block does it
        half = stylegan2.Generator(TINY).apply({"params": params}, ws, max_resolution=16, method="synthesize")
        return stylegan2.upsample(half.image)

    expected = small(params, found["W+"] + early) - small(params, found["W+"])
    assert float(jnp.ptp(expected)) > 0.1
    np.testing.assert_allclose(after - before, expected[0], rtol=0, atol=1e-4 * float(jnp.ptp(expected)))


def test_batches_hold_every_pair_in_order_and_compile_once(tiny):
    params, found, masks = tiny
    editing.apply.clear_cache()
    latents.draw.clear_cache()
    ways, strengths = directions(3), [0.0, 1.0, 2.5]
    images = editing.edit(TINY, params, found, masks, ways, strengths, batch_size=4)
    assert images.shape == (3, 3, 32, 32, 3)
    for d in range(3):
        for s in range(3):
            alone = editing.edit(TINY, params, found, masks, ways[d : d + 1], strengths[s : s + 1], batch_size=4)
            np.testing.assert_allclose(images[d, s], alone[0, 0], atol=1e-6 * np.ptp(alone))
    assert editing.apply._cache_size() == 1
    assert latents.draw._cache_size() == 1


def test_several_images_and_wrong_directions_are_refused(tiny):
    params, found, masks = tiny
    twice = {name: jnp.concatenate([value, value]) for name, value in found.items()}
    with pytest.raises(ValueError, match="one image"):
        editing.edit(TINY, params, twice, masks, directions(1), [1.0])
    with pytest.raises(ValueError, match="directions"):
        editing.edit(TINY, params, found, masks, directions(1)[0], [1.0])
