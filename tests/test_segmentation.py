"""Classical segments: labels that follow the picture's regions."""

import subprocess
import sys

import numpy as np
import pytest

from samjax.errors import UserError
from samjax.segmentation import segment


def picture() -> np.ndarray:
    image = np.full((64, 96, 3), -0.5, np.float32)
    image[:, 48:] = (0.8, -0.2, 0.1)
    image[20:44, 60:84] = (-0.9, 0.9, 0.9)
    return image


@pytest.mark.parametrize("method", ["felzenszwalb", "slic"])
def test_segments_follow_colours(method):
    image = picture()
    labels = segment(image, method)
    assert labels.shape == image.shape[:2]
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(np.unique(labels), np.arange(labels.max() + 1))
    assert labels.max() >= 2
    # Away from edges, which both methods smooth, a segment has one colour.
    inner = np.zeros(image.shape[:2], bool)
    inner[3:-3, 3:45] = inner[3:17, 51:-3] = inner[24:40, 64:80] = True
    for label in np.unique(labels):
        assert len(np.unique(image[(labels == label) & inner], axis=0)) <= 1


def test_options_reach_the_method():
    assert segment(picture(), "slic", n_segments=4).max() < segment(picture(), "slic", n_segments=60).max()


def test_unknown_method_and_wrong_image_are_told():
    with pytest.raises(UserError, match="felzenszwalb or slic"):
        segment(picture(), "watershed")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="H, W, 3"):
        segment(np.zeros((4, 4)))


def test_scikit_image_is_imported_only_when_used():
    code = "import sys, samjax.segmentation; sys.exit('skimage' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
