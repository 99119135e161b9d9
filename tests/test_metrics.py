"""Quality and edit effect, compared with their definitions."""

import numpy as np
import pytest

from samjax.metrics import edit_effect, quality


def test_identical_images_are_perfect():
    image = np.random.default_rng(0).uniform(-1, 1, (32, 32, 3)).astype(np.float32)
    q = quality(image, image)
    assert q.mse == 0
    assert q.ssim == pytest.approx(1)
    assert q.psnr > 100


def test_psnr_of_a_known_error():
    image = np.zeros((32, 32, 3), np.float32)
    q = quality(image + 0.2, image)
    assert q.mse == pytest.approx(0.04, rel=1e-5)
    assert q.psnr == pytest.approx(20.0, abs=1e-4)  # 0.2 of a range of 2


def test_overshoot_is_clipped():
    assert quality(np.full((32, 32, 3), 1.5), np.ones((32, 32, 3))).mse == 0


def test_edit_effect_is_measured_in_the_region_only():
    before = np.zeros((8, 8, 3))
    after = before.copy()
    after[:4] = 0.5
    region = np.zeros((8, 8), bool)
    region[2:6] = True
    assert edit_effect(after, before, region) == pytest.approx(0.25)
    assert edit_effect(after, before, np.zeros((8, 8), bool)) == 0
