"""Timed steps in processes of their own, so that they share neither threads nor memory."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class WorkerError(Exception):
    """A worker ended without a result."""


class Worker:
    """A step in a process of its own.

    Attributes:
      device: name of the device that the step runs on.
    """

    def __init__(self, step: Callable[..., Any], *arguments: Any) -> None:
        """Starts the process, builds the step and runs it once.

        Args:
          step: class of the step, defined at the top level of a module. An instance has an attribute `device`, and
            called with a number of steps returns the seconds they took.
          *arguments: arguments of the class.

        Raises:
          WorkerError: the step cannot be built or run.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, step, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.device = self._receive()
        except BaseException:
            self.close()
            raise

    def seconds(self, steps: int) -> float:
        """Seconds per step, over several steps."""
        return self.ask("__call__", steps) / steps

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the step."""
        self._connection.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()  # the worker reads the end of the stream, and returns
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            value, error = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise WorkerError(f"the process ended with code {code}" + ": out of memory?" * (code == -9)) from None
        if error is not None:
            raise WorkerError(error)
        return value

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(connection: Connection, step: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Runs in the worker's process until the connection is closed."""
    with contextlib.suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
        try:
            made = step(*arguments)
            made(1)
            connection.send((made.device, None))
            while True:
                method, given = connection.recv()
                connection.send((getattr(made, method)(*given), None))
        except Exception as error:
            connection.send((None, f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:200]}"))
