"""The e4e encoder in its authors' checkpoints: their names, and what a checkpoint says of its average style.

A published file is a dictionary of `state_dict` (the encoder as `encoder.*`, and its generator as `decoder.*`, which is
another network and no part of this one), `latent_avg`, and `opts`, the settings of its training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_convert import tables
from ckpt_convert.formats.arrays import Loaded, PickledArray, Stored
from ckpt_convert.formats.torch_file import Tensor
from ckpt_convert.tables import SAME, Network, Row, torch_rows
from samjax.errors import UserError
from samjax.nets.e4e import E4EConfig

_PREFIX = "encoder."
_FIRST = "input_layer.0.weight"
_AVERAGE = "latent_avg"
_TYPE = "Encoder4Editing"

ROWS = (
    Row("batch_stats/latent_avg", lambda: _AVERAGE, SAME),
    Row("params/input_prelu/slope", lambda: "input_layer.2.weight", SAME),
    Row(r"params/body_(\d+)/prelu/slope", "body.{}.res_layer.2.weight".format, SAME),
    *torch_rows(
        ("input_conv", "input_layer.0"),
        ("input_bn", "input_layer.1"),
        (r"body_(\d+)/bn1", "body.{}.res_layer.0"),
        (r"body_(\d+)/conv1", "body.{}.res_layer.1"),
        (r"body_(\d+)/conv2", "body.{}.res_layer.3"),
        (r"body_(\d+)/bn2", "body.{}.res_layer.4"),
        (r"body_(\d+)/se/(\w+)", "body.{}.res_layer.5.{}"),
        (r"body_(\d+)/shortcut_conv", "body.{}.shortcut_layer.0"),
        (r"body_(\d+)/shortcut_bn", "body.{}.shortcut_layer.1"),
        (r"lateral(\d)", "latlayer{}"),
        *((rf"head_(\d+)/conv{i}", f"styles.{{}}.convs.{2 * i}") for i in range(6)),
        (r"head_(\d+)/linear", "styles.{}.linear"),
    ),
)


def _state(found: dict[Any, Any]) -> dict[str, Stored] | None:
    """The state dict in a checkpoint, or that it is."""
    return tables.state_dict(found.get("state_dict", found))


def _styles(arrays: Mapping[str, Stored]) -> int:
    """How many styles the heads' names tell of."""
    matches = (re.match(r"styles\.([0-9]{1,3})\.", name) for name in arrays)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _average(stored: Any, styles: int) -> Stored:
    """`latent_avg` as one row a style, out of that or of one row for all."""
    if not isinstance(stored, Tensor | PickledArray):
        raise UserError(f"{_AVERAGE} in the file is not an array: damaged?")
    if len(stored.shape) == 1 or (len(stored.shape) == 2 and stored.shape[0] == 1):
        return Loaded(np.broadcast_to(stored.array(), (styles, stored.shape[-1])))
    return stored


def find(objects: Sequence[Any]) -> dict[str, Stored] | None:
    """The encoder's arrays in a checkpoint, without "encoder." before their names, and `latent_avg` [styles, 512].

    `latent_avg` is zeros if the checkpoint adds no average style. pSp's encoder has the same names and shapes but forms
    styles otherwise; only `opts` tells, and a file without them is taken for e4e's. See `tables.Network`.
    """
    candidates = [found for found in objects if isinstance(found, dict) and _PREFIX + _FIRST in (_state(found) or {})]
    if not candidates:
        return None
    if len(objects) != 1:
        raise UserError("an e4e encoder is a file of its own: give it alone")
    (found,) = candidates
    opts = found.get("opts")
    opts = opts if isinstance(opts, dict) else {}  # anything else is not read
    kind = opts.get("encoder_type", _TYPE)
    if kind != _TYPE:
        raise UserError(
            f"the encoder is {str(kind)[:40]!r}, which forms styles otherwise than e4e's {_TYPE}: give that"
        )
    state = _state(found) or {}
    arrays = {name.removeprefix(_PREFIX): array for name, array in state.items() if name.startswith(_PREFIX)}
    styles = _styles(arrays)
    stated = opts.get("start_from_latent_avg")
    if stated and _AVERAGE not in found:
        raise UserError(f"the file says that an average style is added, but has no {_AVERAGE}: not whole?")
    if _AVERAGE in found and (stated is None or stated):
        arrays[_AVERAGE] = _average(found[_AVERAGE], styles)
    else:
        arrays[_AVERAGE] = Loaded(np.zeros((styles, E4EConfig.style_dim), np.float32))
    return arrays


def config(arrays: Mapping[str, Stored]) -> E4EConfig:
    """The sizes of the encoder in a file, as `find` gives it: all but the number of styles are the authors'.

    Raises:
      UserError: no e4e encoder has so many.
    """
    try:
        return E4EConfig(num_styles=_styles(arrays))
    except ValueError as error:
        raise UserError(f"no e4e encoder: {error}") from error


NETWORK = Network(
    name="e4e",
    format=f"e4e encoder of its authors ({_TYPE})",
    licence=(
        "the file states none: encoders that SAM's authors published are under the Adobe Research License, for"
        " non-commercial research use, and e4e's authors state the MIT licence; one of your own training is under the"
        " terms you set"
    ),
    rows=ROWS,
    find=find,
    config=config,
)
