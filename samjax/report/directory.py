"""The directory of results of one image: figures, images at full size, metrics.json and report.html."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from samjax.io import files, images
from samjax.report.content import Content, describe, segment_title
from samjax.report.figures import (
    comparison_figure,
    edit_strip,
    invertibility_figure,
    layers_figure,
    segments_figure,
)
from samjax.report.html import render_html
from samjax.results import Edits, Inversion


def save_inversion(
    directory: str | Path,
    inversion: Inversion,
    edits: Edits | None = None,
    *,
    paste_back: bool = False,
    fit: images.Fit = "stretch",
) -> None:
    """Writes the images of one inversion, with its threshold T in their names.

    The reconstruction and the edited images have the generator's own size, without its letterbox. DIRECTION is the
    direction's name, made safe by `files.safe_name`:

        layers_T0.225.png                         the layer of each segment
        reconstruction_T0.225.png                 the reconstruction
        edits/DIRECTION/T0.225.png                every strength and method, at a reduced size
        edits/DIRECTION/T0.225_mul2.png           the edit at strength 2
        pasted/reconstruction_T0.225.png          with `paste_back`, the same in the original image
        pasted/DIRECTION/T0.225_mul2.png

    Args:
      directory: directory of the image; it is created if missing.
      inversion: the inversion.
      edits: direction to strength to method to image [R, R, 3], as `Pipeline.edit_sweep` returns them.
      paste_back: whether to also write the reconstruction and the edits at the original image's size and shape.
      fit: how the original image was fitted to the target's size; used by `paste_back`.

    Raises:
      UserError: a file cannot be written.
    """
    directory, tag = Path(directory), f"T{inversion.threshold:.3f}"
    content = describe(inversion, edits=edits)

    def save(image: np.ndarray, name: str, pasted_name: str) -> None:
        full = inversion.full_size(image)
        images.save_png(directory / name, full)
        if paste_back:
            images.save_png(directory / "pasted" / pasted_name, images.paste_back(inversion.analysis.source, full, fit))

    images.save_png(directory / f"layers_{tag}.png", layers_figure(content))
    save(inversion.image, f"reconstruction_{tag}.png", f"reconstruction_{tag}.png")
    for direction, strengths in (edits or {}).items():
        folder = files.safe_name(direction)
        images.save_png(directory / "edits" / folder / f"{tag}.png", edit_strip(content, direction))
        for strength, edited in strengths.items():
            name = f"{folder}/{tag}_mul{strength:g}.png"
            save(edited["SAM"], f"edits/{name}", name)


def save_summary(
    directory: str | Path,
    inversions: Sequence[Inversion],
    main: Inversion,
    edits: Edits | None = None,
    *,
    seed: int,
    seconds: Mapping[str, float],
) -> Content:
    """Writes the summary of an image: segments.png, invertibility.png, comparison.png, metrics.json, report.html.

    The report is written last, so that its presence means that everything else is complete.

    Args:
      directory: directory of the image; it is created if missing.
      inversions: the inversions of the image, one for each threshold.
      main: the inversion that figures and report show; one of `inversions`.
      edits: edits of `main`, as `Pipeline.edit_sweep` returns them.
      seed: random seed of the inversions.
      seconds: part of the work to its duration in seconds.

    Returns:
      The content of the report.

    Raises:
      UserError: a file cannot be written.
    """
    directory = Path(directory)
    content = describe(main, edits=edits, sweep=inversions)
    images.save_png(directory / "segments.png", segments_figure(content))
    images.save_png(directory / "invertibility.png", invertibility_figure(content))
    images.save_png(directory / "comparison.png", comparison_figure(content))
    described = [content if inversion is main else describe(inversion) for inversion in inversions]
    files.write_json(
        directory / "metrics.json",
        {
            "image": content.name,
            "thresholds": {
                f"{item.threshold:.3f}": {"metrics": item.metrics, "segments": item.rows} for item in described
            },
            "layers": list(content.layers),
            "steps": {"sam": main.config.num_opt_steps, "single_layers": main.measure_steps},
            "seconds": seconds,
            "settings": main.config,
            "seed": seed,
            "device": jax.devices()[0].device_kind,
            "versions": {
                name: importlib.metadata.version(name) for name in ("samjax", "jax", "flax", "optax", "numpy")
            },
            "command": shlex.join(["python", *sys.argv]),
        },
    )
    files.write_text(directory / "report.html", render_html(content))
    return content


def table(content: Content) -> str:
    """The metrics of each method and the layer of each segment, as lines of text for a terminal."""
    lines = [f"{'':8}{'LPIPS':>8}{'PSNR':>8}{'SSIM':>8}"]
    for name, scores in content.metrics.items():
        lines.append(f"{name:8}{scores['LPIPS']:8.3f}{scores['PSNR']:8.2f}{scores['SSIM']:8.3f}")
    layers = ", ".join(f"{segment_title(row)} {row.layer}" for row in content.rows)
    return "\n".join([*lines, f"layers at threshold {content.threshold:.3f}: {layers}"])
