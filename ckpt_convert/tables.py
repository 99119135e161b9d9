"""Tables of names: what the same parameter is called in ours and in another program, and how it lies there.

A table is laid on the tree of our own parameters, as the network itself states it, and serves both ways: each row has
a pattern of our names, their name for it, and how an array goes from their layout to ours and back. Dense weights are
[out, in] in torch, [in, out] with us; convolutions [O, I, k, k] in torch, [k, k, I, O] with us.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ckpt_convert.formats.arrays import BFLOAT16, PickledArray, Stored
from ckpt_convert.formats.torch_file import Tensor
from samjax.errors import UserError
from samjax.io import checkpoints


class Layout(NamedTuple):
    """How an array goes from their layout to ours, and back; it only turns and cuts axes, and rounds nothing."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda a: a, lambda a: a)
DENSE = Layout(np.transpose, np.transpose)
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
KERNEL = Layout(
    lambda a: CONV.ours(a) if a.ndim == 4 else DENSE.ours(a), lambda a: CONV.theirs(a) if a.ndim == 4 else a.T
)


class Row(NamedTuple):
    """Our name as a pattern; theirs, from the pattern's groups; the layout."""

    pattern: str
    name: Callable[..., str]
    layout: Layout


def find(rows: Sequence[Row], path: str) -> tuple[str, Layout]:
    """Their name and layout of our parameter `path`, by the first row that fits. Raises KeyError if none does."""
    for row in rows:
        if match := re.fullmatch(row.pattern, path):
            return row.name(*match.groups()), row.layout
    raise KeyError(path)


# --- recognition networks ---


def _torch_name(template: str, leaf: str, *groups: str) -> str:
    return f"{template.format(*(group.replace('/', '.') for group in groups))}.{leaf}"


def torch_rows(*modules: tuple[str, str]) -> tuple[Row, ...]:
    """Rows for networks of Flax's convolutions, dense layers and batch normalisations.

    Args:
      *modules: pairs of a pattern of our module paths and the format string of theirs, into which the pattern's
        groups go, with dots for slashes. The first that fits counts; the last is as a rule ("(.*)", "{}").
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
"""Modules of torchvision's ResNets, whose stages `samjax.nets` calls `layerS_B`, and of all that keep their names."""


@dataclasses.dataclass(frozen=True)
class Network:
    """How a recognition network is found in files, and its table.

    Attributes:
      name: a key of `samjax.io.checkpoints.NETWORKS`.
      format: of the files, for people.
      licence: of the published weights, for people.
      rows: the table; our names begin with "params/" or "batch_stats/".
      find: the network's arrays, out of what each file given holds, or None where the files are of something else.
        Raises UserError where they are nearly right.
      config: of the network, from the shapes of those arrays.
      ignored: pattern of their names that mean nothing for us.
    """

    name: str
    format: str
    licence: str
    rows: tuple[Row, ...]
    find: Callable[[Sequence[Any]], Mapping[str, Stored] | None]
    config: Callable[[Mapping[str, Stored]], Any]
    ignored: str = r".*\.num_batches_tracked"


def state_dict(found: Any) -> dict[str, Stored] | None:
    """`found` as a state dict; None if it is anything but arrays by name. A "module." before every name goes."""
    if not isinstance(found, dict) or not found:
        return None
    if not all(isinstance(name, str) and isinstance(value, Tensor | PickledArray) for name, value in found.items()):
        return None
    wrapped = all(name.startswith("module.") for name in found)  # by torch.nn.DataParallel
    return {name.removeprefix("module.") if wrapped else name: value for name, value in found.items()}


# --- there and back ---


def as_float(array: np.ndarray, name: str) -> np.ndarray:
    """`array` in one of the kinds that parameters have. Raises UserError for others, and for infinite values."""
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype not in (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16):
        raise UserError(f"{name} in the file is of the type {array.dtype}, not of floating-point numbers")
    if not np.isfinite(array).all():
        raise UserError(f"{name} in the file holds values that are not finite: damaged, or the training had diverged")
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
    """Our parameters, by our flat names, out of a file's arrays; views of the file where that can be.

    Args:
      rows: the table.
      stored: the file's arrays, by its own names.
      shapes: of our parameters.
      what: the network, for messages.
      constants: further names that the file must have, with their shapes.
      ignored: pattern of names that mean nothing.

    Raises:
      UserError: arrays are missing, unexpected or of another shape (all listed), or hold what weights cannot.
    """
    try:
        found = {path: find(rows, path) for path in shapes}
    except KeyError as error:
        raise UserError(f"files with these names cannot hold {error.args[0]}, which the config asks for") from None
    # The shapes in their layout, through a view of one number that stands for the array.
    zero = np.float32(0)
    expected = {
        name: layout.theirs(np.broadcast_to(zero, shapes[path])).shape for path, (name, layout) in found.items()
    } | dict(constants or {})
    held = {name: tuple(array.shape) for name, array in stored.items() if not re.fullmatch(ignored, name)}
    if wrong := checkpoints.differences(held, expected):
        raise UserError(f"the file is not a {what} as expected: {wrong}")
    return {path: layout.ours(as_float(stored[name].array(), name)) for path, (name, layout) in found.items()}
