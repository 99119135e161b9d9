"""Mask R-CNN (He et al., ICCV 2017) on a feature pyramid (Lin et al., "Feature Pyramid Networks for Object Detection",
CVPR 2017): the instance branch of Detectron2's panoptic FPN with ResNet-101, with the same numbers.

A picture goes through five stages: `features`, `rpn`, `proposals`, `box_head`, `mask_head`. `detect` runs them all, on
one picture; `jax.vmap` runs any of them on many of one size. Every shape is static: there are always as many proposals
and detections as the config says, and a mask tells which count.

Pictures are [H, W, 3], BGR, in [0, 255]; boxes are (x0, y0, x1, y1) in pixels, edges rather than centres of pixels.
A picture may lie in the upper left of a larger canvas, with its own `size` beside it, so that pictures of many sizes
share a compilation. The reference pads a picture with zeros to the next multiple of 32, and so does every stage here:
what lies outside of that is neither looked at nor found, whatever the canvas.

Batch normalisation is frozen: it always uses the statistics of the file. Convolutions follow JAX's own precision (see
`samjax.nets.lpips`); interpolation has full float32 everywhere.
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
"""Feature maps [ceil(H / s), ceil(W / s), C] of a canvas, by name: p2 (stride s = 4) to p6 (s = 64)."""

STRIDES: Mapping[str, int] = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
PIXEL_MEAN = (103.53, 116.28, 123.675)  # blue, green, red
ANCHOR_SIZES: Mapping[str, int] = {"p2": 32, "p3": 64, "p4": 128, "p5": 256, "p6": 512}
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height over width

_DIVISOR = 32  # the reference pads pictures to multiples of this
_RPN_IOU, _BOX_IOU = 0.7, 0.5  # boxes that overlap more with a better one are dropped
_BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # by which the box head's targets were multiplied in training
_MAX_LOG_SCALE = math.log(1000 / 16)  # boxes grow by no more than this
_BOX_CELLS, _MASK_CELLS = 7, 14  # a side of what the heads see of a box
_AT_ONCE = 50  # boxes pooled together, which bounds memory
_SHORTEST, _LONGEST = 800, 1333  # sides to which the predictor resizes


@dataclasses.dataclass(frozen=True)
class MaskRCNNConfig:
    """Sizes of the network; the defaults are those of `COCO-PanopticSegmentation/panoptic_fpn_R_101_3x`.

    Attributes:
      num_classes: of things; the background is not among them.
      features: of the ResNet's first convolution; all its widths are multiples of it.
      blocks: of each of the ResNet's four stages.
      channels: of the pyramid, the proposal network and the mask head.
      hidden: entries of the box head's two layers.
      proposals: kept of each level before suppression, and of all levels together after it.
      detections: at most, in a picture.
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
    """Where something may be, the likeliest first: boxes [P, 4], scores [P] (logits), and which of them count [P]."""

    boxes: Array
    scores: Array
    valid: Array


class Detections(NamedTuple):
    """What was found, the surest first.

    Attributes:
      boxes: [D, 4] in pixels.
      scores: [D] probabilities.
      classes: [D] int32, 0 to num_classes - 1.
      masks: [D, 28, 28], how probably each cell of the box is of the thing.
      valid: [D] bool, which of them count; not only at the end may there be some that do not.
    """

    boxes: Array
    scores: Array
    classes: Array
    masks: Array
    valid: Array


# --- operations ---


def _inside(cells: Sequence[int], stride: int, size: Array) -> Array:
    """Which cells of a map are there in the reference too, for a picture of `size`; bool [h, w]."""
    rows, columns = (jnp.arange(n) * stride < e for n, e in zip(cells, _extent(size), strict=True))
    return rows[:, None] & columns


