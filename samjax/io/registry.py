"""The files of the official categories: their sources, where they are kept, and downloads.

The cache, `cache_folder()`, has two parts: `downloads/` holds the files as they are distributed, with their hashes at
the first download in `hashes.json`, and `converted/` the networks that `python -m ckpt_convert get` made of them. An
interrupted download is resumed; a file gets its name only when it is complete and of the size that its host states.
Each time a cached file is used, its size and time of change must be the recorded ones, or else its hash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from samjax.errors import UserError
from samjax.io import files

if TYPE_CHECKING:
    import requests

_SAM = "https://www.cs.cmu.edu/~SAMInversion/ckpt"
_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2/networks"
_ADE20K = "http://sceneparsing.csail.mit.edu/model/pytorch/ade20k-resnet50dilated-ppm_deepsup"
_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/COCO-PanopticSegmentation/panoptic_fpn_R_101_3x/139514519"
_EDITS = "https://raw.githubusercontent.com/adobe-research/sam_inversion/93d3bd6aabd3f395593dd8c2213812bb060e0970/edits"

_NVIDIA_LICENCE = "Nvidia Source Code License-NC: non-commercial"
_SAM_LICENCE = "Adobe Research License: non-commercial research"


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A file that others distribute.

    Attributes:
      name: its name.
      url: its address; if `by_hand`, of a web page rather than the file.
      megabytes: its size, rounded.
      licence: its license, abbreviated.
      role: what it is used as: "generator", "encoder", "invertibility", "segmenter" or "edits".
      network: the network that it holds, a key of `samjax.io.checkpoints.NETWORKS`; "" for edits.
      sha256: its hash, if its authors state one; otherwise the hash of the first download counts.
      by_hand: whether it can be downloaded with a browser only.
    """

    name: str
    url: str
    megabytes: float
    licence: str
    role: str
    network: str = ""
    sha256: str | None = None
    by_hand: bool = False

    @property
    def size(self) -> str:
        """The size for people, such as "357 MB"."""
        return f"{self.megabytes:.0f} MB" if self.megabytes >= 1 else f"{1000 * self.megabytes:.0f} kB"

    @property
    def plain_http(self) -> bool:
        """Whether its address is not https: then anyone between the host and here could change the file."""
        return self.url.startswith("http:")


def _edits(category: str, names: str) -> tuple[WeightFile, ...]:
    megabytes = {"cars": 0.033, "faces": 0.037, "cats": 0.029}[category]
    return tuple(
        WeightFile(f"csc_{name}.npy", f"{_EDITS}/{category}/csc_{name}.npy", megabytes, _SAM_LICENCE, "edits")
        for name in names.split()
    )


