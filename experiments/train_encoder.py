"""Trains an encoder, which maps an image to the W+ code where its inversion starts.

    python experiments/train_encoder.py --gan_weights converted/ --image_folder photos/train \\
        --image_folder_val photos/val --output_folder output/encoder

Writes to OUTPUT_FOLDER: `encoder/`, the encoder with the lowest validation loss, which `--e4e_path` of the other
programs takes; `checkpoints/`, metrics.jsonl, `tensorboard/`, curve.png, and for each validation a figure of images and
what the generator makes of their codes. After an interruption, even a kill, the same command resumes the run, with the
same result as without the interruption.

The encoder of the demo (`--preset small --num_steps 1200 --batch_size 4 --samples 8 --lr 2e-3`) takes 50 minutes on two
CPU cores. Batches are divided over all devices. Several machines train together if the command runs on each with
--coordinator HOST:PORT --num_processes N --process_id I (or, on a TPU pod, with --distributed).
"""

from __future__ import annotations

import dataclasses

from ckpt_convert import get
from samjax import cli, runtime
from samjax.training import EncoderOptions, ProcessOptions, train_encoder


@dataclasses.dataclass(frozen=True)
class Arguments(ProcessOptions, EncoderOptions):
    pass


def main(args: Arguments) -> None:
    args.check()
    runtime.connect(args.distributed, args.coordinator, args.num_processes, args.process_id)
    prepared = get.prepare(args.pipeline_options(), segmenter=False)
    args = dataclasses.replace(args, gan_weights=prepared.gan_weights)
    directory = train_encoder(args, open_output=cli.output_directory)
    print(f"encoder: {directory}")


if __name__ == "__main__":
    cli.run(Arguments, main)
