"""Tables of names: the name and the layout of each parameter in another program.

A table is applied to the parameters that the network in samjax has, and works in both directions: each row has a
pattern of samjax's names, the name in the other program, and the layout, which converts the array. Dense weights are
[out, in] in torch and [in, out] in samjax; convolutions [O, I, k, k] in torch and [k, k, I, O] in samjax.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.io.arrays import BFLOAT16, PickledArray, Stored
from samjax.io.torch_files import Tensor


class Layout(NamedTuple):
    """A pair of functions that rearrange the axes of an array.

    Attributes:
      ours: from the other program's layout to samjax's.
      theirs: from samjax's layout to the other program's.
    """

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
DENSE = Layout(np.transpose, np.transpose)
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
KERNEL = Layout(
    lambda a: CONV.ours(a) if a.ndim == 4 else DENSE.ours(a), lambda a: CONV.theirs(a) if a.ndim == 4 else a.T
)


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      pattern: regular expression of samjax's names.
      name: returns the name in the other program, from the groups of the pattern.
      layout: layout of the array.
    """

    pattern: str
    name: Callable[..., str]
    layout: Layout


def find(rows: Sequence[Row], path: str) -> tuple[str, Layout]:
    """Name and layout of samjax's parameter `path` by the first row that matches; KeyError if there is none."""
    for row in rows:
        if match := re.fullmatch(row.pattern, path):
            return row.name(*match.groups()), row.layout
    raise KeyError(path)


# --- recognition networks ---


def _torch_name(template: str, leaf: str, *groups: str) -> str:
    return f"{template.format(*(group.replace('/', '.') for group in groups))}.{leaf}"


def torch_rows(*modules: tuple[str, str]) -> tuple[Row, ...]:
    """Rows for networks of Flax's convolutions, dense layers and batch normalizations.

    Args:
      *modules: pairs of a pattern of samjax's module paths and a format string of the torch names, which is filled with
        the pattern's groups, slashes replaced by dots. The first match counts; the last pair is usually
        ("(.*)", "{}").

    Returns:
      Rows for kernels, biases, and scales and statistics of batch normalizations.
    """
    leaves = (
        ("params", "kernel", "weight", KERNEL),
        ("params", "scale", "weight", SAME),
        ("params", "bias", "bias", SAME),
        ("batch_stats", "mean", "running_mean", SAME),
        ("batch_stats", "var", "running_var", SAME),
    )
    return tuple(
        Row(f"{collection}/{pattern}/{ours}", functools.partial(_torch_name, template, theirs), layout)
        for pattern, template in modules
        for collection, ours, theirs, layout in leaves
    )


RESNET = (
    (r"(.*)layer(\d)_(\d+)/downsample_conv", "{}layer{}.{}.downsample.0"),
    (r"(.*)layer(\d)_(\d+)/downsample_bn", "{}layer{}.{}.downsample.1"),
    (r"(.*)layer(\d)_(\d+)/(\w+)", "{}layer{}.{}.{}"),
    (r"(.*)", "{}"),
)
"""Modules of torchvision's ResNets, whose blocks are `layerS_B` in samjax, and modules with the same names in both."""


@dataclasses.dataclass(frozen=True)
class Network:
    """How a recognition network is found in files, and its table.

    Attributes:
      name: a key of `samjax.io.checkpoints.NETWORKS`.
      format: description of the files.
      licence: license of the published weights.
      rows: the table; samjax's names begin with "params/" or "batch_stats/".
      find: takes the contents of each file and returns the network's arrays, or None if the files hold something else;
        raises UserError if they are incomplete.
      config: infers the config from these arrays.
      ignored: pattern of names that inference does not use.
    """

    name: str
    format: str
    licence: str
    rows: tuple[Row, ...]
    find: Callable[[Sequence[Any]], Mapping[str, Stored] | None]
    config: Callable[[Mapping[str, Stored]], Any]
    ignored: str = r".*\.num_batches_tracked"


def state_dict(found: Any) -> dict[str, Stored] | None:
    """`found` if it is a state dict, arrays by name, otherwise None. A "module." before every name is removed."""
    if not isinstance(found, dict) or not found:
        return None
    if not all(isinstance(name, str) and isinstance(value, Tensor | PickledArray) for name, value in found.items()):
        return None
    wrapped = all(name.startswith("module.") for name in found)  # by torch.nn.DataParallel
    return {name.removeprefix("module.") if wrapped else name: value for name, value in found.items()}


# --- conversion ---


def as_float(array: np.ndarray, name: str) -> np.ndarray:
    """Checks the type and the values of `array`, and converts float64 to float32; UserError if they are not valid."""
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype not in (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16):
        raise UserError(f"{name} in the file is of the type {array.dtype}, not of floating-point numbers")
    if not np.isfinite(array).all():
        raise UserError(f"{name} in the file holds values that are not finite: damaged, or the training diverged")
    return array


def to_ours(
    rows: Sequence[Row],
    stored: Mapping[str, Stored],
    shapes: Mapping[str, tuple[int, ...]],
    what: str,
    *,
    constants: Mapping[str, tuple[int, ...]] | None = None,
    ignored: str = "",
) -> dict[str, np.ndarray]:
    """Converts the arrays of a file to samjax's parameters.

    Args:
      rows: the table.
      stored: the file's arrays, by its own names.
      shapes: shapes of samjax's parameters, by flat names.
      what: the network, for messages.
      constants: further names that the file must have, with their shapes.
      ignored: pattern of names that inference does not use.

    Returns:
      Arrays by samjax's flat names, views of the file where possible.

    Raises:
      UserError: if arrays are missing, unexpected or of another shape (all are listed), or hold invalid values.
    """
    try:
        found = {path: find(rows, path) for path in shapes}
    except KeyError as error:
        raise UserError(f"files with these names cannot hold {error.args[0]}, which the config requires") from None
    # The shapes in the file's layout, found by rearranging a broadcast scalar.
    zero = np.float32(0)
    expected = {
        name: layout.theirs(np.broadcast_to(zero, shapes[path])).shape for path, (name, layout) in found.items()
    } | dict(constants or {})
    held = {name: tuple(array.shape) for name, array in stored.items() if not re.fullmatch(ignored, name)}
    if wrong := checkpoints.differences(held, expected):
        raise UserError(f"the file is not a {what} as expected: {wrong}")
    return {path: layout.ours(as_float(stored[name].array(), name)) for path, (name, layout) in found.items()}
