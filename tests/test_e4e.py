"""The e4e encoder against the reference's numbers, and its conversion."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import chex
import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckpt_convert import e4e as table
from ckpt_convert import tables
from ckpt_convert.formats.arrays import Loaded, Opaque
from ckpt_convert.formats.torch_file import Storage, Tensor
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets import e4e
from samjax.nets.e4e import E4EConfig

# A small encoder with a stage of several blocks, all three levels, and widths below and above 16.
TINY = E4EConfig(num_styles=8, style_dim=6, widths=(8, 16, 32, 48), blocks=(1, 2, 1, 1), head_width=5, head_depth=1)
TOLERANCE = 1e-4  # relative to the spread; float32 sums in another order differ by 6e-7

encode = jax.jit(e4e.encode, static_argnames="config")
fill = golden_weights.load_fill().e4e


@functools.cache
def shapes_of(config: E4EConfig) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda: e4e.init(config, key=jax.random.key(0)))
    return {path: leaf.shape for path, leaf in checkpoints.flatten(tree).items()}


def tensor(name: str, shape: tuple[int, ...], dtype: type = np.float32) -> Tensor:
    """A tensor of a torch file, filled when it is read."""
    dtype_, count = np.dtype(dtype), int(np.prod(shape))
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))

    def load() -> memoryview:
        return memoryview(np.asarray(fill(name, shape, "A"), dtype_).tobytes())

    return Tensor(Storage(dtype_, count, load), 0, shape, strides)


def state_of(config: E4EConfig) -> dict[str, Any]:
    """The state dict of an encoder under the authors' names, with `latent_avg`, filled by the reference's rule."""
    state = {}
    for path, shape in shapes_of(config).items():
        name, layout = tables.find(table.ROWS, path)
        state[name] = tensor(name, layout.theirs(np.zeros(shape, np.int8)).shape)
    return state


def convert(state: Mapping[str, Any], config: E4EConfig) -> dict[str, Any]:
    flat = tables.to_ours(table.ROWS, state, shapes_of(config), "encoder", ignored=table.NETWORK.ignored)
    return checkpoints.unflatten(flat)


def checkpoint(state: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """A checkpoint of the authors with `state` and a generator."""
    held = {f"encoder.{name}": array for name, array in state.items() if name != "latent_avg"}
    return {"state_dict": {**held, "decoder.style.1.weight": tensor("d", (4, 4))}, **others}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return convert(state_of(TINY), TINY)


def random_images(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, height, width, 3)).astype(np.float32)


def error(ours: Any, theirs: np.ndarray) -> float:
    """The largest difference, as a share of the spread of `theirs`."""
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.ptp(theirs))


# --- the reference ---


@pytest.fixture(scope="module")
def golden_codes(golden) -> tuple[E4EConfig, np.ndarray]:
    """Codes of a published checkpoint: found, converted, run."""
    case = golden("e4e_A")
    state = {
        name: tensor(name, tuple(shape), np.int64 if name.endswith("num_batches_tracked") else np.float32)
        for name, shape in json.loads(str(case["weights"]))
    }
    opts = {"encoder_type": "Encoder4Editing", "start_from_latent_avg": False, "stylegan_size": 512}
    arrays = table.find([checkpoint(state, opts=opts)])
    assert arrays is not None
    config = table.config(arrays)
    variables = convert(arrays, config)
    return config, np.asarray(encode(variables, case["x"].transpose(0, 2, 3, 1), config=config))


def test_matches_reference(golden_codes, golden):
    config, codes = golden_codes
    assert config == E4EConfig(num_styles=16)
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
    images = random_images(3, 19, 30)
    return images, np.asarray(encode(tiny, images, config=TINY))


def test_odd_sizes_match_torch(odd):
    images, codes = odd
    theirs = torch_codes(state_of(TINY), images, TINY)
    assert np.abs(theirs - theirs[:1]).max() > 0.1 * np.ptp(theirs)  # or the images would not matter
    assert error(codes, theirs) < TOLERANCE


def test_largest_and_thinnest_sizes_match_torch(tiny):
    """The largest height and the smallest width: all halvings round up."""
    images = random_images(1, TINY.max_size, 1)
    assert error(encode(tiny, images, config=TINY), torch_codes(state_of(TINY), images, TINY)) < TOLERANCE


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
    changed = update(tiny, random_images(3, 16, 16))
    before, after = (checkpoints.flatten(tree) for tree in (tiny["batch_stats"], changed))
    assert {path for path in before if np.array_equal(before[path], after[path])} == {"latent_avg"}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (jnp.zeros((16, 16, 3)), r"\[N, H, W, 3\]"),
        (jnp.zeros((1, 3, 16, 16)), r"\[N, H, W, 3\]"),
        (jnp.zeros((1, 16, 16, 3), jnp.uint8), "floating point"),
        (jnp.zeros((1, 32, 33, 3)), "1 to 32 pixels a side, not 32 x 33"),
        (jnp.zeros((1, 0, 16, 3)), "1 to 32 pixels a side, not 0 x 16"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        e4e.encode({}, images, TINY)


@pytest.mark.parametrize(
    "values",
    [
        {"num_styles": 2}, {"num_styles": 15}, {"num_styles": 20}, {"style_dim": 0}, {"head_width": 0},
        {"head_depth": 0}, {"widths": (8, 8, 8)}, {"widths": (8, 8, 8, 0)}, {"blocks": (1, 1, 0, 1)}, {"blocks": ()},
    ],
)  # fmt: skip
def test_bad_configs_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        E4EConfig(**values)


# --- conversion ---


def test_conversion_keeps_every_array(tiny):
    state, taken = state_of(TINY), set()
    for path, ours in checkpoints.flatten(tiny).items():
        name, layout = tables.find(table.ROWS, path)
        np.testing.assert_array_equal(layout.theirs(ours), state[name].array())
        taken.add(name)
    assert taken == set(state)


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
    state = state_of(TINY)
    change(state)
    with pytest.raises(UserError, match=message):
        convert(state, TINY)


def found(file: dict[str, Any]) -> Mapping[str, Any]:
    arrays = table.find([file])
    assert arrays is not None
    return arrays


def test_finds_the_encoder_alone():
    state = {name: array for name, array in state_of(TINY).items() if name != "latent_avg"}
    assert set(found(checkpoint(state))) == {*state, "latent_avg"}
    bare = {f"encoder.{name}": array for name, array in state.items()}
    assert set(found(bare)) == {*state, "latent_avg"}
    assert set(found({f"module.{name}": array for name, array in bare.items()})) == {*state, "latent_avg"}


AVERAGE = tensor("latent_avg", (8, 512))
ROW = tensor("latent_avg", (512,))


@pytest.mark.parametrize("opts", [{}, {"opts": Opaque()}, {"opts": {"start_from_latent_avg": True}}])
@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (AVERAGE, AVERAGE.array()),
        (ROW, np.tile(ROW.array(), (8, 1))),
        (tensor("latent_avg", (1, 512)), np.tile(ROW.array(), (8, 1))),
    ],
)
def test_average_style_is_taken(opts, stored, expected):
    file = checkpoint(state_of(TINY), latent_avg=stored, **opts)
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
    average = found(checkpoint(state_of(TINY), **others))["latent_avg"].array()
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
        table.find([checkpoint(state_of(TINY), **others)])


def test_second_file_is_refused():
    with pytest.raises(UserError, match="alone"):
        table.find([{"w": AVERAGE}, checkpoint(state_of(TINY))])


@pytest.mark.parametrize(
    "content",
    [
        None, [], {}, 3, {"state_dict": None}, {"state_dict": {"encoder.input_layer.0.weight": 1}}, {1: AVERAGE},
        {"g_ema": {"input.input": AVERAGE}, "latent_avg": AVERAGE}, {"input_layer.0.weight": AVERAGE},
    ],
)  # fmt: skip
def test_other_files_are_passed_over(content):
    assert table.find([content]) is None


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
