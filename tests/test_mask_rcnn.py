"""Mask R-CNN against the reference's numbers, its operations against plain loops, its files, and canvas sizes.

The golden case has the image before it is enlarged to 320 px, every 8th channel of the pyramid (p2 and p3 averaged over
2 x 2), and Detectron2's results of all other stages.
"""

import functools
import math
import pickle
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import network_cases
import numpy as np
import pytest
from network_cases import MASK_RCNN, pickled

from samjax import segmentation
from samjax.errors import UserError
from samjax.io import arrays, checkpoints, pickles
from samjax.io.arrays import PickledArray
from samjax.nets import mask_rcnn
from samjax.nets.mask_rcnn import Detections

SMALL = MASK_RCNN.small
MIN_FOUND = 10  # objects that a comparison of detections needs


# --- the reference ---


class Stages(NamedTuple):
    pyramid: dict[str, np.ndarray]
    rpn: dict[str, tuple[np.ndarray, np.ndarray]]
    proposals: mask_rcnn.Proposals
    pooled: np.ndarray
    boxes: tuple[np.ndarray, np.ndarray]
    masks: np.ndarray
    detections: Detections
    labels: np.ndarray


@pytest.fixture(scope="module")
def stages(golden) -> Stages:
    """All stages on the image of the golden case, compiled together so that `detect` shares their results."""
    case = golden("maskrcnn_A")
    config, flat = network_cases.convert(MASK_RCNN, *MASK_RCNN.files(network_cases.published(MASK_RCNN, case)))
    height, width = case["image"].shape[1:]

    @jax.jit
    def run(variables, small_image, boxes, classes):
        image = jax.image.resize(small_image, (320, 320, 3), "bilinear")
        pyramid = mask_rcnn.features(variables, image, config)
        outputs = mask_rcnn.rpn(variables, pyramid, config)
        found = mask_rcnn.detect(variables, image, config, output_size=(height, width))
        return Stages(
            dict(pyramid),
            outputs,
            mask_rcnn.proposals(outputs, config),
            mask_rcnn.pool(pyramid, boxes, 7),
            mask_rcnn.box_head(variables, pyramid, boxes, config),
            mask_rcnn.mask_head(variables, pyramid, boxes, classes, config),
            found,
            mask_rcnn.paint(found, height, width),
        )

    image = case["image"].transpose(1, 2, 0).astype(np.float32)
    result = run(checkpoints.unflatten(flat), image, case["boxes"], case["classes"].astype(np.int32))
    return jax.tree.map(np.asarray, result)


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return network_cases.error(ours, theirs) < network_cases.TOLERANCE


