"""Trains an offset encoder, which finds the latents of all layers in a few passes: the start "learned".

    python experiments/train_offsets.py --gan_weights converted/ --e4e_path output/encoder/encoder \\
        --image_folder photos/train --image_folder_val photos/val --output_folder output/offsets

Writes to OUTPUT_FOLDER: `offsets/`, the offset encoder with the lowest validation loss, which `--offsets_path` of the
other programs takes; `segments/`, `checkpoints/`, metrics.jsonl, `tensorboard/`, curve.png, and for each validation a
figure of images and what the generator makes of their latents. After an interruption, even a kill, the same command
resumes the run, with the same result as without the interruption.

Batches are divided over all devices. Several machines train together if the command runs on each with
--coordinator HOST:PORT --num_processes N --process_id I (or, on a TPU pod, with --distributed).
"""

from __future__ import annotations

import dataclasses

from ckpt_convert import get
from samjax import cli, runtime
from samjax.training import OffsetOptions, ProcessOptions, train_offsets


@dataclasses.dataclass(frozen=True)
class Arguments(ProcessOptions, OffsetOptions):
    pass


def main(args: Arguments) -> None:
    args.check()
    runtime.connect(args.distributed, args.coordinator, args.num_processes, args.process_id)
    prepared = get.prepare(args.pipeline_options())
    args = dataclasses.replace(args, gan_weights=prepared.gan_weights, e4e_path=prepared.e4e_path)
    directory = train_offsets(args, open_output=cli.output_directory)
    print(f"offset encoder: {directory}")


if __name__ == "__main__":
    cli.run(Arguments, main)
