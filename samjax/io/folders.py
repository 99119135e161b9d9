"""Listing the files of a directory by their suffixes."""

from __future__ import annotations

import collections
from collections.abc import Collection
from pathlib import Path

from samjax.errors import escaped


def list_files(folder: Path, suffixes: Collection[str]) -> tuple[list[Path], str]:
    """The files of a directory that have one of some suffixes, and a note of those that have another.

    Hidden files are passed over without a note, among them the `._NAME` that macOS leaves on the disks of others.

    Args:
      folder: an existing directory.
      suffixes: in lower case; those of the files may have any case.

    Returns:
      The files, sorted; and one line such as "photos: passed over 3 files: 2 .txt, 1 .mp4", empty if there are none.
    """
    visible = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.is_file())
    others = collections.Counter(path.suffix.lower() for path in visible if path.suffix.lower() not in suffixes)
    count = others.total()
    kinds = ", ".join(f"{n} {escaped(suffix, 20) or 'without a suffix'}" for suffix, n in others.most_common(8))
    more = ", …" if len(others) > 8 else ""
    note = f"{escaped(str(folder))}: passed over {count} file{'s' * (count > 1)}: {kinds}{more}" if count else ""
    return [path for path in visible if path.suffix.lower() in suffixes], note
