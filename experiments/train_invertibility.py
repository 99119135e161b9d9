"""Trains an invertibility predictor on the output of `invert_folder.py`, or of the authors' `single_latent_inv.py`.

    python experiments/train_invertibility.py --dataset_folder_train data/train --dataset_folder_val data/val \\
        --output_folder output/predictor

Writes to OUTPUT_FOLDER: `predictor/`, the predictor with the lowest validation loss, which `--inv_model_path` of the
other programs takes; `checkpoints/`, metrics.jsonl, `tensorboard/`, curve.png, and for each validation a figure of true
and predicted maps. After an interruption, even a kill, the same command resumes the run, with the same result as
without the interruption.

The predictor of the demo (`--preset small --image_category demo --cache_targets --batch_size 8 --lr 2e-3
--num_steps 1200`) takes 25 minutes on two CPU cores. Batches are divided over all devices. Several machines train
together if the command runs on each with --coordinator HOST:PORT --num_processes N --process_id I (or, on a TPU pod,
with --distributed).
"""

from __future__ import annotations

import dataclasses

import jax

from ckpt_convert import get
from samjax import cli, runtime
from samjax.config import CLASSICAL_SEGMENTERS, segmenter_category
from samjax.training import PredictorOptions, ProcessOptions, train_predictor


@dataclasses.dataclass(frozen=True)
class Arguments(ProcessOptions, PredictorOptions):
    pass


def main(args: Arguments) -> None:
    args.check()
    runtime.connect(args.distributed, args.coordinator, args.num_processes, args.process_id)
    segmenter = args.segmenter_name()
    if segmenter not in CLASSICAL_SEGMENTERS and jax.process_index() == 0:
        get.get(segmenter_category(segmenter), args.weights, roles=("segmenter",), fetch=False, notify=print)
    directory = train_predictor(args, open_output=cli.output_directory)
    print(f"predictor: {directory}")


if __name__ == "__main__":
    cli.run(Arguments, main)
