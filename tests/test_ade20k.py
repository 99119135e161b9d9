"""The ADE20K segmenter against the reference's numbers, its files, and its behavior at any size."""

import functools
import json
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import load_fill

from ckpt_convert import tables
from ckpt_convert.ade20k import NETWORK
from ckpt_convert.formats.torch_file import Storage, Tensor
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets import ade20k
from samjax.nets.ade20k import ADE20KConfig

TOLERANCE = 1e-4  # relative to an array's spread; float32 sums in another order stay below it
SMALL = ADE20KConfig(num_classes=7, features=4, blocks=(1, 1, 2, 1))
State = dict[str, Tensor]


def tensor(array: np.ndarray) -> Tensor:
    """`array` as read from a torch file."""
    array = np.ascontiguousarray(array)
    storage = Storage(array.dtype, array.size, lambda: memoryview(array.tobytes()))
    return Tensor(storage, 0, array.shape, tuple(step // array.itemsize for step in array.strides))


@functools.cache
def tree(config: ADE20KConfig) -> dict[str, Any]:
    return checkpoints.flatten(jax.eval_shape(lambda: ade20k.init(config, key=jax.random.key(0))))


def convert(*objects: Any) -> tuple[ADE20KConfig, dict[str, np.ndarray]]:
    """Config and flat variables from the contents of files."""
    stored = NETWORK.find(objects)
    assert stored is not None
    config = NETWORK.config(stored)
    shapes = {path: leaf.shape for path, leaf in tree(config).items()}
    return config, tables.to_ours(NETWORK.rows, stored, shapes, "segmenter", ignored=NETWORK.ignored)


# --- the reference ---


@pytest.fixture(scope="module")
def published(golden) -> tuple[State, State]:
    """The weights of the golden case in the layout of the two published files."""
    case, fill = golden("ade20k_A"), load_fill().fan_scaled

    def state(part: str) -> State:
        names = json.loads(str(case[f"{part}_weights"]))
        return {name: tensor(fill(name, tuple(shape), f"A/{part}")) for name, shape in names}

    return state("encoder"), state("decoder")


@pytest.fixture(scope="module")
def converted(published) -> tuple[ADE20KConfig, dict[str, np.ndarray]]:
    return convert(*published)


@pytest.fixture(scope="module")
def outputs(golden, converted) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of the image of the golden case, which stores it normalized."""
    config, flat = converted
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    images = (golden("ade20k_A")["x"].transpose(0, 2, 3, 1) * deviation + mean) * np.float32(2) - np.float32(1)

    @jax.jit
    def both(variables, images):
        return ade20k.probabilities(variables, images, config), ade20k.labels(variables, images, config)

    probabilities, labels = both(checkpoints.unflatten(flat), images)
    return np.asarray(probabilities), np.asarray(labels)


def test_probabilities_match_reference(golden, outputs):
    theirs = golden("ade20k_A")["probs_area16"]
    ours = outputs[0].reshape(1, 12, 16, 16, 16, 150).mean((2, 4)).transpose(0, 3, 1, 2)
    # Against each class's own spread, since classes differ more from each other than within.
    assert np.all(np.abs(ours - theirs).max((0, 2, 3)) < TOLERANCE * np.ptp(theirs, axis=(0, 2, 3)))


def test_labels_match_reference(golden, outputs):
    labels = outputs[1]
    assert labels.dtype == np.int32
    assert np.mean(labels == golden("ade20k_A")["argmax"]) >= 0.999  # rounding decides ties between classes


# --- files ---


def random_variables(config: ADE20KConfig) -> dict[str, np.ndarray]:
    """Flat variables of realistic size, none at its default."""
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in tree(config).items():
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        if path.endswith("kernel"):
            values *= np.float32(math.sqrt(2 / np.prod(leaf.shape[:-1])))
        elif path.endswith(("scale", "var")):
            values = np.float32(1) + np.float32(0.3) * np.tanh(values)
        flat[path] = values
    return flat


def their_files(flat: dict[str, np.ndarray]) -> tuple[State, State]:
    """The two files with these variables, by the inverse of the conversion table."""
    files: dict[str, State] = {"encoder": {}, "decoder": {}}
    for path, values in flat.items():
        name, layout = tables.find(NETWORK.rows, path)
        part, _, rest = name.partition(".")
        files[part][rest] = tensor(layout.theirs(values))
    return files["encoder"], files["decoder"]


@pytest.fixture
def small_files() -> tuple[State, State]:
    return their_files(random_variables(SMALL))


def test_conversion_round_trip_keeps_every_array(published, converted):
    config, flat = converted
    assert config == ADE20KConfig()
    unused = ("_tmp_running_mean", "_tmp_running_var", "_running_iter", "num_batches_tracked", "deepsup")
    for back, state in zip(their_files(flat), published, strict=True):
        assert back.keys() == {name for name in state if not any(part in name for part in unused)}
        for name, array in back.items():
            np.testing.assert_array_equal(array.array(), state[name].array(), err_msg=name)


def test_small_networks_are_recognized_in_any_order(small_files):
    encoder, decoder = small_files
    fc = {"fc.weight": tensor(np.zeros((5, 128), np.float32)), "fc.bias": tensor(np.zeros(5, np.float32))}
    parallel = {f"module.{name}": array for name, array in decoder.items()}
    for files in ((encoder, decoder), (decoder, encoder), ({**encoder, **fc}, parallel)):
        config, flat = convert(*files)
        assert config == SMALL
        for path, values in random_variables(SMALL).items():
            np.testing.assert_array_equal(flat[path], values, err_msg=path)


def test_other_files_are_not_recognized(small_files):
    encoder, _ = small_files
    shallow = {name: array for name, array in encoder.items() if name not in ("conv2.weight", "conv3.weight")}
    for objects in ([], [None], [{}], [[1]], [shallow], [{"state_dict": encoder}], [{"a": tensor(np.zeros(3))}]):
        assert NETWORK.find(objects) is None


def test_both_files_are_needed_and_no_other(small_files):
    encoder, decoder = small_files
    for files in (
        [encoder], [decoder], [encoder, encoder], [encoder, {}], [decoder, None], [encoder, decoder, {}],
        [encoder, decoder, decoder],
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"encoder_epoch_20\.pth and decoder_epoch_20\.pth") as error:
            NETWORK.find(files)
        assert "\n" not in str(error.value)


def test_conversion_lists_all_faults(small_files):
    encoder, decoder = small_files
    encoder["layer2.0.conv9.weight"] = encoder.pop("layer2.0.conv2.weight")
    decoder["ppm.0.2.bias"] = tensor(np.zeros(3, np.float32))
    decoder["conv_last.4.bias"] = tensor(np.zeros(8, np.float32))
    with pytest.raises(UserError) as error:
        convert(encoder, decoder)
    for part in ("missing: encoder.layer2.0.conv2.weight", "unexpected: encoder.layer2.0.conv9.weight",
                 "decoder.ppm.0.2.bias [3] instead of [32]",
                 "decoder.conv_last.4.bias [8] instead of [7]"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("part", "name", "shape", "message"),
    [
        (0, "conv1.weight", (4,), r"encoder\.conv1\.weight is no convolution"),
        (0, "conv1.weight", (1025, 0, 3, 3), "features must be"),
        (1, "conv_last.4.weight", (0, 4, 1, 1), "num_classes must be"),
        (0, "layer3.0.conv1.weight", None, "blocks must be"),
    ],
)
def test_impossible_configs_are_refused(part, name, shape, message, small_files):
    if shape is None:
        del small_files[part][name]
    else:
        small_files[part][name] = tensor(np.zeros(shape, np.float32))
    with pytest.raises(UserError, match=message):
        convert(*small_files)


# --- behavior ---


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def test_one_and_many_agree_at_any_size():
    variables, images = checkpoints.unflatten(random_variables(SMALL)), random_images(3, 37, 50, 3)
    size = (48, 31)

    @jax.jit
    def both(variables, images):
        return ade20k.probabilities(variables, images, SMALL, size), ade20k.labels(variables, images, SMALL, size)

    many, labels = (np.asarray(array) for array in both(variables, images))
    chex.assert_shape(many, (3, *size, 7))
    chex.assert_type(many, np.float32)
    np.testing.assert_allclose(many.sum(-1), 1, atol=1e-6)  # float32 rounding
    assert np.abs(many[1] - many[0]).max() > 1e-2  # or the comparison below would show nothing
    assert np.abs(both(variables, images[1:2])[0][0] - many[1]).max() < TOLERANCE
    chex.assert_type(labels, np.int32)
    assert len(np.unique(labels)) > 1
    assert np.mean(labels == many.argmax(-1)) > 0.999  # rounding decides ties between classes


@pytest.mark.parametrize("size", [(24, 32), (10, 13), (7, 4), (1, 2)])
def test_adaptive_mean_matches_torch(size):
    """With overlapping parts, and with fewer entries than parts."""
    torch = pytest.importorskip("torch")
    x = random_images(2, *size, 3)
    for count in (1, 2, 3, 6):
        theirs = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), count)
        ours = np.asarray(ade20k.adaptive_mean(jnp.asarray(x), count)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)  # float32 rounding


def test_result_has_the_size_of_the_images_by_default():
    variables = tree(SMALL)
    for size in ((1, 2), (9, 5), (40, 24)):
        shape = jax.eval_shape(lambda v, x: ade20k.labels(v, x, SMALL), checkpoints.unflatten(variables),
                               jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)).shape  # fmt: skip
        assert shape == (2, *size)


def test_bad_arguments_are_refused():
    variables, good = checkpoints.unflatten(random_variables(SMALL)), jnp.zeros((1, 16, 16, 3))
    for images, message in ((good[0], "must be"), (good[..., :2], "must be"), (good[:0], "must be"),
                            (good.astype(jnp.uint8), "floating point")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ade20k.labels(variables, images, SMALL)
    for settings in ({"num_classes": 0}, {"features": 0}, {"blocks": (3, 4, 6)}, {"blocks": (3, 4, 6, 0)}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
            ADE20KConfig(**settings)
