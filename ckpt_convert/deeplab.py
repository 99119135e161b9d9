"""The invertibility predictor in the authors' files: the table of names, and the config inferred from shapes.

A published file is a dictionary of state dicts: `sd_base`, and one for each latent layer under its name. Here their
arrays are merged into one dictionary, as `sd_base.backbone.conv1.weight` and `W+.m.0.weight`; the keys of the file have
no dots, so the first dot separates the two again. The authors' training writes each state dict to a file of its own;
see `of_epoch`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_convert import tables
from ckpt_convert.tables import RESNET, Layout, Network, Row, torch_rows
from samjax.errors import UserError
from samjax.io.arrays import Stored
from samjax.latents import LATENT_NAMES
from samjax.nets.deeplab import PredictorConfig

_BASE = "sd_base"
_MAX_SIZE = 2**16  # of any entry of a config
_EPOCH_FILE = re.compile(r"(\d+)_(?:main|head_(.+))\.pt")
_EPOCH_FILES = "NNN_main.pt and NNN_head_W+.pt, NNN_head_F4.pt, … of one epoch"

FLIPPED_DECONV = Layout(  # [I, O, k, k] in torch; with stride 1 it is a convolution with the flipped kernel
    lambda a: a.transpose(2, 3, 0, 1)[::-1, ::-1], lambda a: a[::-1, ::-1].transpose(2, 3, 0, 1)
)

_BASE_MODULES = (
    (r"aspp/aspp(\d)_conv", "aspp.aspp{}.atrous_conv"),
    (r"aspp/aspp(\d)_bn", "aspp.aspp{}.bn"),
    ("aspp/pool_conv", "aspp.global_avg_pool.1"),
    ("aspp/pool_bn", "aspp.global_avg_pool.2"),
    ("decoder/conv2", "decoder.last_conv.0"),
    ("decoder/bn2", "decoder.last_conv.1"),
    ("decoder/conv3", "decoder.last_conv.4"),
    ("decoder/bn3", "decoder.last_conv.5"),
    ("decoder/conv4", "decoder.last_conv.8"),
    *RESNET,
)

ROWS = (
    Row(r"params/head_([^/]+)/conv1/kernel", "{}.m.0.weight".format, FLIPPED_DECONV),
    Row(r"params/head_([^/]+)/conv2/kernel", "{}.m.3.weight".format, FLIPPED_DECONV),
    *torch_rows(
        (r"head_([^/]+)/conv1", "{}.m.0"),
        (r"head_([^/]+)/bn1", "{}.m.1"),
        (r"head_([^/]+)/conv2", "{}.m.3"),
        *((f"base/{ours}", f"{_BASE}.{theirs}") for ours, theirs in _BASE_MODULES),
    ),
)


def of_epoch(files: Mapping[str, Any]) -> dict[str, Any] | None:
    """Joins the files that the authors' training writes after an epoch to the dictionary of a published file.

    Only the name of a head's file tells which layer the head is for.

    Args:
      files: the contents of each by file name without directories: "099_main.pt", "099_head_W+.pt", ...

    Returns:
      The dictionary for `find`; None if any file has another name.

    Raises:
      UserError: if the files are of several epochs, or the base or all heads are missing.
    """
    matches = {name: _EPOCH_FILE.fullmatch(name) for name in files}
    if not matches or None in matches.values():
        return None
    found = {match[2] or _BASE: files[name] for name, match in matches.items() if match}
    epochs = {match[1] for match in matches.values() if match}
    if len(epochs) > 1 or _BASE not in found or len(found) < 2:
        raise UserError(f"{', '.join(sorted(files))} are not a whole predictor: give {_EPOCH_FILES}")
    return found


def find(objects: Sequence[Any]) -> dict[str, Stored] | None:
    """Finds the predictor's arrays in a published file; see `tables.Network`."""
    if not any(isinstance(found, dict) and _BASE in found for found in objects):
        states = [tables.state_dict(found) or {} for found in objects]
        if any("aspp.conv1.weight" in state or "m.0.weight" in state for state in states):
            raise UserError(f"a part of an invertibility predictor: give {_EPOCH_FILES}, with these names")
        return None
    if len(objects) != 1:
        raise UserError(f"a file with {_BASE} is a whole invertibility predictor: give it alone")
    names = [name for name in objects[0] if name != _BASE]
    if not names or not set(names) <= set(LATENT_NAMES):
        listed = ", ".join(str(name)[:40] for name in names[:8]) or "none"
        raise UserError(
            f"an invertibility predictor has {_BASE} and heads for {', '.join(LATENT_NAMES)} or some of them;"
            f" this file's heads: {listed}"
        )
    arrays: dict[str, Stored] = {}
    for part, held in objects[0].items():
        state = tables.state_dict(held)
        if state is None:
            raise UserError(f"{part} in the file is not a state dict (arrays by name): damaged, or saved otherwise?")
        arrays |= {f"{part}.{name}": array for name, array in state.items()}
    return arrays


def config(arrays: Mapping[str, Stored]) -> PredictorConfig:
    """Infers the config from the arrays that `find` returns.

    Raises:
      UserError: if no predictor of any size has such arrays.
    """

    def size(name: str) -> int:
        name = f"{_BASE}.{name}.weight"
        shape = arrays[name].shape if name in arrays else ()
        if len(shape) != 4 or not 1 <= shape[0] <= _MAX_SIZE:
            what = f"has the shape {list(shape)}" if name in arrays else "is missing"
            raise UserError(f"no invertibility predictor on a ResNet in the file: {name} {what}")
        return shape[0]

    def count(stage: int) -> int:
        size(f"backbone.layer{stage}.0.conv1")
        blocks = 1
        while f"{_BASE}.backbone.layer{stage}.{blocks}.conv1.weight" in arrays:
            blocks += 1
        return blocks

    heads = {name.partition(".")[0] for name in arrays}
    try:
        return PredictorConfig(
            latent_names=tuple(name for name in LATENT_NAMES if name in heads),
            features=size("decoder.last_conv.8"),
            blocks=tuple(count(stage) for stage in (1, 2, 3, 4)),
            width=size("backbone.conv1"),
            decoder_width=size("aspp.conv1"),
            low_level_width=size("decoder.conv1"),
        )
    except ValueError as error:
        raise UserError(f"no invertibility predictor: {error}") from error


def to_theirs(params: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Converts a predictor to the dictionary of state dicts of a published file.

    Args:
      params: arrays by samjax's flat names.

    Returns:
      State dicts by part. PyTorch's `num_batches_tracked`, which inference does not use, is zero.
    """
    parts: dict[str, dict[str, np.ndarray]] = {}
    for path, value in params.items():
        name, layout = tables.find(ROWS, path)
        part, _, rest = name.partition(".")
        state = parts.setdefault(part, {})
        state[rest] = layout.theirs(np.asarray(value, np.float32))
        if rest.endswith(".running_var"):
            state[rest.removesuffix("running_var") + "num_batches_tracked"] = np.zeros((), np.int64)
    return parts


NETWORK = Network(
    name="invertibility",
    format="invertibility predictor (DeepLabV3+) in the layout of SAM's authors",
    licence=(
        "the file states none: SAM's authors publish theirs beside code under the Adobe Research License, for"
        " non-commercial research; a predictor of your own training is under the terms you set"
    ),
    rows=ROWS,
    find=find,
    config=config,
)
