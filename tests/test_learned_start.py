"""The learned start: what the offset encoder sees, which layers it serves, and the pipeline that uses it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import Pipeline, learned_start, losses
from samjax.config import Options
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.io.checkpoints import LoadedNetwork
from samjax.latents import init_latents, latent_layers, synthesize_latents
from samjax.nets import offset_encoder
from samjax.testing import TINY, TINY_64, tiny_encoder, tiny_generator, tiny_offset_encoder

LAYERS = latent_layers(TINY_64)

synthesize = jax.jit(synthesize_latents, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return tiny_generator(TINY_64)


def case(count: int = 1, height: int = 64) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Targets, masks and latents."""
    rng = np.random.default_rng(0)
    masks = {"F4": rng.random((count, 16, 16, 1)), "F6": rng.random((count, 32, 32, 1))}
    start = init_latents(LAYERS, jnp.asarray(rng.standard_normal((count, 8)), jnp.float32))
    targets = rng.uniform(-0.9, 0.9, (count, height, 64, 3)).astype(np.float32)
    to_float = lambda tree: {name: np.asarray(value, np.float32) for name, value in tree.items()}  # noqa: E731
    return targets, to_float(masks), to_float(start)


def test_what_the_network_sees_is_the_image_and_the_slope_of_its_squared_error(params):
    targets, masks, latents = case(height=48)
    see = jax.jit(learned_start.gradient_inputs, static_argnums=0)
    images, features, gradient = see(TINY_64, params, targets, masks, latents)
    made = synthesize(TINY_64, params, latents, masks)
    np.testing.assert_allclose(images, np.clip(made.image[:, 8:56], -1, 1), atol=1e-5)
    np.testing.assert_allclose(features[32], made.features[32], atol=1e-4)

    def error(step: float) -> float:
        moved = {name: value - step * np.asarray(gradient[name]) for name, value in latents.items()}
        image = losses.comparable(synthesize(TINY_64, params, moved, masks).image, 64, 48, 64)
        return 0.5 * float(jnp.sum(jnp.square(image - targets)))

    size = sum(float(jnp.sum(jnp.square(value))) for value in gradient.values())
    step = 1e-4 * error(0) / size
    np.testing.assert_allclose((error(-step) - error(step)) / (2 * step), size, rtol=0.02)  # float32 differences


def test_a_correction_reaches_every_layer_and_none_leaves_the_start(params):
    targets, masks, start = case()
    network = tiny_offset_encoder(TINY_64)
    found = learned_start.learned_latents(network.config, network.params, TINY_64, params, targets, masks, start)
    assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in start.items()}
    assert all(np.abs(found[name] - start[name]).max() > 1e-4 for name in start)
    fresh = offset_encoder.init(network.config, key=jax.random.key(0))
    same = learned_start.learned_latents(network.config, fresh, TINY_64, params, targets, masks, start)
    for name, value in start.items():
        np.testing.assert_array_equal(same[name], value)

    # Without a layer: as with a mask of zeros.
    some = lambda tree: {name: value for name, value in tree.items() if name != "F6"}  # noqa: E731
    fewer = learned_start.learned_latents(
        network.config, network.params, TINY_64, params, targets, some(masks), some(start)
    )
    masked = learned_start.learned_latents(
        network.config, network.params, TINY_64, params, targets, {**masks, "F6": np.zeros_like(masks["F6"])}, start
    )
    assert fewer.keys() == {"W+", "F4"}
    np.testing.assert_array_equal(fewer["F4"], masked["F4"])


def test_an_offset_encoder_is_saved_and_loaded_with_its_manifest(tmp_path):
    network = tiny_offset_encoder(TINY_64)
    checkpoints.save_network(tmp_path / "network", network.config, network.params, {"source": {"file": "x"}})
    checkpoints.save_safetensors(tmp_path / "n.safetensors", network.config, network.params, manifest={"source": "x"})
    for path in (tmp_path / "network", tmp_path / "n.safetensors"):
        config, variables, manifest = checkpoints.load_network(path, "offsets")
        assert config == network.config
        assert manifest["source"]
        for one, other in zip(jax.tree.leaves(variables), jax.tree.leaves(network.params), strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match=r"another network \(offset encoder\), where an e4e encoder is expected"):
        checkpoints.load_network(tmp_path / "network", "e4e")


