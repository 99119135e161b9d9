"""Mask R-CNN (He et al., ICCV 2017) on a feature pyramid (Lin et al., "Feature Pyramid Networks for Object Detection",
CVPR 2017): the instance branch of Detectron2's panoptic FPN with ResNet-101, with the same numbers.

An image passes through five stages: `features`, `rpn`, `proposals`, `box_head`, `mask_head`. `detect` runs them all on
one image; use `jax.vmap` for several of one size. All shapes are static: there are always as many proposals and
detections as the config says, and `valid` marks the actual ones.

Images are [H, W, 3], BGR, in [0, 255]. Boxes are (x0, y0, x1, y1) in pixels, at the edges of pixels rather than their
centers. An image may lie in the upper left of a larger canvas, with its own `size` passed separately, so that images of
many sizes share one compilation. The reference pads an image with zeros to the next multiple of 32, and so does every
stage here: the rest of the canvas has no influence.

Batch normalization always uses the stored statistics. Convolutions follow JAX's precision setting (see
`samjax.nets.lpips`); interpolation is full float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from PIL import Image

from samjax.nets.blocks import Bottleneck, Variables, batch_norm, conv, max_pool

Pyramid = Mapping[str, Array]
"""Feature maps [ceil(H / s), ceil(W / s), C] of a canvas: "p2" (stride s = 4) to "p6" (s = 64)."""

STRIDES: Mapping[str, int] = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
PIXEL_MEAN = (103.53, 116.28, 123.675)  # blue, green, red
ANCHOR_SIZES: Mapping[str, int] = {"p2": 32, "p3": 64, "p4": 128, "p5": 256, "p6": 512}
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height over width

_DIVISOR = 32  # images are padded to multiples of this
_RPN_IOU, _BOX_IOU = 0.7, 0.5  # thresholds of non-maximum suppression
_BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # factors of the box head's deltas
_MAX_LOG_SCALE = math.log(1000 / 16)  # limit on the growth of boxes
_BOX_CELLS, _MASK_CELLS = 7, 14  # height and width of the features of a box, as the heads take them
_POOL_BATCH_SIZE = 50  # boxes pooled at once, which bounds memory
_SHORTEST, _LONGEST = 800, 1333  # sides to which the reference resizes images


@dataclasses.dataclass(frozen=True)
class MaskRCNNConfig:
    """Sizes of the network; the defaults are those of `COCO-PanopticSegmentation/panoptic_fpn_R_101_3x`.

    Attributes:
      num_classes: number of classes, without the background.
      features: channels of the first convolution of the ResNet; all its widths are multiples of it.
      blocks: residual blocks in each of the four stages.
      channels: channels of the pyramid, the proposal network and the mask head.
      hidden: size of the two hidden layers of the box head.
      proposals: number kept in each level before suppression, and in all levels together after it.
      detections: largest number in an image.
    """

    num_classes: int = 80
    features: int = 64
    blocks: tuple[int, ...] = (3, 4, 23, 3)
    channels: int = 256
    hidden: int = 1024
    proposals: int = 1000
    detections: int = 100

    def __post_init__(self) -> None:
        if len(self.blocks) != 4 or not all(1 <= count <= 100 for count in self.blocks):
            raise ValueError(f"blocks must be four numbers from 1 to 100, not {self.blocks}")
        for name in ("num_classes", "features", "channels", "hidden", "proposals", "detections"):
            if not 1 <= getattr(self, name) <= 65536:
                raise ValueError(f"{name} must be from 1 to 65536, not {getattr(self, name)}")


class Proposals(NamedTuple):
    """Boxes that may contain an object, by decreasing score.

    Attributes:
      boxes: [P, 4] in pixels.
      scores: [P] logits.
      valid: bool [P]; the others are padding.
    """

    boxes: Array
    scores: Array
    valid: Array


class Detections(NamedTuple):
    """Objects in an image, by decreasing score.

    Attributes:
      boxes: [D, 4] in pixels.
      scores: [D] probabilities.
      classes: int32 [D], 0 to num_classes - 1.
      masks: [D, 28, 28], probability that each cell of the box belongs to the object.
      valid: bool [D]; the others are to be ignored, and need not be at the end.
    """

    boxes: Array
    scores: Array
    classes: Array
    masks: Array
    valid: Array


# --- operations ---


def _inside(cells: Sequence[int], stride: int, size: Array) -> Array:
    """Cells of a feature map within the padded extent of an image of `size`; bool [h, w]."""
    rows, columns = (jnp.arange(n) * stride < e for n, e in zip(cells, _extent(size), strict=True))
    return rows[:, None] & columns


def _extent(size: Array) -> Array:
    """Height and width to which the reference pads an image."""
    return -(-size // _DIVISOR) * _DIVISOR


def _padded_by_zeros(size: Array, canvas: tuple[int, int]) -> Any:
    """Context in which convolutions see zeros beyond the padded extent of an image, as if the canvas ended there."""

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if not isinstance(module, nn.Conv) or module.kernel_size == (1, 1):
            return call(*args, **kwargs)
        x = args[0]
        stride = 1 << (-(-canvas[0] // x.shape[1]) - 1).bit_length()  # rounded to a power of two, since p6 rounds up
        return call(jnp.where(_inside(x.shape[1:3], stride, size)[..., None], x, 0), **kwargs)

    return nn.intercept_methods(intercept)


def anchors(level: str, indices: Array, columns: int) -> Array:
    """Anchors, the boxes to which the deltas of the proposal network apply.

    Args:
      level: level of the pyramid, "p2" to "p6".
      indices: [N] into the rows x columns x 3 aspect ratios of the level.
      columns: number of columns of the level.

    Returns:
      [N, 4], each centered on the upper left corner of its cell.
    """
    cell, ratio = indices // len(ASPECT_RATIOS), indices % len(ASPECT_RATIOS)
    corner = jnp.stack([cell % columns, cell // columns] * 2, axis=-1) * STRIDES[level]
    return corner.astype(jnp.float32) + jnp.asarray(cell_anchors(level))[ratio]


def cell_anchors(level: str) -> np.ndarray:
    """The three anchors of a cell relative to its corner, of equal area and `ASPECT_RATIOS`; float32 [3, 4]."""
    ratios = np.array(ASPECT_RATIOS)
    widths = np.sqrt(ANCHOR_SIZES[level] ** 2 / ratios)
    half = np.stack([widths, ratios * widths], axis=1) / 2
    return np.concatenate([-half, half], axis=1).astype(np.float32)


def decode(boxes: Array, deltas: Array) -> Array:
    """Applies deltas to boxes: shifts them by (dx, dy) times their size and scales them by e^(dw, dh), at most 62.5.

    Args:
      boxes: [..., 4].
      deltas: [..., 4], (dx, dy, dw, dh).

    Returns:
      [..., 4].
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    center = low + 0.5 * (high - low) + deltas[..., :2] * (high - low)
    half = 0.5 * jnp.exp(jnp.minimum(deltas[..., 2:], _MAX_LOG_SCALE)) * (high - low)
    return jnp.concatenate([center - half, center + half], axis=-1)


