"""Segments: labels that follow the picture's regions, and those of networks behind the same interface."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import segmentation
from samjax.errors import UserError
from samjax.nets import ade20k, bisenet
from samjax.segmentation import segment


def picture() -> np.ndarray:
    image = np.full((64, 96, 3), -0.5, np.float32)
    image[:, 48:] = (0.8, -0.2, 0.1)
    image[20:44, 60:84] = (-0.9, 0.9, 0.9)
    return image


@pytest.mark.parametrize("method", ["felzenszwalb", "slic"])
def test_segments_follow_colors(method):
    image = picture()
    labels = segment(image, method)
    assert labels.shape == image.shape[:2]
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(np.unique(labels), np.arange(labels.max() + 1))
    assert labels.max() >= 2
    # Away from edges, which both methods smooth, a segment has one color.
    inner = np.zeros(image.shape[:2], bool)
    inner[3:-3, 3:45] = inner[3:17, 51:-3] = inner[24:40, 64:80] = True
    for label in np.unique(labels):
        assert len(np.unique(image[(labels == label) & inner], axis=0)) <= 1


def test_options_reach_the_method():
    assert segment(picture(), "slic", n_segments=4).max() < segment(picture(), "slic", n_segments=60).max()


def test_unknown_method_and_wrong_image_are_an_error():
    with pytest.raises(UserError, match="felzenszwalb or slic"):
        segment(picture(), "watershed")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="H, W, 3"):
        segment(np.zeros((4, 4)))


def test_scikit_image_is_imported_only_when_used():
    code = "import sys, samjax.segmentation; sys.exit('skimage' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- networks ---


def test_classes_are_merged_as_the_authors_merge_them():
    classes = np.arange(150, dtype=np.int32)
    merged = segmentation.merge_classes(classes, segmentation.ADE20K_MERGED)
    assert {int(old): int(merged[old]) for old in classes if merged[old] != old} == {
        6: 3, 13: 3, 21: 60, 102: 20, 83: 20, 29: 9,
    }  # fmt: skip
    merged = segmentation.merge_classes(classes[:19], segmentation.FACE_MERGED)
    np.testing.assert_array_equal(merged, [0, 3, 3, 3, 3, 3, 6, 3, 3, 9, 3, 3, 3, 3, 3, 15, 16, 17, 18])
    np.testing.assert_array_equal(classes, np.arange(150))


def test_merging_keeps_shape_and_type_and_makes_no_chains():
    labels = np.array([[1, 2], [3, 4]], np.int16)
    merged = segmentation.merge_classes(labels, {1: 2, 2: 3, 4: 1})
    assert merged.dtype == np.int16
    np.testing.assert_array_equal(merged, [[2, 3], [3, 1]])


NETWORKS = {
    "ade20k": (ade20k, segmentation.ade20k, ade20k.ADE20KConfig(features=2, blocks=(1, 1, 1, 1))),
    "face_parsing": (bisenet, segmentation.face_parsing, bisenet.BiSeNetConfig(features=4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_segmenters(name):
    network, make, config = NETWORKS[name]
    tree = jax.eval_shape(lambda: network.init(config, key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.9, leaf.shape).astype(np.float32), tree)
    segmenter = make(variables, config)
    labels = segmenter(picture()[::2, ::3].astype(np.float64))
    assert isinstance(labels, np.ndarray)
    assert labels.shape == (32, 32)
    assert labels.dtype == np.int32
    assert set(labels.flat) <= set(range(config.num_classes))
    for image in (np.zeros((4, 4)), np.zeros((1, 4, 4, 3)), np.zeros((4, 4, 1))):
        with pytest.raises(UserError, match="H, W, 3"):
            segmenter(image)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_compiled_once_in_full_precision_and_their_classes_merged(name, monkeypatch):
    """With a stand-in for the network, in whose labels each class occurs."""
    network, make, config = NETWORKS[name]
    table = segmentation.ADE20K_MERGED if name == "ade20k" else segmentation.FACE_MERGED
    every = np.arange(64 * 96).reshape(64, 96) % config.num_classes
    calls: list[Any] = []

    def labels(variables, images, config):
        assert images.shape == (1, 64, 96, 3)
        assert images.dtype == jnp.float32
        assert config is NETWORKS[name][2]
        calls.append((isinstance(variables["first"], jax.core.Tracer), jax.config.jax_default_matmul_precision))
        return jnp.arange(64 * 96, dtype=jnp.int32).reshape(1, 64, 96) % config.num_classes + variables["first"]

    monkeypatch.setattr(network, "labels", labels)
    variables = {"first": jnp.int32(0)}
    segmenter = make(variables, config)
    for _ in range(2):
        np.testing.assert_array_equal(segmenter(picture()), segmentation.merge_classes(every, table))
    assert calls == [(True, "highest")]  # weights are arguments, not constants of the program
