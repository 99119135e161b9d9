"""Encoders behind their interface, on a small e4e."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from samjax import encoding
from samjax.nets import e4e

CONFIG = e4e.E4EConfig(4, style_dim=8, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), head_width=8, head_depth=1)


def test_targets_of_any_number_give_their_own_codes():
    variables = e4e.init(CONFIG, key=jax.random.key(0))
    targets = np.random.default_rng(0).uniform(-1, 1, (3, 24, 32, 3)).astype(np.float32)
    codes = encoding.e4e(variables, CONFIG, batch_size=2)(targets)
    assert codes.shape == (3, 4, 8)
    for i in range(3):
        one = encoding.e4e(variables, CONFIG)(targets[i : i + 1])
        # A batch of one and of two are summed in another order.
        np.testing.assert_allclose(codes[i], one[0], rtol=0, atol=1e-5 * np.ptp(codes))
    with pytest.raises(ValueError, match="images must be"):
        encoding.e4e(variables, CONFIG)(targets[..., :2])