CATEGORY_FILES: Mapping[str, tuple[WeightFile, ...]] = {
    "cars": (
        WeightFile(
            "stylegan2-car-config-f.pkl", f"{_NVIDIA}/stylegan2-car-config-f.pkl", 357, _NVIDIA_LICENCE, "generator",
            "generator",
        ),
        WeightFile(
            "e4e_cars_encode.pt", f"{_SAM}/e4e_cars_encode.pt", 1100, "MIT (code); weights by the authors of SAM",
            "encoder", "e4e",
        ),
        WeightFile(
            "invertibility_cars_sg2.pt", f"{_SAM}/invertibility_cars_sg2.pt", 238, _SAM_LICENCE, "invertibility",
            "invertibility",
        ),
        WeightFile(
            "encoder_epoch_20.pth", f"{_ADE20K}/encoder_epoch_20.pth", 95, "BSD-3-Clause", "segmenter", "ade20k"
        ),
        WeightFile(
            "decoder_epoch_20.pth", f"{_ADE20K}/decoder_epoch_20.pth", 112, "BSD-3-Clause", "segmenter", "ade20k"
        ),
        *_edits("cars", "black blue model_t muscle rims snow starwars suv windows_closed windows_open"),
    ),
    "faces": (
        WeightFile(
            "stylegan2-ffhq-config-f.pkl", f"{_NVIDIA}/stylegan2-ffhq-config-f.pkl", 364, _NVIDIA_LICENCE, "generator",
            "generator",
        ),
        WeightFile(
            "e4e_ffhq_encode.pt", f"{_SAM}/e4e_ffhq_encode.pt", 1200, "MIT (code); weights by the authors of e4e",
            "encoder", "e4e",
        ),
        WeightFile(
            "invertibility_faces_sg2.pt", f"{_SAM}/invertibility_faces_sg2.pt", 238, _SAM_LICENCE, "invertibility",
            "invertibility",
        ),
        WeightFile(
            "79999_iter.pth", "https://drive.google.com/open?id=154JgKpzCPW82qINcVieuPH3fZ2e0P812", 53, "MIT",
            "segmenter", "bisenet", by_hand=True,
        ),
        *_edits(
            "faces",
            "eyebrows_thick eyebrows_thin glasses_add glasses_remove laughing nose_big nose_small old sad young",
        ),
    ),
    "cats": (
        WeightFile(
            "stylegan2-cat-config-f_sg2adapyt.pkl", f"{_SAM}/stylegan2-cat-config-f_sg2adapyt.pkl", 345,
            _NVIDIA_LICENCE, "generator", "generator",
        ),
        WeightFile(
            "e4e_lsuncats_encode.pt", f"{_SAM}/e4e_lsuncats_encode.pt", 1000, _SAM_LICENCE, "encoder", "e4e"
        ),
        WeightFile(
            "invertibility_lsuncats_sg2.pt", f"{_SAM}/invertibility_lsuncats_sg2.pt", 238, _SAM_LICENCE,
            "invertibility", "invertibility",
        ),
        WeightFile(
            "model_final_cafdb1.pkl", f"{_DETECTRON2}/model_final_cafdb1.pkl", 261, "CC BY-SA 3.0 (Detectron2)",
            "segmenter", "mask_rcnn",
        ),
        *_edits("cats", "egyptian eyes_large eyes_small nose_pink siamese surprised"),
    ),
}  # fmt: skip
"""Every file of each official category."""


def cache_folder() -> Path:
    """The directory of downloads and converted networks: SAMJAX_CACHE, or `samjax` in the user's cache directory."""
    if given := os.environ.get("SAMJAX_CACHE"):
        return Path(given)
    import pooch

    return Path(pooch.os_cache("samjax"))


def find(file: WeightFile, category: str, folders: Sequence[Path]) -> Path | None:
    """Finds a file in the first of several directories that has it.

    Args:
      file: from `CATEGORY_FILES`.
      category: the category it belongs to.
      folders: where to look, also in their `ckpt/`, `CATEGORY/` and `edits/CATEGORY/`, as in the authors' repository.

    Returns:
      Its path, or None.
    """
    inside = ("edits/" + category, category) if file.role == "edits" else ("", "ckpt")
    for folder in folders:
        for part in inside:
            if (path := folder / part / file.name).is_file():
                return path
    return None


def find_edits(category: str, weights: Path | None = None, cache: Path | None = None) -> Path | None:
    """Finds the directory with a category's directions.

    Args:
      category: a key of `CATEGORY_FILES`.
      weights: a directory with files under their authors' names, which is searched first.
      cache: default: `cache_folder()`.

    Returns:
      The directory that holds the first of the category's directions that is found, or None.

    Raises:
      UserError: a downloaded direction has changed since; see `verify`.
    """
    folders = [*([weights] if weights else []), (cache or cache_folder()) / "downloads"]
    edits = [file for file in CATEGORY_FILES[category] if file.role == "edits"]
    found = (find(file, category, folders) for file in edits)
    directory = next((path.parent for path in found if path is not None), None)
    for file in edits:
        if directory == cached(file, category, cache).parent and cached(file, category, cache).is_file():
            verify(file, category, cache)
    return directory


