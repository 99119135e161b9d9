"""The face parser from its PyTorch file, `79999_iter.pth` of `zllrunning/face-parsing.PyTorch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_convert import tables
from samjax.errors import UserError
from samjax.io.arrays import Stored
from samjax.nets.bisenet import BiSeNetConfig

_FIRST, _LAST = "cp.resnet.conv1.weight", "conv_out.conv_out.weight"


def _find(objects: Sequence[Any]) -> dict[str, Stored] | None:
    states = [state for state in map(tables.state_dict, objects) if state is not None]
    found = [state for state in states if {_FIRST, _LAST} <= state.keys()]
    if found and len(objects) != 1:
        raise UserError(f"the face parser is one file, and these are {len(objects)}: give 79999_iter.pth alone")
    return found[0] if found else None


def _config(arrays: Mapping[str, Stored]) -> BiSeNetConfig:
    def outputs(name: str) -> int:
        shape = arrays[name].shape if name in arrays else ()
        if len(shape) != 4:
            raise UserError(f"no BiSeNet face parser in the file: {name} is not a convolution")
        return shape[0]

    try:
        return BiSeNetConfig(outputs(_LAST), outputs(_FIRST))
    except ValueError as error:
        raise UserError(f"no BiSeNet face parser in the file: {error}") from error


NETWORK = tables.Network(
    name="bisenet",
    format="face parser (BiSeNet) in the layout of zllrunning's face-parsing.PyTorch",
    licence="MIT (zll); trained on CelebAMask-HQ, which is for non-commercial research and education",
    rows=tables.torch_rows(*tables.RESNET),
    find=_find,
    config=_config,
    # The heads at 1/8 and 1/16 of the size, which only training uses, and the classifier of the ResNet.
    ignored=r".*\.num_batches_tracked|conv_out(16|32)\..*|cp\.resnet\.fc\..*",
)
