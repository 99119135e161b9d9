"""Shared by all programs: parsing arguments, reporting errors in one clear line, and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from samjax.errors import UserError

Args = TypeVar("Args")


def run(arguments: type[Args], main: Callable[[Args], None]) -> None:
    """Parses the command line into the dataclass `arguments` (dashes or underscores) and calls `main` with it.

    Exit codes: 0 for success; 2 for bad input, with one line and no traceback; 130 for Ctrl-C.
    """
    import tyro

    args = tyro.cli(arguments)
    from samjax import runtime

    runtime.configure()
    try:
        main(args)
    except UserError as error:
        print(f"error: {error.shown}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; finished outputs are kept, run the same command again to continue", file=sys.stderr)
        sys.exit(130)