def cached(file: WeightFile, category: str, cache: Path | None = None) -> Path:
    """The path of a file in the cache, whether it exists or not.

    Args:
      file: from `CATEGORY_FILES`.
      category: the category it belongs to; edits of different categories may have the same name.
      cache: default: `cache_folder()`.
    """
    folder = (cache or cache_folder()) / "downloads"
    return folder / (f"edits/{category}" if file.role == "edits" else "") / file.name


def converted(category: str, role: str, cache: Path | None = None) -> Path:
    """The directory where a category's converted network is kept, whether it exists or not.

    Args:
      category: a key of `CATEGORY_FILES`.
      role: "generator", "encoder", "invertibility" or "segmenter".
      cache: default: `cache_folder()`.
    """
    (network,) = {file.network for file in CATEGORY_FILES[category] if file.role == role}
    # Categories may share a segmenter, so it is kept under its own name.
    name = network if role == "segmenter" else f"{category}_{role}"
    return (cache or cache_folder()) / "converted" / name


def find_converted(category: str, role: str, cache: Path | None = None) -> Path:
    """Finds a category's converted network.

    Args:
      category: a key of `CATEGORY_FILES`.
      role: "generator", "encoder", "invertibility" or "segmenter".
      cache: default: `cache_folder()`.

    Returns:
      Its directory; see `samjax.io.checkpoints.load_network`.

    Raises:
      UserError: if it is missing.
    """
    from samjax.io import checkpoints

    path = converted(category, role, cache)
    if checkpoints.network_at(path) is None:
        raise UserError(
            f"the {role} of the category {category} has not been downloaded: fetch it with"
            f" `python -m ckpt_convert get {category}`"
        )
    return path


def missing(category: str, absent: Sequence[WeightFile], reasons: Sequence[str] = ()) -> UserError:
    """The error for files that cannot be found; it lists where to get each and where to put it."""
    details = []
    for file in absent:
        by_hand = "; with a browser: its host rejects other programs" if file.by_hand else ""
        where = f"edits/{category}/" if file.role == "edits" else ""
        details.append(f"DIR/{where}{file.name} from {file.url} ({file.size}; {file.licence}{by_hand})")
    count = "a file" if len(absent) == 1 else f"{len(absent)} files"
    return UserError(
        f"{count} of the category {category} cannot be found: fetch all with `python -m ckpt_convert get {category}`,"
        " or put them into a directory DIR and give --weights DIR:",
        [*details, *reasons],
    )


# --- downloads ---

NO_CONNECTION = "no connection"
"""The end of the message if a host cannot be reached at all."""


class _IncompleteDownload(OSError):
    """A download that ended early."""


class _Pin(NamedTuple):
    """What is recorded of a cached file: its hash, and its size in bytes and time of change in nanoseconds then.

    The latter are None in records of earlier versions.
    """

    sha256: str
    size: int | None = None
    modified: int | None = None


def _host_lies(file: WeightFile, what: str) -> UserError:
    return UserError(f"{file.url} {what}: nothing was kept; download it with a browser, and give --weights")


def check_redirect(file: WeightFile, source: str, target: str) -> None:
    """Checks where a host sends a download.

    Args:
      file: the file.
      source: the address that redirects.
      target: where to, absolute or relative to `source`.

    Raises:
      UserError: it is neither https nor http, or it is http although the registry's address is not.
    """
    try:
        scheme = urllib.parse.urlsplit(urllib.parse.urljoin(source, target)).scheme
    except ValueError:
        scheme = ""
    if scheme not in (("https", "http") if file.plain_http else ("https",)):
        raise _host_lies(file, f"redirects to {target[:80]!r}, which is not https")


