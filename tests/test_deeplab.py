"""The invertibility predictor against the reference's numbers, its files, and its training mode."""

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import network_cases
import numpy as np
import pytest
from network_cases import PREDICTOR, TOLERANCE, convert, error, random_images, random_variables

from ckpt_convert import convert as convert_module
from ckpt_convert import deeplab as table
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.latents import LATENT_NAMES
from samjax.nets import deeplab

SMALL = dataclasses.replace(PREDICTOR.small, blocks=(1, 1, 1, 2))  # for compilation
KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default implementation


# --- the reference ---


@pytest.fixture(scope="module")
def outputs(golden) -> tuple[np.ndarray, np.ndarray]:
    """Features and maps of the image of the golden case, NCHW."""
    case = golden("invertibility_A")
    config, flat = convert(PREDICTOR, *PREDICTOR.files(network_cases.published(PREDICTOR, case)))
    images = case["x"].transpose(0, 2, 3, 1)

    @jax.jit
    def both(variables, images):
        return deeplab.base(variables, images, config), deeplab.predict(variables, images, config)

    features, maps = both(checkpoints.unflatten(flat), images)
    return np.asarray(features).transpose(0, 3, 1, 2), np.asarray(maps)


def test_features_match_reference(golden, outputs):
    case, features = golden("invertibility_A"), outputs[0]
    area4 = features.reshape(1, 8, 48, 4, 64, 4).mean((3, 5))
    assert error(area4, case["base_area4"]) < TOLERANCE
    assert error(features[:, :, :16, :16], case["base_corner"]) < TOLERANCE


@pytest.mark.parametrize("i", range(5))
def test_maps_match_reference(i, golden, outputs):
    assert error(outputs[1][:, i : i + 1], golden("invertibility_A")[f"map_{LATENT_NAMES[i]}"]) < TOLERANCE


# --- files ---


@pytest.fixture
def small_file() -> dict[str, dict[str, Any]]:
    return network_cases.split(network_cases.state_dict(PREDICTOR))


def test_export_is_a_file_of_the_authors(tmp_path):
    """PyTorch reads it with `weights_only`, and converting it back gives the same bits."""
    import torch

    flat = random_variables(PREDICTOR, SMALL)
    checkpoints.save_network(tmp_path / "ours", SMALL, checkpoints.unflatten(flat), {"source": {"file": "x"}})
    notes = convert_module.export(tmp_path / "ours", tmp_path / "exported.pt", "sam")
    assert len(notes) == 1  # its size differs from that in their program
    found = torch.load(tmp_path / "exported.pt", weights_only=True)
    assert set(found) == {"sd_base", *SMALL.latent_names}
    state = found["sd_base"]
    assert state["backbone.bn1.num_batches_tracked"].dtype == torch.int64
    assert state["backbone.bn1.num_batches_tracked"].shape == ()
    kernel = flat["params/base/backbone/conv1/kernel"]
    np.testing.assert_array_equal(state["backbone.conv1.weight"].numpy(), kernel.transpose(3, 2, 0, 1))
    config, back = convert_module.read(tmp_path / "exported.pt")[:2]
    assert config == SMALL
    assert all((back[name] == flat[name]).all() for name in flat)


