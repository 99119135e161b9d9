"""The e4e encoder against the reference's numbers, and its conversion."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import network_cases
import numpy as np
import pytest
from golden_weights import load_fill
from network_cases import E4E, TOLERANCE, error, random_images, tensor

from ckpt_convert import e4e as table
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.io.arrays import Loaded
from samjax.io.pickles import INERT
from samjax.io.torch_files import Tensor
from samjax.nets import e4e
from samjax.nets.e4e import E4EConfig

TINY = E4E.small
encode = jax.jit(e4e.encode, static_argnames="config")
fill = load_fill().e4e


def filled(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor filled by the reference's rule."""
    return tensor(fill(name, shape, "A"))


@functools.cache
def tiny_tensors() -> dict[str, Tensor]:
    zeros = {path: np.zeros(leaf.shape, np.int8) for path, leaf in network_cases.shapes(E4E, TINY).items()}
    return {name: filled(name, array.shape) for name, array in network_cases.their_arrays(E4E, zeros).items()}


def tiny_state() -> dict[str, Any]:
    """The state dict of an encoder under the authors' names, with `latent_avg`."""
    return dict(tiny_tensors())


def checkpoint(state: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A checkpoint of the authors with `state` and a generator."""
    (file,) = E4E.files(state)
    return {**file, **others}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return checkpoints.unflatten(network_cases.to_ours(E4E, tiny_state(), TINY))


# --- the reference ---


@pytest.fixture(scope="module")
def golden_codes(golden) -> tuple[E4EConfig, np.ndarray]:
    """Codes of a published checkpoint: found, converted, run."""
    case = golden("e4e_A")
    state = network_cases.published(E4E, case)
    opts = {"encoder_type": "Encoder4Editing", "start_from_latent_avg": False, "stylegan_size": 512}
    config, flat = network_cases.convert(E4E, checkpoint(state, opts=opts))
    variables = checkpoints.unflatten(flat)
    return config, np.asarray(encode(variables, case["x"].transpose(0, 2, 3, 1), config=config))


def test_matches_reference(golden_codes, golden):
    config, codes = golden_codes
    assert config == E4E.config
    theirs = golden("e4e_A")["codes"]
    assert error(codes, theirs) < TOLERANCE
    # The differences too, which a much larger style 0 would hide.
    assert error(codes[:, 1:] - codes[:, :1], theirs[:, 1:] - theirs[:, :1]) < TOLERANCE


def torch_codes(state: Mapping[str, Any], images: np.ndarray, config: E4EConfig) -> np.ndarray:
    """The encoder, written independently in PyTorch, from a state dict."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    torch.set_num_threads(1)  # its idle threads would take CPU time from JAX's
    w = {name: torch.from_numpy(np.array(array.array())) for name, array in state.items()}

    def norm(x, name):
        stats = (w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"])
        return functional.batch_norm(x, *stats)

    def conv(x, name, stride=1):
        kernel = w[f"{name}.weight"]
        return functional.conv2d(x, kernel, w.get(f"{name}.bias"), stride, kernel.shape[-1] // 2)

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    x = functional.prelu(norm(conv(x, "input_layer.0"), "input_layer.1"), w["input_layer.2.weight"])
    stages, strides = [], [2 if i == 0 else 1 for count in config.blocks for i in range(count)]
    for i, stride in enumerate(strides):
        res, cut = f"body.{i}.res_layer", f"body.{i}.shortcut_layer"
        y = functional.prelu(conv(norm(x, f"{res}.0"), f"{res}.1"), w[f"{res}.2.weight"])
        y = norm(conv(y, f"{res}.3", stride), f"{res}.4")
        squeezed = torch.relu(conv(y.mean((2, 3), keepdim=True), f"{res}.5.fc1"))
        y = y * torch.sigmoid(conv(squeezed, f"{res}.5.fc2"))
        projected = f"{cut}.0.weight" in w
        x = y + (norm(conv(x, f"{cut}.0", stride), f"{cut}.1") if projected else functional.max_pool2d(x, 1, stride))
        if i + 1 in np.cumsum(config.blocks):
            stages.append(x)
    levels = [stages[3]]
    for i, stage in enumerate((stages[2], stages[1]), 1):
        up = functional.interpolate(levels[-1], size=stage.shape[2:], mode="bilinear", align_corners=True)
        levels.append(up + conv(stage, f"latlayer{i}"))
    styles = []
    for i in range(config.num_styles):
        level = 0 if i < 3 else 1 if i < 7 else 2
        y = levels[level]
        for j in range(config.head_depth + level):
            y = functional.leaky_relu(conv(y, f"styles.{i}.convs.{2 * j}", 2))
        kernel = w[f"styles.{i}.linear.weight"]
        y = functional.linear(y.flatten(1), kernel / kernel.shape[1] ** 0.5, w[f"styles.{i}.linear.bias"])
        styles.append(styles[0] + y if i else y)
    return (torch.stack(styles, 1) + w["latent_avg"]).numpy()


@pytest.fixture(scope="module")
def odd(tiny) -> tuple[np.ndarray, np.ndarray]:
    """Images of a size that no stride divides, and their codes."""
    images = random_images(3, 19, 30, 3, seed=0)
    return images, np.asarray(encode(tiny, images, config=TINY))


def test_odd_sizes_match_torch(odd):
    images, codes = odd
    theirs = torch_codes(tiny_state(), images, TINY)
    assert np.abs(theirs - theirs[:1]).max() > 0.1 * np.ptp(theirs)  # or the images would not matter
    assert error(codes, theirs) < TOLERANCE


def test_largest_and_thinnest_sizes_match_torch(tiny):
    """The largest height and the smallest width: all halvings round up."""
    images = random_images(1, TINY.max_size, 1, 3, seed=0)
    assert error(encode(tiny, images, config=TINY), torch_codes(tiny_state(), images, TINY)) < TOLERANCE


# --- use ---


def test_one_and_many_agree(odd, tiny):
    images, codes = odd
    one = encode(tiny, images[1:2], config=TINY)
    assert error(one, codes[1:2]) < 1e-5  # float32 rounding


def test_average_style_is_added_once(odd, tiny):
    images, codes = odd
    average = tiny["batch_stats"]["latent_avg"]
    assert np.ptp(average) > 0.1
    without = {**tiny, "batch_stats": {**tiny["batch_stats"], "latent_avg": np.zeros_like(average)}}
    np.testing.assert_allclose(encode(without, images, config=TINY) + average, codes, atol=1e-5)


@pytest.mark.parametrize("styles", [4, 6])
def test_few_styles_leave_levels_unused(styles):
    """Their layers still exist, as in the authors' checkpoints. Only shapes are computed."""
    config = dataclasses.replace(TINY, num_styles=styles)
    variables = jax.eval_shape(lambda: e4e.init(config, key=jax.random.key(0)))
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    codes = jax.eval_shape(lambda v, x: e4e.encode(v, x, config), variables, images)
    chex.assert_shape(codes, (2, styles, 6))
    chex.assert_type(codes, jnp.float32)
    assert {"lateral1", "lateral2"} <= set(variables["params"])


def test_training_mode_updates_statistics(tiny):
    network = e4e.Encoder(TINY, train=True)
    update = jax.jit(lambda v, x: network.apply(v, x, mutable=["batch_stats"])[1]["batch_stats"])
    changed = update(tiny, random_images(3, 16, 16, 3, seed=0))
    before, after = (checkpoints.flatten(tree) for tree in (tiny["batch_stats"], changed))
    assert {path for path in before if np.array_equal(before[path], after[path])} == {"latent_avg"}


@pytest.mark.parametrize("size", [(32, 33), (0, 16)])
def test_bad_sizes_are_refused(size):
    height, width = size
    with pytest.raises(ValueError, match=f"1 to 32 pixels a side, not {height} x {width}"):
        e4e.encode({}, jnp.zeros((1, height, width, 3)), TINY)


# --- conversion ---


def test_conversion_keeps_every_array(tiny):
    state, back = tiny_state(), network_cases.their_arrays(E4E, checkpoints.flatten(tiny))
    assert back.keys() == state.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name].array(), err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("body.3.res_layer.5.fc1.weight"), "1 missing: body.3.res_layer.5.fc1.weight"),
        (lambda s: s.update({"body.9.fc.weight": s["latent_avg"]}), "1 unexpected: body.9.fc.weight"),
        (lambda s: s.update({"latlayer1.bias": s["latent_avg"]}), r"latlayer1.bias \[8, 6\] instead of \[48\]"),
        (lambda s: s.update({"latent_avg": s["latlayer1.bias"]}), r"latent_avg \[48\] instead of \[8, 6\]"),
        (lambda s: s.update({"latlayer1.bias": Loaded(np.full(48, np.nan, np.float32))}), "not finite"),
    ],
)
def test_wrong_arrays_are_refused(change, message):
    state = tiny_state()
    change(state)
    with pytest.raises(UserError, match=message):
        network_cases.to_ours(E4E, state, TINY)


