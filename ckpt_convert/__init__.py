"""Conversion of networks from other programs' files, and of samjax's networks to them.

`load` reads a file as its authors distribute it straight into memory. `python -m ckpt_convert --help` describes the
command line, which converts files once, for repeated use.

`formats` reads files as named arrays, without the libraries that wrote them and without executing anything in them. One
module for each network, such as `stylegan2`, holds the table of its parameters' names and layouts in other programs,
and `convert` applies the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samjax.io.checkpoints import LoadedNetwork

__all__ = ["load"]


def load(source: str | Path | Sequence[str | Path], network: str | None = None) -> LoadedNetwork:
    """Loads a network from a file of any known format; nothing is written.

    The result equals that of converting the file and loading the converted directory:

        pipeline = samjax.Pipeline(generator=ckpt_convert.load("network.pkl"))

    Args:
      source: path of a file as its authors distribute it (`python -m ckpt_convert --help` lists the formats), of a
        converted directory, or of a .safetensors file of samjax; a list of paths for a network distributed in parts.
      network: the expected kind, a key of `samjax.io.checkpoints.NETWORKS`. Default: the kind that the file holds. The
        checkpoint of an encoder holds its generator too, which is the default; "e4e" selects the encoder.

    Returns:
      Config, nested float32 arrays on the default device, and the manifest.

    Raises:
      UserError: if the file is missing, damaged, or holds something else.
    """
    from ckpt_convert import convert

    return convert.load(source, network)
