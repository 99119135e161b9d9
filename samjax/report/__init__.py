"""Reports of an inversion: figures, a single HTML file, and a directory with every image.

    report.save(inversion, "report.html", edits=pipeline.edit_sweep(inversion))

`describe` gathers what a report shows into a `Content`, from which the figures and `render_html` are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from samjax.errors import UserError, shown
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
      UserError: an argument is something else, or the file cannot be written.
    """
    if not isinstance(inversion, Inversion):
        raise UserError(f"give an inversion, as returned by Pipeline.invert, not {shown(inversion)}")
    if not isinstance(edits, Mapping | None):
        raise UserError(f"edits must be those that Pipeline.edit_sweep returns, not {shown(edits)}")
    if not isinstance(sweep, Sequence) or not all(isinstance(one, Inversion) for one in sweep):
        raise UserError(f"sweep must be a list of inversions, as returned by Pipeline.sweep, not {shown(sweep)}")
    files.write_text(path, render_html(describe(inversion, edits=edits, sweep=sweep)))