def found(file: dict[str, Any]) -> Mapping[str, Any]:
    arrays = table.find([file])
    assert arrays is not None
    return arrays


def test_finds_the_encoder_alone():
    state = {name: array for name, array in tiny_state().items() if name != "latent_avg"}
    assert set(found(checkpoint(state))) == {*state, "latent_avg"}
    bare = {f"encoder.{name}": array for name, array in state.items()}
    assert set(found(bare)) == {*state, "latent_avg"}
    assert set(found({f"module.{name}": array for name, array in bare.items()})) == {*state, "latent_avg"}


AVERAGE = filled("latent_avg", (8, 512))
ROW = filled("latent_avg", (512,))


@pytest.mark.parametrize("opts", [{}, {"opts": INERT}, {"opts": {"start_from_latent_avg": True}}])
@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (AVERAGE, AVERAGE.array()),
        (ROW, np.tile(ROW.array(), (8, 1))),
        (filled("latent_avg", (1, 512)), np.tile(ROW.array(), (8, 1))),
    ],
)
def test_average_style_is_taken(opts, stored, expected):
    file = checkpoint(tiny_state(), latent_avg=stored, **opts)
    np.testing.assert_array_equal(found(file)["latent_avg"].array(), expected)


@pytest.mark.parametrize(
    "others",
    [
        {"latent_avg": AVERAGE, "opts": {"start_from_latent_avg": False}},
        {"opts": {"start_from_latent_avg": False}},
        {"opts": {}},
        {},
    ],
)
def test_average_style_is_zero_where_the_file_adds_none(others):
    average = found(checkpoint(tiny_state(), **others))["latent_avg"].array()
    assert average.shape == (8, 512)
    assert not average.any()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"opts": {"encoder_type": "GradualStyleEncoder"}}, "GradualStyleEncoder.*Encoder4Editing"),
        ({"opts": {"encoder_type": [1]}}, r"\[1\].*Encoder4Editing"),
        ({"opts": {"start_from_latent_avg": True}}, "no latent_avg"),
        ({"latent_avg": [0.0] * 512}, "latent_avg .*not an array"),
    ],
)
def test_similar_files_are_refused(others, message):
    with pytest.raises(UserError, match=message):
        table.find([checkpoint(tiny_state(), **others)])


def test_second_file_is_refused():
    with pytest.raises(UserError, match="alone"):
        table.find([{"w": AVERAGE}, checkpoint(tiny_state())])


@pytest.mark.parametrize(
    "names", [[], ["styles.14.linear.bias"], ["styles.19.linear.bias"], ["styles.999.linear.bias"]]
)
def test_no_encoder_has_so_many_styles(names):
    with pytest.raises(UserError, match="num_styles"):
        table.config(dict.fromkeys([*names, "input_layer.0.weight", "styles.1000.x", "styles.x"], ROW))


def test_lacking_head_is_named():
    """The last head gives the number of styles, so that a missing head before it is reported by name."""
    names = [f"styles.{i}.linear.bias" for i in range(14) if i != 5]
    assert table.config(dict.fromkeys(names, ROW)) == E4EConfig(num_styles=14)
