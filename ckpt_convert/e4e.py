"""The e4e encoder in its authors' checkpoints: the table of names, and the average style.

A published file is a dictionary of `state_dict` (the encoder as `encoder.*`, its generator as `decoder.*`, which is a
separate network), `latent_avg`, and `opts`, the settings of its training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_convert import tables
from ckpt_convert.tables import SAME, Network, Row, torch_rows
from samjax.errors import UserError
from samjax.io.arrays import Loaded, PickledArray, Stored
from samjax.io.torch_files import Tensor
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
    """The state dict in a checkpoint; `found` may be a bare state dict."""
    return tables.state_dict(found.get("state_dict", found))


def _styles(arrays: Mapping[str, Stored]) -> int:
    """Number of styles, inferred from the heads' names."""
    matches = (re.match(r"styles\.([0-9]{1,3})\.", name) for name in arrays)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _average(stored: Any, styles: int) -> Stored:
    """`latent_avg` with one row for each style; a file may have one row for all."""
    if not isinstance(stored, Tensor | PickledArray):
        raise UserError(f"{_AVERAGE} in the file is not an array: damaged?")
    if len(stored.shape) == 1 or (len(stored.shape) == 2 and stored.shape[0] == 1):
        return Loaded(np.broadcast_to(stored.array(), (styles, stored.shape[-1])))
    return stored


def find(objects: Sequence[Any]) -> dict[str, Stored] | None:
    """Finds the encoder's arrays in a checkpoint, with names without "encoder.", and `latent_avg` [styles, 512].

    `latent_avg` is zeros if the encoder was trained without an average style. pSp's encoder has the same names and
    shapes but computes styles differently; only `opts` tells them apart, and a file without `opts` is read as e4e's.
    See `tables.Network`.
    """
    candidates = [found for found in objects if isinstance(found, dict) and _PREFIX + _FIRST in (_state(found) or {})]
    if not candidates:
        return None
    if len(objects) != 1:
        raise UserError("an e4e encoder is one file: give it alone")
    (found,) = candidates
    opts = found.get("opts")
    opts = opts if isinstance(opts, dict) else {}  # other types are ignored
    kind = opts.get("encoder_type", _TYPE)
    if kind != _TYPE:
        raise UserError(
            f"the encoder is {str(kind)[:40]!r}, which computes styles differently from e4e's {_TYPE}: give that"
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
    """Infers the config from the arrays that `find` returns: only the number of styles varies.

    Raises:
      UserError: if no e4e encoder has this number of styles.
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
        " non-commercial research use, and e4e's authors state the MIT license; one of your own training is under the"
        " terms you set"
    ),
    rows=ROWS,
    find=find,
    config=config,
)