def _extent(file: WeightFile, response: requests.Response, have: int) -> tuple[int, int]:
    """The first byte and the size of the whole file in a response, by its headers, checked against each other.

    Args:
      file: the file.
      response: a successful response.
      have: how many bytes are here already; only what follows was asked for.

    Raises:
      UserError: the size is not stated or far from the registry's, the file is encoded, or it is another part.
    """
    headers, stated = response.headers, file.megabytes * 1e6
    if "text/html" in headers.get("Content-Type", ""):
        raise UserError(f"{file.url} gave a web page instead of the file")
    if (encoding := headers.get("Content-Encoding", "identity").lower()) != "identity":
        raise _host_lies(file, f"is sent encoded ({encoding[:20]!r}), which was not asked for")
    length = headers.get("Content-Length", "")
    if "Transfer-Encoding" in headers or not re.fullmatch("[0-9]{1,15}", length):
        raise _host_lies(file, "is sent without its length, so that a part could not be told from the whole")
    first, size = 0, int(length)
    if response.status_code != 200:
        found = re.fullmatch("bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", headers.get("Content-Range", ""))
        first, last, size = map(int, found.groups()) if found else (-1, 0, 0)
        if response.status_code != 206 or (first, last + 1, size - first) != (have, size, int(length)):
            raise _host_lies(file, "gave another part of the file than was asked for")
    if not stated / 2 <= size <= 2 * stated:
        raise _host_lies(file, f"has {size:,} bytes rather than about {file.size}")
    return first, size


class _Resuming:
    """A downloader for pooch that resumes an interrupted download, whose bytes are in `part`."""

    def __init__(self, file: WeightFile, part: Path) -> None:
        self.file, self.part = file, part
        self.state = part.with_suffix(".state")  # the ETag or date of the file

    def __call__(self, url: str, output_file: Any, _: Any) -> None:
        import requests
        from tqdm import tqdm

        have = self.part.stat().st_size if self.part.exists() and self.state.exists() else 0
        with requests.Session() as session:
            session.max_redirects = 5
            response = self._ask(session, url, have)
            if response.status_code == 416:  # the part was complete, or the file has changed: start again
                response.close()
                response = self._ask(session, url, 0)
            with response:
                response.raise_for_status()
                try:
                    have, total = _extent(self.file, response, have)
                except UserError:
                    self._forget()
                    raise
                self.state.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
                if not self.state.read_text():
                    self.state.unlink()  # without it a changed file could not be detected: not resumed
                with (
                    self.part.open("ab" if have else "wb") as out,
                    tqdm(desc=self.file.name, total=total, initial=have, unit="B", unit_scale=True) as bar,
                    contextlib.suppress(requests.exceptions.ChunkedEncodingError, requests.ConnectionError),
                ):  # fmt: skip
                    for chunk in response.iter_content(2**16):
                        out.write(chunk)
                        bar.update(len(chunk))
        size = self.part.stat().st_size
        if size != total:
            raise _IncompleteDownload(
                f"only {size:,} of {total:,} bytes arrived; they are kept, and the same command resumes"
            )
        os.replace(self.part, output_file)
        self._forget()

    def _ask(self, session: requests.Session, url: str, have: int) -> requests.Response:
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": self.state.read_text()}
        return session.get(url, headers=headers, stream=True, timeout=60, hooks={"response": self._check})

    def _check(self, response: requests.Response, **_: Any) -> None:
        if response.is_redirect:
            check_redirect(self.file, response.url, response.headers["Location"])

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)


