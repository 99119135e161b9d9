"""Segment means, choice of layer, soft masks: the reference's numbers, and what holds for any segments."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samjax import latents, layer_selection
from samjax.latents import LatentLayer
from samjax.nets.stylegan2 import StyleGAN2Config

LAYERS = latents.latent_layers(StyleGAN2Config(256, channel_base=1024, channel_max=16))
TAUS = ("0.3", "0.45", "0.6")


def reference(case):
    return np.stack([case[f"inv_{layer.name}"][0, 0] for layer in LAYERS]), case["segments"]


@st.composite
def pictures(draw):
    """Error maps [4, 6, 9], and labels [6, 9] of at most 6 odd values; one size, so that one program serves all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.choice(1000, size=draw(st.integers(1, 6)), replace=False)
    return rng.random((4, 6, 9), np.float32), rng.choice(values, size=(6, 9))


means_of_6, means_of_13 = (
    jax.jit(functools.partial(layer_selection.segment_means, max_segments=size)) for size in (6, 13)
)
quick = settings(max_examples=15, deadline=None)


def test_reference_layer_maps(golden):
    case = golden("sam_A")
    error_maps, segments = reference(case)
    found = layer_selection.assign_layers(error_maps, segments, [float(tau) for tau in TAUS])
    np.testing.assert_array_equal(found.values, np.unique(segments))
    for tau, layer_map in zip(TAUS, found.layer_maps, strict=True):
        # The reference counts from F10 (0) to W+ (4).
        np.testing.assert_array_equal(4 - layer_map, case[f"refined_{tau}"])


def test_reference_masks(golden):
    case = golden("sam_A")
    for tau in TAUS:
        for name, mask in layer_selection.soft_masks(4 - case[f"refined_{tau}"], LAYERS).items():
            np.testing.assert_allclose(mask[..., 0], case[f"mask_{tau}_{name}"][0, 0], rtol=0, atol=1e-6)


@quick
@given(pictures())
def test_means_are_those_of_numpy(picture):
    error_maps, segments = picture
    labels, values = layer_selection.contiguous(segments)
    means = means_of_6(error_maps, labels)[:, : len(values)]
    expected = [[error_map[segments == value].mean(dtype=np.float64) for value in values] for error_map in error_maps]
    np.testing.assert_allclose(means, expected, rtol=1e-6)


@quick
@given(pictures())
def test_padding_changes_no_mean(picture):
    error_maps, segments = picture
    labels, values = layer_selection.contiguous(segments)
    means, padded = means_of_6(error_maps, labels), means_of_13(error_maps, labels)
    np.testing.assert_array_equal(padded[:, :6], means)
    assert np.all(np.isposinf(padded[:, len(values) :]))
    assert np.all(np.isfinite(padded[:, : len(values)]))


@quick
@given(pictures(), st.floats(0, 1, width=32), st.randoms(use_true_random=False))
def test_renaming_labels_changes_no_layer_map(picture, tau, random):
    error_maps, segments = picture
    names = list(range(1000))
    random.shuffle(names)
    layer_map = layer_selection.assign_layers(error_maps, segments, tau).layer_maps
    np.testing.assert_array_equal(
        layer_selection.assign_layers(error_maps, np.array(names)[segments], tau).layer_maps, layer_map
    )


