"""How good a reconstruction is, and how much an edit changed; NumPy and scikit-image."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Quality(NamedTuple):
    """Of one reconstruction: mean squared error over [-1, 1], PSNR in decibels, SSIM; LPIPS (VGG) where known."""

    mse: float
    psnr: float
    ssim: float
    lpips: float | None = None


def quality(reconstruction: ArrayLike, target: ArrayLike, lpips: float | None = None) -> Quality:
    """Compares two images [H, W, 3] in [-1, 1] (clipped to it).

    SSIM is that of Wang et al. 2004 (Gaussian weights of sigma 1.5, over the three channels).
    """
    from skimage.metrics import structural_similarity

    x, y = (np.clip(np.asarray(a, np.float64), -1, 1) for a in (reconstruction, target))
    mse = float(np.mean(np.square(x - y)))
    ssim: Any = structural_similarity(
        x, y, data_range=2.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return Quality(mse, float(10 * np.log10(4 / max(mse, 1e-12))), float(ssim), lpips)


def edit_effect(edited: ArrayLike, reconstruction: ArrayLike, region: ArrayLike) -> float:
    """Mean absolute change of colour inside `region`: images [H, W, 3] in [-1, 1], clipped; region [H, W] bool.

    Zero where the region is empty.
    """
    x, y = (np.clip(np.asarray(a, np.float64), -1, 1) for a in (edited, reconstruction))
    inside = np.asarray(region, bool)
    return float(np.abs(x - y)[inside].mean()) if inside.any() else 0.0
