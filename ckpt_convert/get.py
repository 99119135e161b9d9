"""The networks of an official category, ready to load: found or downloaded, converted once, kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ckpt_convert import convert
from samjax.errors import UserError
from samjax.io import checkpoints, files, registry
from samjax.io.registry import WeightFile

ROLES = ("generator", "encoder", "invertibility", "segmenter")

Notify = Callable[[str], None]


def get(
    category: str,
    weights: Path | None = None,
    cache: Path | None = None,
    *,
    roles: Sequence[str] = (*ROLES, "edits"),
    fetch: bool = True,
    notify: Notify = lambda _: None,
) -> dict[str, Path]:
    """Makes sure that the networks of a category are there, converted.

    Args:
      category: a key of `samjax.io.registry.CATEGORY_FILES`.
      weights: a folder that holds files under their authors' names; looked at first.
      cache: see `samjax.io.registry.cache_folder`.
      roles: what is wanted, of `ROLES` and "edits".
      fetch: whether to download what is not there; if not, missing files are an error that says what to do.
      notify: called with a line for what takes its time.

    Returns:
      For each role the folder of the converted network; for "edits" that of the directions.

    Raises:
      UserError: files are missing (all of them listed), cannot be fetched, or hold something else.
    """
    cache = cache or registry.cache_folder()
    if weights is not None and not weights.is_dir():
        raise UserError(f"{weights} is no folder: give --weights the folder that holds the files")
    folders = [*([weights] if weights else []), cache / "downloads"]
    wanted = [file for file in registry.CATEGORY_FILES[category] if file.role in roles]
    found = {file: registry.find(file, category, folders) for file in wanted}
    absent = [file for file, path in found.items() if path is None]
    if fetch:
        found |= _fetch(absent, category, cache, notify)
    elif absent:
        raise registry.missing(category, absent)
    result = {}
    for role in roles:
        sources = {file: path for file, path in found.items() if file.role == role and path is not None}
        if role == "edits":
            parents = {path.parent for path in sources.values()}
            if len(parents) > 1:
                raise UserError(f"the edits of {category} lie in several folders: put them into one")
            result[role] = parents.pop()
        else:
            result[role] = _converted(list(sources.values()), next(iter(sources)), category, cache, notify)
    return result


def _fetch(absent: Sequence[WeightFile], category: str, cache: Path, notify: Notify) -> dict[WeightFile, Path]:
    """Downloads what can be; then all that could not is named at once."""
    fetched, failed = {}, {}
    for file in absent:
        notify(f"fetching {file.name} ({file.size}; {file.licence})")
        try:
            fetched[file] = registry.download(file, category, cache)
        except UserError as error:
            failed[file] = str(error)
            if failed[file].endswith(registry.NO_CONNECTION):  # nor will the others come
                failed |= {other: failed[file] for other in absent if other not in fetched | failed}
                break
    if failed:
        raise registry.missing(category, list(failed), list(dict.fromkeys(failed.values())))
    return fetched


def _converted(sources: Sequence[Path], file: WeightFile, category: str, cache: Path, notify: Notify) -> Path:
    """The folder of the network in `sources`, converted unless these very files were before."""
    # The segmenter of one category may serve another: the network's own name is enough.
    name = f"{category}_{file.role}" if file.role != "segmenter" else file.network
    return _once(sources, file.network, cache / "converted" / name, notify)


def ready(path: Path, network: str, cache: Path | None = None, *, notify: Notify = lambda _: None) -> Path:
    """`path` itself where it is converted; a file as its authors distribute it is converted into the cache.

    Raises:
      UserError: it is missing, or holds something else.
    """
    if path.suffix not in (".pkl", ".pt", ".pth", ".ckpt") or not path.is_file():
        return path
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    folder = (cache or registry.cache_folder()) / "converted" / f"{path.stem}_{network}_{key}"
    return _once([path], network, folder, notify)


def edits_folder(category: str, weights: Path | None = None, cache: Path | None = None) -> Path | None:
    """The folder with the category's edit directions; None where there is none."""
    folders = [*([weights] if weights else []), (cache or registry.cache_folder()) / "downloads"]
    files = (file for file in registry.CATEGORY_FILES[category] if file.role == "edits")
    found = (registry.find(file, category, folders) for file in files)
    return next((path.parent for path in found if path is not None), None)


def _once(sources: Sequence[Path], network: str, folder: Path, notify: Notify) -> Path:
    """`folder`, with the network of `sources` converted into it, unless it is there from these very files."""
    record = folder.with_name(f"{folder.name}.sources.json")
    state = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    try:
        if checkpoints.kind_at(folder) and json.loads(record.read_text("utf-8")) == state:
            return folder
    except (OSError, ValueError):
        pass
    notify(f"converting {', '.join(path.name for path in sources)}")
    convert.convert(sources, folder, network)
    files.write_json(record, state)
    return folder
