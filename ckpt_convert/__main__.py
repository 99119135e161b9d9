"""The command line: `python -m ckpt_convert SOURCE OUT_DIR`, `… get CATEGORY` and `… export OUT_DIR FILE`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samjax.errors import UserError

_CONVERT = """\
Converts a network into a folder that samjax reads.

SOURCE is one of:
  .pkl          of NVIDIA's PyTorch repositories (stylegan2-ada-pytorch, stylegan3): its G_ema
  .pkl          of NVIDIA's TensorFlow repositories (stylegan2, stylegan2-ada): its Gs
  .pt           of rosinality's stylegan2-pytorch (g_ema), or of an encoder with its generator (e4e, pSp: decoder.*)
  .pt           e4e_*_encode.pt: its encoder, with --network e4e
  .pt           invertibility_*_sg2.pt, or what the authors' training of the predictor writes
  .pth .pth     encoder_epoch_20.pth and decoder_epoch_20.pth of the ADE20K segmenter, both
  .pth          79999_iter.pth of the face parser
  .pkl          model_final_*.pkl of Detectron2's panoptic_fpn_R_101_3x
  .safetensors  that this program exported

What it is, its format and its sizes are found in the file. Neither PyTorch nor TensorFlow is needed, and nothing
that the file carries is run. OUT_DIR appears whole: an Orbax checkpoint and manifest.json, which says what it is.

All files of an official category, downloaded and converted (see `get --help`):
  python -m ckpt_convert get cars|faces|cats
The other way, for generators and for invertibility predictors:
  python -m ckpt_convert export OUT_DIR FILE.safetensors --names nvidia|rosinality
  python -m ckpt_convert export OUT_DIR FILE.pt --names sam
"""
_EXPORT = """\
Writes a network of samjax with the names and layouts of a PyTorch program, whose network then loads it. A generator
becomes a safetensors file: safetensors.torch.load_file(FILE) gives the state dict. An invertibility predictor becomes
a .pt file like those that SAM's authors publish, with sd_base and a state dict for each layer.
Converted back, they are the same to the last bit.
"""


def _export(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m ckpt_convert export", description=_EXPORT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", metavar="OUT_DIR", help="a converted generator, or an invertibility predictor")
    parser.add_argument("file", metavar="FILE", help="the file to write")
    parser.add_argument(
        "--names", choices=("nvidia", "rosinality", "sam"), required=True,
        help="nvidia: Generator of stylegan2-ada-pytorch and stylegan3; rosinality: Generator of stylegan2-pytorch,"
        " with latent_avg beside it; sam: the invertibility predictor",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    from ckpt_convert import convert

    notes = convert.export(args.network, args.file, args.names)
    print(f"{args.file}: written with the names of {args.names}")
    for note in notes:
        print(f"note: {note}")


_GET = """\
Fetches every file of an official category and converts it, so that experiments/invert.py --image_category finds it.

What is already in the cache, or in the folder given by --weights under its authors' name, is not fetched again; a
broken download goes on where it was. Each file is under its authors' own licence, which is printed.
"""


def _get(arguments: Sequence[str]) -> None:
    from samjax.io import registry

    parser = argparse.ArgumentParser(
        "python -m ckpt_convert get", description=_GET, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("category", choices=tuple(registry.CATEGORY_FILES))
    parser.add_argument("--weights", type=Path, metavar="DIR", help="a folder with files already there")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where to keep it; else SAMJAX_CACHE or the system's")
    args = parser.parse_args(arguments)
    from ckpt_convert import get

    for role, path in get.get(args.category, args.weights, args.cache, notify=print).items():
        print(f"{role}: {path}")


def _convert(arguments: Sequence[str]) -> None:
    from samjax.io.checkpoints import NETWORKS

    parser = argparse.ArgumentParser(
        "python -m ckpt_convert", description=_CONVERT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="the checkpoint file, or its parts")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="the folder to write; replaced if it holds the same source")
    parser.add_argument("--network", choices=tuple(NETWORKS), help="which one, where a file holds several")
    args = parser.parse_args(arguments)
    from ckpt_convert import convert

    found = convert.convert(args.sources, args.out_dir, args.network)
    print(f"{args.out_dir}: {describe(found.config, found.manifest)}")
    for note in found.manifest["notes"]:
        print(f"note: {note}")


def describe(config: Any, manifest: Mapping[str, Any]) -> str:
    """A converted network in one line."""
    if hasattr(config, "num_ws"):
        labels = f", {config.c_dim} labels" if config.c_dim else ""
        return f"{manifest['source_format']}, {config.img_resolution} px, {config.num_ws} styles{labels}"
    return str(manifest["source_format"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: 0; 2 for bad input; 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["export"]:
            _export(arguments[1:])
        elif arguments[:1] == ["get"]:
            _get(arguments[1:])
        else:
            _convert(arguments)
    except UserError as error:
        print(f"error: {error.shown}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
