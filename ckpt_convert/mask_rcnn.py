"""Mask R-CNN from Detectron2's files: `model_final_*.pkl` of its model zoo, and `.pth` of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_convert import tables
from ckpt_convert.tables import Layout, Row, torch_rows
from samjax.errors import UserError
from samjax.io.arrays import Stored
from samjax.nets import mask_rcnn
from samjax.nets.mask_rcnn import MaskRCNNConfig

# The input of the box head's first layer is 7 x 7 cells, channels first in Detectron2 and last in samjax.
FIRST_DENSE = Layout(
    lambda a: a.reshape(a.shape[0], -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
    lambda a: a.reshape(7, 7, -1, a.shape[1]).transpose(3, 2, 0, 1).reshape(a.shape[1], -1),
)

# Constants of the network, which a file may hold: they are compared with samjax's.
_PIXELS = {"pixel_mean": mask_rcnn.PIXEL_MEAN, "pixel_std": (1.0, 1.0, 1.0)}
_ANCHORS = "proposal_generator.anchor_generator.cell_anchors"
_HEADS = ("proposal_generator.rpn_head.conv.weight", "roi_heads.mask_head.predictor.weight")


def _find(objects: Sequence[Any]) -> dict[str, Stored] | None:
    held = [found.get("model", found) if isinstance(found, dict) else None for found in objects]
    states = [state for state in map(tables.state_dict, held) if state is not None]
    states = [state for state in states if any(name in state for name in _HEADS)]
    if not states:
        return None
    if len(objects) != 1:
        raise UserError(f"Mask R-CNN is one file, and these are {len(objects)}: give model_final_….pkl alone")
    for name in _HEADS:
        if name not in states[0]:
            raise UserError(
                f"it is a detector of Detectron2, but not Mask R-CNN ({name} is missing): take the file of"
                " COCO-PanopticSegmentation/panoptic_fpn_R_101_3x"
            )
    _check_constants(states[0])
    return states[0]


def _check_constants(arrays: Mapping[str, Stored]) -> None:
    expected = {name: np.array(values)[:, None, None] for name, values in _PIXELS.items()}
    expected |= {f"{_ANCHORS}.{i}": mask_rcnn.cell_anchors(name) for i, name in enumerate(mask_rcnn.STRIDES)}
    for name, values in expected.items():
        if name not in arrays:
            continue
        if arrays[name].shape != values.shape or not np.allclose(
            tables.as_float(arrays[name].array(), name), values, rtol=0, atol=1e-3
        ):
            raise UserError(
                f"{name} is not {np.ravel(values).round(3).tolist()}, the only one that samjax's Mask R-CNN has:"
                " take the file of COCO-PanopticSegmentation/panoptic_fpn_R_101_3x"
            )


def _config(arrays: Mapping[str, Stored]) -> MaskRCNNConfig:
    def outputs(name: str, axes: int) -> int:
        held = arrays.get(f"{name}.weight")
        if held is None or len(held.shape) != axes:
            raise UserError(f"the file is not a Mask R-CNN on a ResNet: no layer {name}")
        return held.shape[0]

    blocks = []
    for stage in range(2, 6):
        count = 0
        while f"backbone.bottom_up.res{stage}.{count}.conv1.weight" in arrays:
            count += 1
        blocks.append(count)
    try:
        return MaskRCNNConfig(
            num_classes=outputs("roi_heads.mask_head.predictor", 4),
            features=outputs("backbone.bottom_up.stem.conv1", 4),
            blocks=tuple(blocks),
            channels=outputs("backbone.fpn_output2", 4),
            hidden=outputs("roi_heads.box_head.fc1", 2),
        )
    except ValueError as error:
        raise UserError(f"the file is not a Mask R-CNN on a ResNet: {error}") from error


NETWORK = tables.Network(
    name="mask_rcnn",
    format="Detectron2",
    licence="CC BY-SA 3.0, as Detectron2 states for its model zoo; a network of your own is under the terms you set",
    rows=(
        Row("params/box_head/fc1/kernel", lambda: "roi_heads.box_head.fc1.weight", FIRST_DENSE),
        *torch_rows(
            (r"backbone/stem_conv", "backbone.bottom_up.stem.conv1"),
            (r"backbone/stem_bn", "backbone.bottom_up.stem.conv1.norm"),
            (r"backbone/res(\d)_(\d+)/downsample_conv", "backbone.bottom_up.res{}.{}.shortcut"),
            (r"backbone/res(\d)_(\d+)/downsample_bn", "backbone.bottom_up.res{}.{}.shortcut.norm"),
            (r"backbone/res(\d)_(\d+)/conv(\d)", "backbone.bottom_up.res{}.{}.conv{}"),
            (r"backbone/res(\d)_(\d+)/bn(\d)", "backbone.bottom_up.res{}.{}.conv{}.norm"),
            (r"fpn/(\w+)", "backbone.fpn_{}"),
            (r"rpn/(\w+)", "proposal_generator.rpn_head.{}"),
            (r"box_head/(cls_score|bbox_pred)", "roi_heads.box_predictor.{}"),
            (r"(box_head|mask_head)/(\w+)", "roi_heads.{}.{}"),
        ),
    ),
    find=_find,
    config=_config,
    # The semantic head, and the constants that `find` compares.
    ignored=r"sem_seg_head\..*|pixel_mean|pixel_std|proposal_generator\.anchor_generator\..*|.*\.num_batches_tracked",
)
