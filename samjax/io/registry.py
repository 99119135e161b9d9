"""The files of the official categories: their sources, where they are kept, and downloads.

The cache, `cache_folder()`, has two parts: `downloads/` holds the files as they are distributed, with their hashes at
the first download in `hashes.json`, and `converted/` the networks that `python -m ckpt_convert get` made of them. An
interrupted download is resumed; a file gets its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samjax.errors import UserError
from samjax.io import files

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
    """
    folders = [*([weights] if weights else []), (cache or cache_folder()) / "downloads"]
    edits = (file for file in CATEGORY_FILES[category] if file.role == "edits")
    found = (find(file, category, folders) for file in edits)
    return next((path.parent for path in found if path is not None), None)


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


class _Resuming:
    """A downloader for pooch that resumes an interrupted download, whose bytes are in `part`."""

    def __init__(self, part: Path, label: str, progress: bool) -> None:
        self.part, self.label, self.progress = part, label, progress

    def __call__(self, url: str, output_file: Any, _: Any) -> None:
        import requests
        from tqdm import tqdm

        state = self.part.with_suffix(".state")  # the ETag or date of the file
        have = self.part.stat().st_size if self.part.exists() and state.exists() else 0
        headers = {"Range": f"bytes={have}-", "If-Range": state.read_text()} if have else {}
        with requests.get(url, headers=headers, stream=True, timeout=60) as response:
            if response.status_code == 416:  # the part was complete, or the file has changed: start again
                have = 0
                response.close()
                response = requests.get(url, stream=True, timeout=60)
            response.raise_for_status()
            have = have if response.status_code == 206 else 0
            if "text/html" in response.headers.get("Content-Type", ""):
                raise UserError(f"{url} gave a web page instead of the file")
            state.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
            if not state.read_text():
                state.unlink()  # without it a changed file could not be detected: not resumed
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            with (
                self.part.open("ab" if have else "wb") as out,
                tqdm(
                    desc=self.label, total=total, initial=have, unit="B", unit_scale=True, disable=not self.progress
                ) as bar,
                contextlib.suppress(requests.exceptions.ChunkedEncodingError, requests.ConnectionError),
            ):
                for chunk in response.iter_content(2**16):
                    out.write(chunk)
                    bar.update(len(chunk))
        size = self.part.stat().st_size
        if size != total and total is not None:
            raise _IncompleteDownload(
                f"only {size:,} of {total:,} bytes arrived; they are kept, and the same command resumes"
            )
        os.replace(self.part, output_file)
        state.unlink(missing_ok=True)


def _read_hashes(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: delete it, and the downloads beside it") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"{path} is damaged: delete it, and the downloads beside it")
    return found


def download(file: WeightFile, category: str, cache: Path, *, progress: bool = True) -> Path:
    """Downloads a file into the cache, unless it is there.

    Its hash must be the stated one, or if none is stated, the one of its first download.

    Args:
      file: from `CATEGORY_FILES`.
      category: the category it belongs to; edits of different categories may have the same name.
      cache: see `cache_folder`.
      progress: whether to show a progress bar.

    Returns:
      Its path.

    Raises:
      UserError: if its host cannot be reached or lacks it, its hash has changed, or it cannot be written.
    """
    folder = cache / "downloads" / (f"edits/{category}" if file.role == "edits" else "")
    path, record = folder / file.name, cache / "downloads" / "hashes.json"
    key = path.relative_to(cache / "downloads").as_posix()
    if path.is_file():
        return path
    if file.by_hand:
        raise UserError(f"{file.name} can be downloaded from {file.url} with a browser only: save it as {path}")
    hashes = _read_hashes(record)
    expected = file.sha256 or hashes.get(key)
    import pooch
    import requests

    files.output_directory(folder)
    get = _Resuming(folder / f"{file.name}.part", file.name, progress)
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")  # it would print the hash of every file
    try:
        pooch.retrieve(file.url, f"sha256:{expected}" if expected else None, file.name, folder, downloader=get)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(
            f"{file.url} has changed (expected sha256 {expected}): nothing was kept; if the change"
            f" is intended, delete {key} from {record}"
        ) from error
    except (requests.RequestException, OSError) as error:
        raise UserError(f"{file.url} cannot be fetched: {_reason(error)}") from error
    finally:
        logger.setLevel(level)
    if not expected:
        with path.open("rb") as opened:
            hashes[key] = hashlib.file_digest(opened, "sha256").hexdigest()
        try:
            files.write_json(record, hashes)
        except UserError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
    return path


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the host says {error.response.status_code}"
    if isinstance(error, requests.ConnectionError):
        return NO_CONNECTION
    return str(error).split("\n")[0][:160] or type(error).__name__