def test_transposed_convolutions_are_stored_as_ordinary_ones(small_file):
    import torch

    torch.set_num_threads(1)
    _, flat = convert(PREDICTOR, small_file)
    x = np.random.default_rng(1).standard_normal((2, 5, 7, 3)).astype(np.float32)
    state = {name: torch.from_numpy(array.array().copy()) for name, array in small_file["F6"].items()}
    nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    y = torch.nn.functional.conv_transpose2d(nchw, state["m.0.weight"], state["m.0.bias"], padding=1)
    norm = [state[f"m.1.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
    y = torch.nn.functional.leaky_relu(torch.nn.functional.batch_norm(y, *norm), 0.2)
    y = torch.nn.functional.conv_transpose2d(y, state["m.3.weight"], state["m.3.bias"]).relu()
    nested = checkpoints.unflatten(flat)
    ours = deeplab.Head().apply({kind: nested[kind]["head_F6"] for kind in nested}, jnp.asarray(x))
    assert error(np.asarray(ours), y[:, 0].numpy()) < TOLERANCE


def test_files_of_a_training_epoch(small_file):
    """With the array names of `torch.nn.DataParallel`; only file names tell to which layer a head belongs."""
    wrapped = {part: {f"module.{name}": a for name, a in state.items()} for part, state in small_file.items()}
    files = {"099_head_F6.pt": wrapped["F6"], "099_head_W+.pt": wrapped["W+"], "099_main.pt": wrapped["sd_base"]}
    together = table.of_epoch(files)
    assert together is not None
    config, flat = convert(PREDICTOR, together)
    assert config == PREDICTOR.small
    for path, values in random_variables(PREDICTOR).items():
        np.testing.assert_array_equal(flat[path], values, err_msg=path)

    assert table.of_epoch({}) is None
    assert table.of_epoch({**files, "notes.pt": {}}) is None
    heads = {name: held for name, held in files.items() if "head" in name}
    for wrong in (heads, {"099_main.pt": wrapped["sd_base"]}, {"004_main.pt": wrapped["sd_base"], **heads}):
        with pytest.raises(UserError, match=r"not a whole predictor: give NNN_main\.pt and NNN_head_W"):
            table.of_epoch(wrong)
    for lone in ([wrapped["sd_base"]], [wrapped["W+"]], [wrapped["sd_base"], wrapped["W+"], wrapped["F6"]]):
        with pytest.raises(UserError, match=r"a part of an invertibility predictor: give NNN_main\.pt"):
            table.find(lone)


def test_similar_files_are_refused(small_file):
    base, head = small_file["sd_base"], small_file["W+"]
    cases: list[tuple[list[Any], str]] = [
        ([{"sd_base": base}], "this file's heads: none"),
        ([{**small_file, "F12": head}], "this file's heads: .*F12"),
        ([{**small_file, 7: head}], "this file's heads: .*7"),
        ([small_file, {}], "give it alone"),
        ([{**small_file, "W+": 3}], r"W\+ in the file is not a state dict"),
        ([{**small_file, "sd_base": {"a": 1}}], "sd_base in the file is not a state dict"),
    ]
    for objects, message in cases:
        with pytest.raises(UserError, match=message):
            table.find(objects)


# --- prediction ---

predict = jax.jit(deeplab.predict, static_argnames="config")


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return checkpoints.unflatten(random_variables(PREDICTOR, SMALL))


def test_one_and_many_agree_at_an_odd_size_in_any_order_of_layers(small):
    images = random_images(3, 37, 53, 3, seed=2)
    many = np.asarray(predict(small, images, SMALL))
    chex.assert_shape(many, (3, 2, 37, 53))
    assert many.min() >= 0
    assert min(error(many[i], many[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.1  # otherwise nothing is compared
    one = np.asarray(predict(small, images[1:2], dataclasses.replace(SMALL, latent_names=("F6", "W+"))))
    assert error(one, many[1:2, ::-1]) < 1e-5  # float32 rounding


def test_pyramid_has_the_reach_of_the_reference(small):
    """In the golden image, which is small, all outer taps of the largest dilation lie outside."""
    impulse = np.zeros((1, 41, 41, 128), np.float32)
    impulse[0, 20, 20] = 1
    part = {kind: small[kind]["base"]["aspp"] for kind in small}
    only_convs = lambda module, _: (module.name or "").startswith("aspp")  # noqa: E731
    _, state = deeplab.ASPP(8).apply(part, impulse, capture_intermediates=only_convs, mutable=["intermediates"])
    for name, rate in (("aspp1", 0), ("aspp2", 6), ("aspp3", 12), ("aspp4", 18)):
        reached = np.asarray(state["intermediates"][f"{name}_conv"]["__call__"][0])[0].any(axis=-1)
        expected = np.zeros((41, 41), bool)
        expected[np.ix_(*[[20 - rate, 20, 20 + rate]] * 2)] = True
        np.testing.assert_array_equal(reached, expected, err_msg=name)


def test_smallest_image(small):
    maps = np.asarray(predict(small, random_images(1, 1, 2, 3, seed=2), SMALL))
    chex.assert_shape(maps, (1, 2, 1, 2))
    chex.assert_tree_all_finite(maps)


# --- training ---


def test_training_normalizes_by_the_batch_and_updates_statistics(small, monkeypatch):
    """Without dropout, the output of training mode is the prediction with the statistics of the batch."""
    rates = []

    def identity(self, x):
        rates.append((self.rate, self.deterministic))
        return x

    monkeypatch.setattr(deeplab.nn.Dropout, "__call__", identity)
    images = random_images(3, 37, 53, 3, seed=2)
    maps, stats = jax.jit(lambda v, x, k: deeplab.train_maps(v, x, SMALL, key=k))(small, images, KEY)
    assert rates == [(0.5, False), (0.5, False), (0.1, False)]
    assert jax.tree.structure(stats) == jax.tree.structure(small["batch_stats"])
    batch = jax.tree.map(lambda new, old: (new - 0.9 * old) / 0.1, stats, small["batch_stats"])
    expected = np.asarray(predict({"params": small["params"], "batch_stats": batch}, images, SMALL))
    # The batch's statistics are reconstructed from a tenth of their value, which costs a digit.
    assert error(np.asarray(maps), expected) < 1e-3
    assert error(np.asarray(predict(small, images, SMALL)), expected) > 0.1  # unlike with the running statistics


def test_gradients_and_dropout(small):
    images = random_images(2, 32, 48, 3, seed=2)

    @jax.jit
    def step(params, stats, images, key):
        def loss(params):
            maps, new = deeplab.train_maps({"params": params, "batch_stats": stats}, images, SMALL, key=key)
            return jnp.mean(jnp.square(maps - 1.5)), (maps, new)

        return jax.grad(loss, has_aux=True)(params)

    run = lambda seed: step(small["params"], small["batch_stats"], images, jax.random.key(seed, impl="rbg"))  # noqa: E731
    (grads, (maps, stats)), again, other = run(0), run(0)[1][0], run(1)[1][0]
    np.testing.assert_array_equal(maps, again)
    assert error(np.asarray(other), np.asarray(maps)) > 0.05
    chex.assert_tree_all_finite(grads)
    for path, grad in checkpoints.flatten(grads).items():
        # The normalization after the first convolution of a head removes its bias.
        assert np.abs(grad).max() > 0 or path.endswith("conv1/bias"), path
    for path, old in checkpoints.flatten(small["batch_stats"]).items():
        assert not np.array_equal(checkpoints.flatten(stats)[path], old), path


def test_start_of_training():
    config = dataclasses.replace(SMALL, blocks=(1, 1, 1, 1), width=16, decoder_width=64, low_level_width=32)
    deviations = {  # sqrt(2 / fan): fan-out in the backbone, fan-in after it
        "backbone/conv1": math.sqrt(2 / (49 * 16)),
        "backbone/layer4_0/conv2": math.sqrt(2 / (9 * 128)),
        "backbone/layer4_0/conv3": math.sqrt(2 / 512),
        "backbone/layer2_0/downsample_conv": math.sqrt(2 / 128),
        "aspp/aspp2_conv": math.sqrt(2 / (9 * 512)),
        "decoder/conv2": math.sqrt(2 / (9 * 96)),
        "decoder/conv4": math.sqrt(2 / 64),
    }

    @jax.jit
    def start(key):
        flat = checkpoints.flatten(deeplab.init(config, key=key))
        # Only the kernels tested below: each takes a second to compile.
        tested = [f"params/base/{module}/kernel" for module in deviations]
        return {k: v for k, v in flat.items() if k in tested or "head_W+" in k or not k.endswith("kernel")}

    flat = start(KEY)
    for module, expected in deviations.items():
        kernel = flat[f"params/base/{module}/kernel"]
        # Within four standard errors of the estimate.
        assert float(jnp.std(kernel)) == pytest.approx(expected, rel=4 / math.sqrt(2 * kernel.size)), module
    for module, limit in (("conv1", 1 / 6), ("conv2", 1.0)):
        values = jnp.concatenate([flat[f"params/head_W+/{module}/{leaf}"].ravel() for leaf in ("kernel", "bias")])
        assert limit / 3 < float(jnp.abs(values).max()) <= limit
    assert 0 < float(jnp.abs(flat["params/base/decoder/conv4/bias"]).max()) <= 1 / 8
    for path, values in flat.items():
        if path.endswith(("scale", "var")):
            assert np.all(np.asarray(values) == 1), path
        elif path.endswith(("mean", "bn1/bias", "bn2/bias", "bn3/bias")):
            assert not np.asarray(values).any(), path


def test_training_needs_two_images(small):
    with pytest.raises(ValueError, match="at least two images"):
        deeplab.train_maps(small, jnp.zeros((1, 8, 8, 3)), SMALL, key=KEY)
