"""Provenance of results: fingerprints of what they depend on, and a check that their settings have not changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from samjax.errors import UserError
from samjax.io import files


def fingerprint(*values: Any) -> str:
    """A fingerprint of values: 16 hexadecimal digits.

    Args:
      *values: arrays, numbers, strings, bytes, paths, None, and dataclasses, mappings and sequences of these.

    Raises:
      TypeError: a value of another kind.
    """
    sha = hashlib.sha256()
    for part in _parts(values):
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    if value is None or isinstance(value, str | int | float | os.PathLike):
        yield f"{type(value).__name__} {os.fspath(value) if isinstance(value, os.PathLike) else value!r}".encode()
    elif isinstance(value, bytes):
        yield b"bytes"
        yield value
    elif dataclasses.is_dataclass(value):
        yield from _parts({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=str):
            yield from _parts(key)
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"sequence {len(value)}".encode()
        for entry in value:
            yield from _parts(entry)
    elif hasattr(value, "__array__"):
        array = np.asarray(value)
        yield f"array {array.dtype} {array.shape}".encode()
        yield np.ascontiguousarray(array).tobytes()
    else:
        raise TypeError(f"a {type(value).__name__} has no fingerprint")


def check_settings(path: str | Path, settings: Mapping[str, Any], flag: str) -> None:
    """Checks that existing results in a directory were made with the same settings.

    The first call writes the settings to `path`; later calls compare with them, unless there are no results yet.

    Args:
      path: path of the JSON file in the directory of the results.
      settings: what the results depend on; see `files.write_json`.
      flag: the option by which the user chooses another directory, for the message.

    Raises:
      UserError: some settings differ (they are named), or the file is damaged or cannot be written.
    """
    path = Path(path)
    now = json.loads(files.to_json(settings))
    try:
        before = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        files.write_json(path, now)
        return
    except NotADirectoryError:
        raise UserError(f"{path.parent} is a file: give a directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: remove {path.parent}, or choose another {flag}") from error
    before = before if isinstance(before, dict) else {}
    changed = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    if changed and not any(other.name != path.name and other.name[:1] != "." for other in path.parent.iterdir()):
        files.write_json(path, now)  # whatever wrote the settings left no results
    elif changed:
        raise UserError(
            f"{path.parent} holds results of other settings ({', '.join(changed)}): choose another {flag}, or remove "
            "that directory"
        )
