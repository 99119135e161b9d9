"""Names from files become names of results; output directories are of one program at a time, and stay."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samjax import cli, evaluation
from samjax.errors import UserError
from samjax.io import files, images


@pytest.mark.parametrize(
    "name", ["photo", "IMG_0001", "photo (1)", "Ein Bild, groß", "日本語", "é" * 60, "a.b-c+d", "x" * 120]
)
def test_safe_names_stay_as_they_are(name):
    assert files.safe_name(name) == name


HOSTILE = [
    "..", ".", "...", " ", ".hidden", "a/../b", "../../etc/passwd", "a\\b", "C:", "a\n", "a\0b", "a\x1b[2J", "con",
    "CON.x", "nul .txt", "LPT1", "a.", "a ", "x" * 255, "é" * 126, "\udcff", "\u202egnp", "a\u0000", "*?", "-\ud800",
]  # fmt: skip


def is_safe(name: str) -> bool:
    stem = name.partition(".")[0].strip().upper()
    return (
        0 < len(name.encode()) <= files.MAX_NAME_BYTES
        and name.strip(" .") == name
        and not set(name) & set('/\\:*?"<>|')
        and name.isprintable()
        and stem not in ("CON", "PRN", "AUX", "NUL", "COM1", "LPT1")
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_other_names_are_made_safe(name):
    assert is_safe(files.safe_name(name))


def test_different_names_stay_different():
    assert len({files.safe_name(name) for name in HOSTILE}) == len(HOSTILE)
    assert files.safe_name("") == "image"
    assert files.safe_name("..").startswith("image_")


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_gives_a_safe_name(name):
    made = files.safe_name(name)
    assert is_safe(made)
    assert files.safe_name(made) == made


def test_results_of_an_image_stay_in_the_directory(tmp_path):
    """An image called `...png`, whose stem is the parent directory."""
    out = tmp_path / "a" / "out"
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("...png", "con.png", "b.png"):
        images.save_png(folder / name, np.zeros((16, 16, 3), np.uint8))
    examples = [evaluation.Example(path.stem, path, None) for path in sorted(folder.iterdir())]
    found = evaluation.run(examples, lambda example: {"name": example.name}, out, "0", lambda values: values)
    assert set(found) == {"..", "con", "b"}
    assert len(list(out.iterdir())) == 3
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# --- one program at a time ---

HOLD = """
import sys
from samjax.io import files
with files.exclusive_directory(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate()
    assert process.returncode == 0


@dataclasses.dataclass(frozen=True)
class Arguments:
    output_path: Path


def run(monkeypatch: pytest.MonkeyPatch, main, directory: Path) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["program", "--output_path", str(directory)])
    try:
        cli.run(Arguments, main)
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_second_program_says_so_and_stops(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    process = hold(out)
    assert run(monkeypatch, lambda args: cli.output_directory(args.output_path), out) == 2
    error = capsys.readouterr().err
    assert error == f"error: {out} is in use by another program: wait until it ends, or choose another directory\n"
    finish(process)
    assert os.listdir(out) == []
    assert run(monkeypatch, lambda args: files.write_text(cli.output_directory(args.output_path) / "a", "x"), out) == 0
    assert os.listdir(out) == ["a"]


def test_a_program_that_was_killed_blocks_nobody(tmp_path):
    process = hold(tmp_path)
    process.kill()
    process.communicate()
    assert os.listdir(tmp_path) == [".lock"]
    with files.exclusive_directory(tmp_path):
        files.write_text(tmp_path / "a", "x")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("what", ["out", "out/sub", "out/sub/a.txt"])
@pytest.mark.parametrize("again", [False, True])
def test_results_that_are_removed_midway_are_an_error(tmp_path, monkeypatch, capsys, what, again):
    def main(args: Arguments) -> None:
        out = cli.output_directory(args.output_path)
        files.write_text(out / "sub" / "a.txt", "x")
        path = tmp_path / what
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if again:
            files.write_text(out / "sub" / "b.txt", "x")

    assert run(monkeypatch, main, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "removed" in error
    assert error.count("\n") == 1
    assert what != "out" or not (tmp_path / "out").exists()


def replace(out: Path) -> None:
    with files.exclusive_directory(out):
        out.rename(out.with_name("old"))
        out.mkdir()
        (out / ".lock").touch()
        files.write_text(out / "a", "x")


def test_a_directory_that_is_replaced_midway_is_an_error(tmp_path):
    out = tmp_path / "out"
    with files.exclusive_directory(tmp_path), pytest.raises(UserError, match="was removed or replaced"):
        replace(out)
    assert not (out / "a").exists()


def test_what_an_error_leaves_empty_is_removed(tmp_path):
    with pytest.raises(UserError), files.exclusive_directory(tmp_path / "a" / "b"):
        raise UserError("no")
    assert not list(tmp_path.iterdir())
