"""Recognition networks as the tests need them: small configs with random variables, and the files that hold them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from golden_weights import load_fill

import ckpt_convert.ade20k
import ckpt_convert.bisenet
import ckpt_convert.deeplab
import ckpt_convert.e4e
import ckpt_convert.mask_rcnn
from ckpt_convert import tables
from samjax.io import checkpoints
from samjax.io.arrays import PickledArray, PickledDtype, Stored
from samjax.io.torch_files import Storage, Tensor
from samjax.latents import LATENT_NAMES
from samjax.nets import ade20k, bisenet, deeplab, e4e, mask_rcnn

TOLERANCE = 1e-4  # relative to an array's spread; float32 sums in another order stay below it


def tensor(array: np.ndarray) -> Tensor:
    """`array` as read from a torch file."""
    array = np.ascontiguousarray(array).reshape(array.shape)  # the former adds an axis to scalars
    storage = Storage(array.dtype, array.size, lambda: array.reshape(-1).view(np.uint8).data)
    return Tensor(storage, 0, array.shape, tuple(step // array.itemsize for step in array.strides))


def claimed(*shape: int) -> Tensor:
    """A tensor of which only the shape can be read."""
    return Tensor(Storage(np.dtype(np.float32), 0, lambda: memoryview(b"")), 0, shape, (0,) * len(shape))


def pickled(array: np.ndarray) -> PickledArray:
    """`array` as read from a pickle."""
    result = PickledArray()
    result.__setstate__((1, array.shape, PickledDtype(array.dtype.str[1:]), False, array.tobytes()))
    return result


def error(ours: Any, theirs: Any) -> float:
    """The largest difference, as a share of the spread of `theirs`."""
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.ptp(theirs))


def random_images(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def split(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A state dict whose names begin with parts, "encoder.conv1.weight", as one state dict for each part."""
    parts: dict[str, dict[str, Any]] = {}
    for name, array in state.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = array
    return parts


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A recognition network. Its state dict has all arrays of its files, each under the name in the conversion table.

    Attributes:
      module: has `init`.
      network: conversion table.
      config: of the published network.
      small: config for tests.
      golden: name of the reference case.
      weights: by prefix of the names, where the reference case has names and shapes, and the salt of the filling rule.
      rule: the filling rule.
      unused: parts of names of published arrays that inference does not use.
      files: the contents of each file of a state dict.
      stored: an array as read from a file.
      adjust: further changes of random variables, by their flat name.
      theirs: the state dict's arrays from flat variables; by default, the inverse of the conversion table.
    """

    module: types.ModuleType
    network: tables.Network
    config: Any
    small: Any
    golden: str
    weights: Mapping[str, tuple[str, str]]
    rule: str = "fan_scaled"
    unused: tuple[str, ...] = ()
    files: Callable[[dict[str, Any]], tuple[Any, ...]] = lambda state: (state,)
    stored: Callable[[np.ndarray], Stored] = tensor
    adjust: Callable[[str, np.ndarray], np.ndarray] = lambda path, values: values
    theirs: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None


# --- variables ---


@functools.cache
def shapes(case: Case, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes by flat names."""
    return checkpoints.flatten(jax.eval_shape(lambda: case.module.init(config, key=jax.random.key(0))))


@functools.cache
def random_variables(case: Case, config: Any = None) -> dict[str, np.ndarray]:
    """Flat variables of realistic size, none at its default; of `case.small` by default."""
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in shapes(case, config or case.small).items():
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        if path.endswith("kernel"):
            values *= np.float32(math.sqrt(2 / np.prod(leaf.shape[:-1])))
        elif path.endswith(("scale", "var")):
            values = np.float32(1) + np.float32(0.3) * np.tanh(values)
        flat[path] = case.adjust(path, values)
        flat[path].flags.writeable = False
    return flat


# --- files ---


def published(case: Case, arrays: Mapping[str, np.ndarray], *, numbered: bool = False) -> dict[str, Stored]:
    """The state dict of the published network, filled by the rule of the reference case.

    Args:
      case: the network.
      arrays: of the reference case.
      numbered: whether large arrays count upwards instead, which is much faster.
    """
    rule = getattr(load_fill(), case.rule)
    state = {}
    for prefix, (key, salt) in case.weights.items():
        for name, shape in json.loads(str(arrays[key])):
            if numbered and (size := math.prod(shape)) > 2**12:
                first = zlib.crc32(f"{salt}/{name}".encode()) % 1000
                array = np.arange(first, first + size, dtype=np.float32).reshape(shape)
            else:
                array = rule(name, tuple(shape), salt)
            if array is not None:  # a constant that samjax computes
                state[prefix + name] = case.stored(array)
    return state


