"""Generators as people have them: other wrappers, older files, other sizes and settings."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import ckpt_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ckpt_files import TINY

from ckpt_convert import convert
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets import stylegan2

CASES = Path(__file__).parent / "cases" / "generators"
# Random weights of a mapping network with the usual multiplier, whose spread raises no doubt.
PARAMS = ckpt_files.random_params(TINY) | {
    name: 100 * array for name, array in ckpt_files.random_params(TINY).items() if name.startswith("mapping/fc")
}
OTHER = ckpt_files.random_params(TINY, seed=1)


def state(naming: str = "rosinality", params: Any = PARAMS, prefix: str = "") -> dict[str, torch.Tensor]:
    arrays = ckpt_files.tensors(ckpt_files.their_arrays(naming, TINY, params))
    return {prefix + name: tensor for name, tensor in arrays.items()}


def read(found: Any, path: Path) -> convert.Converted:
    return convert.read(ckpt_files.dump_torch(path / "g.pt", found))


def same(found: convert.Converted, params: Any = PARAMS) -> bool:
    return found.params.keys() == params.keys() and all(np.array_equal(found.params[k], params[k]) for k in params)


# --- wrappers ---

WRAPPERS = {
    "bare": lambda g, _: g,
    "state_dict": lambda g, _: {"state_dict": g},
    "g": lambda g, _: {"g": g},
    "generator": lambda g, _: {"generator": g, "epoch": 3},
    "params_ema": lambda g, other: {"params": other, "params_ema": g},
    "g_ema and g": lambda g, other: {"g": other, "g_ema": g, "g_optim": {"state": {0: {"step": torch.tensor(1)}}}},
    "DataParallel": lambda g, _: {"g_ema": {f"module.{name}": tensor for name, tensor in g.items()}},
    "Lightning": lambda g, other: {
        "epoch": 1, "pytorch-lightning_version": "2.0", "optimizer_states": [{}], "lr_schedulers": [],
        "state_dict": {f"generator.{name}": tensor for name, tensor in other.items()}
        | {f"generator_ema.{name}": tensor for name, tensor in g.items()}
        | {"discriminator.weight": torch.ones(2)},
    },
    "list": lambda g, _: [g, {"step": 2}],
    "several levels": lambda g, _: {"model": {"nets": {"generator": g}}},
}  # fmt: skip


@pytest.mark.parametrize("naming", ["rosinality", "nvidia"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_wrapper_does_not_matter(wrapper, naming, tmp_path):
    found = read(WRAPPERS[wrapper](state(naming), state(naming, OTHER)), tmp_path)
    assert same(found)
    several = wrapper in ("params_ema", "g_ema and g", "Lightning")
    assert any("the averaged one, is converted" in note for note in found.manifest["notes"]) == several


def test_of_two_without_average_the_first_is_converted_and_named(tmp_path):
    found = read({"generator_a": state(), "generator_b": state(params=OTHER)}, tmp_path)
    assert same(found)
    (note,) = found.manifest["notes"]
    assert note == "the file holds 2 generators (generator_a, generator_b): generator_a, the first one, is converted"


@pytest.mark.parametrize("name", ["latent_avg", "mean_latent"])
def test_the_mean_style_may_be_anywhere_around_the_generator(name, tmp_path):
    held = state(prefix="decoder.")
    average = held.pop("decoder.latent_avg")
    found = read({name: average.expand(TINY.num_ws, -1), "nets": {"state_dict": held}}, tmp_path)
    assert same(found)


def test_nvidia_names_without_settings_are_noted(tmp_path):
    found = read(state("nvidia"), tmp_path)
    (note,) = found.manifest["notes"]
    assert "conv_clamp" in note
    doubted = read(state(params=PARAMS | {"mapping/fc0/weight": PARAMS["mapping/fc0/weight"] / 100}), tmp_path)
    assert any("learning rate multiplier" in note for note in doubted.manifest["notes"])


# --- parts that are missing ---


@pytest.mark.parametrize("naming", ["rosinality", "nvidia"])
def test_stored_noise_is_drawn_if_there_is_none(naming, tmp_path):
    held = {
        name: tensor for name, tensor in state(naming).items() if "noises." not in name and "noise_const" not in name
    }
    found = read(held, tmp_path)
    assert any("no stored noise: it was drawn with the seed 0" in note for note in found.manifest["notes"])
    kept = {name for name in PARAMS if not name.endswith("noise_const")}
    assert all(np.array_equal(found.params[name], PARAMS[name]) for name in kept)
    again = read(held, tmp_path)
    drawn = [(array, again.params[name]) for name, array in found.params.items() if name not in kept]
    assert len(drawn) == 2 * len(TINY.block_resolutions) - 1
    assert all(np.array_equal(one, other) and 0.5 < one.std() < 2 for one, other in drawn)


def test_generators_without_noise(tmp_path):
    held = {name: tensor for name, tensor in state("nvidia").items() if "noise" not in name}
    found = read(held, tmp_path)
    assert found.config == dataclasses.replace(TINY, use_noise=False)
    params, ws = checkpoints.to_device(found.params), jnp.ones((1, TINY.num_ws, TINY.w_dim))
    expected = stylegan2.synthesize(TINY, checkpoints.to_device(PARAMS), ws, noise="none").image
    for noise in ("const", "none", "random"):
        image = stylegan2.synthesize(found.config, params, ws, noise=noise, noise_key=jax.random.key(0)).image
        np.testing.assert_array_equal(image, expected)


def test_noise_that_is_switched_off_is_left_out(tmp_path):
    def switch_off(_: str, kind: str, module: dict[str, Any]) -> None:
        if kind == "SynthesisLayer":
            module["use_noise"] = False

    arrays = ckpt_files.their_arrays("nvidia", TINY, PARAMS)
    path = ckpt_files.dump_nvidia(tmp_path / "g.pkl", ckpt_files.nvidia_network(TINY, arrays, switch_off))
    assert not convert.read(path).config.use_noise


@pytest.mark.parametrize("naming", ["rosinality", "nvidia"])
def test_a_missing_mean_style_is_estimated(naming, tmp_path):
    held = state(naming)
    del held["latent_avg" if naming == "rosinality" else "mapping.w_avg"]
    found = read(held, tmp_path)
    assert any("w_avg is the mean of 16,384 mapped samples" in note for note in found.manifest["notes"])
    params = checkpoints.to_device(found.params)
    ws = stylegan2.map_z(TINY, params, jax.random.normal(jax.random.key(1), (16384, TINY.z_dim)))[:, 0]
    # Two means of 16,384 samples differ by some standard errors of one of them.
    np.testing.assert_allclose(found.params["mapping/w_avg"], ws.mean(0), rtol=0, atol=6 * float(ws.std()) / 128)


# --- other sizes and settings ---


def mapped(params: Any, z: np.ndarray, multiplier: float, first: np.ndarray) -> np.ndarray:
    """The mapping network in NumPy, from the input of its first dense layer on."""
    x = first
    for i in range(TINY.mapping_layers):
        weight, bias = params[f"mapping/fc{i}/weight"], params[f"mapping/fc{i}/bias"]
        x = x @ (weight * (multiplier / math.sqrt(len(weight)))) + bias * multiplier
        x = np.where(x > 0, x, 0.2 * x) * math.sqrt(2)
    return x


def normalized(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-8)


@pytest.mark.parametrize("multiplier", [0.1, 1.0, 0.003])
def test_the_mapping_networks_multiplier_is_read(multiplier, tmp_path):
    def adjust(_: str, kind: str, module: dict[str, Any]) -> None:
        if kind == "FullyConnectedLayer":
            inputs = module["_parameters"]["weight"].shape[1]
            own = multiplier if tuple(module["_parameters"]["bias"].shape) == (TINY.w_dim,) else 1.0
            # Both are NumPy's scalars in files of the program.
            module |= {"weight_gain": own / np.sqrt(inputs), "bias_gain": own, "in_features": 5}

    arrays = ckpt_files.their_arrays("nvidia", TINY, PARAMS)
    network = ckpt_files.nvidia_network(TINY, arrays, adjust)
    found = convert.read(ckpt_files.dump_nvidia(tmp_path / "g.pkl", {"G_ema": network}))
    assert found.config.mapping_lr_multiplier == pytest.approx(multiplier, rel=1e-5)
    z = np.random.default_rng(0).standard_normal((3, TINY.z_dim), np.float32)
    ws = stylegan2.map_z(found.config, checkpoints.to_device(found.params), jnp.asarray(z))[:, 0]
    expected = mapped(PARAMS, z, multiplier, normalized(z))
    np.testing.assert_allclose(ws, expected, rtol=0, atol=1e-5 * float(expected.std()))  # float32 against float64


def test_multipliers_of_other_layers_are_refused(tmp_path):
    def adjust(name: str, kind: str, module: dict[str, Any]) -> None:
        if name.endswith("affine"):
            module |= {"weight_gain": 0.5 / np.sqrt(module["_parameters"]["weight"].shape[1]), "bias_gain": 0.5}

    network = ckpt_files.nvidia_network(TINY, ckpt_files.their_arrays("nvidia", TINY, PARAMS), adjust)
    with pytest.raises(UserError, match=r"affine: lr_multiplier is 0\.5"):
        convert.read(ckpt_files.dump_nvidia(tmp_path / "g.pkl", network))


def test_the_first_tensorflow_programs_labels(tmp_path):
    config = dataclasses.replace(TINY, c_dim=5, embed_dim=TINY.z_dim, label_concat=True, mapping_lr_multiplier=0.1)
    params = ckpt_files.random_params(config)
    arrays = ckpt_files.their_arrays("tensorflow", config, params)
    assert arrays["mapping/LabelConcat/weight"].shape == (5, TINY.z_dim)
    network = ckpt_files.tensorflow_network(config, arrays, mapping_lrmul=0.1)
    found = convert.read(ckpt_files.dump_tensorflow(tmp_path / "g.pkl", (network, network, network)))
    assert found.config == config
    z, c = np.random.default_rng(0).standard_normal((3, TINY.z_dim), np.float32), np.eye(5, dtype=np.float32)[[0, 3, 4]]
    ws = stylegan2.map_z(config, checkpoints.to_device(found.params), jnp.asarray(z), jnp.asarray(c))[:, 0]
    first = normalized(np.concatenate([z, c @ params["mapping/label_matrix"]], -1))
    expected = mapped(params, z, 0.1, first)
    np.testing.assert_allclose(ws, expected, rtol=0, atol=1e-5 * float(expected.std()))
    checkpoints.save_network(tmp_path / "own", config, checkpoints.unflatten(found.params), {})
    with pytest.raises(UserError, match="which labels of this kind need"):
        convert.export(tmp_path / "own", tmp_path / "g.safetensors", "nvidia")


@pytest.mark.parametrize(
    "changes",
    [
        {"img_resolution": 8},
        {"mapping_dim": 20},
        {"c_dim": 4, "embed_dim": 6, "mapping_dim": 7},
        {"mapping_layers": 1, "z_dim": 5},
        {"block_channels": (16, 32, 8)},  # as of rosinality's channel_multiplier 4: wider in the middle
        {"img_channels": 1},
        {"img_channels": 4, "use_noise": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("naming", ["nvidia", "tensorflow"])
def test_sizes_of_every_kind(naming, changes, tmp_path):
    config = dataclasses.replace(TINY, **changes)
    arrays = ckpt_files.their_arrays(naming, config)
    if naming == "nvidia":
        path = ckpt_files.dump_nvidia(tmp_path / "g.pkl", ckpt_files.nvidia_network(config, arrays))
    else:
        network = ckpt_files.tensorflow_network(config, arrays, use_noise=config.use_noise)
        path = ckpt_files.dump_tensorflow(tmp_path / "g.pkl", (network, network, network))
    found = convert.read(path)
    assert dataclasses.replace(found.config, channel_base=0, channel_max=0) == dataclasses.replace(
        config, channel_base=0, channel_max=0
    )
    assert all(
        np.array_equal(found.params[k], v) for k, v in ckpt_files.random_params(config).items() if "affine" not in k
    )
    convert.convert(path, tmp_path / "converted")
    assert checkpoints.load_network(tmp_path / "converted", "generator").config == found.config


# --- reference files ---


@pytest.mark.parametrize("name", ["pti_tuned.pt", "attributes.pkl"])
def test_images_are_the_references(name):
    found = convert.read(CASES / name)
    ws, image = (np.load(CASES / f"{Path(name).stem}_{part}.npy") for part in ("ws", "ref"))
    with jax.default_matmul_precision("highest"):
        drawn = stylegan2.synthesize(found.config, checkpoints.to_device(found.params), jnp.asarray(ws)).image
    if image.shape != drawn.shape:
        image = image.transpose(0, 2, 3, 1)
    # float32 sums in another order; images are clipped as all programs do.
    np.testing.assert_allclose(np.clip(drawn, -1, 1), np.clip(image, -1, 1), rtol=0, atol=1e-5)


# --- refusals ---


def nonsquare() -> Any:
    held = state()
    return held | {"input.input": torch.ones(1, 16, 4, 8)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (nonsquare, "images that are not square, which begins with 4 x 8 values"),
        (lambda: state() | {"style.2.weight": torch.ones(3)}, r"of another shape: style\.2\.weight \[3\] instead of"),
        (lambda: {"weight": torch.ones(2)}, r"no StyleGAN2 generator in the file \(its arrays are weight\)"),
        (lambda: {"epoch": 3}, r"no StyleGAN2 generator in the file \(it has epoch\)"),
        (lambda: 3, r"no StyleGAN2 generator in the file \(it holds an int\)"),
    ],
)
def test_what_is_no_stylegan2_is_named(found, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(found(), tmp_path)


def test_a_small_file_cannot_describe_an_enormous_network(tmp_path):
    held = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in state().items()}
    held["style.1.weight"] = torch.zeros(1).expand(1_500_000, 1)
    held["style.1.bias"], held["style.2.weight"] = torch.zeros(1_500_000), torch.zeros(1).expand(12, 1_500_000)
    with pytest.raises(UserError, match="far more than its"):
        read(held, tmp_path)
