"""What `compare_pytorch.py` and the process that runs the authors' script agree on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

TERMS = ("mse", "lpips", "mvg", "delta", "f_rec")
"""The loss terms that the process records, in order."""

NETS = (
    "stylegan3", "encoder4editing", "pytorch-deeplab-xception", "semantic-segmentation-pytorch", "face-parsing.PyTorch"
)  # fmt: skip
"""Submodules of the authors' checkout, in `src/nets`."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run; stored as a JSON object of strings and numbers.

    Attributes:
      reference: checkout of adobe-research/sam_inversion with its submodules.
      detectron2: checkout of detectron2; None if it is installed or not needed.
      category: "cars", "faces" or "cats".
      weights: paths of the category's files, by the names their authors gave them.
      vgg: .npz file with `NAME.weight` [O, I, k, k] and `NAME.bias` of VGG16's convolutions, in the order of the names.
      image: PNG file of exactly the category's size.
      height, width: the category's size.
      direction: .npy file of the direction to edit along.
      threshold: mean error up to which a segment may use a layer; None for `reference_sam.balanced_threshold`.
      steps: number of optimization steps.
      lr_rampup_length, lr_rampdown_length: as in `samjax.config.InversionConfig`.
      threads: number of threads of PyTorch.
      seed: seed of the samples for the prior.
      folder: working directory; the results are `output.npz` and `seconds.json` in it.
    """

    reference: str
    detectron2: str | None
    category: str
    weights: Mapping[str, str]
    vgg: str
    image: str
    height: int
    width: int
    direction: str
    threshold: float | None
    steps: int
    lr_rampup_length: float
    lr_rampdown_length: float
    threads: int
    seed: int
    folder: str
