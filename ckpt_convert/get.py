"""Finding, downloading and converting the networks of the official categories; results are kept in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ckpt_convert import convert
from samjax import config
from samjax.config import CLASSICAL_SEGMENTERS, Options
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
    verify: bool = False,
    notify: Notify = lambda _: None,
) -> dict[str, Path]:
    """Finds or downloads the files of a category, and converts its networks.

    Args:
      category: a key of `samjax.io.registry.CATEGORY_FILES`.
      weights: a directory with files under their authors' names, which is searched before the cache.
      cache: default: `samjax.io.registry.cache_folder()`.
      roles: the files wanted: any of `ROLES`, and "edits".
      fetch: whether to download missing files; if not, they are an error.
      verify: whether to check the hashes of files in the cache, rather than their sizes and times of change only.
      notify: called with a line of text before each download and each conversion.

    Returns:
      For each role the directory of the converted network; for "edits" the directory of the directions.

    Raises:
      UserError: if files are missing (all are listed), cannot be downloaded, have changed since they were downloaded,
        or hold something else.
    """
    cache = cache or registry.cache_folder()
    if weights is not None and not weights.is_dir():
        raise UserError(f"{weights} is not a directory: give --weights the directory that holds the files")
    folders = [*([weights] if weights else []), cache / "downloads"]
    wanted = [file for file in registry.CATEGORY_FILES[category] if file.role in roles]
    found = {file: registry.find(file, category, folders) for file in wanted}
    for file, path in found.items():
        if path == registry.cached(file, category, cache):
            registry.verify(file, category, cache, full=verify)
            if verify:
                notify(f"{file.name}: as it was downloaded")
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
                raise UserError(f"the edits of {category} are in several directories: put them into one")
            result[role] = parents.pop()
        else:
            network, folder = next(iter(sources)).network, registry.converted(category, role, cache)
            result[role] = _convert_once(list(sources.values()), network, folder, notify)
    return result


def prepare(options: Options, *, segmenter: bool = True, notify: Notify = print) -> Options:
    """Converts the networks that options select, so that `samjax.Pipeline.from_options` can load them.

    Files given as their authors distribute them are replaced by their converted directories. The networks of an
    official category are looked for in `options.weights` and in the cache, and converted where `samjax` finds them;
    nothing is downloaded.

    Args:
      options: the user's options.
      segmenter: whether segments have to be found, rather than given.
      notify: called with a line of text before each conversion.

    Returns:
      The options, with the paths of converted networks, and the category's directions if none are given.

    Raises:
      UserError: if files are missing (all are listed) or hold something else, or options contradict each other.
    """
    category = config.resolve_category(options)
    if options.gan_weights is not None:
        generator = ready(options.gan_weights, "generator", notify=notify)
        options = dataclasses.replace(options, gan_weights=generator)
        # Whether a generator fits is checked before other networks are converted. The batch size does not matter here,
        # and its default would start JAX's devices.
        config.resolve(dataclasses.replace(options, batch_size=1), checkpoints.load_config(generator, "generator"))
    if roles := config.required_roles(options, segmenter=segmenter):
        get(category.name, options.weights, roles=roles, fetch=False, notify=notify)
    if segmenter and "segmenter" not in roles and category.segmenter not in CLASSICAL_SEGMENTERS:
        other = config.segmenter_category(category.segmenter)
        get(other, options.weights, roles=("segmenter",), fetch=False, notify=notify)
    own = (("e4e_path", "e4e"), ("offsets_path", "offsets"), ("inv_model_path", "invertibility"))
    for name, network in own:
        if (path := getattr(options, name)) is not None:
            options = dataclasses.replace(options, **{name: ready(path, network, notify=notify)})
    if options.edits_folder is None and category.official:
        options = dataclasses.replace(options, edits_folder=registry.find_edits(category.name, options.weights))
    return options


def ready(path: Path, network: str, cache: Path | None = None, *, notify: Notify = lambda _: None) -> Path:
    """Converts a file as its authors distribute it into the cache; a converted network is returned as it is.

    Args:
      path: path of the file.
      network: the expected kind, a key of `samjax.io.checkpoints.NETWORKS`.
      cache: default: `samjax.io.registry.cache_folder()`.
      notify: called with a line of text before a conversion.

    Returns:
      The directory of the converted network, or `path`.

    Raises:
      UserError: if the file is missing, damaged, or holds something else.
    """
    suffix = path.suffix.lower()  # a file may have any: torch.save writes whatever it is told
    if path.is_dir() or suffix == ".safetensors" or not (path.exists() or suffix in checkpoints.DISTRIBUTED):
        return path
    if not path.exists():
        raise UserError(f"{path} does not exist: give the path of a checkpoint file, or of a converted network")
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    folder = (cache or registry.cache_folder()) / "converted" / f"{files.safe_name(path.stem)}_{network}_{key}"
    return _convert_once([path], network, folder, notify)


def _fetch(absent: Sequence[WeightFile], category: str, cache: Path, notify: Notify) -> dict[WeightFile, Path]:
    """Downloads files; one error lists all that cannot be downloaded."""
    fetched, failed = {}, {}
    for file in absent:
        open_to_changes = "; over plain http, which others on the way can read and change" if file.plain_http else ""
        notify(f"fetching {file.name} ({file.size}; {file.licence}{open_to_changes})")
        try:
            fetched[file] = registry.download(file, category, cache, notify=notify)
        except UserError as error:
            failed[file] = str(error)
            if failed[file].endswith(registry.NO_CONNECTION):  # then the others would fail too
                failed |= {other: failed[file] for other in absent if other not in fetched | failed}
                break
    if failed:
        raise registry.missing(category, list(failed), list(dict.fromkeys(failed.values())))
    return fetched


def _convert_once(sources: Sequence[Path], network: str, folder: Path, notify: Notify) -> Path:
    """Converts the network in `sources` to `folder`, unless `folder` was already converted from the same files."""
    record = folder.with_name(f"{folder.name}.sources.json")

    def done() -> bool:
        try:
            return checkpoints.network_at(folder) is not None and json.loads(record.read_text("utf-8")) == state
        except (OSError, ValueError):
            return False

    state = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    if done():
        return folder
    lock = files.output_directory(folder.parent) / f".{folder.name}.lock"
    with files.locked(lock, wait=lambda: notify(f"waiting for another program that converts to {folder}")):
        if not done():
            notify(f"converting {', '.join(path.name for path in sources)}")
            convert.convert(sources, folder, network)
            files.write_json(record, state)
    return folder
