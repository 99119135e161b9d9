"""Reading codes in W and W+ as programs save them: projectors, encoders, and samjax itself.

    read(Path("projected_w.npz"), 18, 512)   # {"projected_w": [18, 512]}
    read(Path("latents.pt"), 18, 512)        # {"latents_00": [18, 512], "latents_01": ...}

A code in W+ has a style for each layer of the generator; a code in W has one for all. An array of two axes and as many
rows as the generator has styles is one code in W+; of any other number of rows, so many codes in W.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import numpy as np

from samjax.errors import UserError, escaped
from samjax.io import values

T = TypeVar("T")

MAX_CODES = 10_000
"""Files with more codes are rejected."""

# In the order in which they are looked for. samjax's own files hold where W+ started ("ws") beside its result.
_KEYS = (
    "latent_w+", "w+", "w_plus", "wplus", "wp", "ws", "projected_w", "w_pivot", "pivot", "w", "latents", "latent",
    "latent_codes", "latent_code", "codes", "code", "styles", "style", "dlatents", "dlatent",
)  # fmt: skip

_LARGE = (14, 16, 18)  # styles of generators of 256 to 1024 px: such rows are not taken for codes in W


def read(path: str | Path, num_ws: int, w_dim: int) -> dict[str, np.ndarray]:
    """Reads the codes in a file. Nothing in it is executed.

    Args:
      path: of a file with one of `samjax.io.values.SUFFIXES`, in any case.
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.

    Returns:
      {name: [num_ws, w_dim] float32}, in the order of the file. The name is the key in the file, such as the name of an
      image, or that of the file; numbers follow if there are several codes under it.

    Raises:
      UserError: the file is missing or damaged, holds no codes of this generator, or values that are not finite.
    """
    path = Path(path)
    return collect(values.read(path), num_ws, w_dim, path, path.stem)


def collect(value: Any, num_ws: int, w_dim: int, where: str | Path, name: str = "code") -> dict[str, np.ndarray]:
    """Finds codes in W and W+ in anything that holds them.

    Args:
      value: an array of floats, with the shape of one or more codes; or a mapping or sequence of these, such as
        `{"W+": ...}` or `{"photo.png": ...}`.
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.
      where: what messages call the value.
      name: of codes without a key.

    Returns:
      {name: [num_ws, w_dim] float32}; see `read`.

    Raises:
      UserError: it holds no codes of this generator, more than `MAX_CODES`, or values that are not finite.
    """
    found: list[tuple[str, np.ndarray]] = []
    with values.naming(where):
        for keys, array in values.find(value, _KEYS):
            codes = _checked(array, num_ws, w_dim, "_".join(keys))
            if len(found) + len(codes) > MAX_CODES:
                raise UserError(f"holds more than {MAX_CODES:,} codes: give fewer at a time")
            found += zip(numbered("_".join(keys) or name, len(codes)), codes, strict=True)
        if not found:
            raise UserError("holds no arrays of numbers, and so no codes in W or W+")
        return {key: values.finite(code) for key, code in named(found).items()}


def choose(codes: Mapping[str, np.ndarray], image: str | Path, where: str | Path) -> np.ndarray:
    """The code of an image: the one that has its name, with or without folder and suffix, or else the only one.

    Args:
      codes: as returned by `read`.
      image: path or name of the image.
      where: what messages call the codes.

    Raises:
      UserError: there are several, and none or more than one has this name.
    """
    if len(codes) == 1:
        return next(iter(codes.values()))
    wanted = _file(str(image))
    for same in (
        lambda name: name == str(image),
        lambda name: _file(name).name == wanted.name,
        lambda name: _file(name).stem == wanted.stem,
    ):
        if len(chosen := [name for name in codes if same(name)]) == 1:
            return codes[chosen[0]]
    names = ", ".join(escaped(name, 60) for name in list(codes)[:8]) + (", …" if len(codes) > 8 else "")
    raise UserError(
        f"{where}: holds {len(codes)} codes ({names}), of which not exactly one has the name {wanted.name}: save the"
        " code that is wanted in a file of its own"
    )


def split(array: np.ndarray, num_ws: int, w_dim: int) -> np.ndarray | None:
    """The codes in an array, a view [N, num_ws, w_dim]; None if its shape is not that of codes.

    Args:
      array: (..., num_ws, w_dim), (..., 1, w_dim), (num_ws, w_dim), (N, w_dim) or (w_dim,).
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.
    """
    shape = array.shape
    if not array.size or shape[-1:] != (w_dim,):
        return None
    if array.ndim > 2:
        rows = shape[-2]
    else:
        rows = num_ws if shape == (num_ws, w_dim) else 1
        if rows == 1 and shape[:-1] and shape[0] in _LARGE:
            return None
    if rows not in (1, num_ws):
        return None
    codes = array.reshape(-1, rows, w_dim)
    return np.broadcast_to(codes, (len(codes), num_ws, w_dim))


def mismatch(array: np.ndarray, num_ws: int, w_dim: int) -> str:
    """Whose codes an array has, in words that follow its shape; "" if it is unlikely to have any."""
    if array.ndim < 2 or array.shape[-1] != w_dim or array.shape[-2] == num_ws:
        return ""
    rows = array.shape[-2]
    if rows not in range(4, 20, 2):
        return ""
    several = f", or {rows} codes in W, to be saved as ({rows}, 1, {w_dim})" if array.ndim == 2 else ""
    return f", the styles of a {_pixels(rows)} px generator, not of {_pixels(num_ws)} px{several}"


def numbered(name: str, count: int) -> Sequence[str]:
    """`count` names; with numbers if there are several."""
    return [name] if count == 1 else [f"{name}_{i:02d}" for i in range(count)]


def named(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    """A dictionary of pairs of a name and a value; names that are taken are followed by a number."""
    found: dict[str, T] = {}
    seen: collections.Counter[str] = collections.Counter()
    for name, value in pairs:
        made = name
        while made in found:
            seen[name] += 1
            made = f"{name}_{seen[name] + 1}"
        found[made] = value
    return found


def _checked(array: np.ndarray, num_ws: int, w_dim: int, name: str) -> np.ndarray:
    """The codes in an array, a view [N, num_ws, w_dim] of any type of floats."""
    name = f"{escaped(name, 60)} " if name else ""
    if not values.is_float(array.dtype):
        raise UserError(f"{name}holds {array.dtype}, but styles are floats")
    codes = split(array, num_ws, w_dim)
    if codes is None:
        raise UserError(
            f"{name}has shape {array.shape}{mismatch(array, num_ws, w_dim)}; this generator takes"
            f" (N, {num_ws}, {w_dim}) or ({num_ws}, {w_dim}) in W+, (N, 1, {w_dim}) or ({w_dim},) in W"
        )
    return codes


def _pixels(num_ws: int) -> int:
    """The size of the images of a generator with so many styles."""
    return 2 ** (num_ws // 2 + 1)


def _file(name: str) -> PurePath:
    """A path that a program on any system wrote."""
    return PureWindowsPath(name) if "\\" in name else PurePosixPath(name)
