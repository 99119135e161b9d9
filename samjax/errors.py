"""The one kind of exception that is meant for the person who runs a program."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do. Programs print it and exit with code 2.

    Attributes:
      details: further lines, for what no line can hold: a list of files, with their addresses.
    """

    def __init__(self, message: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)

    @property
    def shown(self) -> str:
        """The text for a terminal; nothing that a file's names hold adds a line to it."""
        return "\n".join([" ".join(str(self).split()), *(f"  {' '.join(line.split())}" for line in self.details)])
