"""The ADE20K segmenter from CSAIL's two PyTorch files, `encoder_epoch_20.pth` and `decoder_epoch_20.pth`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_convert import tables
from samjax.errors import UserError
from samjax.io.arrays import Stored
from samjax.nets.ade20k import ADE20KConfig

# Names by which the two files are recognized.
_ENCODER = {"conv1.weight", "conv2.weight", "conv3.weight", "layer4.0.conv1.weight"}
_DECODER = {"ppm.0.1.weight", "conv_last.0.weight", "conv_last.4.weight"}


def _find(objects: Sequence[Any]) -> dict[str, Stored] | None:
    states = [state for state in map(tables.state_dict, objects) if state is not None]
    encoders = [state for state in states if state.keys() >= _ENCODER]
    decoders = [state for state in states if state.keys() >= _DECODER]
    if not encoders and not decoders:
        return None
    if not len(encoders) == len(decoders) == 1 or len(objects) != 2:
        raise UserError(
            f"the ADE20K segmenter is an encoder and a decoder, and these {len(objects)} files have"
            f" {len(encoders)} and {len(decoders)}: give both, encoder_epoch_20.pth and decoder_epoch_20.pth, alone"
        )
    found = {f"encoder.{name}": array for name, array in encoders[0].items()}
    return found | {f"decoder.{name}": array for name, array in decoders[0].items()}


def _config(arrays: Mapping[str, Stored]) -> ADE20KConfig:
    def outputs(name: str) -> int:
        shape = arrays[name].shape if name in arrays else ()
        if len(shape) != 4:
            raise UserError(f"no ADE20K segmenter in the files: {name} is not a convolution")
        return shape[0]

    blocks = []
    for stage in range(1, 5):
        count = 0
        while f"encoder.layer{stage}.{count}.conv1.weight" in arrays:
            count += 1
        blocks.append(count)
    try:
        return ADE20KConfig(outputs("decoder.conv_last.4.weight"), outputs("encoder.conv1.weight"), tuple(blocks))
    except ValueError as error:
        raise UserError(f"no ADE20K segmenter in the files: {error}") from error


NETWORK = tables.Network(
    name="ade20k",
    format="ADE20K segmenter (dilated ResNet, pyramid pooling) in the layout of CSAIL's semantic-segmentation-pytorch",
    licence="BSD-3-Clause (MIT CSAIL); trained on ADE20K, whose images are for non-commercial research and education",
    rows=tables.torch_rows(
        (r"decoder/ppm(\d)_conv", "decoder.ppm.{}.1"),
        (r"decoder/ppm(\d)_bn", "decoder.ppm.{}.2"),
        (r"decoder/conv", "decoder.conv_last.0"),
        (r"decoder/bn", "decoder.conv_last.1"),
        (r"decoder/classifier", "decoder.conv_last.4"),
        *tables.RESNET,
    ),
    find=_find,
    config=_config,
    # Buffers of synchronized batch normalization, the classifier of the ResNet, and the heads for deep supervision.
    ignored=r".*\.(num_batches_tracked|_tmp_running_mean|_tmp_running_var|_running_iter)"
    r"|encoder\.fc\..*|decoder\.(cbr|conv_last)_deepsup\..*",
)
