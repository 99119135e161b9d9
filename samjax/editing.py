"""Edits of inverted images: a direction in W+, applied where W+ rules, while the other layers keep what they drew.

SAM (CVPR 2022), section 3.4. A recording pass takes the block outputs at the F layers from the unedited latents. An
edited pass moves W+ along the direction, adds no offsets, and at each F layer puts the recorded output back where
that layer's mask is.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import Array
from numpy.typing import ArrayLike

from samjax.errors import UserError
from samjax.latents import RESOLUTIONS, Latents, Masks, by_resolution, synthesize_latents
from samjax.nets import stylegan2
from samjax.nets.stylegan2 import Noise, Params, StyleGAN2Config


@functools.partial(jax.jit, static_argnames=("config", "noise", "precision"))
def record(
    config: StyleGAN2Config,
    params: Params,
    latents: Latents,
    masks: Masks,
    *,
    noise: Noise = "const",
    precision: str = "highest",
) -> dict[int, Array]:
    """Block outputs of unedited latents at the F layers: {16: [N, 16, 16, C], ...}, offsets included."""
    with jax.default_matmul_precision(precision):
        features = synthesize_latents(config, params, latents, masks, noise=noise).features
    return {RESOLUTIONS[name]: features[RESOLUTIONS[name]] for name in latents if name in RESOLUTIONS}


@functools.partial(jax.jit, static_argnames=("config", "noise", "precision"))
def apply(
    config: StyleGAN2Config,
    params: Params,
    ws: Array,
    features: dict[int, Array],
    masks: Masks,
    directions: Array,
    strengths: Array,
    *,
    noise: Noise = "const",
    precision: str = "highest",
) -> Array:
    """The edited pass: one image of one set of latents for each of B directions and strengths.

    Args:
      config: sizes of the generator.
      params: its parameters.
      ws: [1, num_ws, w_dim], unedited.
      features: of `record`, [1, r, r, C] each.
      masks: {"F4": [1, 16, 16, 1], ...}.
      directions: [B, num_ws, w_dim].
      strengths: [B].
      noise: "const" or "none".
      precision: of matrix products and convolutions.

    Returns:
      [B, R, R, 3], in [-1, 1] up to overshoot.
    """
    ws = ws + directions * strengths[:, None, None]
    with jax.default_matmul_precision(precision):
        return stylegan2.synthesize(
            config, params, ws, noise=noise, features=features, masks=by_resolution(masks)
        ).image


def edit(
    config: StyleGAN2Config,
    params: Params,
    latents: Latents,
    masks: Masks,
    directions: ArrayLike,
    strengths: ArrayLike,
    *,
    noise: Noise = "const",
    precision: str = "highest",
    batch_size: int = 4,
) -> np.ndarray:
    """Edits one image along several directions, at several strengths.

    All passes have the same batch size (the last is filled up), so that another direction compiles nothing.

    Args:
      config: sizes of the generator.
      params: its parameters.
      latents: of one image, {"W+": [1, num_ws, w_dim], "F4": [1, 16, 16, C], ...}.
      masks: {"F4": [1, 16, 16, 1], ...}.
      directions: [D, num_ws, w_dim].
      strengths: [S] multiples of a direction; 0 gives the reconstruction, but for the soft edges of masks.
      noise: "const", the stored noise, or "none".
      precision: of matrix products and convolutions; "highest" is full float32.
      batch_size: edited images in one pass.

    Returns:
      [D, S, R, R, 3] float32, in [-1, 1] up to overshoot.

    Raises:
      ValueError: latents of more than one image, or directions that do not belong to the generator.
    """
    directions, strengths = np.asarray(directions, np.float32), np.asarray(strengths, np.float32)
    if latents["W+"].shape[0] != 1:
        raise ValueError(f"edit takes the latents of one image, not of {latents['W+'].shape[0]}")
    if directions.shape[1:] != (config.num_ws, config.w_dim):
        raise ValueError(f"directions of {directions.shape}, expected [D, {config.num_ws}, {config.w_dim}]")
    pairs = [(d, s) for d in range(len(directions)) for s in range(len(strengths))]
    if not pairs:
        size = config.img_resolution
        return np.zeros((len(directions), len(strengths), size, size, config.img_channels), np.float32)
    ws = jnp.asarray(latents["W+"])
    masks = {name: jnp.asarray(mask) for name, mask in masks.items()}
    features = record(config, params, dict(latents), masks, noise=noise, precision=precision)
    images = []
    for first in range(0, len(pairs), batch_size):
        chosen = [pairs[min(i, len(pairs) - 1)] for i in range(first, first + batch_size)]
        d, s = (list(index) for index in zip(*chosen, strict=True))
        batch = apply(
            config, params, ws, features, masks, directions[d], strengths[s], noise=noise, precision=precision
        )
        images.append(np.asarray(batch)[: len(pairs) - first])
    flat = np.concatenate(images)
    return flat.reshape(len(directions), len(strengths), *flat.shape[1:])


def load_direction(path: str | Path, num_ws: int, w_dim: int) -> np.ndarray:
    """Reads an edit direction.

    Args:
      path: .npy, or .npz or .safetensors with one array (or one called "direction"), of shape (1, num_ws, w_dim),
        (num_ws, w_dim), (1, w_dim) or (w_dim,); the last two are the same for every style.
      num_ws: styles that the generator takes.
      w_dim: entries of each.

    Returns:
      [num_ws, w_dim] float32.

    Raises:
      UserError: no such file, damaged, of another kind or shape, or with values that are not finite. Nothing in the
        file is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a direction as .npy, .npz or .safetensors")
    return check_direction(_read_array(path), num_ws, w_dim, path)


