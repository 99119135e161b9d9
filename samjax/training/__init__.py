"""Training of an encoder, an offset encoder and an invertibility predictor for a generator, and the predictor's data.

The steps are functions of their options, and can be interrupted and resumed: `train_encoder`, `train_offsets`,
`invert_directory` and `train_predictor`. `experiments/` has a program for each.
"""

from samjax.training.inversions import DirectoryOptions, DirectoryResult, invert_directory
from samjax.training.loop import ProcessOptions
from samjax.training.recipes import (
    EncoderOptions,
    OffsetOptions,
    PredictorOptions,
    train_encoder,
    train_offsets,
    train_predictor,
)

__all__ = [
    "DirectoryOptions",
    "DirectoryResult",
    "EncoderOptions",
    "OffsetOptions",
    "PredictorOptions",
    "ProcessOptions",
    "invert_directory",
    "train_encoder",
    "train_offsets",
    "train_predictor",
]