def their_arrays(case: Case, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of the state dict with these variables."""
    if case.theirs is not None:
        return case.theirs(flat)
    found = {path: tables.find(case.network.rows, path) for path in flat}
    return {name: layout.theirs(flat[path]) for path, (name, layout) in found.items()}


def state_dict(case: Case) -> dict[str, Stored]:
    """The state dict with the random variables of the small network."""
    return {name: case.stored(array) for name, array in their_arrays(case, random_variables(case)).items()}


def convert(case: Case, *objects: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Config and flat variables from the contents of files."""
    stored = case.network.find(objects)
    assert stored is not None
    config = case.network.config(stored)
    return config, to_ours(case, stored, config)


def to_ours(case: Case, stored: Mapping[str, Stored], config: Any) -> dict[str, np.ndarray]:
    """Flat variables from a state dict."""
    expected = {path: leaf.shape for path, leaf in shapes(case, config).items()}
    return tables.to_ours(case.network.rows, stored, expected, case.network.name, ignored=case.network.ignored)


# --- the networks ---


def _adjust_mask_rcnn(path: str, values: np.ndarray) -> np.ndarray:
    """Makes scores differ enough to find objects."""
    if path.endswith("bias"):
        values *= np.float32(0.1)
    for part, scale in {"stem_conv": 0.01, "fpn": 0.3, "anchor_deltas": 0.2}.items():
        values *= np.float32(scale if part in path else 1)
    return values


def _adjust_predictor(path: str, values: np.ndarray) -> np.ndarray:
    """Keeps the last ReLU of the heads active."""
    if path.endswith(("kernel", "scale", "var")):
        return values
    return np.float32(0.1) * values + np.float32("conv2/bias" in path)


def _predictor_arrays(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    parts = ckpt_convert.deeplab.to_theirs(flat)
    return {f"{part}.{name}": array for part, state in parts.items() for name, array in state.items()}


def _e4e_files(state: dict[str, Any]) -> tuple[Any, ...]:
    """A checkpoint of the authors, with a generator and without `latent_avg`."""
    held = {f"encoder.{name}": array for name, array in state.items() if name != "latent_avg"}
    return ({"state_dict": {**held, "decoder.style.1.weight": tensor(np.ones((4, 4), np.float32))}},)


ADE20K = Case(
    ade20k,
    ckpt_convert.ade20k.NETWORK,
    config=ade20k.ADE20KConfig(),
    small=ade20k.ADE20KConfig(num_classes=7, features=4, blocks=(1, 1, 2, 1)),
    golden="ade20k_A",
    weights={"encoder.": ("encoder_weights", "A/encoder"), "decoder.": ("decoder_weights", "A/decoder")},
    unused=("_tmp_running_mean", "_tmp_running_var", "_running_iter", "num_batches_tracked", "deepsup"),
    files=lambda state: tuple(split(state)[part] for part in ("encoder", "decoder")),
)
BISENET = Case(
    bisenet,
    ckpt_convert.bisenet.NETWORK,
    config=bisenet.BiSeNetConfig(),
    small=bisenet.BiSeNetConfig(num_classes=5, features=4),
    golden="faceparsing_A",
    weights={"": ("weights", "A")},
    unused=("num_batches_tracked", "conv_out16", "conv_out32"),
)
MASK_RCNN = Case(
    mask_rcnn,
    ckpt_convert.mask_rcnn.NETWORK,
    config=mask_rcnn.MaskRCNNConfig(),
    small=mask_rcnn.MaskRCNNConfig(
        num_classes=5, features=4, blocks=(1, 2, 1, 1), channels=8, hidden=16, proposals=60, detections=40
    ),
    golden="maskrcnn_A",
    weights={"": ("weights", "A")},
    rule="maskrcnn",
    unused=("sem_seg_head.",),
    files=lambda state: ({"model": state, "__author__": "Detectron2 Model Zoo"},),
    stored=pickled,
    adjust=_adjust_mask_rcnn,
)
PREDICTOR = Case(
    deeplab,
    ckpt_convert.deeplab.NETWORK,
    config=deeplab.PredictorConfig(),
    small=deeplab.PredictorConfig(
        ("W+", "F6"), 3, blocks=(2, 1, 12, 3), width=4, decoder_width=8, low_level_width=6
    ),  # for files; compilation takes long
    golden="invertibility_A",
    weights={  # the layers in another order than in a config
        **{f"{name}.": ("head_weights", f"A/{name}") for name in reversed(LATENT_NAMES)},
        "sd_base.": ("weights", "A"),
    },
    files=lambda state: (split(state),),
    adjust=_adjust_predictor,
    theirs=_predictor_arrays,
)
E4E = Case(
    e4e,
    ckpt_convert.e4e.NETWORK,
    config=e4e.E4EConfig(num_styles=16),
    # A stage of several blocks, all three levels, and widths below and above 16.
    small=e4e.E4EConfig(
        num_styles=8, style_dim=6, widths=(8, 16, 32, 48), blocks=(1, 2, 1, 1), head_width=5, head_depth=1
    ),
    golden="e4e_A",
    weights={"": ("weights", "A")},
    rule="e4e",
    files=_e4e_files,
)