def _read_pins(path: Path) -> dict[str, _Pin]:
    try:
        found = json.loads(path.read_text("utf-8"))
        return {key: _Pin(pin) if isinstance(pin, str) else _Pin(**pin) for key, pin in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: delete it, and the downloads beside it") from error


def _pin(path: Path, downloads: Path, sha256: str) -> None:
    """Records the hash, size and time of change of the cached file `path`.

    Raises:
      UserError: the record cannot be written.
    """
    record, status = downloads / "hashes.json", path.stat()
    with files.locked(downloads / ".hashes.lock", wait=lambda: None):
        pins = _read_pins(record) | {_key(path, downloads): _Pin(sha256, status.st_size, status.st_mtime_ns)}
        files.write_json(record, {key: pin._asdict() for key, pin in pins.items()})


def _key(path: Path, downloads: Path) -> str:
    return path.relative_to(downloads).as_posix()


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def verify(file: WeightFile, category: str, cache: Path | None = None, *, full: bool = False) -> None:
    """Checks that a file in the cache is the one that was downloaded.

    Its size and time of change must be the recorded ones. If one of them has changed, its hash must be the recorded
    one, which then is recorded with them. The first hash of a file that was put there by hand counts.

    Args:
      file: from `CATEGORY_FILES`.
      category: the category it belongs to.
      cache: default: `cache_folder()`.
      full: whether to check the hash in any case.

    Raises:
      UserError: it has another hash, or it cannot be read.
    """
    path = cached(file, category, cache)
    downloads = (cache or cache_folder()) / "downloads"
    pin = _read_pins(downloads / "hashes.json").get(_key(path, downloads))
    try:
        status = path.stat()
        known = pin is not None and pin[1:] == (status.st_size, status.st_mtime_ns)
        if known and not full:
            return
        found = _sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    expected = file.sha256 or (pin.sha256 if pin else found)
    if found != expected:
        raise UserError(
            f"{path} has changed since it was downloaded (expected sha256 {expected}, found {found}): delete it, and"
            f" fetch it again with `python -m ckpt_convert get {category}`"
        )
    if not known:
        with contextlib.suppress(UserError):  # a cache that may only be read
            _pin(path, downloads, found)


def download(
    file: WeightFile,
    category: str,
    cache: Path,
    *,
    notify: Callable[[str], None] = lambda _: None,
) -> Path:
    """Downloads a file into the cache, unless it is there.

    Its hash must be the stated one, or if none is stated, the one of its first download. If another process is
    downloading the file, this waits for it.

    Args:
      file: from `CATEGORY_FILES`.
      category: the category it belongs to.
      cache: see `cache_folder`.
      notify: called with a line of text if there is something to wait for.

    Returns:
      Its path.

    Raises:
      UserError: its host cannot be reached, lacks it, does not state its size, or gives something else; its hash has
        changed; or it cannot be written.
    """
    path = cached(file, category, cache)
    if path.is_file():
        return path
    if file.by_hand:
        raise UserError(f"{file.name} can be downloaded from {file.url} with a browser only: save it as {path}")
    files.output_directory(path.parent)
    try:
        with files.locked(
            path.with_name(f".{file.name}.lock"), wait=lambda: notify(f"waiting for another download of {file.name}")
        ):
            if not path.is_file():  # the other one may have failed
                _download(file, path, cache / "downloads")
    except OSError as error:
        raise UserError(f"{file.url} cannot be fetched: {_reason(error)}") from error
    return path


def _download(file: WeightFile, path: Path, downloads: Path) -> None:
    import pooch
    import requests

    record, key = downloads / "hashes.json", _key(path, downloads)
    pin = _read_pins(record).get(key)
    expected = file.sha256 or (pin.sha256 if pin else None)
    get = _Resuming(file, path.with_name(f"{file.name}.part"))
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # it would print the hash of every file
    try:
        pooch.retrieve(file.url, f"sha256:{expected}" if expected else None, file.name, path.parent, downloader=get)  # type: ignore[arg-type]
    except (requests.RequestException, requests.packages.urllib3.exceptions.HTTPError) as error:  # type: ignore[attr-defined]
        raise UserError(f"{file.url} cannot be fetched: {_reason(error)}") from error
    except ValueError as error:
        raise UserError(
            f"{file.url} has changed (expected sha256 {expected}): nothing was kept; if the change"
            f" is intended, delete {key} from {record}"
        ) from error
    finally:
        logger.setLevel(level)
    try:
        _pin(path, downloads, expected or _sha256(path))
    except UserError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the host says {error.response.status_code}"
    if isinstance(error, requests.ConnectionError):
        return NO_CONNECTION
    return str(error).split("\n")[0][:160] or type(error).__name__
