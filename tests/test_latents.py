"""Latent layers: which a generator has, how they start, and the image they form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import golden_generator, seeded_latents

from samjax import latents, layer_selection
from samjax.errors import UserError
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.stylegan2 import StyleGAN2Config
from samjax.testing import TINY, tiny_generator

synthesize = jax.jit(latents.synthesize_latents, static_argnums=0, static_argnames="noise")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (StyleGAN2Config(), {"W+": (14, 512), "F4": (16, 16, 512), "F6": (32, 32, 512), "F8": (64, 64, 512),
                             "F10": (128, 128, 256)}),
        (StyleGAN2Config(1024), {"W+": (18, 512), "F4": (16, 16, 512), "F6": (32, 32, 512), "F8": (64, 64, 512),
                                 "F10": (128, 128, 256)}),
        (StyleGAN2Config(64), {"W+": (10, 512), "F4": (16, 16, 512), "F6": (32, 32, 512)}),
        (StyleGAN2Config(16), {"W+": (6, 512)}),
    ],
)  # fmt: skip
def test_layers_follow_the_generator(config, expected):
    assert {layer.name: layer.shape for layer in latents.latent_layers(config)} == expected


def test_an_offset_acts_on_the_image_exactly_where_it_counts_as_a_layer():
    # The last block's RGB is taken before its offset: at 32 px, F6 would change nothing.
    params = tiny_generator()
    ws = jnp.zeros((1, TINY.num_ws, TINY.w_dim))
    plain = synthesize(TINY, params, {"W+": ws}, {}).image
    acts = {}
    for name, r in latents.RESOLUTIONS.items():
        if r <= TINY.img_resolution:
            offset = jnp.ones((1, r, r, TINY.channels(r)))
            moved = synthesize(TINY, params, {"W+": ws, name: offset}, {}).image
            acts[name] = bool(jnp.any(moved != plain))
    assert acts == {"F4": True, "F6": False}
    assert [layer.name for layer in latents.latent_layers(TINY)] == ["W+", "F4"]


def test_names_are_read_ordered_and_checked():
    assert latents.parse_latent_names("F10, W+,F4") == ("W+", "F4", "F10")
    assert latents.parse_latent_names("F6") == ("W+", "F6")
    with pytest.raises(UserError, match=r"'F5'.*W\+, F4, F6, F8, F10"):
        latents.parse_latent_names("W+,F5")
    with pytest.raises(UserError, match=r"'F6'.*32 px generator has W\+, F4$"):
        latents.parse_latent_names("W+,F6", TINY)


def test_a_predictor_knows_the_same_layers():
    assert PredictorConfig().latent_names == latents.LATENT_NAMES


def test_start_is_the_style_and_no_offset():
    layers = latents.latent_layers(TINY)
    start = latents.init_latents(layers, jnp.arange(16.0).reshape(2, 8))
    assert start["W+"].shape == (2, TINY.num_ws, 8)
    np.testing.assert_array_equal(start["W+"][1, 3], np.arange(8.0, 16.0))
    assert not np.any(start["F4"])
    assert start["F4"].shape == (2, 16, 16, 8)
    with pytest.raises(ValueError, match="W\\+ has shape"):
        latents.init_latents(layers, jnp.zeros((1, 3, 8)))


def test_single_layer_masks_allow_one_layer_each():
    layers = latents.latent_layers(StyleGAN2Config(64))
    masks = latents.single_layer_masks(layers)
    assert {name: mask.shape for name, mask in masks.items()} == {"F4": (3, 16, 16, 1), "F6": (3, 32, 32, 1)}
    assert [[float(mask[i].min()), float(mask[i].max())] for mask in masks.values() for i in range(3)] == [
        [0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [1, 1]]  # fmt: skip


def test_forms_the_reference_image(golden):
    case = golden("sam_A")
    config, params = golden_generator(case)
    layers = latents.latent_layers(config)
    error_maps = np.stack([case[f"inv_{layer.name}"][0, 0] for layer in layers])
    layer_map = layer_selection.assign_layers(error_maps, case["segments"], 0.45).layer_maps
    masks = {name: jnp.asarray(mask) for name, mask in layer_selection.stack_masks(layer_map, layers).items()}
    image = synthesize(config, params, seeded_latents(config, case["wp"]), masks).image
    expected = case["formed"].transpose(0, 2, 3, 1)
    # float32 through 14 layers, summed in another order; 1e-6 of the spread was seen.
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_random_noise_of_an_item_does_not_depend_on_its_neighbors():
    params = tiny_generator()
    ws = jax.random.normal(jax.random.key(1), (3, TINY.num_ws, TINY.w_dim))
    keys = jax.random.split(jax.random.key(2), 3)

    def run(i):
        return synthesize(TINY, params, {"W+": ws[i]}, {}, noise="random", noise_keys=keys[i]).image

    together, alone = run(jnp.arange(3)), run(jnp.array([1]))
    # The same noise; sums of another batch shape may round differently.
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5 * float(jnp.ptp(alone)))
    assert not np.allclose(alone, synthesize(TINY, params, {"W+": ws[1:2]}, {}).image, atol=0.01)
    with pytest.raises(ValueError, match="noise_keys"):
        synthesize(TINY, params, {"W+": ws}, {}, noise="random")
