"""The sheet of found directions: what each does to some images, at several strengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from samjax.io.images import to_uint8
from samjax.report.sheets import Sheet, Uint8, resize


class DirectionRow(NamedTuple):
    """A row of the sheet.

    Attributes:
      name: name of the direction.
      strengths: [S] of the edits.
      images: [S, N, R, R, 3] edited images, in [-1, 1].
    """

    name: str
    strengths: Sequence[float]
    images: np.ndarray


def directions_sheet(rows: Sequence[DirectionRow]) -> Uint8:
    """Draws edits along several directions.

    Args:
      rows: a row for each direction, with the same numbers of strengths and images.

    Returns:
      uint8 [H, W, 3].
    """
    strengths, count = rows[0].images.shape[:2]
    side, label, gap, head, seam = 128, 170, 14, 26, 3
    block = strengths * (side + seam) + gap
    sheet = Sheet(label + count * block + gap, len(rows) * (side + head) + gap)
    for i, row in enumerate(rows):
        top = gap + i * (side + head)
        sheet.text(gap, top + side / 2 - 8, row.name, 16, width=label - 2 * gap, strong=True)
        for k, strength in enumerate(row.strengths):
            text = f"{strength:+.1f}" if strength else "0"
            for n in range(count):
                left = label + n * block + k * (side + seam)
                sheet.image(left, top, resize(to_uint8(row.images[k, n]), side, side))
                sheet.text(left + side / 2, top + side + 2, text, 12, align="center")
    return sheet.array()
