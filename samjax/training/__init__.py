"""Training of an encoder and an invertibility predictor for a generator, and making the predictor's data.

The three steps are functions of their options, and can be interrupted and resumed: `train_encoder`, `invert_directory`
and `train_predictor`. `experiments/` has a program for each.
"""

from samjax.training.inversions import DirectoryOptions, DirectoryResult, invert_directory
from samjax.training.loop import ProcessOptions
from samjax.training.recipes import EncoderOptions, PredictorOptions, train_encoder, train_predictor

__all__ = [
    "DirectoryOptions",
    "DirectoryResult",
    "EncoderOptions",
    "PredictorOptions",
    "ProcessOptions",
    "invert_directory",
    "train_encoder",
    "train_predictor",
]