@quick
@given(pictures(), st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
def test_a_larger_threshold_never_chooses_a_less_editable_layer(picture, taus):
    found = layer_selection.assign_layers(*picture, sorted(taus))
    assert np.all(np.diff(found.layers, axis=0) <= 0)
    assert np.all(np.diff(found.layer_maps, axis=0) <= 0)


@quick
@given(pictures(), st.floats(0, 1, width=32))
def test_every_pixel_gets_its_segments_layer_and_no_other(picture, tau):
    error_maps, segments = picture
    found = layer_selection.assign_layers(error_maps, segments, tau)
    for value, layer in zip(found.values, found.layers[0], strict=True):
        assert np.all(found.layer_maps[0][segments == value] == layer)
    size = max(segments.shape)
    layers = [LatentLayer(f"layer {i}", size, (size, size, 1)) for i in range(len(error_maps))]
    masks = layer_selection.soft_masks(found.layer_maps[0], layers)  # at the map's own size: binary
    total = sum(mask[..., 0] for mask in masks.values())
    np.testing.assert_allclose(total, layer_selection.letterbox(np.ones(segments.shape, np.float32)), atol=1e-6)


def test_a_threshold_admits_a_map_of_exactly_that_value():
    # A plain float32 sum of 65,536 times 0.225 rounds the mean to either side of it.
    error_maps = np.stack([np.full((256, 256), 0.225, np.float32), np.zeros((256, 256), np.float32)])
    assert layer_selection.assign_layers(error_maps, np.zeros((256, 256), int), 0.225).layers == 0


def test_many_segments_and_no_admitted_layer():
    segments = np.arange(100).reshape(10, 10)
    found = layer_selection.assign_layers(np.ones((3, 10, 10)), segments, [0.5, 1.0], max_segments=8)
    np.testing.assert_array_equal(found.layers, [[2] * 100, [0] * 100])
    with pytest.raises(ValueError, match="px"):
        layer_selection.assign_layers(np.ones((3, 10, 9)), segments, 0.5)


def test_pictures_with_as_many_segments_at_most_share_a_program():
    layer_selection._assign.clear_cache()
    for count in (1, 3, 7, 64):
        segments = (np.arange(64) % count).reshape(8, 8)
        layer_selection.assign_layers(np.ones((2, 8, 8)), segments, count / 100)
    assert layer_selection._assign._cache_size() == 1


def test_letterboxed_masks_are_empty_outside_the_image():
    wide = np.zeros((192, 256), int)  # all of it F4's
    layers = (LAYERS[1],)
    mask = layer_selection.soft_masks(wide, layers)["F4"][..., 0]
    assert mask.shape == (16, 16)
    # 32 of 256 rows are two of 16; Lanczos reaches three rows beyond an edge, and its undershoot is clipped.
    np.testing.assert_array_equal(mask[3:13] > 0.9, True)
    assert mask[:1].max() < 0.05
    np.testing.assert_allclose(mask[0:8], mask[:7:-1], atol=1e-6)  # alike above and below
    np.testing.assert_allclose(mask.T, layer_selection.soft_masks(wide.T, layers)["F4"][..., 0], atol=1e-6)
    assert mask.max() <= 1.0
    assert mask.min() >= 0.0


def test_equal_layer_maps_are_found_once():
    a, b = np.zeros((4, 4), int), np.eye(4, dtype=int)
    assert layer_selection.unique_layer_maps(np.stack([b, a, b, b, a])) == ([0, 1], [0, 1, 0, 0, 1])


def test_masks_of_several_maps_are_stacked():
    layer_maps = np.stack([np.zeros((32, 32), int), np.full((32, 32), 1)])
    stacked = layer_selection.stack_masks(layer_maps, LAYERS)
    assert {name: mask.shape for name, mask in stacked.items()} == {
        "F4": (2, 16, 16, 1), "F6": (2, 32, 32, 1), "F8": (2, 64, 64, 1), "F10": (2, 128, 128, 1)}  # fmt: skip
    assert stacked["F4"][0].max() == 0
    np.testing.assert_allclose(stacked["F4"][1], 1.0, atol=1e-6)


def test_forced_layers():
    segments = np.array([[4, 4, 9], [4, 9, 2]])
    error_maps = np.stack([np.full((2, 3), 0.5), np.full((2, 3), 0.1)]).astype(np.float32)
    chosen = layer_selection.assign_layers(error_maps, segments, [0.2, 0.9])
    forced = layer_selection.force_layers(chosen, segments, {9: 0, 77: 1})
    np.testing.assert_array_equal(forced.layers, [[1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(forced.layer_maps[0], [[1, 1, 0], [1, 0, 1]])
    np.testing.assert_array_equal(chosen.layers, [[1, 1, 1], [0, 0, 0]])  # untouched
    np.testing.assert_array_equal(layer_selection.force_layers(chosen, segments, {}).layer_maps, chosen.layer_maps)
