"""Reports of an inversion: figures, a single HTML file, and a directory with every image.

    report.save(inversion, "report.html", edits=pipeline.edit_sweep(inversion))

`describe` gathers what a report shows into a `Content`, from which the figures and `render_html` are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from samjax.io import files
from samjax.report.content import (
    LAYER_MEANINGS,
    METHOD_CAPTIONS,
    METRICS,
    PALETTE,
    Content,
    Segment,
    Strength,
    describe,
    heat_limit,
    layer_color,
    layer_shares,
    layers_at,
    preview,
    segment_colors,
    segment_title,
    shown_thresholds,
)
from samjax.report.directory import save_inversion, save_summary, table
from samjax.report.figures import (
    comparison_figure,
    edit_strip,
    invertibility_figure,
    layers_figure,
    layers_overlay,
    segments_figure,
    segments_overlay,
)
from samjax.report.html import render_html
from samjax.results import Edits, Inversion

__all__ = [
    "LAYER_MEANINGS", "METHOD_CAPTIONS", "METRICS", "PALETTE", "Content", "Segment", "Strength",
    "comparison_figure", "describe", "edit_strip", "heat_limit", "invertibility_figure", "layer_color", "layer_shares",
    "layers_at", "layers_figure", "layers_overlay", "preview", "render_html", "save", "save_inversion", "save_summary",
    "segment_colors", "segment_title", "segments_figure", "segments_overlay", "shown_thresholds", "table",
]  # fmt: skip


def save(
    inversion: Inversion, path: str | Path, *, edits: Edits | None = None, sweep: Sequence[Inversion] = ()
) -> None:
    """Writes the report of an inversion as one HTML file that works offline.

    Args:
      inversion: the inversion, as `Pipeline.invert` returns it.
      path: path of the HTML file; an existing file is replaced.
      edits: edits to show, as `Pipeline.edit_sweep` returns them.
      sweep: inversions of the same image at other thresholds, as `Pipeline.sweep` returns them.

    Raises:
      UserError: the file cannot be written.
    """
    files.write_text(path, render_html(describe(inversion, edits=edits, sweep=sweep)))
