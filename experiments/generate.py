"""Draws images of a generator, from seeds or from styles.

    python experiments/generate.py --output_path out                                  # seeds 0 to 7 of the demo
    python experiments/generate.py --generator network.pkl --seeds 0-7,12 --truncation_psi 0.7 --output_path out
    python experiments/generate.py --generator converted/ --ws styles.npy --output_path out

OUTPUT_PATH gets a PNG for each image, grid.png with all of them, and images.npy: float32 [N, H, W, C] in [-1, 1], not
rounded, in the same order. Files of the same names are replaced. A PNG is gray, RGB or RGBA: of a generator that draws
another number of channels, there is only images.npy. A seed gives the z that NVIDIA's own programs draw for it, so
images can be identified by their seeds.

The first command takes 10 seconds on two CPU cores and draws eight cars of 256 px.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import tqdm

from ckpt_convert import get
from samjax import cli, demo, generation
from samjax.config import check_class
from samjax.errors import UserError, check_least
from samjax.io import checkpoints, files, images
from samjax.nets.stylegan2 import Noise


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path
    """Directory of the images."""
    generator: Path | None = None
    """A generator, converted or as distributed. Default: the demo's."""
    seeds: str | None = None
    """Seeds and ranges of seeds, such as 0-7,12. Default: 0-7."""
    ws: Path | None = None
    """Codes in W or W+ instead of seeds: a .npy, .npz, .safetensors, .pt, .pth or .pkl file."""
    truncation_psi: float = 1.0
    """How far a style goes from the mean style (0) to its own (1); below 1 images vary less and look better."""
    truncation_cutoff: int | None = None
    """How many of the first styles are truncated. Default: all."""
    class_idx: int | None = None
    """Class to draw, for a generator with classes. Default: seeds take all classes in turn."""
    noise: Noise = "const"
    """Fine structure: stored with the generator, none, or random (drawn from the seed)."""
    batch_size: int = 4
    """Images in one program."""


def check(args: Arguments) -> None:
    """Raises a `UserError` for arguments that are wrong or exclude each other, whatever the generator."""
    check_least(args, {"batch_size": 1})
    if args.seeds is not None and args.ws is not None:
        raise UserError("--seeds and --ws exclude each other: give one of them")
    if args.ws is not None and (args.truncation_psi, args.truncation_cutoff, args.class_idx) != (1, None, None):
        raise UserError("--truncation_psi, --truncation_cutoff and --class_idx act on seeds: leave them out with --ws")
    if not math.isfinite(args.truncation_psi):
        raise UserError(f"--truncation_psi must be a number such as 0.7, not {args.truncation_psi}")


def main(args: Arguments) -> None:
    check(args)
    path = demo.GENERATOR if args.generator is None else get.ready(args.generator, "generator", notify=cli.note)
    loaded = checkpoints.load_generator(path)
    config, channels = loaded.config, loaded.config.img_channels
    as_png = channels in (1, 3, 4)
    if not as_png:
        cli.note(f"the generator's {channels} channels are neither gray, RGB nor RGBA: only images.npy is written")
    if args.ws is None:
        check_class(config, args.class_idx)
        if config.c_dim and args.class_idx is None:
            cli.note(f"the generator has {config.c_dim} classes, which seeds take in turn; --class_idx chooses one")
        ws, seeds = None, generation.parse_seeds("0-7" if args.seeds is None else args.seeds)
    else:
        ws = generation.read_ws(args.ws, config)
        seeds = range(len(ws))
    if args.truncation_cutoff is not None and not 0 <= args.truncation_cutoff <= config.num_ws:
        raise UserError(f"--truncation_cutoff must lie between 0 and this generator's {config.num_ws} styles")
    names = [f"{'seed' if ws is None else 'ws'}{seed:04d}" for seed in seeds]

    folder = cli.output_directory(args.output_path)
    grid = generation.Grid(len(names), config.img_resolution)
    batches = generation.draw_batches(
        config, loaded.params, seeds, ws=ws, truncation_psi=args.truncation_psi,
        truncation_cutoff=args.truncation_cutoff, class_idx=args.class_idx, noise=args.noise,
        batch_size=args.batch_size,
    )  # fmt: skip
    shape, remaining = (len(names), config.img_resolution, config.img_resolution, channels), iter(names)
    with files.whole_file(folder / "images.npy") as array, tqdm.tqdm(total=len(names), unit="image") as bar:
        np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for batch in batches:
            array.write(np.ascontiguousarray(batch, "<f4").tobytes())
            for image in images.to_uint8(batch) if as_png else ():
                image = image[..., 0] if channels == 1 else image
                images.save_png(folder / f"{next(remaining)}.png", image)
                grid.add(image)
            bar.update(len(batch))
    if as_png:
        images.save_png(folder / "grid.png", grid.image)
    listed = f"{names[0]}.png, …, grid.png, images.npy" if as_png else "images.npy"
    print(f"{len(names)} images of {config.img_resolution} px in {folder}: {listed}")


if __name__ == "__main__":
    cli.run(Arguments, main)
