"""What programs say of themselves and of bad flags."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from samjax import cli
from samjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Arguments:
    count: int | None = None
    """Number of things. Default: all of them."""
    names: tuple[str, ...] = ()
    """Their names. Default: those of the files."""
    path: Path = Path("output")
    """Directory of the results."""


def run(monkeypatch, capsys, main, *words: str) -> tuple[int | str | None, str, str]:
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as stop:
        cli.run(Arguments, main)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_help_describes_the_program_and_names_no_empty_defaults(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, print, "--help")
    assert code == 0
    assert "What programs say of themselves" in out
    assert "Default: all of them." in out
    assert "(default: output)" in out
    assert out.count("(default:") == 1
    assert "None" not in out


def test_arguments_are_those_of_the_dataclass(monkeypatch):
    given = []
    monkeypatch.setattr(sys, "argv", ["program", "--count", "3", "--names", "a", "b"])
    cli.run(Arguments, given.append)
    assert isinstance(given[0], Arguments)
    assert dataclasses.astuple(given[0]) == (3, ("a", "b"), Path("output"))


def test_a_user_error_is_one_line(monkeypatch, capsys):
    def main(args: Arguments) -> None:
        raise UserError("--count is\nwrong")

    assert run(monkeypatch, capsys, main) == (2, "", "error: --count is\\nwrong\n")
