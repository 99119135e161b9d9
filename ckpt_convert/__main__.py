"""The command line: `python -m ckpt_convert SOURCE OUT_DIR` and `python -m ckpt_convert export OUT_DIR FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from samjax.errors import UserError

_CONVERT = """\
Converts a StyleGAN2 generator into a folder that samjax reads.

SOURCE is one of:
  .pkl          of NVIDIA's PyTorch repositories (stylegan2-ada-pytorch, stylegan3): its G_ema
  .pkl          of NVIDIA's TensorFlow repositories (stylegan2, stylegan2-ada): its Gs
  .pt           of rosinality's stylegan2-pytorch (g_ema), or of an encoder with its generator (e4e, pSp: decoder.*)
  .safetensors  that this program exported

Its format and the generator's sizes are found in the file. Neither PyTorch nor TensorFlow is needed, and nothing
that the file carries is run. OUT_DIR appears whole: an Orbax checkpoint and manifest.json, which says what it is.

The other way:
  python -m ckpt_convert export OUT_DIR FILE.safetensors --names nvidia|rosinality
"""
_EXPORT = """\
Writes a converted generator as a safetensors file with the names and layouts of a PyTorch program, whose network
then loads it: safetensors.torch.load_file(FILE) gives the state dict. Converted back, it is the same to the last bit.
"""


def _export(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m ckpt_convert export", description=_EXPORT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generator", metavar="OUT_DIR", help="a converted generator")
    parser.add_argument("file", metavar="FILE.safetensors", help="the file to write")
    parser.add_argument(
        "--names", choices=("nvidia", "rosinality"), required=True,
        help="nvidia: Generator of stylegan2-ada-pytorch and stylegan3; rosinality: Generator of stylegan2-pytorch,"
        " with latent_avg beside it",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    from ckpt_convert import convert

    notes = convert.export(args.generator, args.file, args.names)
    print(f"{args.file}: written with the names of {args.names}")
    for note in notes:
        print(f"note: {note}")


def _convert(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m ckpt_convert", description=_CONVERT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint file")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="the folder to write; replaced if it holds the same source")
    args = parser.parse_args(arguments)
    from ckpt_convert import convert

    found = convert.convert(args.source, args.out_dir)
    config = found.config
    labels = f", {config.c_dim} labels" if config.c_dim else ""
    print(
        f"{args.out_dir}: {found.manifest['source_format']}, {config.img_resolution} px, {config.num_ws} styles{labels}"
    )
    for note in found.manifest["notes"]:
        print(f"note: {note}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: 0; 2 for bad input; 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["export"]:
            _export(arguments[1:])
        else:
            _convert(arguments)
    except UserError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # one line, whatever names a file holds
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
