"""Downloading official files from a local server that interrupts, changes or lacks them, and preparing options."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_convert import __main__ as program
from ckpt_convert import get
from samjax.config import Options
from samjax.errors import UserError
from samjax.io import checkpoints, registry
from samjax.io.registry import WeightFile

GOLDEN = Path(__file__).parent / "golden"
NAME = "tensorflow_A.pkl"


class Server(http.server.ThreadingHTTPServer):
    """Serves `folder`, with ranges; once, it closes the connection after `cut` bytes.

    `changes` replaces headers of its responses, or removes them if None; `redirect` is where it sends everybody.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.cut, self.asked = folder, 0, list[str]()
        self.changes, self.redirect, self.encodings = dict[str, str | None](), "", set[str | None]()
        self.delay = 0.0

    def handle_error(self, *_: Any) -> None:
        pass  # of interrupted connections

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.server.folder / self.path[1:]
        if not path.is_file():
            self.send_error(404)
            return
        data, first = path.read_bytes(), 0
        tag = f'"{hash(data)}"'
        asked = self.headers.get("Range", "")
        self.server.asked.append(asked)
        self.server.encodings.add(self.headers.get("Accept-Encoding"))
        time.sleep(self.server.delay)
        if self.server.redirect:
            self.send_response(302)
            self.send_header("Location", self.server.redirect)
            self.end_headers()
            return
        if asked and self.headers.get("If-Range") == tag:
            first = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if first else 200)
        headers: dict[str, str | None] = {
            "Content-Type": "application/octet-stream",
            "ETag": tag,
            "Content-Length": str(len(data) - first),
            "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}" if first else None,
        }
        for name, value in (headers | self.server.changes).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if "Transfer-Encoding" in self.server.changes:  # one chunk, and no end
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data) // 2, data[: len(data) // 2]))
            return
        if cut := self.server.cut:
            self.server.cut = 0
            self.wfile.write(data[first : first + cut])
            return
        self.wfile.write(data[first:])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(GOLDEN / NAME, folder)
    np.save(folder / "up.npy", np.zeros((1, 10, 32), np.float32))
    with Server(folder) as running:
        thread = threading.Thread(target=functools.partial(running.serve_forever, poll_interval=0.01))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def category(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A category of one generator and one direction."""
    files = (
        WeightFile(NAME, server.url(NAME), 0.7, "free", "generator", "generator"),
        WeightFile("up.npy", server.url("up.npy"), 0.001, "free", "edits"),
    )
    monkeypatch.setattr(registry, "CATEGORY_FILES", {"tests": files})
    return "tests"


ROLES = ("generator", "edits")


def fetch(category: str, cache: Path, **options: Any) -> tuple[dict[str, Path], list[str]]:
    said: list[str] = []
    return get.get(category, cache=cache, roles=ROLES, notify=said.append, **options), said


def test_files_are_downloaded_and_converted_once(category, server, tmp_path):
    found, said = fetch(category, tmp_path / "cache")
    assert len(said) == 3  # two files, one conversion
    assert "700 kB; free" in said[0]
    assert checkpoints.load_generator(found["generator"]).config.img_resolution == 64
    assert (found["edits"] / "up.npy").exists()
    asked = len(server.asked)
    assert fetch(category, tmp_path / "cache") == (found, [])
    assert len(server.asked) == asked
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_an_interrupted_download_is_resumed(category, server, tmp_path):
    server.cut = 100_000
    with pytest.raises(UserError, match="a file of the category tests cannot be found") as caught:
        fetch(category, tmp_path / "cache")
    assert "65,536 of" in caught.value.details[-1]
    downloads = tmp_path / "cache" / "downloads"
    assert not (downloads / NAME).exists()
    assert (downloads / f"{NAME}.part").stat().st_size == 65_536  # whole chunks
    fetch(category, tmp_path / "cache")
    assert server.asked[-1] == "bytes=65536-"
    assert (downloads / NAME).read_bytes() == (GOLDEN / NAME).read_bytes()


def test_a_file_that_changed_meanwhile_is_downloaded_from_the_start(category, server, tmp_path):
    server.cut = 100_000
    with pytest.raises(UserError):
        fetch(category, tmp_path / "cache")
    shutil.copy(GOLDEN / "nvidia_A.pkl", server.folder / NAME)
    fetch(category, tmp_path / "cache")
    assert (tmp_path / "cache" / "downloads" / NAME).read_bytes() == (GOLDEN / "nvidia_A.pkl").read_bytes()


def test_later_downloads_must_have_the_first_hash(category, server, tmp_path):
    fetch(category, tmp_path / "cache")
    downloads = tmp_path / "cache" / "downloads"
    assert len(json.loads((downloads / "hashes.json").read_text())[NAME]["sha256"]) == 64
    (downloads / NAME).unlink()
    fetch(category, tmp_path / "cache")  # the same file is accepted
    (downloads / NAME).unlink()
    shutil.copy(GOLDEN / "nvidia_A.pkl", server.folder / NAME)
    with pytest.raises(UserError) as caught:
        fetch(category, tmp_path / "cache")
    assert "has changed (expected sha256" in caught.value.details[-1]
    assert not (downloads / NAME).exists()
    assert not list(downloads.glob("*.part"))


def test_the_first_download_must_have_the_stated_hash(category, server, tmp_path, monkeypatch):
    (file, edit) = registry.CATEGORY_FILES[category]
    wrong = WeightFile(file.name, file.url, 1, "free", file.role, file.network, sha256="0" * 64)
    monkeypatch.setattr(registry, "CATEGORY_FILES", {category: (wrong, edit)})
    with pytest.raises(UserError) as caught:
        fetch(category, tmp_path / "cache")
    assert "expected sha256 000" in caught.value.details[-1]


def test_a_page_instead_of_the_file_and_a_missing_one(category, server, tmp_path):
    server.changes = {"Content-Type": "text/html; charset=utf-8"}
    (server.folder / "up.npy").unlink()
    with pytest.raises(UserError, match="2 files") as caught:
        fetch(category, tmp_path / "cache")
    assert "gave a web page" in caught.value.details[-2]
    assert "the host says 404" in caught.value.details[-1]
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "downloads").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"Content-Length": None, "Transfer-Encoding": "chunked"}, "without its length"),  # and cut short
        ({"Content-Length": None}, "without its length"),
        ({"Content-Length": "5, 6"}, "cannot be fetched"),
        ({"Content-Encoding": "gzip"}, "is sent encoded ('gzip')"),
        ({"Content-Length": "2000000000"}, "has 2,000,000,000 bytes rather than about 700 kB"),
        ({"Content-Length": "300"}, "has 300 bytes rather than about 700 kB"),
    ],
)
def test_a_response_that_cannot_be_checked_leaves_nothing(category, server, tmp_path, changes, says):
    server.changes = changes
    with pytest.raises(UserError) as caught:
        fetch(category, tmp_path)
    assert any(says in line for line in caught.value.details), caught.value.details
    assert kept(tmp_path) == []
    assert server.encodings == {"identity"}


@pytest.mark.parametrize(
    "other", [None, "bytes 0-737655/737656", "bytes 65536-737654/737656", "bytes 65536-737655/737657", "bytes */737656"]
)
def test_another_part_than_was_asked_for_is_not_appended(category, server, tmp_path, other):
    server.cut = 100_000
    with pytest.raises(UserError):
        fetch(category, tmp_path)
    server.changes = {"Content-Range": other}
    with pytest.raises(UserError) as caught:
        fetch(category, tmp_path)
    assert "another part of the file" in caught.value.details[-1]
    server.changes = {}
    fetch(category, tmp_path)
    assert server.asked[-1] == ""  # from the start
    assert (tmp_path / "downloads" / NAME).read_bytes() == (GOLDEN / NAME).read_bytes()


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "http://[", "loop"])
def test_redirects_lead_to_web_servers_only_and_end(category, server, tmp_path, target):
    server.redirect = target
    with pytest.raises(UserError) as caught:
        fetch(category, tmp_path)
    assert "cannot be fetched" in caught.value.details[-1] or "redirects to" in caught.value.details[-1]
    assert kept(tmp_path) == []
    assert len(server.asked) <= 12  # two files, each with five redirects


def test_a_redirect_is_no_less_safe_than_the_registry():
    safe = WeightFile("a", "https://host/a", 1, "free", "generator")
    registry.check_redirect(safe, safe.url, "/b")
    registry.check_redirect(safe, safe.url, "HTTPS://host/other/a")
    with pytest.raises(UserError, match="which is not https"):
        registry.check_redirect(safe, safe.url, "http://host/a")
    plain = dataclasses.replace(safe, url="http://host/a")
    registry.check_redirect(plain, plain.url, "http://host/other/a")
    assert plain.plain_http
    assert not safe.plain_http
    assert {
        file.name for files in registry.CATEGORY_FILES.values() for file in files if file.plain_http
    } == {"encoder_epoch_20.pth", "decoder_epoch_20.pth"}  # fmt: skip


def test_plain_http_is_said(category, tmp_path):
    _, said = fetch(category, tmp_path)
    assert "over plain http" in said[0]


def test_two_downloads_at_once_wait_for_each_other(category, server, tmp_path):
    server.delay = 0.2
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / f".{NAME}.lock").touch()  # of a process that was killed
    said: list[str] = []
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(get.get, category, None, tmp_path, roles=ROLES, notify=said.append) for _ in range(2)]
    assert both[0].result() == both[1].result()
    assert len(server.asked) == 2  # two files, once each
    assert any(line.startswith("waiting for another download of") for line in said)
    assert sum(line.startswith("converting") for line in said) == 1
    assert not list(tmp_path.rglob("*.lock"))


def test_a_cached_file_that_changes_is_an_error(category, tmp_path):
    fetch(category, tmp_path)
    path = tmp_path / "downloads" / NAME
    data, status = path.read_bytes(), path.stat()
    os.utime(path, (1, 1))  # another time, the same content
    fetch(category, tmp_path)
    assert json.loads((tmp_path / "downloads" / "hashes.json").read_text())[NAME]["modified"] == 10**9
    for content, times in ((data[:-1], None), (data[:-1] + b"x", None), (data + b"x", (1, 1))):
        path.write_bytes(content)
        if times:
            os.utime(path, times)
        with pytest.raises(UserError, match="has changed since it was downloaded"):
            fetch(category, tmp_path)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    fetch(category, tmp_path)


def test_verify_checks_the_hashes(category, tmp_path, capsys):
    fetch(category, tmp_path)
    direction = tmp_path / "downloads" / "edits" / "tests" / "up.npy"
    assert [line for line in fetch(category, tmp_path, verify=True)[1]] == [
        f"{NAME}: as it was downloaded", "up.npy: as it was downloaded",
    ]  # fmt: skip
    status = direction.stat()
    direction.write_bytes(direction.read_bytes()[:-1] + b"\1")
    os.utime(direction, ns=(status.st_atime_ns, status.st_mtime_ns))
    fetch(category, tmp_path)  # not noticed
    with pytest.raises(UserError, match=r"up\.npy has changed since it was downloaded"):
        fetch(category, tmp_path, verify=True)
    os.utime(direction)
    with pytest.raises(UserError, match=r"up\.npy has changed"):
        registry.find_edits(category, None, tmp_path)
    with pytest.raises(SystemExit):
        program.main(["get", "--help"])
    assert "--verify" in capsys.readouterr().out


def test_records_of_earlier_versions_are_completed(category, tmp_path):
    fetch(category, tmp_path)
    record = tmp_path / "downloads" / "hashes.json"
    pins = json.loads(record.read_text())
    record.write_text(json.dumps({key: pin["sha256"] for key, pin in pins.items()}))
    fetch(category, tmp_path)
    assert json.loads(record.read_text()) == pins
    record.write_text("[1]")
    with pytest.raises(UserError, match="is damaged"):
        fetch(category, tmp_path)


def test_the_users_directory_comes_first(category, server, tmp_path):
    own = tmp_path / "own"
    (own / "edits" / "tests").mkdir(parents=True)
    (own / "ckpt").mkdir()
    shutil.copy(GOLDEN / NAME, own / "ckpt")
    shutil.copy(server.folder / "up.npy", own / "edits" / "tests")
    found, _ = fetch(category, tmp_path / "cache", weights=own, fetch=False)
    assert found["edits"] == own / "edits" / "tests"
    assert not server.asked


def test_damaged_files_leave_the_cache_whole(category, server, tmp_path):
    own, data = tmp_path / "own", (GOLDEN / NAME).read_bytes()
    own.mkdir()
    shutil.copy(server.folder / "up.npy", own)
    (own / "tests").mkdir()
    shutil.move(own / "up.npy", own / "tests")
    (own / NAME).write_bytes(data)
    good, _ = fetch(category, tmp_path / "cache", weights=own)
    (own / NAME).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=NAME):
        fetch(category, tmp_path / "cache", weights=own)
    assert checkpoints.load_generator(good["generator"]).config.img_resolution == 64
    (own / NAME).write_bytes(data)
    _, said = fetch(category, tmp_path / "cache", weights=own)
    assert said == [f"converting {NAME}"]


def test_another_network_under_the_name_is_an_error(category, server, tmp_path):
    own = tmp_path / "own"
    (own / "tests").mkdir(parents=True)
    shutil.copy(server.folder / "up.npy", own / "tests")
    (own / NAME).write_bytes(b"\x80\x02}.")
    with pytest.raises(UserError, match="generator"):
        fetch(category, tmp_path / "cache", weights=own)


@pytest.mark.parametrize("category", ["cars", "faces", "cats"])
def test_without_files_and_network_one_message_lists_all(category, tmp_path, monkeypatch, capsys):
    nowhere = "http://127.0.0.1:9/"  # no server listens there
    files = registry.CATEGORY_FILES[category]
    offline = tuple(
        WeightFile(f.name, nowhere + f.name, f.megabytes, f.licence, f.role, f.network, by_hand=f.by_hand)
        for f in files
    )
    monkeypatch.setattr(registry, "CATEGORY_FILES", {category: offline})
    assert program.main(["get", category, "--cache", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for file in offline:
        assert f"{file.name} from {file.url}" in error
    assert "--weights DIR" in error
    assert "no connection" in error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_registry_is_complete():
    for category, files in registry.CATEGORY_FILES.items():
        assert {file.role for file in files} == {*get.ROLES, "edits"}, category
        assert all(file.url.startswith("http") and file.licence and file.megabytes > 0 for file in files)
        assert all(file.network in checkpoints.NETWORKS or file.role == "edits" for file in files)
        assert len({file.name for file in files}) == len(files)
    assert [file.name for file in registry.CATEGORY_FILES["faces"] if file.by_hand] == ["79999_iter.pth"]


def test_a_file_as_distributed_is_converted_once(tmp_path):
    said: list[str] = []
    folder = get.ready(GOLDEN / NAME, "generator", tmp_path, notify=said.append)
    assert get.ready(GOLDEN / NAME, "generator", tmp_path, notify=said.append) == folder
    assert len(said) == 1
    assert get.ready(folder, "generator", tmp_path) == folder
    with pytest.raises(UserError, match="no e4e encoder"):
        get.ready(GOLDEN / NAME, "e4e", tmp_path)


@pytest.mark.parametrize("name", ["net.PKL", "net"])
def test_a_file_as_distributed_may_have_any_name(name, tmp_path):
    shutil.copy(GOLDEN / "rosinality_A.pt", tmp_path / name)
    with pytest.raises(UserError):
        checkpoints.load_config(tmp_path / name, "generator")
    folder = get.ready(tmp_path / name, "generator", tmp_path / "cache")
    assert checkpoints.load_config(folder, "generator").img_resolution == 64
    for other in ("none", "none.safetensors"):  # the loader says what is missing
        assert get.ready(tmp_path / other, "generator", tmp_path) == tmp_path / other


def test_a_converted_network_is_found_by_samjax_alone(category, tmp_path):
    with pytest.raises(UserError, match="the generator of the category tests has not been downloaded: fetch it with"):
        registry.find_converted(category, "generator", tmp_path / "cache")
    found, _ = fetch(category, tmp_path / "cache")
    assert registry.find_converted(category, "generator", tmp_path / "cache") == found["generator"]
    assert registry.converted(category, "generator", tmp_path / "cache") == found["generator"]
    assert registry.find_edits(category, None, tmp_path / "cache") == found["edits"]


def test_segmenters_are_kept_by_their_own_name(tmp_path):
    assert registry.converted("cars", "segmenter", tmp_path) == tmp_path / "converted" / "ade20k"
    assert registry.converted("cars", "encoder", tmp_path) == tmp_path / "converted" / "cars_encoder"


# --- preparing options ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_options_that_need_no_files_stay_as_they_are(cache):
    assert get.prepare(Options()) == Options()
    assert not cache.exists()


def test_files_as_distributed_are_replaced_by_converted_ones(cache):
    said: list[str] = []
    options = get.prepare(Options(gan_weights=GOLDEN / NAME, seed=3), notify=said.append)
    assert options.gan_weights is not None
    assert options.gan_weights.parent == cache / "converted"
    assert checkpoints.load_generator(options.gan_weights).config.img_resolution == 64
    assert options == Options(gan_weights=options.gan_weights, seed=3)
    assert get.prepare(options, notify=said.append) == options
    assert said == [f"converting {NAME}"]


def test_networks_of_a_category_are_converted_into_the_cache(cache, tmp_path, monkeypatch):
    files = (
        WeightFile(NAME, "", 0.7, "free", "generator", "generator"),
        WeightFile("up.npy", "", 0.001, "free", "edits"),
    )
    monkeypatch.setattr(registry, "CATEGORY_FILES", {"cars": files})
    own = tmp_path / "own"
    (own / "edits" / "cars").mkdir(parents=True)
    options = Options("cars", own, start="mean", invertibility="measured", segmenter="slic")
    with pytest.raises(UserError, match="a file of the category cars cannot be found"):
        get.prepare(options)
    shutil.copy(GOLDEN / NAME, own)
    np.save(own / "edits" / "cars" / "up.npy", np.zeros((1, 10, 32), np.float32))
    found = get.prepare(options, notify=lambda _: None)
    assert found.edits_folder == own / "edits" / "cars"
    assert checkpoints.load_generator(registry.find_converted("cars", "generator")).config.img_resolution == 64
    assert get.prepare(Options("cars", own, start="mean", invertibility="measured", edits_folder=own), segmenter=False,
                       notify=lambda _: None).edits_folder == own  # fmt: skip


@pytest.mark.parametrize(
    ("options", "segmenter", "message"),
    [
        (Options("faces"), False, "3 files of the category faces cannot be found"),
        (Options("faces"), True, "4 files of the category faces cannot be found"),
        (Options("faces", segmenter="slic"), True, "3 files of the category faces cannot be found"),
        (Options(segmenter="mask_rcnn"), True, "a file of the category cats cannot be found"),
        (Options("custom"), True, "custom needs --gan_weights"),
        (Options(gan_weights=GOLDEN / NAME, start="encoder"), True, "--start encoder needs --e4e_path"),
        (Options(gan_weights=GOLDEN / NAME, invertibility="predicted"), True, "needs --inv_model_path"),
        (Options("cars", gan_weights=GOLDEN / NAME), True, "makes 64 px images, the category cars has 512 px"),
        (Options(gan_weights=Path("none.pkl")), True, r"none\.pkl does not exist"),
        (Options("cats", weights=Path("none")), True, "none is not a directory: give --weights"),
    ],
)
def test_options_that_cannot_be_prepared(options, segmenter, message, cache):
    with pytest.raises(UserError, match=message):
        get.prepare(options, segmenter=segmenter, notify=lambda _: None)
