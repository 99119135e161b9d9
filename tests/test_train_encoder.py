"""Training of an encoder: the loss falls, codes start at the mean style, and a stopped run resumes exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_encoder as program
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from killing import metrics_of
from PIL import Image

from samjax import losses
from samjax.errors import UserError
from samjax.inversion import Networks
from samjax.io import checkpoints
from samjax.nets import e4e, stylegan2
from samjax.testing import TINY, random_lpips, tiny_encoder, tiny_encoder_config, tiny_generator
from samjax.training import encoder, recipes
from samjax.training.encoder import TrainConfig

ENCODER = tiny_encoder_config()
CONFIG = TrainConfig(num_steps=30, lr=1e-2, warmup=1, samples=4, lpips_type="alex")


@pytest.fixture(scope="module")
def frozen() -> Networks:
    generator = tiny_generator()
    return Networks(generator, random_lpips("alex"), losses.generator_prior(TINY, generator, key=jax.random.key(0)))


synthesize = jax.jit(stylegan2.synthesize, static_argnums=0)


def make_images(frozen: Networks, count: int, seed: int = 0) -> np.ndarray:
    """Images [N, 32, 32, 3] of the generator itself, so that codes for them exist; N <= 5."""
    z = jax.random.normal(jax.random.key(seed), (count, TINY.z_dim))
    z = jnp.concatenate([z, jnp.zeros((5 - count, TINY.z_dim))])  # one shape, one program
    ws = stylegan2.map_z(TINY, frozen.generator, z)
    return np.clip(synthesize(TINY, frozen.generator, ws).image[:count], -1, 1)


def test_the_schedule_warms_up_and_falls_along_a_cosine():
    steps = np.arange(31)
    rates = [float(encoder.learning_rate(dataclasses.replace(CONFIG, warmup=5))(step)) for step in steps]
    expected = 1e-2 * np.minimum((steps + 1) / 5, 1) * 0.5 * (1 + np.cos(np.pi * steps / 30))
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-9)


def test_a_new_encoder_gives_one_style_near_the_mean(frozen):
    state = encoder.init(ENCODER, CONFIG, frozen)
    codes = jax.jit(e4e.encode, static_argnums=2)(state.variables, jnp.asarray(make_images(frozen, 2)), ENCODER)
    np.testing.assert_array_equal(codes, jnp.broadcast_to(codes[:, :1], codes.shape))
    spread = np.abs(np.asarray(stylegan2.map_z(TINY, frozen.generator, jnp.eye(8))) - frozen.prior.mean_w).mean()
    assert np.abs(codes - frozen.prior.mean_w).mean() < spread


@pytest.mark.slow
def test_training_learns_and_keeps_the_mean_style(frozen):
    state = encoder.init(ENCODER, CONFIG, frozen)
    average = np.array(state.variables["batch_stats"]["latent_avg"])
    rows = []
    for i in range(20):
        images = jnp.asarray(make_images(frozen, 4, seed=i % 3))
        state, metrics = encoder.step(ENCODER, TINY, CONFIG, frozen, state, images)
        rows.append([float(value) for value in metrics])
    assert np.isfinite(rows).all()
    first, last = np.mean(rows[:3], axis=0), np.mean(rows[-3:], axis=0)
    assert last[0] < 0.8 * first[0]
    np.testing.assert_array_equal(state.variables["batch_stats"]["latent_avg"], average)
    loss, mse, lpips, delta, w = rows[-1]
    assert loss == pytest.approx(mse + lpips + 1e-3 * delta + w, rel=1e-5)


@pytest.mark.slow  # compiles a program of its own
def test_without_samples_only_the_images_count(frozen):
    config = dataclasses.replace(CONFIG, samples=0)
    state = encoder.init(ENCODER, config, frozen)
    _, metrics = encoder.step(ENCODER, TINY, config, frozen, state, jnp.asarray(make_images(frozen, 2)))
    assert float(metrics.w) == 0
    assert np.isfinite(float(metrics.loss))


@pytest.mark.slow  # compiles two programs of its own
def test_one_device_and_two_give_the_same_losses(frozen):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("batch",))
    divided, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    new = lambda: encoder.init(ENCODER, CONFIG, frozen)  # noqa: E731
    alone, shared, everywhere = new(), jax.device_put(new(), whole), jax.device_put(frozen, whole)
    for i in range(4):
        images = jnp.asarray(make_images(frozen, 4, seed=i))
        alone, one = encoder.step(ENCODER, TINY, CONFIG, frozen, alone, images)
        shared, many = encoder.step(ENCODER, TINY, CONFIG, everywhere, shared, jax.device_put(images, divided))
        # Float32 sums in another order; Adam divides by small second moments in its first steps.
        np.testing.assert_allclose(float(many.loss), float(one.loss), rtol=1e-3)


# --- the program ---


@pytest.fixture(scope="module", autouse=True)
def small_encoder():
    usual, recipes.ENCODER_PRESETS["small"] = recipes.ENCODER_PRESETS["small"], ENCODER
    yield
    recipes.ENCODER_PRESETS["small"] = usual


@pytest.fixture(scope="module")
def inputs(frozen, tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    checkpoints.save_safetensors(directory / "own.safetensors", TINY, frozen.generator)
    for name, count in (("train", 5), ("val", 3)):
        (directory / name).mkdir()
        for i, image in enumerate(make_images(frozen, count)):
            Image.fromarray(((image + 1) * 127.5).astype(np.uint8)).save(directory / name / f"{i}.png")
    return directory


def arguments(inputs: Path, output: Path, **changes) -> program.Arguments:
    values = {
        "gan_weights": inputs / "own.safetensors", "image_folder": inputs / "train",
        "image_folder_val": inputs / "val", "output_folder": output, "preset": "small", "lpips_type": "alex",
        "batch_size": 2, "num_steps": 4, "val_frequency": 2, "save_frequency": 1, "log_frequency": 1,
    }  # fmt: skip
    return program.Arguments(**{**values, **changes})


@pytest.mark.slow  # the two other trainings, which share its loop, run by default
def test_the_program_writes_an_encoder_and_resumes_where_it_was_stopped(inputs, tmp_path, monkeypatch):
    program.main(arguments(inputs, tmp_path / "whole"))
    config, variables, _ = checkpoints.load_network(tmp_path / "whole" / "encoder", "e4e")
    assert config == ENCODER
    with Image.open(tmp_path / "whole" / "figures" / "000004.png") as figure:
        assert min(figure.size) > 100

    step, calls = encoder.step, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(encoder, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        program.main(arguments(inputs, tmp_path / "stopped"))
    program.main(arguments(inputs, tmp_path / "stopped"))
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    assert len(calls) == 5
    _, again, _ = checkpoints.load_network(tmp_path / "stopped" / "encoder", "e4e")
    chex.assert_trees_all_equal(variables, again)


COUNTS = ("batch_size", "num_steps", "epochs", "log_frequency", "save_frequency", "val_frequency")


def test_bad_input_is_found_before_work(inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    other = tiny_encoder(dataclasses.replace(TINY, img_resolution=16))
    checkpoints.save_network(tmp_path / "other", other.config, other.params, {"source": {"file": "x"}})
    for changes, message in (
        ({"image_folder": tmp_path / "none"}, "not a directory"),
        ({"image_folder_val": tmp_path / "empty"}, "no images"),
        ({"batch_size": 3}, "does not divide evenly over the 2 devices"),
        ({"init": tmp_path / "other"}, "gives 6 styles of 8, the generator takes 8"),
        ({"gan_weights": tmp_path / "none"}, "none"),
        *(({name: 0}, f"--{name} must be at least 1, not 0") for name in COUNTS),
        ({"num_steps": -5}, "--num_steps must be at least 1"),
        ({"samples": -1}, "--samples must be at least 0"),
        ({"lr": float("nan")}, "--lr must be a number above 0"),
        ({"seed": 99999999999999999999}, "--seed must lie between"),
    ):
        with pytest.raises(UserError, match=message):
            program.main(arguments(inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
