"""Training of an encoder: the loss falls, codes start at the mean style, and a stopped run goes on."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from tiny import TINY, random_lpips, tiny_generator

from samjax import encoder_training, losses
from samjax.encoder_training import EncoderTrainConfig
from samjax.errors import UserError
from samjax.inversion import Networks
from samjax.io import checkpoints
from samjax.nets import e4e, stylegan2
from samjax.nets.e4e import E4EConfig

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
ENCODER = E4EConfig(
    TINY.num_ws, TINY.w_dim, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), head_width=4, head_depth=1
)  # fmt: skip
CONFIG = EncoderTrainConfig(num_steps=30, lr=1e-2, warmup=1, samples=4, lpips_type="alex")


@pytest.fixture(scope="module")
def frozen() -> Networks:
    generator = tiny_generator()
    return Networks(generator, random_lpips("alex"), losses.generator_prior(TINY, generator, key=jax.random.key(0)))


def pictures(frozen: Networks, count: int, seed: int = 0) -> np.ndarray:
    """Of the generator itself, so that a code for them exists."""
    z = jax.random.normal(jax.random.key(seed), (count, TINY.z_dim))
    ws = stylegan2.map_z(TINY, frozen.generator, z)
    return np.clip(jax.jit(stylegan2.synthesize, static_argnums=0)(TINY, frozen.generator, ws).image, -1, 1)


def test_a_fresh_encoder_puts_out_one_style_near_the_mean(frozen):
    state = encoder_training.init(ENCODER, CONFIG, frozen)
    codes = jax.jit(e4e.encode, static_argnums=2)(state.variables, jnp.asarray(pictures(frozen, 2)), ENCODER)
    np.testing.assert_array_equal(codes, jnp.broadcast_to(codes[:, :1], codes.shape))
    spread = np.abs(np.asarray(stylegan2.map_z(TINY, frozen.generator, jnp.eye(8))) - frozen.prior.mean_w).mean()
    assert np.abs(codes - frozen.prior.mean_w).mean() < spread


@pytest.mark.slow
def test_training_learns_and_leaves_the_mean_style_alone(frozen):
    state = encoder_training.init(ENCODER, CONFIG, frozen)
    average = np.array(state.variables["batch_stats"]["latent_avg"])
    rows = []
    for i in range(20):
        images = jnp.asarray(pictures(frozen, 4, seed=i % 3))
        state, metrics = encoder_training.step(ENCODER, TINY, CONFIG, frozen, state, images)
        rows.append([float(value) for value in metrics])
    assert np.isfinite(rows).all()
    first, last = np.mean(rows[:3], axis=0), np.mean(rows[-3:], axis=0)
    assert last[0] < 0.8 * first[0]
    np.testing.assert_array_equal(state.variables["batch_stats"]["latent_avg"], average)
    loss, mse, lpips, delta, w = rows[-1]
    assert loss == pytest.approx(mse + lpips + 1e-3 * delta + w, rel=1e-5)


@pytest.mark.slow  # compiles a program of its own
def test_without_samples_only_the_pictures_count(frozen):
    config = dataclasses.replace(CONFIG, samples=0)
    state = encoder_training.init(ENCODER, config, frozen)
    _, metrics = encoder_training.step(ENCODER, TINY, config, frozen, state, jnp.asarray(pictures(frozen, 2)))
    assert float(metrics.w) == 0
    assert np.isfinite(float(metrics.loss))


@pytest.mark.slow  # compiles two programs of its own
def test_one_device_and_two_give_the_same_losses(frozen):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("batch",))
    divided, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    fresh = lambda: encoder_training.init(ENCODER, CONFIG, frozen)  # noqa: E731
    alone, shared, everywhere = fresh(), jax.device_put(fresh(), whole), jax.device_put(frozen, whole)
    for i in range(4):
        images = jnp.asarray(pictures(frozen, 4, seed=i))
        alone, one = encoder_training.step(ENCODER, TINY, CONFIG, frozen, alone, images)
        shared, many = encoder_training.step(ENCODER, TINY, CONFIG, everywhere, shared, jax.device_put(images, divided))
        # Float32 sums in another order; Adam divides by small second moments in its first steps.
        np.testing.assert_allclose(float(many.loss), float(one.loss), rtol=1e-3)


# --- the script ---


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import train_encoder

        usual = train_encoder.PRESETS["small"]
        train_encoder.PRESETS["small"] = ENCODER
        yield train_encoder
        train_encoder.PRESETS["small"] = usual
    finally:
        sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def inputs(frozen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    checkpoints.save_safetensors(folder / "own.safetensors", TINY, frozen.generator)
    for name, count in (("train", 5), ("val", 3)):
        (folder / name).mkdir()
        for i, picture in enumerate(pictures(frozen, count)):
            Image.fromarray(((picture + 1) * 127.5).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def arguments(script, inputs, output, **changes):
    values = {
        "gan_weights": inputs / "own.safetensors", "image_folder": inputs / "train",
        "image_folder_val": inputs / "val", "output_folder": output, "preset": "small", "lpips_type": "alex",
        "batch_size": 2, "num_steps": 4, "val_frequency": 2, "save_frequency": 1, "log_frequency": 1,
    }  # fmt: skip
    return script.Arguments(**{**values, **changes})


def figures(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_the_script_writes_an_encoder_and_goes_on_where_it_was_stopped(script, inputs, tmp_path, monkeypatch):
    script.main(arguments(script, inputs, tmp_path / "whole"))
    config, variables, _ = checkpoints.load_network(tmp_path / "whole" / "encoder", "e4e")
    assert config == ENCODER
    with Image.open(tmp_path / "whole" / "pictures" / "000004.png") as picture:
        assert min(picture.size) > 100

    step, calls = encoder_training.step, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(script.encoder_training, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments(script, inputs, tmp_path / "stopped"))
    script.main(arguments(script, inputs, tmp_path / "stopped"))
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")
    assert len(calls) == 5
    _, again, _ = checkpoints.load_network(tmp_path / "stopped" / "encoder", "e4e")
    assert all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (variables, again)), strict=True))


def test_bad_input_is_found_before_work(script, inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    other = dataclasses.replace(ENCODER, num_styles=6)
    variables = e4e.init(other, key=jax.random.key(0))
    checkpoints.save_network(tmp_path / "other", other, variables, {"source": {"file": "x"}})
    for changes, message in (
        ({"image_folder": tmp_path / "none"}, "no folder"),
        ({"image_folder_val": tmp_path / "empty"}, "no images"),
        ({"batch_size": 3}, "does not divide by the 2 devices"),
        ({"init": tmp_path / "other"}, "gives 6 styles of 8, the generator takes 8"),
        ({"gan_weights": tmp_path / "none"}, "none"),
    ):
        with pytest.raises(UserError, match=message):
            script.main(arguments(script, inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
