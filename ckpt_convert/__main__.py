"""Command line of the converter; see `python -m ckpt_convert --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samjax.errors import UserError

_CONVERT = """\
Converts a network to a directory that samjax loads.

SOURCE is one of:
  .pkl          a StyleGAN2 generator of NVIDIA's PyTorch or TensorFlow repositories
  .pt .pth      a StyleGAN2 generator of rosinality's program, PTI, MMGeneration, GenForce, Hammer or BasicSR, or inside
                an encoder's checkpoint (e4e, pSp), in any wrapper
  .pt           e4e_*_encode.pt: with --network e4e the encoder is converted
  .pt           invertibility_*_sg2.pt, or the files that the authors' training of the predictor writes in an epoch
  .pth .pth     encoder_epoch_20.pth and decoder_epoch_20.pth of the ADE20K segmenter, both
  .pth          79999_iter.pth of the face parser
  .pkl          model_final_*.pkl of Detectron2's panoptic_fpn_R_101_3x
  .safetensors  exported by this program, or a generator with the names of one of the programs above

The kind of network, the format and the sizes are detected from the file. PyTorch and TensorFlow are not needed, and
nothing in the file is executed. OUT_DIR is written atomically: an Orbax checkpoint, and manifest.json, which describes
the network.

To download and convert all files of an official category (see `get --help`):
  python -m ckpt_convert get cars|faces|cats
To export generators and invertibility predictors to PyTorch (see `export --help`):
  python -m ckpt_convert export OUT_DIR FILE.safetensors --names nvidia|rosinality
  python -m ckpt_convert export OUT_DIR FILE.pt --names sam
"""
_EXPORT = """\
Writes a network of samjax with the names and layouts of a PyTorch program, which can load it. A generator becomes a
safetensors file: safetensors.torch.load_file(FILE) returns the state dict. An invertibility predictor becomes a .pt
file like those that SAM's authors publish, with sd_base and a state dict for each layer.
Converting the file back restores the same bits.
"""


def _export(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m ckpt_convert export", description=_EXPORT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "network", metavar="OUT_DIR", help="the directory of a converted generator or invertibility predictor"
    )
    parser.add_argument("file", metavar="FILE", help="the file to write; one that exists is replaced")
    parser.add_argument(
        "--names", choices=("nvidia", "rosinality", "sam"), required=True,
        help="the program to write for: nvidia, the Generator of stylegan2-ada-pytorch and stylegan3; rosinality, the"
        " Generator of stylegan2-pytorch, with latent_avg; sam, the invertibility predictor of SAM's authors",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    from ckpt_convert import convert

    if args.names != "sam" and not args.file.lower().endswith(".safetensors"):
        raise UserError(f"{args.file}: a generator becomes a safetensors file; give a name that ends in .safetensors")
    notes = convert.export(args.network, args.file, args.names)
    print(f"{args.file}: written with the names of {args.names}")
    for note in notes:
        print(f"note: {note}")


_GET = """\
Downloads all files of an official category and converts them, for --image_category of samjax's programs.

Files that are in the cache, or in the directory --weights under their authors' names, are not downloaded again; an
interrupted download is resumed. Each file is under its authors' own license, which is printed. A file must be the one
that was downloaded first: its size and time of change are checked each time, its hash if they differ.
"""


def _get(arguments: Sequence[str]) -> None:
    from samjax.io import registry

    parser = argparse.ArgumentParser(
        "python -m ckpt_convert get", description=_GET, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("category", choices=tuple(registry.CATEGORY_FILES), help="the category to download")
    parser.add_argument(
        "--weights", type=Path, metavar="DIR", help="a directory with files that are downloaded already; default: none"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR",
        help="the directory for downloads and converted networks; default: the environment variable SAMJAX_CACHE, or"
        " samjax in the user's cache directory",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="check the hashes of all files in the cache")
    args = parser.parse_args(arguments)
    from ckpt_convert import get

    for role, path in get.get(args.category, args.weights, args.cache, verify=args.verify, notify=print).items():
        print(f"{role}: {path}")


def _convert(arguments: Sequence[str]) -> None:
    from samjax.io.checkpoints import NETWORKS

    parser = argparse.ArgumentParser(
        "python -m ckpt_convert", description=_CONVERT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="the checkpoint file, or the files of its parts")
    parser.add_argument(
        "out_dir",
        metavar="OUT_DIR",
        help="the directory to write; it is replaced if it was converted from the same source",
    )
    parser.add_argument(
        "--network",
        choices=tuple(NETWORKS),
        help="the kind of network to convert; default: the one that SOURCE holds, or its generator if it holds several",
    )
    args = parser.parse_args(arguments)
    from ckpt_convert import convert

    found = convert.convert(args.sources, args.out_dir, args.network)
    print(f"{args.out_dir}: {describe(found.config, found.manifest)}")
    for note in found.manifest["notes"]:
        print(f"note: {note}")


def describe(config: Any, manifest: Mapping[str, Any]) -> str:
    """Describes a converted network in one line."""
    if hasattr(config, "num_ws"):
        labels = f", {config.c_dim} labels" if config.c_dim else ""
        return f"{manifest['source_format']}, {config.img_resolution} px, {config.num_ws} styles{labels}"
    return str(manifest["source_format"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
      arguments: arguments of the command line. Default: `sys.argv[1:]`.

    Returns:
      The exit code: 0, 2 for an error, or 130 if interrupted.
    """
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
