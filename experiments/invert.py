"""Inverts an image with SAM and edits it.

    python experiments/invert.py                                   # the demo: no files, no network needed
    python experiments/invert.py --image_path photo.png --gan_weights converted/ --edits_folder edits/
    python experiments/invert.py --image_path car.png --image_category cars   # after `python -m ckpt_convert get cars`

The demo takes a minute on two CPU cores, a third of it the second time, and reaches LPIPS 0.127. Results go to
OUTPUT_PATH/IMAGE_NAME: figures, the reconstruction and the edits at the generator's own size, metrics.json, and
report.html. The same command continues where it was stopped. Flags have the names and meanings of the authors' script.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ckpt_convert import get
from samjax import cli, demo, driver, report
from samjax.config import Options
from samjax.driver import OnProgress, Progress
from samjax.errors import UserError, check_least
from samjax.io import files, images
from samjax.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Arguments(Options):
    image_path: Path | None = None
    """The image. Default: a sample of the demo."""
    output_path: Path = Path("output")
    """Directory of the results, with a subdirectory named after the image."""
    segments: Path | None = None
    """A label image of the same size as the image: one value or flat color for each segment. Default: the segmenter
    finds the segments."""
    sweep_thresholds: bool = False
    """Runs all thresholds of the category; those that choose the same layers are optimized once."""
    paste_back: bool = False
    """Also writes reconstruction and edits at the image's own size and shape; areas removed by a crop stay as in the
    original."""
    save_final_latent: bool = True
    """Keeps latents_T*.npz so that a later run can continue."""
    save_intermediate: bool = False
    """Keeps images of the optimization in progress, every save_frequency steps."""
    save_frequency: int = 250
    """Steps between intermediate images."""


def main(args: Arguments) -> None:
    began = time.perf_counter()
    path, segments = args.image_path, args.segments
    if path is None:
        if args.image_category not in (None, "demo") or args.gan_weights is not None:
            raise UserError("--image_path is missing: give the image to invert")
        path = demo.SAMPLES / "scene0.png"
        segments = segments or demo.SAMPLES / "scene0_segments.png"
    check_least(args, {"save_frequency": 1})
    size = images.image_size(path)  # wrong files are found before the networks are loaded
    if segments is not None:
        images.check_segments_size(segments, images.image_size(segments), size)
    sam = Pipeline.from_options(
        get.prepare(args, segmenter=segments is None),
        name=args.gan_weights.name if args.gan_weights else None,
        segments_given=segments is not None,
        max_batch_size=16 if args.sweep_thresholds else 8,
        notify=lambda line: print(line, flush=True),
    )
    folder = cli.output_directory(args.output_path / files.safe_name(path.stem))
    print(f"{path.name} -> {folder}", flush=True)
    names = demo.SEGMENT_NAMES if segments is not None and segments.parent == demo.SAMPLES else {}
    analysis = sam.analyze(path, segments=segments, segment_names=names, directory=folder)
    images.save_png(folder / "input.png", analysis.target)
    images.save_png(folder / "start.png", analysis.full_size(sam.start_image(analysis)))
    seconds = {"analysis": time.perf_counter() - began}

    main_threshold = sam.category.threshold
    thresholds = sorted({*sam.category.sweep(), main_threshold}) if args.sweep_thresholds else [main_threshold]
    with watching(args, sam, folder) as on_progress:
        results = sam.sweep(
            analysis, thresholds, directory=folder if args.save_final_latent else None, on_progress=on_progress
        )
    seconds["sam"] = sum({one.assignment.layer_maps.tobytes(): one.seconds for one in results}.values())
    shown, edits = results[thresholds.index(main_threshold)], {}
    for result in results:
        edited = sam.edit_sweep(result)
        report.save_inversion(folder, result, edited, paste_back=args.paste_back, fit=args.fit)
        edits = edited if result is shown else edits
    seconds["total"] = time.perf_counter() - began
    content = report.save_summary(folder, results, shown, edits, seed=args.seed, seconds=seconds)
    print(f"\n{report.table(content)}\n\nreport: {folder / 'report.html'}  ({seconds['total']:.0f} s)", flush=True)


@contextlib.contextmanager
def watching(args: Arguments, sam: Pipeline, folder: Path) -> Iterator[OnProgress | None]:
    """With --save_intermediate a progress bar that also keeps images of the layer maps being optimized."""
    if not args.save_intermediate:
        yield None
        return
    with driver.progress_bar("SAM", disable=None) as bar:

        def on_progress(progress: Progress) -> None:
            bar(progress)
            steps = len(progress.terms.total)
            if progress.step // args.save_frequency > (progress.step - steps) // args.save_frequency:
                made = sam.render(progress.state.latents, progress.masks)
                for item, image in zip(progress.items, made, strict=True):
                    name = f"step_{item:02d}_{progress.step:04d}.png"
                    images.save_png(folder / "intermediate" / name, np.asarray(image))

        yield on_progress


if __name__ == "__main__":
    cli.run(Arguments, main)