def check_direction(array: np.ndarray, num_ws: int, w_dim: int, path: Path) -> np.ndarray:
    """A direction [num_ws, w_dim] from the array of a file; the same for every style where it says nothing of them.

    Raises:
      UserError: not numbers, another shape, or values that are not finite.
    """
    shape = array.shape
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path}: holds {array.dtype} and not numbers; a direction is an array of floats")
    if shape not in ((1, num_ws, w_dim), (num_ws, w_dim), (1, w_dim), (w_dim,)):
        raise UserError(
            f"{path}: shape {shape} does not fit this generator; a direction has shape (1, {num_ws}, {w_dim}), "
            f"({num_ws}, {w_dim}), (1, {w_dim}) or ({w_dim},)"
        )
    direction = np.broadcast_to(array.astype(np.float32), (1, num_ws, w_dim))[0]
    if not np.isfinite(direction).all():
        raise UserError(f"{path}: holds values that are not finite; a direction needs numbers everywhere")
    return np.array(direction)


def _read_array(path: Path) -> np.ndarray:
    kind = path.suffix.lower()
    if kind not in (".npy", ".npz", ".safetensors"):
        raise UserError(f"{path}: a direction is read from .npy, .npz or .safetensors, not {kind or 'a bare name'!r}")
    try:
        if kind == ".safetensors":
            arrays = safetensors.numpy.load_file(path)
            return arrays[_only(path, list(arrays))]
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray) != (kind == ".npy"):
                raise ValueError("the other kind under this name")
            return found if isinstance(found, np.ndarray) else found[_only(path, list(found.files))]
    except (UserError, OSError) as error:
        if isinstance(error, UserError) or error.errno is not None:
            raise
        raise UserError(f"{path}: cannot be read as {kind} ({error}); damaged, or not whole?") from error
    except Exception as error:  # damaged files raise almost anything, from zlib's errors to MemoryError
        raise UserError(f"{path}: cannot be read as {kind} ({_short(error)}); damaged, or not whole?") from error


def _only(path: Path, names: list[str]) -> str:
    if "direction" in names:
        return "direction"
    if len(names) != 1:
        raise UserError(f"{path}: holds {len(names)} arrays ({', '.join(names[:5])}); name the direction 'direction'")
    return names[0]


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
