"""Checkpoints of rosinality's `stylegan2-pytorch`, and of encoders that include its generator.

The first hold state dicts, of which `g_ema` is the averaged generator, and often `latent_avg`. The second (pSp, e4e and
similar encoders) hold one `state_dict` of encoder and `decoder`, and `latent_avg`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckpt_convert.formats.checkpoint import Checkpoint
from samjax.errors import UserError
from samjax.io.arrays import Stored
from samjax.io.torch_files import Tensor


def checkpoint(found: Any) -> Checkpoint:
    """Finds the generator in the contents of a torch file.

    Raises:
      UserError: if there is none.
    """
    if not isinstance(found, dict):
        raise UserError("the torch file holds no dictionary: not a checkpoint of a generator")
    g_ema, state = found.get("g_ema"), found.get("state_dict")
    if isinstance(g_ema, dict):
        what, held = "g_ema of rosinality checkpoint", dict(g_ema)
    elif isinstance(state, dict) and any(str(name).startswith("decoder.") for name in state):
        what = "decoder of encoder checkpoint (rosinality's layout)"
        held = {str(name)[8:]: value for name, value in state.items() if str(name).startswith("decoder.")}
    else:
        keys = ", ".join(str(key)[:40] for key in list(found)[:5])
        raise UserError(
            f"the torch file holds no g_ema and no decoder inside a state_dict (it has {keys or 'nothing'}):"
            " not a checkpoint of a StyleGAN2 generator"
        )
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items()):
        raise UserError("the generator's state dict holds something other than tensors: damaged?")
    average = found.get("latent_avg")
    arrays: dict[str, Stored] = held
    if isinstance(average, Tensor):
        arrays["latent_avg"] = _one_style(average)
    return Checkpoint(what, "rosinality", arrays, {})


class _Row:
    """The first row of an array whose rows are equal; see `arrays.Stored`."""

    def __init__(self, stored: Tensor) -> None:
        self._stored = stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self._stored.shape[-1:]

    def array(self) -> np.ndarray:
        rows = self._stored.array().reshape(-1, self._stored.shape[-1])
        if not len(rows) or not np.array_equal(rows, np.broadcast_to(rows[0], rows.shape)):
            raise UserError("latent_avg has a different average for each style; samjax's generator has one for all")
        return rows[0]


def _one_style(average: Tensor) -> Stored:
    """`latent_avg` of one style; encoders repeat it for every style."""
    return _Row(average) if len(average.shape) > 1 else average
