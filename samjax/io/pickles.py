"""Reading pickles from outside without running anything in them.

A pickle names functions and classes and calls them. `load` resolves only the names in its allow list, to the
harmless stand-ins given there; any other name ends the read.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from samjax.errors import UserError

Allowed = Mapping[tuple[str, str], Callable[..., Any]]


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, file: BinaryIO, allowed: Allowed, persistent_load: Callable[[Any], Any] | None, encoding: str
    ):
        super().__init__(file, encoding=encoding)
        self._allowed = allowed
        if persistent_load is not None:
            self.persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise UserError(
                f"the pickle names {module}.{name}, which is not on the allow list: nothing was run, nothing was read"
            ) from None


def load(
    file: BinaryIO,
    allowed: Allowed,
    *,
    persistent_load: Callable[[Any], Any] | None = None,
    encoding: str = "ASCII",
) -> Any:
    """Reads one pickled object from `file`.

    Args:
      file: open for reading in binary mode.
      allowed: (module, name) to what stands in for it; it is called with whatever arguments the file gives.
      persistent_load: as in `pickle.Unpickler`.
      encoding: of Python 2 strings; "latin1" for old NumPy arrays.

    Raises:
      UserError: the file names something else, is no pickle, or ends early.
    """
    try:
        return _Unpickler(file, allowed, persistent_load, encoding).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"not a readable pickle ({type(error).__name__}: {error}): damaged, or not whole?") from error
