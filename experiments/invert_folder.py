"""Inverts every image of a directory in each latent layer alone: the training data of an invertibility predictor.

    python experiments/invert_folder.py --image_folder photos/train --gan_weights converted/ --output_path data/train

Writes OUTPUT_PATH/LAYER/NAME/final/input.png and reconstruction.png, like the authors' program, so that both their
training and `train_invertibility.py` can read them. Finished inversions are skipped: after an interruption, even a
kill, the same command resumes. Images and layers may be added, but other settings need another OUTPUT_PATH.

An image of the demo takes 46 seconds on two CPU cores (five layers of 100 steps). Images and layers are items of the
same batches, which are divided over all devices. Several machines share a directory if the command runs on each with
--coordinator HOST:PORT --num_processes N --process_id I (or, on a TPU pod, with --distributed).

Exit code 1: some images could not be read or inverted. They are listed, and all others are done.
"""

from __future__ import annotations

import dataclasses
import sys

from ckpt_convert import get
from samjax import cli, runtime
from samjax.errors import UserError, check_seed
from samjax.training import DirectoryOptions, ProcessOptions, invert_directory


@dataclasses.dataclass(frozen=True)
class Arguments(ProcessOptions, DirectoryOptions):
    pass


def main(args: Arguments) -> None:
    check_seed(args.seed)
    images, results = args.image_folder.resolve(), args.output_path.resolve()
    if results == images or images in results.parents:
        raise UserError(f"--output_path {args.output_path} lies in --image_folder: choose a directory outside of it")
    runtime.connect(args.distributed, args.coordinator, args.num_processes, args.process_id)
    prepared = get.prepare(args.pipeline_options(), segmenter=False)
    paths = {"gan_weights": prepared.gan_weights, "e4e_path": prepared.e4e_path}
    result = invert_directory(dataclasses.replace(args, **paths), open_output=cli.output_directory)
    for path, reason in result.failed.items():
        print(f"skipped {path}: {reason}", file=sys.stderr)
    done = len(result.images) - len(result.failed)
    print(f"{result.directory}: {done} of {len(result.images)} images in {len(result.latent_names)} layers", flush=True)
    if result.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(Arguments, main)