def test_pyramid_matches_reference(golden, stages):
    for name in mask_rcnn.STRIDES:
        ours = stages.pyramid[name].transpose(2, 0, 1)[None, ::8]
        if name in ("p2", "p3"):
            _, channels, height, width = ours.shape
            ours = ours.reshape(1, channels, height // 2, 2, width // 2, 2).mean((3, 5))
        assert close(ours, golden("maskrcnn_A")[f"fpn_{name}"]), name


def test_rpn_matches_reference(golden, stages):
    for name in ("p3", "p4", "p5", "p6"):
        for ours, part in zip(stages.rpn[name], ("logits", "deltas"), strict=True):
            assert close(ours.transpose(2, 0, 1)[None], golden("maskrcnn_A")[f"rpn_{part}_{name}"]), name


def test_proposals_match_reference(golden, stages):
    case, ours = golden("maskrcnn_A"), stages.proposals
    assert ours.valid.sum() == case["n_proposals"]
    assert np.all(np.diff(ours.scores[ours.valid]) <= 0)
    assert close(ours.scores[:20], case["objectness_top20"])
    # Boxes are exponentials of deltas, which sum thousands of terms; they differ by 4e-5 of the side of the image.
    assert np.abs(ours.boxes[:20] - case["proposals_top20"]).max() < 2e-4 * 320


def test_box_head_matches_reference(golden, stages):
    case = golden("maskrcnn_A")
    assert close(stages.pooled.mean((1, 2)), case["pooled_mean"])
    assert close(stages.boxes[0], case["box_scores"])
    assert close(stages.boxes[1].reshape(12, -1), case["box_deltas"])


def test_mask_head_matches_reference(golden, stages):
    assert close(stages.masks, golden("maskrcnn_A")["masks"][:, 0])


def test_detections_match_reference(golden, stages):
    """All detections of the reference are found. There, an empty box displaces one more; see `detect`."""
    case, ours = golden("maskrcnn_A"), stages.detections
    assert ours.valid.sum() in (case["n_instances"], case["n_instances"] + 1)
    taken = set()
    for box, score, label in zip(case["pred_boxes"], case["scores"], case["pred_classes"], strict=True):
        away = np.abs(ours.boxes - box).max(1) + np.where(ours.valid & (ours.classes == label), 0, np.inf)
        best = int(away.argmin())
        assert away[best] < 2e-4 * 256  # as for proposals
        assert abs(ours.scores[best] - score) < 2e-3  # 4e-4 was observed, for boxes that differ as above
        taken.add(best)
    assert len(taken) == case["n_instances"]
    assert np.all(np.diff(ours.scores) <= 0)
    assert max(taken) < len(taken)  # the additional one comes last


def test_labels_match_reference(golden, stages):
    assert stages.labels.dtype == np.int32
    # 99.99% was observed; rounding decides at the edge of an object and between two of equal score.
    assert np.mean(stages.labels == golden("maskrcnn_A")["labels"]) >= 0.99


# --- operations ---


def test_cell_anchors():
    """Known values, among them sqrt(1/2) times a side."""
    np.testing.assert_allclose(
        mask_rcnn.cell_anchors("p2"), [[-22.6274, -11.3137, 22.6274, 11.3137], [-16, -16, 16, 16],
                                       [-11.3137, -22.6274, 11.3137, 22.6274]], atol=1e-4,
    )  # fmt: skip
    # Three for each cell, row by row: index 7 is the second anchor of the third cell, in a row of two.
    found = mask_rcnn.anchors("p6", jnp.array([1, 4, 7]), 2)
    np.testing.assert_array_equal(found, [[-256, -256, 256, 256], [-192, -256, 320, 256], [-256, -192, 256, 320]])


def test_decode_moves_and_scales_boxes():
    box = jnp.array([10.0, 20.0, 30.0, 60.0])
    for deltas, expected in (
        ((0, 0, 0, 0), (10, 20, 30, 60)),
        ((0.5, -0.25, 0, 0), (20, 10, 40, 50)),
        ((0, 0, math.log(2), math.log(0.5)), (0, 30, 40, 50)),
        ((0, 0, 50, 0), (20 - 625, 20, 20 + 625, 60)),  # at most 62.5 times as wide
    ):
        np.testing.assert_allclose(mask_rcnn.decode(box, jnp.array(deltas, jnp.float32)), expected, rtol=1e-5)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union; 0 for empty boxes."""
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    area = sides[0] * sides[1]
    whole = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - area
    return area / whole if whole else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_suppression_is_greedy(seed):
    """On coarse values, with equal scores, overlaps exactly at the threshold, and empty boxes."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 6, (120, 2))
    boxes = np.concatenate([low, low + rng.integers(0, 6, (120, 2))], axis=1).astype(np.float32)
    scores = (rng.integers(0, 12, 120) / 4).astype(np.float32)
    scores[rng.random(120) < 0.1] = -np.inf
    groups = rng.integers(0, 3, 120)
    expected: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if scores[i] > -np.inf and all(groups[i] != groups[j] or overlap(boxes[i], boxes[j]) <= 0.5 for j in expected):
            expected.append(int(i))
    call = jax.jit(mask_rcnn.suppress, static_argnames=("iou", "count"))
    indices, valid = call(boxes, scores, groups, iou=0.5, count=118)
    assert 30 < len(expected) < 118
    np.testing.assert_array_equal(np.asarray(indices)[np.asarray(valid)], expected)
    assert not np.any(valid[len(expected) :])
    few, valid = call(boxes, scores, groups, iou=0.5, count=7)
    np.testing.assert_array_equal(few, expected[:7])
    assert np.all(valid)


def roi_align(feature: np.ndarray, box: np.ndarray, stride: int, cells: int) -> np.ndarray:
    """ROIAlign by its definition, one bilinear sample at a time, in float64."""
    height, width = feature.shape[:2]
    x0, y0, x1, y1 = box.astype(np.float64) / stride - 0.5
    counts = [math.ceil(side / cells) for side in (y1 - y0, x1 - x0)]
    result = np.zeros((cells, cells, feature.shape[2]))
    for i, j in np.ndindex(cells, cells):
        for k, m in np.ndindex(*counts):
            y = np.clip(y0 + (i + (k + 0.5) / counts[0]) * (y1 - y0) / cells, 0, height - 1)
            x = np.clip(x0 + (j + (m + 0.5) / counts[1]) * (x1 - x0) / cells, 0, width - 1)
            row, column = min(int(y), height - 2), min(int(x), width - 2)
            v, u = y - row, x - column
            part = feature[row : row + 2, column : column + 2]
            result[i, j] += (1 - v) * ((1 - u) * part[0, 0] + u * part[0, 1])
            result[i, j] += v * ((1 - u) * part[1, 0] + u * part[1, 1])
    return result / max(np.prod(counts), 1)


BOXES = {  # level and box; a side of 7 n cells must have exactly n samples per part
    "tiny": ("p2", (3.2, 5.1, 3.9, 6.3)),
    "corner": ("p2", (500.0, 700.0, 512.0, 704.0)),
    "21 cells": ("p2", (0.0, 0.0, 84.0, 84.0)),
    "whole width": ("p2", (0.0, 100.0, 512.0, 115.5)),
    "whole height": ("p2", (10.0, 0.0, 12.5, 704.0)),
    "most cells of p2": ("p2", (101.0, 0.0, 118.7, 704.0)),
    "line": ("p2", (0.0, 33.0, 512.0, 33.01)),
    "smallest of p3": ("p3", (100.0, 100.0, 212.0, 212.0)),
    "tall of p3": ("p3", (200.0, 0.0, 250.0, 704.0)),
    "largest of p3": ("p3", (77.7, 300.3, 301.6, 524.2)),
    "p4": ("p4", (40.0, 50.0, 400.0, 290.0)),
    "whole image": ("p5", (0.0, 0.0, 512.0, 704.0)),
    "empty": ("p2", (512.0, 10.0, 512.0, 80.0)),
}


def test_pooling_matches_its_definition():
    """Also in a larger canvas, with other features beyond the image."""
    rng = np.random.default_rng(0)
    # The image has 690 x 500 pixels, padded to 704 x 512.
    levels = {n: rng.standard_normal((704 // s, 512 // s, 2)).astype(np.float32) for n, s in mask_rcnn.STRIDES.items()}
    beyond = {n: rng.standard_normal((768 // s, 640 // s, 2)).astype(np.float32) for n, s in mask_rcnn.STRIDES.items()}
    for name, x in levels.items():
        beyond[name][: x.shape[0], : x.shape[1]] = x
    boxes = np.array([box for _, box in BOXES.values()], np.float32)
    call = jax.jit(mask_rcnn.pool, static_argnames="cells")
    for cells in (7, 14):
        ours, larger = call(levels, boxes, cells), call(beyond, boxes, cells, (690, 500))
        for i, (name, (level, _)) in enumerate(BOXES.items()):
            expected = roi_align(levels[level], boxes[i], mask_rcnn.STRIDES[level], cells)
            np.testing.assert_allclose(ours[i], expected, atol=2e-5, err_msg=name)  # float32 positions up to 100
            np.testing.assert_allclose(larger[i], ours[i], atol=1e-6, err_msg=name)


def some_detections(count: int = 6) -> Detections:
    """The first few of six in an image of 40 x 50: inside, at its edges, tiny; the fifth is invalid."""
    rng = np.random.default_rng(3)
    boxes = np.array([[3.2, 4.1, 30.7, 20.2], [0, 0, 50, 40], [10, 10, 11.4, 12], [42, 2, 50, 5.5], [20, 30, 41, 40],
                      [5, 5, 9, 9]], np.float32)  # fmt: skip
    masks = rng.random((6, 28, 28), np.float32)
    masks[2:4] = 0.4 + masks[2:4] / 2  # mostly above 0.5, since few of their cells are at the center of a pixel
    scores = np.linspace(0.9, 0.2, 6, dtype=np.float32)
    valid = np.array([True, True, True, True, False, True])
    found = Detections(boxes, scores, np.array([3, 1, 2, 4, 3, 0], np.int32), masks, valid)
    return Detections(*(jnp.asarray(a[:count]) for a in found))


def doubled(found: Detections) -> Detections:
    return found._replace(boxes=2 * found.boxes)


def test_pasting_matches_torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # its idle threads would take CPU time from JAX's
    found, (height, width) = some_detections(), (40, 50)
    ours = np.asarray(jax.jit(mask_rcnn.paste, static_argnums=(1, 2))(found, height, width))
    assert ours.shape == (6, height, width)
    assert ours.dtype == bool
    boxes, masks = (torch.from_numpy(np.array(a)) for a in (found.boxes, found.masks))
    y = (torch.arange(height) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    x = (torch.arange(width) + 0.5 - boxes[:, 0:1]) / (boxes[:, 2:3] - boxes[:, 0:1]) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    soft = torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0].numpy()
    for i in range(6):
        expected = (soft[i] >= 0.5) & bool(found.valid[i])
        differ = expected != ours[i]
        assert np.all(np.abs(soft[i][differ] - 0.5) < 1e-5)  # rounding at the threshold
        assert expected.any() == (i != 4)


def test_painting_puts_later_objects_over_earlier_ones():
    found = some_detections()
    expected = np.zeros((40, 50), np.int32)
    for label, mask in zip(found.classes, np.asarray(mask_rcnn.paste(found, 40, 50)), strict=True):
        expected[mask] = label
    labels = mask_rcnn.paint(found, 40, 50)
    assert labels.dtype == jnp.int32
    np.testing.assert_array_equal(labels, expected)
    assert set(np.unique(expected)) == {0, 1, 2, 3, 4}


# --- the whole of a small network ---


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return checkpoints.unflatten(network_cases.random_variables(MASK_RCNN))


def random_image(*shape: int) -> np.ndarray:
    """An image with structure at all scales, in [0, 255]."""
    rng = np.random.default_rng(1)
    result = np.zeros(shape, np.float32)
    for size in (2, 8, 32):
        coarse = rng.uniform(0, 85, (shape[0] // size + 1, shape[1] // size + 1, 3)).astype(np.float32)
        result += coarse.repeat(size, 0).repeat(size, 1)[: shape[0], : shape[1]]
    return result


detect = jax.jit(mask_rcnn.detect, static_argnames="config")


def assert_same(ours: Detections, theirs: Detections) -> None:
    """Detections agree up to rounding, and there are enough of them, of several classes."""
    assert np.sum(theirs.valid) >= MIN_FOUND
    assert len(np.unique(np.asarray(theirs.classes)[np.asarray(theirs.valid)])) > 1
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    np.testing.assert_array_equal(ours.classes, theirs.classes)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
    np.testing.assert_allclose(ours.masks, theirs.masks, atol=1e-3)


@pytest.fixture(scope="module")
def in_canvas(variables) -> Detections:
    """Detections in an image of 100 x 150, in the corner of a canvas of 160 x 256 with other content.

    The reference pads the image to 128 x 160, which is 2 x 3 cells of p6; the canvas has 3 x 4.
    """
    canvas = random_image(160, 256, 3)
    return detect(variables, canvas, SMALL, size=(100, 150), output_size=(100, 150), score_threshold=0.1)


def test_padding_changes_nothing(variables, in_canvas):
    """The image alone, whose sides no stride divides."""
    alone = detect(variables, random_image(160, 256, 3)[:100, :150], SMALL)
    assert np.all(np.asarray(alone.boxes) <= [150, 100, 150, 100])
    assert_same(in_canvas, alone)


def test_features_are_those_of_the_image_padded_by_zeros(variables):
    image = random_image(50, 75, 3)
    padded = np.zeros((1, 64, 96, 3), np.float32)
    padded[0, :50, :75] = image - np.float32([103.53, 116.28, 123.675])
    network = mask_rcnn.MaskRCNN(SMALL)
    plain: Any = jax.jit(lambda v, x: network.apply(v, x, method="features"))(variables, padded)
    ours = jax.jit(lambda v, x: mask_rcnn.features(v, x, SMALL))(variables, image)
    for name, stride in mask_rcnn.STRIDES.items():
        assert ours[name].shape == (-(-64 // stride), -(-96 // stride), SMALL.channels)
        assert np.abs(ours[name] - plain[name][0]).max() < 1e-5 * np.ptp(plain[name])


@pytest.mark.slow  # compiles a program of its own
def test_one_and_many_agree(variables, in_canvas):
    """Images of several sizes at once."""
    images = np.stack([random_image(160, 256, 3)[::-1, ::-1], random_image(160, 256, 3)])
    sizes = np.array([[160, 256], [100, 150]], np.int32)
    many = jax.jit(jax.vmap(lambda v, x, s: mask_rcnn.detect(v, x, SMALL, size=s), in_axes=(None, 0, 0)))(
        variables, images, sizes
    )
    first = detect(variables, images[0], SMALL, size=(160, 256), output_size=(160, 256), score_threshold=0.1)
    for i, one in enumerate((first, in_canvas)):
        assert_same(jax.tree.map(lambda a, i=i: a[i], many), one)


def test_threshold_and_output_size(variables, in_canvas):
    call = functools.partial(detect, variables, random_image(160, 256, 3), SMALL, size=(100, 150))
    sure = call(output_size=(100, 150), score_threshold=0.6)
    count = sure.valid.sum()
    assert 0 < count < in_canvas.valid.sum()
    assert np.all(sure.valid[:count])
    assert np.all(sure.scores[:count] > 0.6)
    np.testing.assert_allclose(sure.boxes[:count], in_canvas.boxes[:count], atol=1e-4)
    assert not call(output_size=(100, 150), score_threshold=1.0).valid.any()
    large = call(output_size=(200, 75), score_threshold=0.1)
    np.testing.assert_allclose(large.boxes, np.asarray(in_canvas.boxes) * [0.5, 2, 0.5, 2], rtol=1e-5)
    np.testing.assert_array_equal(large.valid, in_canvas.valid)


def test_empty_boxes_are_dropped(variables):
    """With all boxes moved beyond the right edge, nothing is found, and all results are finite."""
    flat = checkpoints.flatten(variables)
    flat["params/box_head/bbox_pred/bias"] = np.tile(np.float32([1e4, 0, 0, 0]), SMALL.num_classes)
    found = detect(
        checkpoints.unflatten(flat), random_image(160, 256, 3), SMALL,
        size=(100, 150), output_size=(100, 150), score_threshold=0.1,
    )  # fmt: skip
    assert not found.valid.any()
    chex.assert_tree_all_finite(found)


# --- images ---


def test_resized():
    """The shorter side is 800, the longer at most 1333; halves round up."""
    for size, expected in (((256, 256), (800, 800)), ((480, 640), (800, 1067)), ((640, 480), (1067, 800)),
                           ((200, 1000), (267, 1333)), ((1600, 1600), (800, 800)), ((3, 1), (1333, 444))):  # fmt: skip
        assert mask_rcnn.resized(*size) == expected


def test_preprocess_resizes_as_pillow_does(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    monkeypatch.setattr(mask_rcnn, "_SHORTEST", 60)
    monkeypatch.setattr(mask_rcnn, "_LONGEST", 78)
    canvas, size = mask_rcnn.preprocess(image[..., ::-1])
    assert size == (78, 59)  # 80 x 60 scaled by 78 / 80; 58.5 rounds up
    assert canvas.shape == (96, 64, 3)
    assert canvas.dtype == np.float32
    np.testing.assert_array_equal(canvas, np.rint(canvas))  # the reference resizes uint8
    assert not canvas[78:].any()
    assert not canvas[:, 59:].any()
    from PIL import Image

    theirs = Image.fromarray(np.ascontiguousarray(image[..., ::-1])).resize((59, 78), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(canvas[:78, :59], np.asarray(theirs))
    for bad in (image[0], image[..., :1], image.astype(np.float32), image[:0]):
        with pytest.raises(ValueError, match="uint8 array"):
            mask_rcnn.preprocess(bad)


@pytest.mark.parametrize("swap", [False, True])
def test_instances_are_a_segmenter(swap, variables, monkeypatch):
    """With a stand-in for the network, which finds its last object only where red comes last."""

    def stand_in(held, image, config, *, size, output_size, score_threshold):
        assert image.shape == (800, 1024, 3)
        assert config == SMALL
        found = some_detections()
        red_last = jnp.mean(image[..., 2]) > jnp.mean(image[..., 0])
        valid = found.valid & (found.scores > score_threshold) & (red_last | (jnp.arange(6) != 3))
        scale = jnp.stack([output_size[1] / 50, output_size[0] / 40] * 2).astype(jnp.float32)
        return found._replace(boxes=found.boxes * scale * size[1] / 1000, valid=valid)

    monkeypatch.setattr(mask_rcnn, "detect", stand_in)
    red = np.zeros((80, 100, 3), np.float32) + np.float32([0.8, 0.0, -0.8])
    segmenter = segmentation.instances(variables, SMALL, score_threshold=0.3, swap_channels=swap)
    labels = segmenter(red)

    found = some_detections(3 if swap else 4)  # scores above 0.3, and one fewer with swapped channels
    expected = np.zeros((80, 100), np.int32)
    for label, mask in zip(found.classes, np.asarray(mask_rcnn.paste(doubled(found), 80, 100)), strict=True):
        expected[mask] = label
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, expected)
    assert len(np.unique(labels)) > (2 if swap else 3)
    for bad in (red[0], red[..., :2]):
        with pytest.raises(UserError, match="H, W, 3"):
            segmenter(bad)


# --- files ---


@pytest.fixture
def small_file() -> dict[str, PickledArray]:
    """With the constants and other parts of the published file."""
    held = network_cases.their_arrays(MASK_RCNN, network_cases.random_variables(MASK_RCNN))
    held["pixel_mean"] = np.array([103.53, 116.28, 123.675], np.float32).reshape(3, 1, 1)
    held["pixel_std"] = np.ones((3, 1, 1), np.float32)
    for i, level in enumerate(mask_rcnn.STRIDES):
        held[f"proposal_generator.anchor_generator.cell_anchors.{i}"] = mask_rcnn.cell_anchors(level)
    held["sem_seg_head.predictor.weight"] = np.zeros((54, 128, 1, 1), np.float32)
    held["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] = np.zeros((), np.int64)
    return {name: pickled(array) for name, array in held.items()}


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_the_model_zoo_are_read(protocol, small_file):
    held = {"model": {name: array.array() for name, array in small_file.items()}, "__author__": "Detectron2 Model Zoo"}
    data = memoryview(pickle.dumps(held, protocol))
    config, flat = network_cases.convert(
        MASK_RCNN, pickles.load(arrays.View(data), arrays.python_names(), encoding="latin1")
    )
    assert (config.num_classes, config.features, config.blocks) == (5, 4, (1, 2, 1, 1))
    assert (config.channels, config.hidden) == (8, 16)
    for path, values in network_cases.random_variables(MASK_RCNN).items():
        np.testing.assert_array_equal(flat[path], values, err_msg=path)


def test_bare_and_parallel_state_dicts_are_recognized(small_file):
    parallel = {f"module.{name}": array for name, array in small_file.items()}
    for held in (small_file, {"model": parallel, "iteration": 3}):
        found = MASK_RCNN.network.find([held])
        assert found is not None
        assert found.keys() == small_file.keys()


def test_similar_files_are_refused(small_file):
    with pytest.raises(UserError, match="alone"):
        MASK_RCNN.network.find([{"model": small_file}, None])
    faster = {name: array for name, array in small_file.items() if "mask_head" not in name}
    with pytest.raises(UserError, match=r"not Mask R-CNN \(roi_heads\.mask_head\.predictor\.weight is missing"):
        MASK_RCNN.network.find([{"model": faster}])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("pixel_mean", np.array([123.675, 116.28, 103.53], np.float32).reshape(3, 1, 1)),  # of RGB
        ("pixel_std", np.float32([57.375, 57.12, 58.395]).reshape(3, 1, 1)),
        ("pixel_mean", np.float32([103.53, 116.28, 123.675])),
        ("pixel_mean", np.zeros(0, np.float32)),
        ("proposal_generator.anchor_generator.cell_anchors.0", np.ones((3, 4), np.float32)),
        ("proposal_generator.anchor_generator.cell_anchors.4", np.ones((9, 4), np.float32)),
    ],
)
def test_other_constants_are_refused(name, values, small_file):
    small_file[name] = pickled(values)
    with pytest.raises(UserError, match=f"{name} is not .*, the only one"):
        network_cases.convert(MASK_RCNN, {"model": small_file})
