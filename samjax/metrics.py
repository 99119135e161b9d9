"""The quality of a reconstruction, and the effect of an edit; NumPy and scikit-image."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Quality(NamedTuple):
    """The quality of one reconstruction.

    Attributes:
      mse: mean squared error of values in [-1, 1].
      psnr: peak signal-to-noise ratio in decibels.
      ssim: structural similarity, 1 for equal images.
    """

    mse: float
    psnr: float
    ssim: float


def quality(reconstruction: ArrayLike, target: ArrayLike) -> Quality:
    """Compares a reconstruction with its target.

    SSIM is that of Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, with
    Gaussian weights of sigma 1.5, over the three channels. For images below 11 pixels, the width of its window, pixels
    are repeated.

    Args:
      reconstruction: [H, W, 3], clipped to [-1, 1].
      target: [H, W, 3], clipped to [-1, 1].
    """
    from skimage.metrics import structural_similarity

    x, y = (np.clip(np.asarray(a, np.float64), -1, 1) for a in (reconstruction, target))
    mse = float(np.mean(np.square(x - y)))
    factor = -(-11 // min(x.shape[:2]))
    larger = (a.repeat(factor, axis=0).repeat(factor, axis=1) for a in (x, y))
    ssim: Any = structural_similarity(
        *larger, data_range=2.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return Quality(mse, float(10 * np.log10(4 / max(mse, 1e-12))), float(ssim))


def edit_effect(edited: ArrayLike, reconstruction: ArrayLike, region: ArrayLike) -> float:
    """Mean absolute change of color in a region.

    Args:
      edited: [H, W, 3], clipped to [-1, 1].
      reconstruction: [H, W, 3], the image before the edit, clipped to [-1, 1].
      region: [H, W] bool.

    Returns:
      From 0 to 2; 0 if the region is empty.
    """
    x, y = (np.clip(np.asarray(a, np.float64), -1, 1) for a in (edited, reconstruction))
    inside = np.asarray(region, bool)
    return float(np.abs(x - y)[inside].mean()) if inside.any() else 0.0