def clip(boxes: Array, size: Array) -> Array:
    """Clips boxes [..., 4] to an image of height and width `size`, int [2]."""
    limit = size[::-1].astype(jnp.float32)
    return jnp.clip(boxes, 0, jnp.concatenate([limit, limit]))


def nonempty(boxes: Array) -> Array:
    """Whether boxes [..., 4] have a positive area; bool [...]."""
    return jnp.all(boxes[..., 2:] > boxes[..., :2], axis=-1)


def suppress(boxes: Array, scores: Array, groups: Array, iou: float, count: int) -> tuple[Array, Array]:
    """Greedy non-maximum suppression: the best box, then the best of those that do not overlap it, and so on.

    There is one step per box to select, each over all candidates: nothing is sorted, and memory is linear in the number
    of candidates. Ties are broken by index.

    Args:
      boxes: [N, 4].
      scores: [N]; -inf excludes a box.
      groups: int [N]; only boxes of the same group suppress each other.
      iou: boxes whose intersection over union with a selected one exceeds this are suppressed.
      count: number of boxes to select.

    Returns:
      Indices int [count] of the selected boxes, best first, and whether each is valid, bool [count].
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides[:, 0] * sides[:, 1]

    def select(remaining: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        best = jnp.argmax(remaining)
        common = jnp.minimum(boxes[:, 2:], boxes[best, 2:]) - jnp.maximum(boxes[:, :2], boxes[best, :2])
        common = jnp.maximum(common, 0)
        area = common[:, 0] * common[:, 1]
        suppressed = (area / (areas + areas[best] - area) > iou) & (groups == groups[best])
        rest = jnp.where(suppressed, -jnp.inf, remaining).at[best].set(-jnp.inf)
        return rest, (best, remaining[best] > -jnp.inf)

    return lax.scan(select, scores, None, length=count)[1]


def pool(pyramid: Pyramid, boxes: Array, cells: int, size: ArrayLike | None = None) -> Array:
    """Features within boxes, resized to one size: ROIAlign (He et al.) as in Detectron2's "ROIAlignV2".

    Features come from the level that suits the area of a box. Each of the cells x cells parts of the box is the mean of
    a grid of bilinear samples, ceil(side / cells) along a side measured in cells of the level. This number differs from
    box to box, but the mean is linear in the features: a matrix over the rows that the box covers, times the features,
    times a matrix over its columns. The number of cells that a box covers is bounded, in the lower levels by its area
    and in the last by the level itself, so that all boxes are products of one static size.

    Args:
      pyramid: as returned by `features`.
      boxes: [B, 4] within the image.
      cells: height and width of the result.
      size: as for `rpn`.

    Returns:
      [B, cells, cells, C].
    """
    maps = [pyramid[name] for name in list(STRIDES)[:4]]
    heights, widths = (np.array([m.shape[i] for m in maps]) for i in (0, 1))
    starts = np.cumsum([0, *(heights * widths)[:-1]])
    flat = jnp.concatenate([m.reshape(-1, m.shape[-1]) for m in maps])
    extent = _extent(_size(pyramid["p2"], size))
    height, width = int(heights[0]), int(widths[0])
    # Except in the last level, the area of a box is at most 28 x 28 cells; samples along a side n use less than n + 3
    # cells.
    covered = max(
        int(heights[3] * widths[3]),
        *(rows * (width if rows < 4 else min(width, 785 // (rows - 3) + 3)) for rows in range(1, height + 1)),
    )

    def matrix(low: Array, high: Array, limit: Array, slots: int) -> tuple[Array, Array, Array]:
        """Along one axis: weights [cells, slots] of the level's covered cells, the first of these, and their number."""
        side = high - low
        steps = jnp.arange(-(-slots // cells), dtype=jnp.float32)
        samples = jnp.sum(side > cells * steps).astype(jnp.float32)  # ceil(side / cells), which XLA does not get exact
        divisor = jnp.maximum(samples, 1)
        at = low + (jnp.arange(cells, dtype=jnp.float32)[:, None] + (steps + 0.5) / divisor) * (side / cells)
        at = jnp.clip(at, 0, limit - 1)  # [cells, steps]
        first, last = (jnp.floor(jnp.clip(end, 0, limit - 1)) for end in (low, high))
        offset = jnp.abs(at[:, None] - (first + jnp.arange(slots, dtype=jnp.float32))[:, None])  # [cells, slots, steps]
        weights = jnp.sum(jnp.where(steps < samples, jnp.maximum(1 - offset, 0), 0), axis=-1) / divisor
        return weights, first.astype(jnp.int32), (jnp.minimum(last + 2, limit) - first).astype(jnp.int32)

    def one(box: Array) -> Array:
        side = jnp.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = jnp.clip(jnp.floor(4 + jnp.log2(side / 224 + 1e-8)), 2, 5).astype(jnp.int32) - 2
        stride = jnp.left_shift(4, level)
        box = box / stride.astype(jnp.float32) - 0.5
        limit = (extent // stride).astype(jnp.float32)
        by_row, top, _ = matrix(box[1], box[3], limit[0], height)
        by_column, left, columns = matrix(box[0], box[2], limit[1], width)
        row, column = jnp.arange(covered) // columns, jnp.arange(covered) % columns
        index = jnp.asarray(starts)[level] + (top + row) * jnp.asarray(widths)[level] + left + column
        covered_features = jnp.take(flat, index, axis=0, mode="clip")  # [covered, C]
        # Rows beyond the box have weight 0.
        by_row, by_column = (
            jnp.take(m, i, axis=1, mode="fill", fill_value=0) for m, i in ((by_row, row), (by_column, column))
        )
        weights = (by_row[:, None] * by_column).reshape(cells * cells, covered)
        return jnp.matmul(weights, covered_features, precision="highest").reshape(cells, cells, -1)

    return lax.map(one, boxes, batch_size=_POOL_BATCH_SIZE)


def _size(p2: Array, size: ArrayLike | None) -> Array:
    """`size`, or height and width of the canvas of the map `p2`; int32 [2]."""
    canvas = (p2.shape[0] * STRIDES["p2"], p2.shape[1] * STRIDES["p2"])
    return jnp.asarray(canvas if size is None else size, jnp.int32)


# --- blocks ---


class ResNet(nn.Module):
    """Bottleneck ResNet with strides as in Caffe; the outputs at 1/4, 1/8, 1/16 and 1/32 of the size."""

    features: int
    blocks: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        x = conv(self.features, 7, 2, name="stem_conv")(x)
        x = max_pool(nn.relu(batch_norm(use_running_average=True, name="stem_bn")(x)))
        outputs = []
        for s, count in enumerate(self.blocks):
            for b in range(count):
                stride = 2 if b == 0 and s > 0 else 1
                block = Bottleneck(
                    self.features * 2**s, stride, project=b == 0, stride_first=True, name=f"res{s + 2}_{b}"
                )
                x = block(x)
            outputs.append(x)
        return tuple(outputs)


class FPN(nn.Module):
    """Feature pyramid: adds coarser levels to finer ones; "p2" to "p6"."""

    channels: int

    @nn.compact
    def __call__(self, maps: tuple[Array, ...]) -> dict[str, Array]:
        levels = {}
        above = None
        for i, x in reversed(list(enumerate(maps, 2))):
            x = conv(self.channels, 1, bias=True, name=f"lateral{i}")(x)
            if above is not None:
                x = x + jnp.repeat(jnp.repeat(above, 2, axis=1), 2, axis=2)
            above = x
            levels[f"p{i}"] = conv(self.channels, bias=True, name=f"output{i}")(x)
        return {**levels, "p6": levels["p5"][:, ::2, ::2]}


class RPN(nn.Module):
    """Region proposal network (Ren et al., NeurIPS 2015): logits [..., 3] and deltas [..., 12] of anchors."""

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = nn.relu(conv(self.channels, bias=True, name="conv")(x))
        count = len(ASPECT_RATIOS)
        logits = conv(count, 1, bias=True, name="objectness_logits")(x)
        return logits, conv(4 * count, 1, bias=True, name="anchor_deltas")(x)


class BoxHead(nn.Module):
    """Logits of the classes and the background [B, num_classes + 1], and deltas [B, 4 num_classes]."""

    config: MaskRCNNConfig

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.config.hidden, name="fc1")(x))
        x = nn.relu(nn.Dense(self.config.hidden, name="fc2")(x))
        classes = self.config.num_classes
        return nn.Dense(classes + 1, name="cls_score")(x), nn.Dense(4 * classes, name="bbox_pred")(x)


class MaskHead(nn.Module):
    """Logits of one mask per class, [B, h, w, channels] to [B, 2h, 2w, num_classes]."""

    config: MaskRCNNConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(1, 5):
            x = nn.relu(conv(self.config.channels, bias=True, name=f"mask_fcn{i}")(x))
        # As in PyTorch, the gradient of a convolution: hence `transpose_kernel`.
        deconv = nn.ConvTranspose(
            self.config.channels, (2, 2), (2, 2), padding="VALID", transpose_kernel=True, name="deconv"
        )
        return conv(self.config.num_classes, 1, bias=True, name="predictor")(nn.relu(deconv(x)))


# --- network ---


class MaskRCNN(nn.Module):
    """Backbone, pyramid, proposal network and heads; use it through the functions below, which take `variables`."""

    config: MaskRCNNConfig

    def setup(self) -> None:
        self.backbone = ResNet(self.config.features, self.config.blocks)
        self.fpn = FPN(self.config.channels)
        self.rpn = RPN(self.config.channels)
        self.box_head = BoxHead(self.config)
        self.mask_head = MaskHead(self.config)

    def __call__(self, x: Array) -> None:
        levels = self.features(x)
        self.rpn(levels["p2"])
        for head, cells in ((self.box_head, _BOX_CELLS), (self.mask_head, _MASK_CELLS)):
            head(jnp.zeros((1, cells, cells, self.config.channels), jnp.float32))

    def features(self, x: Array) -> dict[str, Array]:
        return self.fpn(self.backbone(x))

    def propose(self, levels: Pyramid) -> dict[str, tuple[Array, Array]]:
        return {name: self.rpn(x) for name, x in levels.items()}

    def boxes(self, x: Array) -> tuple[Array, Array]:
        return self.box_head(x)

    def masks(self, x: Array) -> Array:
        return self.mask_head(x)


# --- functions ---


def init(config: MaskRCNNConfig, *, key: Array) -> Variables:
    """Random variables {"params": …, "batch_stats": …}; their `jax.eval_shape` is the tree that converters fill."""
    return MaskRCNN(config).init(key, jnp.zeros((1, _DIVISOR, _DIVISOR, 3), jnp.float32))


def features(variables: Variables, image: Array, config: MaskRCNNConfig, size: ArrayLike | None = None) -> Pyramid:
    """Computes the feature pyramid of an image.

    Args:
      variables: as returned by `init` or converted from a checkpoint.
      image: float [H, W, 3], BGR, in [0, 255], of any size; or a canvas with the image in its upper left.
      config: sizes of the network.
      size: height and width of the image in the canvas, int [2]; default: the whole canvas.

    Returns:
      "p2" to "p6" of the canvas, padded to multiples of 32.

    Raises:
      ValueError: If the image has another shape or type.
    """
    _check(image)
    height, width = image.shape[:2]
    image_size = jnp.asarray((height, width) if size is None else size, jnp.int32)
    padding = ((0, -height % _DIVISOR), (0, -width % _DIVISOR), (0, 0))
    x = jnp.pad(image - np.array(PIXEL_MEAN, np.float32), padding)
    rows, columns = (jnp.arange(n) < m for n, m in zip(x.shape[:2], image_size, strict=True))
    x = jnp.where((rows[:, None] & columns)[..., None], x, 0)
    with _padded_by_zeros(image_size, (x.shape[0], x.shape[1])):
        levels: Any = MaskRCNN(config).apply(variables, x[None], method="features")
    return {name: levels[name][0] for name in STRIDES}


def rpn(
    variables: Variables, pyramid: Pyramid, config: MaskRCNNConfig, size: ArrayLike | None = None
) -> dict[str, tuple[Array, Array]]:
    """Applies the proposal network to every level.

    Args:
      variables: as returned by `init` or converted from a checkpoint.
      pyramid: as returned by `features`.
      config: sizes of the network.
      size: height and width of the image, int [2]; default: those of the padded canvas.

    Returns:
      For each level, logits [h, w, 3] and deltas [h, w, 12], four for each aspect ratio in turn.
    """
    height, width = pyramid["p2"].shape[:2]
    canvas = (height * STRIDES["p2"], width * STRIDES["p2"])
    with _padded_by_zeros(_size(pyramid["p2"], size), canvas):
        batched = {name: x[None] for name, x in pyramid.items()}
        outputs: Any = MaskRCNN(config).apply(variables, batched, method="propose")
    return {name: (logits[0], deltas[0]) for name, (logits, deltas) in outputs.items()}


def proposals(
    outputs: Mapping[str, tuple[Array, Array]], config: MaskRCNNConfig, size: ArrayLike | None = None
) -> Proposals:
    """Selects the boxes that are most likely to contain an object.

    Deltas are applied to the best anchors of every level, and the boxes clipped to the image. Boxes that overlap a
    better one of their level with an intersection over union above 0.7 are dropped, and the best of all levels kept.

    Args:
      outputs: as returned by `rpn`.
      config: sizes of the network.
      size: as for `rpn`.

    Returns:
      `config.proposals` boxes.
    """
    image_size = _size(outputs["p2"][0], size)
    parts = []
    for group, name in enumerate(STRIDES):
        logits, deltas = outputs[name]
        inside = _inside(logits.shape[:2], STRIDES[name], image_size)
        scores = jnp.where(inside[..., None], logits, -jnp.inf).reshape(-1)
        scores, indices = lax.top_k(scores, min(config.proposals, scores.size))
        boxes = decode(anchors(name, indices, logits.shape[1]), deltas.reshape(-1, 4)[indices])
        finite = jnp.all(jnp.isfinite(boxes), axis=-1) & jnp.isfinite(scores)
        boxes = clip(boxes, image_size)
        scores = jnp.where(finite & nonempty(boxes), scores, -jnp.inf)
        parts.append((boxes, scores, jnp.full(scores.shape, group)))
    boxes, scores, groups = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    kept, valid = suppress(boxes, scores, groups, _RPN_IOU, config.proposals)
    return Proposals(jnp.where(valid[:, None], boxes[kept], 0), jnp.where(valid, scores[kept], -jnp.inf), valid)


def box_head(
    variables: Variables, pyramid: Pyramid, boxes: Array, config: MaskRCNNConfig, size: ArrayLike | None = None
) -> tuple[Array, Array]:
    """Classifies boxes and refines them.

    Args:
      variables: as returned by `init` or converted from a checkpoint.
      pyramid: as returned by `features`.
      boxes: [B, 4] within the image.
      config: sizes of the network.
      size: as for `rpn`.

    Returns:
      Probabilities [B, num_classes + 1], the last for the background, and deltas [B, num_classes, 4], multiplied by
      (10, 10, 5, 5).
    """
    pooled = pool(pyramid, boxes, _BOX_CELLS, size)
    outputs: Any = MaskRCNN(config).apply(variables, pooled, method="boxes")
    logits, deltas = outputs
    return nn.softmax(logits), deltas.reshape(len(boxes), config.num_classes, 4)


def mask_head(
    variables: Variables,
    pyramid: Pyramid,
    boxes: Array,
    classes: Array,
    config: MaskRCNNConfig,
    size: ArrayLike | None = None,
) -> Array:
    """Predicts the masks of objects in boxes.

    Args:
      variables: as returned by `init` or converted from a checkpoint.
      pyramid: as returned by `features`.
      boxes: [B, 4] within the image.
      classes: int [B], class of the object in each box.
      config: sizes of the network.
      size: as for `rpn`.

    Returns:
      Probabilities [B, 28, 28].
    """
    pooled = pool(pyramid, boxes, _MASK_CELLS, size)
    logits: Any = MaskRCNN(config).apply(variables, pooled, method="masks")
    return nn.sigmoid(jnp.take_along_axis(logits, classes[:, None, None, None], axis=-1)[..., 0])


def detect(
    variables: Variables,
    image: Array,
    config: MaskRCNNConfig,
    *,
    size: ArrayLike | None = None,
    output_size: ArrayLike | None = None,
    score_threshold: ArrayLike = 0.1,
) -> Detections:
    """Finds objects in an image: Detectron2's inference, from the resized image to boxes in the original one.

    Of the boxes with a class probability above the threshold, those that overlap a more probable one of the same class
    with an intersection over union above 0.5 are dropped, and the most probable of all classes kept. Empty boxes are
    dropped before this. The reference drops them at the end, where they can displace others if there are more than
    `config.detections`.

    Args:
      variables: as returned by `init` or converted from a checkpoint.
      image: float [H, W, 3], BGR, in [0, 255], as returned by `preprocess`.
      config: sizes of the network.
      size: height and width of the image in the canvas, int [2]; default: the whole canvas.
      output_size: height and width of the image to which the boxes of the result refer, int [2]; default: `size`.
      score_threshold: least class probability. Detectron2's default is 0.05; the authors of SAM use 0.1.

    Returns:
      `config.detections` objects.

    Raises:
      ValueError: If the image has another shape or type.
    """
    _check(image)
    image_size = jnp.asarray(image.shape[:2] if size is None else size, jnp.int32)
    pyramid = features(variables, image, config, image_size)
    proposed = proposals(rpn(variables, pyramid, config, image_size), config, image_size)
    scores, deltas = box_head(variables, pyramid, proposed.boxes, config, image_size)
    boxes = decode(proposed.boxes[:, None], deltas / np.array(_BOX_WEIGHTS, np.float32))
    finite = jnp.all(jnp.isfinite(boxes), axis=(1, 2)) & jnp.all(jnp.isfinite(scores), axis=1)
    boxes, scores = clip(boxes, image_size), scores[:, :-1]
    eligible = (scores > score_threshold) & (finite & proposed.valid)[:, None] & nonempty(boxes)
    flat, classes = boxes.reshape(-1, 4), jnp.tile(jnp.arange(config.num_classes, dtype=jnp.int32), len(boxes))
    candidates = jnp.where(eligible, scores, -jnp.inf).reshape(-1)
    kept, valid = suppress(flat, candidates, classes, _BOX_IOU, config.detections)
    flat, classes = jnp.where(valid[:, None], flat[kept], 0), jnp.where(valid, classes[kept], 0)
    masks = mask_head(variables, pyramid, flat, classes, config, image_size)

    result_size = image_size if output_size is None else jnp.asarray(output_size, jnp.int32)
    scale = (result_size.astype(jnp.float32) / image_size.astype(jnp.float32))[::-1]
    flat = clip(flat * jnp.concatenate([scale, scale]), result_size)
    return Detections(flat, jnp.where(valid, candidates[kept], 0), classes, masks, valid & nonempty(flat))


def _paste(box: Array, mask: Array, height: int, width: int) -> Array:
    """One mask, resized to its box; bool [height, width]."""

    def matrix(low: Array, high: Array, pixels: int, cells: int) -> Array:
        at = (jnp.arange(pixels, dtype=jnp.float32) + 0.5 - low) / (high - low) * cells - 0.5
        return jnp.maximum(1 - jnp.abs(at[:, None] - jnp.arange(cells, dtype=jnp.float32)), 0)

    rows = matrix(box[1], box[3], height, mask.shape[0])
    columns = matrix(box[0], box[2], width, mask.shape[1])
    return jnp.einsum("yk,kl,xl->yx", rows, mask, columns, precision="highest") >= 0.5


def paste(detections: Detections, height: int, width: int) -> Array:
    """The pixels of objects: masks, resized bilinearly to their boxes, where they are at least 0.5.

    Args:
      detections: detections with boxes in an image of that size.
      height: height of the result.
      width: width of the result.

    Returns:
      Bool [D, H, W]; all False for invalid detections.
    """

    def one(detection: Detections) -> Array:
        return _paste(detection.boxes, detection.masks, height, width) & detection.valid

    return lax.map(one, detections)


def paint(detections: Detections, height: int, width: int) -> Array:
    """Class labels of pixels: the class of the object at each pixel, the least probable where they overlap, or 0.

    Args:
      detections: detections with boxes in an image of that size.
      height: height of the result.
      width: width of the result.

    Returns:
      int32 [H, W]; class 0 and no object look the same.
    """

    def add(labels: Array, detection: Detections) -> tuple[Array, None]:
        pixels = _paste(detection.boxes, detection.masks, height, width) & detection.valid
        return jnp.where(pixels, detection.classes, labels), None

    return lax.scan(add, jnp.zeros((height, width), jnp.int32), detections)[0]


# --- images ---


def resized(height: int, width: int) -> tuple[int, int]:
    """Height and width to which Detectron2 resizes an image: the shorter side is 800, the longer at most 1333."""
    scale = _SHORTEST / min(height, width)
    sides = [float(_SHORTEST) if side == min(height, width) else scale * side for side in (height, width)]
    if max(sides) > _LONGEST:
        sides = [side * (_LONGEST / max(sides)) for side in sides]
    return int(sides[0] + 0.5), int(sides[1] + 0.5)


def preprocess(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes and pads an image as Detectron2 does, with Pillow's bilinear filter on uint8.

    Args:
      image: uint8 [H, W, 3], BGR.

    Returns:
      A canvas for `detect`, float32 [h, w, 3] with h and w multiples of 32, and height and width of the image in it.

    Raises:
      ValueError: If the image has another shape or type.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected a uint8 array [H, W, 3], not {image.dtype} {list(image.shape)}")
    height, width = resized(image.shape[0], image.shape[1])
    resized_image = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR)
    padding = ((0, -height % _DIVISOR), (0, -width % _DIVISOR), (0, 0))
    return np.pad(np.asarray(resized_image, np.float32), padding), (height, width)


def _check(image: Array) -> None:
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"the image must be [H, W, 3], not {list(image.shape)}")
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"the image must be floating point in [0, 255], not {image.dtype}")
