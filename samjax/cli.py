"""Shared by all programs: parsing arguments, reporting errors in one clear line, and exit codes."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from samjax.errors import UserError

Args = TypeVar("Args")

_until_the_end: contextvars.ContextVar[contextlib.ExitStack | None] = contextvars.ContextVar("stack", default=None)


def run(arguments: type[Args], main: Callable[[Args], None]) -> None:
    """Parses the command line into the dataclass `arguments` (dashes or underscores) and calls `main` with it.

    `--help` begins with the docstring of the dataclass's module.

    Exit codes: 0 for success; 2 for bad input, with one line and no traceback; 130 for Ctrl-C.
    """
    import tyro

    args = tyro.cli(
        _without_empty_defaults(arguments),
        description=sys.modules[arguments.__module__].__doc__,
        config=(tyro.conf.DisallowNone,),
    )
    from samjax import runtime

    runtime.configure()
    try:
        with contextlib.ExitStack() as stack:
            _until_the_end.set(stack)
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
    finally:
        _until_the_end.set(None)


def _without_empty_defaults(arguments: Any) -> Any:
    """A subclass whose help leaves "(default: None)" out: the texts of such options say what the default is."""
    import tyro

    hidden = tyro.conf.arg(help_behavior_hint="")
    hints = get_type_hints(arguments, include_extras=True)
    fields = [
        (field.name, Annotated[hints[field.name], hidden], dataclasses.field(default=field.default))
        for field in dataclasses.fields(arguments)
        if field.default in (None, ())
    ]
    return dataclasses.make_dataclass(
        arguments.__name__, fields, bases=(arguments,), frozen=arguments.__dataclass_params__.frozen
    )


def note(line: str) -> None:
    """Prints a line for the user to standard error."""
    print(line, file=sys.stderr)


def output_directory(path: str | Path) -> Path:
    """Creates the directory of a program's results, and keeps other programs out of it until this one ends.

    Of several processes of one program, the first does so for all. Outside of `run`, this is `files.output_directory`.

    Returns:
      `path`, as given.

    Raises:
      UserError: it cannot be used, or another program uses it; at the program's end, if results have been removed. See
        `files.exclusive_directory`.
    """
    import jax

    from samjax.io import files

    stack = _until_the_end.get()
    if stack is None or jax.process_index() > 0:
        return files.output_directory(path)
    return stack.enter_context(files.exclusive_directory(path))
