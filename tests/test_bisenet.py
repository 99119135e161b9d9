"""The face parser against the reference's numbers, its file, and its behavior at any size."""

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
from ckpt_convert.bisenet import NETWORK
from ckpt_convert.formats.torch_file import Storage, Tensor
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets import bisenet
from samjax.nets.bisenet import BiSeNetConfig

TOLERANCE = 1e-4  # relative to an array's spread; float32 sums in another order stay below it
SMALL = BiSeNetConfig(num_classes=5, features=4)
State = dict[str, Tensor]


def tensor(array: np.ndarray) -> Tensor:
    """`array` as read from a torch file."""
    array = np.ascontiguousarray(array)
    storage = Storage(array.dtype, array.size, lambda: memoryview(array.tobytes()))
    return Tensor(storage, 0, array.shape, tuple(step // array.itemsize for step in array.strides))


@functools.cache
def tree(config: BiSeNetConfig) -> dict[str, Any]:
    return checkpoints.flatten(jax.eval_shape(lambda: bisenet.init(config, key=jax.random.key(0))))


def convert(*objects: Any) -> tuple[BiSeNetConfig, dict[str, np.ndarray]]:
    """Config and flat variables from the contents of files."""
    stored = NETWORK.find(objects)
    assert stored is not None
    config = NETWORK.config(stored)
    shapes = {path: leaf.shape for path, leaf in tree(config).items()}
    return config, tables.to_ours(NETWORK.rows, stored, shapes, "face parser", ignored=NETWORK.ignored)


# --- the reference ---


@pytest.fixture(scope="module")
def published(golden) -> State:
    """The weights of the golden case in the layout of the published file."""
    case, fill = golden("faceparsing_A"), load_fill().fan_scaled
    return {name: tensor(fill(name, tuple(shape), "A")) for name, shape in json.loads(str(case["weights"]))}


@pytest.fixture(scope="module")
def converted(published) -> tuple[BiSeNetConfig, dict[str, np.ndarray]]:
    return convert(published)


@pytest.fixture(scope="module")
def outputs(golden, converted) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of the image of the golden case, which stores it normalized."""
    config, flat = converted
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    images = (golden("faceparsing_A")["x"].transpose(0, 2, 3, 1) * deviation + mean) * np.float32(2) - np.float32(1)

    @jax.jit
    def both(variables, images):
        return bisenet.logits(variables, images, config), bisenet.labels(variables, images, config)

    logits, labels = both(checkpoints.unflatten(flat), images)
    return np.asarray(logits), np.asarray(labels)


def test_logits_match_reference(golden, outputs):
    theirs = golden("faceparsing_A")["logits_area8"]
    ours = outputs[0].reshape(1, 32, 8, 32, 8, 19).mean((2, 4)).transpose(0, 3, 1, 2)
    # Against each class's own spread, since classes differ more from each other than within.
    assert np.all(np.abs(ours - theirs).max((0, 2, 3)) < TOLERANCE * np.ptp(theirs, axis=(0, 2, 3)))


def test_labels_match_reference(golden, outputs):
    labels = outputs[1]
    assert labels.dtype == np.int32
    assert np.mean(labels == golden("faceparsing_A")["argmax"]) >= 0.999  # rounding decides ties between classes


# --- files ---


def random_variables(config: BiSeNetConfig) -> dict[str, np.ndarray]:
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


def their_file(flat: dict[str, np.ndarray]) -> State:
    """The file with these variables, by the inverse of the conversion table."""
    file = {}
    for path, values in flat.items():
        name, layout = tables.find(NETWORK.rows, path)
        file[name] = tensor(layout.theirs(values))
    return file


def test_conversion_round_trip_keeps_every_array(published, converted):
    config, flat = converted
    assert config == BiSeNetConfig()
    back = their_file(flat)
    unused = ("num_batches_tracked", "conv_out16", "conv_out32")
    assert back.keys() == {name for name in published if not any(part in name for part in unused)}
    for name, array in back.items():
        np.testing.assert_array_equal(array.array(), published[name].array(), err_msg=name)


def test_small_networks_are_recognized():
    """Without the auxiliary heads, with the classifier of the ResNet, and from `DataParallel`."""
    file = their_file(random_variables(SMALL))
    file["cp.resnet.fc.weight"] = tensor(np.zeros((5, 32), np.float32))
    for found in (file, {f"module.{name}": array for name, array in file.items()}):
        config, flat = convert(found)
        assert config == SMALL
        for path, values in random_variables(SMALL).items():
            np.testing.assert_array_equal(flat[path], values, err_msg=path)


def test_other_files_are_not_recognized():
    file = their_file(random_variables(SMALL))
    resnet = {name.removeprefix("cp.resnet."): array for name, array in file.items() if name.startswith("cp.resnet.")}
    for objects in ([], [None], [{}], [[1]], [resnet], [resnet, resnet], [{"state_dict": file}]):
        assert NETWORK.find(objects) is None
    with pytest.raises(UserError, match=r"79999_iter\.pth alone"):
        NETWORK.find([file, resnet])


def test_conversion_lists_all_faults():
    file = their_file(random_variables(SMALL))
    file["cp.arm16.conv9.weight"] = file.pop("cp.arm16.conv_atten.weight")
    file["ffm.conv1.weight"] = tensor(np.zeros((4, 16, 3, 3), np.float32))
    with pytest.raises(UserError) as error:
        convert(file)
    for part in ("missing: cp.arm16.conv_atten.weight", "unexpected: cp.arm16.conv9.weight",
                 "ffm.conv1.weight [4, 16, 3, 3] instead of [4, 16, 1, 1]"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cp.resnet.conv1.weight", (4,), r"cp\.resnet\.conv1\.weight is no convolution"),
        ("cp.resnet.conv1.weight", (1025, 0, 7, 7), "features must be"),
        ("conv_out.conv_out.weight", (0, 16, 1, 1), "num_classes must be"),
    ],
)
def test_impossible_configs_are_refused(name, shape, message):
    file = their_file(random_variables(SMALL)) | {name: tensor(np.zeros(shape, np.float32))}
    with pytest.raises(UserError, match=message):
        convert(file)


# --- behavior ---


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def test_one_and_many_agree_at_any_size():
    variables, images = checkpoints.unflatten(random_variables(SMALL)), random_images(3, 37, 50, 3)

    @jax.jit
    def both(variables, images):
        return bisenet.logits(variables, images, SMALL), bisenet.labels(variables, images, SMALL)

    many, labels = (np.asarray(array) for array in both(variables, images))
    chex.assert_shape(many, (3, 37, 50, 5))
    chex.assert_type(many, np.float32)
    assert np.abs(many[1] - many[0]).max() > 1e-2 * np.ptp(many)  # or the comparison below would show nothing
    assert np.abs(both(variables, images[1:2])[0][0] - many[1]).max() < TOLERANCE * np.ptp(many)
    chex.assert_type(labels, np.int32)
    assert len(np.unique(labels)) > 1
    assert np.mean(labels == many.argmax(-1)) > 0.999  # rounding decides ties between classes


def test_result_has_the_size_of_the_images():
    variables = checkpoints.unflatten(tree(SMALL))
    for size in ((1, 2), (9, 5), (33, 64)):
        images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
        shape = jax.eval_shape(lambda v, x: bisenet.labels(v, x, SMALL), variables, images).shape
        assert shape == (2, *size)


def test_doubling_matches_torch():
    torch = pytest.importorskip("torch")
    for size in (1, 2, 3, 8, 33):
        x = random_images(1, (size + 1) // 2, 3, 2)
        theirs = torch.nn.functional.interpolate(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), (size, 5))
        ours = np.asarray(bisenet.double(jnp.asarray(x), (size, 5))).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(ours, theirs.numpy())


def test_bad_arguments_are_refused():
    variables, good = checkpoints.unflatten(random_variables(SMALL)), jnp.zeros((1, 16, 16, 3))
    for images, message in ((good[0], "must be"), (good[..., :2], "must be"), (good[:0], "must be"),
                            (good.astype(jnp.uint8), "floating point")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bisenet.labels(variables, images, SMALL)
    for settings in ({"num_classes": 0}, {"features": 0}, {"features": 1025}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
            BiSeNetConfig(**settings)
