"""Directories of images: which files are read, and what is said of the others; HEIC files."""

import warnings

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from samjax.errors import UserError
from samjax.io import folders, images

PIXELS = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)


def test_hidden_files_and_others(tmp_path):
    for name in ("b.txt", "a.TXT", ".c.txt", "._a.txt", "movie.mp4", "README", "x.png", "x.\x1b[m"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.txt").mkdir()
    found, others = folders.list_files(tmp_path, (".txt",))
    assert [path.name for path in found] == ["a.TXT", "b.txt"]
    assert others == rf"{tmp_path}: passed over 4 files: 1 without a suffix, 1 .mp4, 1 .\x1b[m, 1 .png"
    assert folders.list_files(tmp_path, (".txt", ".mp4", "", ".png", ".\x1b[m"))[1] == ""


def test_images_of_every_format_are_found(tmp_path):
    image = Image.fromarray(PIXELS)
    names = ("a.png", "b.JPG", "c.webp", "d.gif", "e.tif", "f.bmp", "g.avif", "h.ppm", "i.tga", "j.jfif", "k.jp2")
    for name in names:
        image.save(tmp_path / name, format="JPEG" if name == "j.jfif" else None)
    image.save(tmp_path / "a_segments.png")
    (tmp_path / "._a.png").write_bytes(b"of macOS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is passed over
        found = images.list_images(tmp_path)
    assert [path.name for path in found] == list(names)
    assert all(images.read_image(path).shape == PIXELS.shape for path in found)
    for name in ("notes.txt", "more.txt", "movie.mp4"):
        (tmp_path / name).write_bytes(b"no image")
    notes = []
    assert images.list_images(tmp_path, notify=notes.append) == found
    assert notes == [f"{tmp_path}: passed over 3 files: 2 .txt, 1 .mp4"]


def test_a_directory_without_images(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        images.list_images(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"holds no images \(PNG, .*\); .* passed over 1 file: 1 .txt"):
        images.list_images(tmp_path)


def test_images_with_the_same_results(tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    with pytest.raises(UserError, match="would have the same results"):
        images.list_images(tmp_path)


def test_heic(tmp_path):
    smooth = np.add.outer(np.arange(64), 2 * np.arange(48))[..., None] + np.zeros(3)
    pillow_heif.from_pillow(Image.fromarray(smooth.astype(np.uint8))).save(tmp_path / "photo.HEIC", quality=95)
    (path,) = images.list_images(tmp_path)
    assert images.image_size(path) == (64, 48)
    error = np.abs(images.read_image(path).astype(int) - smooth)
    assert error.max() <= 8  # the format is lossy
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"photo\.HEIC is damaged"):
        images.read_image(path)


def test_heic_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "OPEN", {name: opener for name, opener in Image.OPEN.items() if name != "HEIF"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(UserError, match=r"photo\.heic is a HEIC image: to read HEIC, pip install pillow-heif, or save"):
        images.read_image(tmp_path / "photo.heic")
    with pytest.raises(UserError, match=r"passed over 1 file: 1 \.heic; to read HEIC, pip install pillow-heif"):
        images.list_images(tmp_path)