# --- the pipeline ---


@pytest.fixture(scope="module")
def pipeline(params) -> Pipeline:
    return Pipeline(
        LoadedNetwork(TINY_64, params, {}), encoder=tiny_encoder(TINY_64), offsets=tiny_offset_encoder(TINY_64),
        options=Options(num_opt_steps=0, lpips_type="alex"),
    )  # fmt: skip


def test_without_steps_the_result_is_the_learned_start(pipeline):
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    maps = np.zeros((3, 64, 64))
    maps[0, :32] = maps[1, :16] = 1.0  # F6 above, then F4, W+ below
    segments = np.repeat([0, 1, 2, 2], 16)[:, None] * np.ones((1, 64), int)
    assert pipeline.category.start == "learned"
    known = pipeline.analyze(image, segments=segments, maps=maps)
    assert known.ws_from == "learned"
    result = pipeline.invert(known, threshold=0.5)
    assert result.layers == {0: "F6", 1: "F4", 2: "W+"}
    assert result.terms.total.shape == (0,)
    own, generator = pipeline.offsets, pipeline.generator
    start = {name: np.asarray(value) for name, value in init_latents(LAYERS, jnp.asarray(known.ws)[None]).items()}
    expected = learned_start.learned_latents(
        own.config, own.params, generator.config, generator.params, known.target[None], result.masks, start
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(result.latents[name], value)

    from_code = pipeline.analyze(image, segments=segments, maps=maps, start="encoder")
    np.testing.assert_array_equal(from_code.ws, known.ws)
    np.testing.assert_array_equal(pipeline.invert(from_code, threshold=0.5).latents["W+"][0], known.ws)
    both = pipeline.invert_batch([from_code, known], threshold=0.5)
    np.testing.assert_array_equal(both[0].latents["W+"][0], known.ws)
    np.testing.assert_array_equal(both[1].latents["F6"], result.latents["F6"])


def test_the_demo_has_a_learned_start_and_settings_for_other_starts():
    demo = Pipeline.from_pretrained("demo")
    assert demo.category.start == "learned"
    assert (demo.config.num_opt_steps, demo.config.final_steps) == (30, 6)
    assert "offsets" in demo.settings
    other = Pipeline.from_pretrained("demo", start="encoder")
    assert (other.config.num_opt_steps, other.config.final_steps) == (100, 0)
    assert other.offsets is not None  # for a single image
    assert "offsets" not in other.settings  # its usual inversions do not depend on it


def test_networks_that_are_missing_or_of_another_generator_are_named(pipeline, params):
    generator = pipeline.generator
    plain = Pipeline(generator, encoder=pipeline.encoder, options=Options(lpips_type="alex", num_opt_steps=0))
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(
        UserError, match=r"'learned' is not possible: this pipeline has no offset encoder \(offsets_path\)"
    ):
        plain.analyze(image, start="learned")
    known = pipeline.analyze(image, maps=np.zeros((3, 64, 64)))
    with pytest.raises(UserError, match="this pipeline has no offset encoder"):
        plain.invert(known)
    with pytest.raises(UserError, match="use networks that belong together"):
        Pipeline(generator, encoder=pipeline.encoder, offsets=tiny_offset_encoder(TINY))
    with pytest.raises(UserError, match="offsets must be a loaded offset encoder"):
        Pipeline(generator, encoder=pipeline.encoder, offsets=pipeline.encoder)
    with pytest.raises(UserError, match="--start learned needs --e4e_path"):
        Pipeline(generator, offsets=pipeline.offsets)
    with pytest.raises(UserError, match="--start learned needs --offsets_path"):
        Pipeline(generator, encoder=pipeline.encoder, options=Options(start="learned"))
    few = dataclasses.replace(pipeline.offsets.config, resolutions=(16,), channels=(8,), widths=(8,))
    shapes = jax.eval_shape(lambda: offset_encoder.init(few, key=jax.random.key(0)))
    with pytest.raises(UserError, match="has no F6: leave these out of --latent_names"):
        Pipeline(generator, encoder=pipeline.encoder, offsets=LoadedNetwork(few, shapes, {}))
