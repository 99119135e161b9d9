"""`UserError`, the exception for errors that the user can correct."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do. Programs print it and exit with code 2.

    Attributes:
      details: further lines, such as a list of files with their addresses.
    """

    def __init__(self, message: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)

    @property
    def shown(self) -> str:
        """The text for a terminal; line breaks in file names are replaced by spaces."""
        return "\n".join([" ".join(str(self).split()), *(f"  {' '.join(line.split())}" for line in self.details)])
