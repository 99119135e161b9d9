"""Training of an offset encoder: masks of random layers, a falling loss, and a stopped run that resumes exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_offsets as program
from killing import metrics_of
from PIL import Image

from samjax.errors import UserError
from samjax.inversion import Networks
from samjax.io import checkpoints
from samjax.nets import stylegan2
from samjax.testing import (
    TINY,
    TINY_64,
    tiny_encoder,
    tiny_networks,
    tiny_offset_encoder,
    tiny_offset_encoder_config,
)
from samjax.training import offsets, recipes
from samjax.training.offsets import Batch, Frozen, TrainConfig

NETWORK = tiny_offset_encoder_config()
CONFIG = TrainConfig(num_steps=30, lr=1e-2, warmup=1, lpips_type="alex", lambda_f_rec=0.5)


@pytest.fixture(scope="module")
def networks() -> Networks:
    return tiny_networks()


synthesize = jax.jit(stylegan2.synthesize, static_argnums=0)


def make_batch(networks: Networks, count: int, seed: int = 0) -> Batch:
    """Images [N, 32, 32, 3] of the generator itself, each with two segments; N <= 5."""
    z = jax.random.normal(jax.random.key(seed), (5, TINY.z_dim))  # one shape, one program
    images = synthesize(TINY, networks.generator, stylegan2.map_z(TINY, networks.generator, z)).image[:count]
    halves = np.repeat(np.arange(2), 16)[None, :, None]
    return Batch(np.clip(images, -1, 1), np.broadcast_to(halves, (count, 32, 32)).astype(np.int32))


def test_every_segment_takes_one_layer_and_soft_edges_are_shares_of_the_area():
    names = ("W+", "F4", "F6")
    segments = jnp.asarray(np.repeat(np.arange(8), 8)[None, :, None] * np.ones((64, 1, 48), int))  # rows of 8 px
    masks = jax.jit(offsets.random_masks, static_argnums=(0, 1, 3))(
        dataclasses.replace(CONFIG, single=0.0), names, segments, 64, jax.random.key(0)
    )
    assert {name: mask.shape for name, mask in masks.items()} == {"F4": (64, 16, 16, 1), "F6": (64, 32, 32, 1)}
    fine = np.asarray(masks["F6"])[..., 0]
    assert set(np.unique(fine)) == {0.0, 1.0}
    assert not fine[:, :, :4].any()  # the bars of the letterbox
    assert not fine[:, :, -4:].any()
    rows = fine[:, :, 4:-4].reshape(64, 8, 4, 24)
    assert (rows == rows[:, :, :1, :1]).all()
    np.testing.assert_allclose(rows.mean(), 1 / 3, atol=0.1)
    coarse = np.asarray(masks["F4"])[..., 0]
    inside = np.asarray(fine.reshape(64, 16, 2, 16, 2).max((2, 4)))
    assert (coarse * inside == 0).all()  # no pixel has two layers
    alone = offsets.random_masks(dataclasses.replace(CONFIG, single=1.0), names, segments, 64, jax.random.key(0))
    assert all(len(np.unique(mask[:, 6:10])) == 1 for mask in np.asarray(alone["F4"])[..., 0])


def test_a_new_network_changes_nothing_and_its_constants_are_the_generators(networks):
    state = offsets.init(NETWORK, CONFIG, TINY, networks)
    constants = state.variables["batch_stats"]
    assert all((np.asarray(value) > 0).all() for name, value in constants.items() if name != "style_mean")
    z = jax.random.normal(jax.random.key(5), (500, TINY.z_dim))
    ws = np.asarray(stylegan2.map_z(TINY, networks.generator, z))[:, 0]
    np.testing.assert_allclose(constants["style_scale"].mean(), ws.std(0).mean(), rtol=0.4)  # of 16 samples only
    last = [state.params[f"out_{r}"] for r in NETWORK.resolutions] + [state.params["styles"]["out"]]
    assert not any(np.any(array) for layer in last for array in layer.values())


@pytest.mark.slow  # compiles a program of its own
def test_training_lowers_the_loss(networks):
    encoder = tiny_encoder()
    state, frozen = offsets.init(NETWORK, CONFIG, TINY, networks), Frozen(networks, encoder.params)
    constants = jax.tree.map(np.array, state.variables["batch_stats"])
    key, batch = jax.random.key(0), make_batch(networks, 2)
    found = offsets.evaluate(NETWORK, encoder.config, TINY, CONFIG, frozen, state.variables, batch, key)
    np.testing.assert_array_equal(found[2], 0)  # the offsets of a new network
    rows = []
    for i in range(24):
        batch = make_batch(networks, 4, seed=i % 2)
        state, metrics = offsets.step(NETWORK, encoder.config, TINY, CONFIG, frozen, state, batch)
        rows.append([float(value) for value in metrics])
    assert np.isfinite(rows).all()
    assert np.mean(rows[-4:], axis=0)[0] < 0.8 * np.mean(rows[:4], axis=0)[0]
    chex.assert_trees_all_equal(state.variables["batch_stats"], constants)
    # The network that is kept is an average, which follows the trained one.
    apart = lambda other: sum(  # noqa: E731
        float(jnp.sum(jnp.square(a - b)))
        for a, b in zip(jax.tree.leaves(state.variables["params"]), jax.tree.leaves(other), strict=True)
    )
    fresh = offsets.init(NETWORK, CONFIG, TINY, networks)
    assert 0 < apart(state.params) < apart(fresh.params)


# --- the program ---


@pytest.fixture(scope="module", autouse=True)
def small_network():
    usual = recipes.OFFSET_PRESETS["small"]
    widths = dict(zip(NETWORK.resolutions, NETWORK.widths, strict=True))
    recipes.OFFSET_PRESETS["small"] = {
        "widths": widths, "blocks": NETWORK.blocks, "style_width": NETWORK.style_width,
    }  # fmt: skip
    yield
    recipes.OFFSET_PRESETS["small"] = usual


@pytest.fixture(scope="module")
def inputs(networks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    encoder = tiny_encoder()
    checkpoints.save_safetensors(directory / "own.safetensors", TINY, networks.generator)
    checkpoints.save_safetensors(directory / "encoder.safetensors", encoder.config, encoder.params)
    for name, count in (("train", 5), ("val", 3)):
        (directory / name).mkdir()
        for i, image in enumerate(make_batch(networks, count).images):
            Image.fromarray(((image + 1) * 127.5).astype(np.uint8)).save(directory / name / f"{i}.png")
    return directory


def arguments(inputs: Path, output: Path, **changes) -> program.Arguments:
    values = {
        "gan_weights": inputs / "own.safetensors", "e4e_path": inputs / "encoder.safetensors",
        "image_folder": inputs / "train", "image_folder_val": inputs / "val", "output_folder": output,
        "preset": "small", "lpips_type": "alex", "batch_size": 2, "num_steps": 4, "passes": 1, "val_frequency": 2,
        "save_frequency": 1, "log_frequency": 1,
    }  # fmt: skip
    return program.Arguments(**{**values, **changes})


def test_the_program_writes_an_offset_encoder_and_resumes_where_it_was_stopped(inputs, tmp_path, monkeypatch):
    program.main(arguments(inputs, tmp_path / "whole"))
    config, variables, _ = checkpoints.load_network(tmp_path / "whole" / "offsets", "offsets")
    assert config == dataclasses.replace(NETWORK, passes=1)
    with Image.open(tmp_path / "whole" / "figures" / "000004.png") as figure:
        assert min(figure.size) > 100

    step, calls = offsets.step, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(offsets, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        program.main(arguments(inputs, tmp_path / "stopped"))
    program.main(arguments(inputs, tmp_path / "stopped"))
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    assert len(calls) == 5
    _, again, _ = checkpoints.load_network(tmp_path / "stopped" / "offsets", "offsets")
    chex.assert_trees_all_equal(variables, again)


def test_bad_input_is_found_before_work(inputs, tmp_path):
    other = tiny_offset_encoder(TINY_64)
    checkpoints.save_network(tmp_path / "other", other.config, other.params, {"source": {"file": "x"}})
    for changes, message in (
        ({"image_folder": tmp_path / "none"}, "not a directory"),
        ({"batch_size": 3}, "does not divide evenly over the 2 devices"),
        ({"init": tmp_path / "other"}, "is for a generator of 10 styles of 8"),
        ({"e4e_path": None}, "needs --e4e_path"),
        ({"latent_names": "W+"}, "one or more F layers"),
        ({"passes": 0}, "--passes must be at least 1"),
        ({"lpips_crop": -1}, "--lpips_crop must be at least 0"),
        ({"lr": float("nan")}, "--lr must be a number above 0"),
    ):
        with pytest.raises(UserError, match=message):
            program.main(arguments(inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