def _extent(size: Array) -> Array:
    """Height and width to which the reference pads a picture."""
    return -(-size // _DIVISOR) * _DIVISOR


def _padded_by_zeros(size: Array, canvas: tuple[int, int]) -> Any:
    """A context in which convolutions see zeros outside of a picture of `size`, as if the canvas ended with it."""

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if not isinstance(module, nn.Conv) or module.kernel_size == (1, 1):
            return call(*args, **kwargs)
        x = args[0]
        stride = 1 << (-(-canvas[0] // x.shape[1]) - 1).bit_length()  # p6 rounds up, so that division is not enough
        return call(jnp.where(_inside(x.shape[1:3], stride, size)[..., None], x, 0), **kwargs)

    return nn.intercept_methods(intercept)


def anchors(level: str, indices: Array, columns: int) -> Array:
    """The boxes from which the proposal network starts.

    Args:
      level: of the pyramid.
      indices: [N] into the level's rows x columns x 3 aspect ratios.
      columns: of the level.

    Returns:
      [N, 4], each centred on the upper left corner of its cell.
    """
    place, ratio = indices // len(ASPECT_RATIOS), indices % len(ASPECT_RATIOS)
    corner = jnp.stack([place % columns, place // columns] * 2, axis=-1) * STRIDES[level]
    return corner.astype(jnp.float32) + jnp.asarray(cell_anchors(level))[ratio]


def cell_anchors(level: str) -> np.ndarray:
    """The three anchors of a cell about its corner: equal areas, `ASPECT_RATIOS`; float32 [3, 4]."""
    ratios = np.array(ASPECT_RATIOS)
    widths = np.sqrt(ANCHOR_SIZES[level] ** 2 / ratios)
    half = np.stack([widths, ratios * widths], axis=1) / 2
    return np.concatenate([-half, half], axis=1).astype(np.float32)


def decode(boxes: Array, deltas: Array) -> Array:
    """Boxes moved and scaled as the network says: by (dx, dy) times their size, and by e^(dw, dh), at most 62.5.

    Args:
      boxes: [..., 4].
      deltas: [..., 4].

    Returns:
      [..., 4].
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    centre = low + 0.5 * (high - low) + deltas[..., :2] * (high - low)
    half = 0.5 * jnp.exp(jnp.minimum(deltas[..., 2:], _MAX_LOG_SCALE)) * (high - low)
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def clip(boxes: Array, size: Array) -> Array:
    """Boxes [..., 4] cut to a picture of height and width `size`."""
    limit = size[::-1].astype(jnp.float32)
    return jnp.clip(boxes, 0, jnp.concatenate([limit, limit]))


def nonempty(boxes: Array) -> Array:
    """Which boxes [..., 4] have an area."""
    return jnp.all(boxes[..., 2:] > boxes[..., :2], axis=-1)


def suppress(boxes: Array, scores: Array, groups: Array, iou: float, count: int) -> tuple[Array, Array]:
    """Greedy non-maximum suppression: the best box, then the best of those that do not overlap it, and so on.

    As many steps as boxes are asked for, each over all candidates, so that nothing is sorted and no number of
    candidates is too large. Of equal scores the first comes first.

    Args:
      boxes: [N, 4].
      scores: [N]; -inf for those not to be taken.
      groups: [N] integers; only boxes of one group suppress each other.
      iou: those are suppressed whose intersection over union with one taken is larger.
      count: how many to take.

    Returns:
      Indices [count] of those taken, the best first, and whether there were as many [count].
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides[:, 0] * sides[:, 1]

    def take(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        best = jnp.argmax(left)
        common = jnp.minimum(boxes[:, 2:], boxes[best, 2:]) - jnp.maximum(boxes[:, :2], boxes[best, :2])
        common = jnp.maximum(common, 0)
        area = common[:, 0] * common[:, 1]
        gone = (area / (areas + areas[best] - area) > iou) & (groups == groups[best])
        return jnp.where(gone, -jnp.inf, left).at[best].set(-jnp.inf), (best, left[best] > -jnp.inf)

    return lax.scan(take, scores, None, length=count)[1]


def pool(pyramid: Pyramid, boxes: Array, cells: int, size: ArrayLike | None = None) -> Array:
    """What lies within boxes, brought to one size: ROIAlign (He et al.) with the conventions of Detectron2's V2.

    A box is taken from the level that suits its area. Each of the `cells` x `cells` parts of it is the mean of a grid
    of bilinear samples, ceil(side / cells) of them along a side measured in the level's cells. That number differs
    from box to box, but the mean is linear in the features: it is a matrix over the rows that the box covers, times
    the features, times a matrix over its columns. And what a box covers is bounded: in the lower levels by its area,
    whatever its proportions, in the last by the level itself. So every box is a product of static size, with the same
    result.

    Args:
      pyramid: of one picture.
      boxes: [B, 4] within the picture.
      cells: a side of the result.
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
    # Below the last level a box has an area of up to 28 x 28 cells; samples over a side n use fewer than n + 3 cells.
    covered = max(
        int(heights[3] * widths[3]),
        *(rows * (width if rows < 4 else min(width, 785 // (rows - 3) + 3)) for rows in range(1, height + 1)),
    )

    def matrix(low: Array, high: Array, limit: Array, slots: int) -> tuple[Array, Array, Array]:
        """Weights [cells, slots] of the level's cells from the first covered one on, that one, and their number."""
        side = high - low
        steps = jnp.arange(-(-slots // cells), dtype=jnp.float32)
        samples = jnp.sum(side > cells * steps).astype(jnp.float32)  # a compiled division would not be exact
        some = jnp.maximum(samples, 1)
        at = low + (jnp.arange(cells, dtype=jnp.float32)[:, None] + (steps + 0.5) / some) * (side / cells)
        at = jnp.clip(at, 0, limit - 1)
        first, last = (jnp.floor(jnp.clip(end, 0, limit - 1)) for end in (low, high))
        away = jnp.abs(at[:, None] - (first + jnp.arange(slots, dtype=jnp.float32))[:, None])  # [cells, slots, steps]
        weights = jnp.sum(jnp.where(steps < samples, jnp.maximum(1 - away, 0), 0), axis=-1) / some
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
        seen = jnp.take(flat, index, axis=0, mode="clip")
        # Beyond the box's last row there is no weight.
        by_row, by_column = (
            jnp.take(m, i, axis=1, mode="fill", fill_value=0) for m, i in ((by_row, row), (by_column, column))
        )
        weights = (by_row[:, None] * by_column).reshape(cells * cells, covered)
        return jnp.matmul(weights, seen, precision="highest").reshape(cells, cells, -1)

    return lax.map(one, boxes, batch_size=_AT_ONCE)


def _size(p2: Array, size: ArrayLike | None) -> Array:
    """Height and width of a picture, from its largest map if it is the whole canvas; int32 [2]."""
    whole = (p2.shape[0] * STRIDES["p2"], p2.shape[1] * STRIDES["p2"])
    return jnp.asarray(whole if size is None else size, jnp.int32)


# --- networks ---


class ResNet(nn.Module):
    """ResNet with bottlenecks as Caffe has it; its outputs at 1/4, 1/8, 1/16 and 1/32 of the size."""

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
    """Feature pyramid: every level's own features and those of all coarser levels, added up; p2 to p6."""

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
    """Region proposal network (Ren et al., NeurIPS 2015): logits [..., 3] and deltas [..., 12] of cells' anchors."""

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = nn.relu(conv(self.channels, bias=True, name="conv")(x))
        count = len(ASPECT_RATIOS)
        logits = conv(count, 1, bias=True, name="objectness_logits")(x)
        return logits, conv(4 * count, 1, bias=True, name="anchor_deltas")(x)


class BoxHead(nn.Module):
    """Logits of the classes and of the background, [B, num_classes + 1], and deltas [B, 4 num_classes]."""

    config: MaskRCNNConfig

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.config.hidden, name="fc1")(x))
        x = nn.relu(nn.Dense(self.config.hidden, name="fc2")(x))
        classes = self.config.num_classes
        return nn.Dense(classes + 1, name="cls_score")(x), nn.Dense(4 * classes, name="bbox_pred")(x)


class MaskHead(nn.Module):
    """Logits of each class's mask, [B, 2h, 2w, num_classes]."""

    config: MaskRCNNConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(1, 5):
            x = nn.relu(conv(self.config.channels, bias=True, name=f"mask_fcn{i}")(x))
        # `transpose_kernel` makes it PyTorch's: the gradient of a convolution.
        deconv = nn.ConvTranspose(
            self.config.channels, (2, 2), (2, 2), padding="VALID", transpose_kernel=True, name="deconv"
        )
        return conv(self.config.num_classes, 1, bias=True, name="predictor")(nn.relu(deconv(x)))


class MaskRCNN(nn.Module):
    """All parts; use it through the functions below, which take `variables`."""

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


# --- stages ---


def init(config: MaskRCNNConfig, *, key: Array) -> Variables:
    """Random variables, {"params": …, "batch_stats": …}; `jax.eval_shape` of it is the tree that converters fill."""
    return MaskRCNN(config).init(key, jnp.zeros((1, _DIVISOR, _DIVISOR, 3), jnp.float32))


def features(variables: Variables, image: Array, config: MaskRCNNConfig, size: ArrayLike | None = None) -> Pyramid:
    """The feature pyramid of a picture.

    Args:
      variables: as `init` describes them.
      image: [H, W, 3] floats, BGR, in [0, 255]; of any size, or a canvas with the picture in its upper left.
      config: the network's.
      size: height and width of the picture in the canvas, int [2]; the whole canvas if None.

    Returns:
      "p2" to "p6" of the canvas, filled up to multiples of 32.

    Raises:
      ValueError: an image of another shape or kind.
    """
    _check(image)
    height, width = image.shape[:2]
    whole = jnp.asarray((height, width) if size is None else size, jnp.int32)
    fill = ((0, -height % _DIVISOR), (0, -width % _DIVISOR), (0, 0))
    x = jnp.pad(image - np.array(PIXEL_MEAN, np.float32), fill)
    rows, columns = (jnp.arange(n) < m for n, m in zip(x.shape[:2], whole, strict=True))
    x = jnp.where((rows[:, None] & columns)[..., None], x, 0)
    with _padded_by_zeros(whole, (x.shape[0], x.shape[1])):
        levels: Any = MaskRCNN(config).apply(variables, x[None], method="features")
    return {name: levels[name][0] for name in STRIDES}


def rpn(
    variables: Variables, pyramid: Pyramid, config: MaskRCNNConfig, size: ArrayLike | None = None
) -> dict[str, tuple[Array, Array]]:
    """What the proposal network says of each anchor.

    Args:
      variables: as `init` describes them.
      pyramid: as `features` gives it.
      config: the network's.
      size: height and width of the picture, int [2]; if None those of the canvas, filled up as it is.

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
    """Where something may be.

    The best anchors of every level are moved as their deltas say and cut to the picture; those that overlap a better
    one of their level by more than 0.7 are dropped, and the best of all levels are kept.

    Args:
      outputs: as `rpn` gives them.
      config: the network's.
      size: as for `rpn`.

    Returns:
      `config.proposals` of them.
    """
    whole = _size(outputs["p2"][0], size)
    parts = []
    for group, name in enumerate(STRIDES):
        logits, deltas = outputs[name]
        there = _inside(logits.shape[:2], STRIDES[name], whole)
        scores = jnp.where(there[..., None], logits, -jnp.inf).reshape(-1)
        scores, indices = lax.top_k(scores, min(config.proposals, scores.size))
        boxes = decode(anchors(name, indices, logits.shape[1]), deltas.reshape(-1, 4)[indices])
        finite = jnp.all(jnp.isfinite(boxes), axis=-1) & jnp.isfinite(scores)
        boxes = clip(boxes, whole)
        scores = jnp.where(finite & nonempty(boxes), scores, -jnp.inf)
        parts.append((boxes, scores, jnp.full(scores.shape, group)))
    boxes, scores, groups = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    kept, valid = suppress(boxes, scores, groups, _RPN_IOU, config.proposals)
    return Proposals(jnp.where(valid[:, None], boxes[kept], 0), jnp.where(valid, scores[kept], -jnp.inf), valid)


def box_head(
    variables: Variables, pyramid: Pyramid, boxes: Array, config: MaskRCNNConfig, size: ArrayLike | None = None
) -> tuple[Array, Array]:
    """What is in boxes, and where more exactly.

    Args:
      variables: as `init` describes them.
      pyramid: as `features` gives it.
      boxes: [B, 4] within the picture.
      config: the network's.
      size: as for `rpn`.

    Returns:
      Probabilities [B, num_classes + 1], the last of which is that of the background, and deltas [B, num_classes, 4],
      multiplied by (10, 10, 5, 5).
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
    """Which part of boxes is of the thing.

    Args:
      variables: as `init` describes them.
      pyramid: as `features` gives it.
      boxes: [B, 4] within the picture.
      classes: [B] integers, what the thing in each box is.
      config: the network's.
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
    """Finds things in a picture: Detectron2's inference, from the resized picture to boxes in the original one.

    Of the boxes that are of a class with a probability above the threshold, those are dropped that overlap a surer
    one of the class by more than 0.5; the surest of all classes are kept. Boxes without area are dropped at once: the
    reference does so at the end, so that they may take the places of others where more than `config.detections` are
    found.

    Args:
      variables: as `init` describes them.
      image: [H, W, 3] floats, BGR, in [0, 255], as `preprocess` gives it.
      config: the network's.
      size: height and width of the picture in the canvas, int [2]; the whole canvas if None.
      output_size: height and width of the picture that the boxes are to be of, int [2]; `size` if None.
      score_threshold: see above. The reference has 0.05 where nothing is said, and SAM's authors 0.1.

    Returns:
      `config.detections` of them.

    Raises:
      ValueError: an image of another shape or kind.
    """
    _check(image)
    whole = jnp.asarray(image.shape[:2] if size is None else size, jnp.int32)
    pyramid = features(variables, image, config, whole)
    proposed = proposals(rpn(variables, pyramid, config, whole), config, whole)
    scores, deltas = box_head(variables, pyramid, proposed.boxes, config, whole)
    boxes = decode(proposed.boxes[:, None], deltas / np.array(_BOX_WEIGHTS, np.float32))
    finite = jnp.all(jnp.isfinite(boxes), axis=(1, 2)) & jnp.all(jnp.isfinite(scores), axis=1)
    boxes, scores = clip(boxes, whole), scores[:, :-1]
    taken = (scores > score_threshold) & (finite & proposed.valid)[:, None] & nonempty(boxes)
    flat, classes = boxes.reshape(-1, 4), jnp.tile(jnp.arange(config.num_classes, dtype=jnp.int32), len(boxes))
    candidates = jnp.where(taken, scores, -jnp.inf).reshape(-1)
    kept, valid = suppress(flat, candidates, classes, _BOX_IOU, config.detections)
    flat, classes = jnp.where(valid[:, None], flat[kept], 0), jnp.where(valid, classes[kept], 0)
    masks = mask_head(variables, pyramid, flat, classes, config, whole)

    target = whole if output_size is None else jnp.asarray(output_size, jnp.int32)
    scale = (target.astype(jnp.float32) / whole.astype(jnp.float32))[::-1]
    flat = clip(flat * jnp.concatenate([scale, scale]), target)
    return Detections(flat, jnp.where(valid, candidates[kept], 0), classes, masks, valid & nonempty(flat))


def _paste(box: Array, mask: Array, height: int, width: int) -> Array:
    def matrix(low: Array, high: Array, pixels: int, cells: int) -> Array:
        at = (jnp.arange(pixels, dtype=jnp.float32) + 0.5 - low) / (high - low) * cells - 0.5
        return jnp.maximum(1 - jnp.abs(at[:, None] - jnp.arange(cells, dtype=jnp.float32)), 0)

    rows = matrix(box[1], box[3], height, mask.shape[0])
    columns = matrix(box[0], box[2], width, mask.shape[1])
    return jnp.einsum("yk,kl,xl->yx", rows, mask, columns, precision="highest") >= 0.5


def paste(detections: Detections, height: int, width: int) -> Array:
    """The things' pixels: masks brought to their boxes bilinearly, where they are at least 0.5.

    Args:
      detections: whose boxes are of a picture of that size.
      height: rows of the result.
      width: columns of the result.

    Returns:
      Bool [D, H, W], all False for what does not count.
    """

    def one(detection: Detections) -> Array:
        return _paste(detection.boxes, detection.masks, height, width) & detection.valid

    return lax.map(one, detections)


def paint(detections: Detections, height: int, width: int) -> Array:
    """Classes of pixels: every thing's class at its pixels, less sure things over surer ones, and 0 elsewhere.

    Args:
      detections: whose boxes are of a picture of that size.
      height: rows of the result.
      width: columns of the result.

    Returns:
      int32 [H, W]. The first class cannot be told from nothing.
    """

    def add(labels: Array, detection: Detections) -> tuple[Array, None]:
        there = _paste(detection.boxes, detection.masks, height, width) & detection.valid
        return jnp.where(there, detection.classes, labels), None

    return lax.scan(add, jnp.zeros((height, width), jnp.int32), detections)[0]


# --- pictures ---


def resized(height: int, width: int) -> tuple[int, int]:
    """Height and width to which the predictor brings a picture: the shorter side 800, the longer at most 1333."""
    scale = _SHORTEST / min(height, width)
    sides = [float(_SHORTEST) if side == min(height, width) else scale * side for side in (height, width)]
    if max(sides) > _LONGEST:
        sides = [side * (_LONGEST / max(sides)) for side in sides]
    return int(sides[0] + 0.5), int(sides[1] + 0.5)


def preprocess(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """What Detectron2's predictor does to a picture: Pillow's bilinear resizing, on uint8.

    Args:
      image: uint8 [H, W, 3], BGR.

    Returns:
      A canvas for `detect`, float32 with sides that are multiples of 32, and height and width of the picture in it.

    Raises:
      ValueError: an image of another shape or kind.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected a uint8 array [H, W, 3], not {image.dtype} {list(image.shape)}")
    height, width = resized(image.shape[0], image.shape[1])
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR)
    fill = ((0, -height % _DIVISOR), (0, -width % _DIVISOR), (0, 0))
    return np.pad(np.asarray(picture, np.float32), fill), (height, width)


def _check(image: Array) -> None:
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"the image must be [H, W, 3], not {list(image.shape)}")
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"the image must be floating point in [0, 255], not {image.dtype}")
