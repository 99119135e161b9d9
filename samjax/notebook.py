"""Display, progress, and files in and out for notebooks, in Jupyter and on Colab.

Importing this module needs no IPython and starts no devices.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from numpy.typing import ArrayLike
from PIL import Image

from samjax.io import images
from samjax.report.sheets import Sheet, resize
from samjax.session import OnProgress, ProgressUpdate


def in_colab() -> bool:
    """Whether this process is the kernel of a Colab notebook."""
    return "google.colab" in sys.modules


# --- images and progress ---


def show(image: ArrayLike) -> None:
    """Displays an image [H, W, 3], uint8 or float in [-1, 1]."""
    from IPython.display import Image as Shown
    from IPython.display import display

    display(Shown(_png(image)))


def show_row(named: Mapping[str, ArrayLike], height: int = 256) -> None:
    """Displays images side by side, each below its name.

    Args:
      named: name to image [H, W, 3], uint8 or float in [-1, 1].
      height: height in pixels to which all images are resized.
    """
    gap, top = 12, 30
    resized = [
        resize(pixels, height, round(height * pixels.shape[1] / pixels.shape[0]))
        for pixels in map(_uint8, named.values())
    ]
    sheet = Sheet(sum(pixels.shape[1] + gap for pixels in resized) + gap, height + top + gap)
    left = gap
    for name, pixels in zip(named, resized, strict=True):
        sheet.text(left, 8, name, 15, width=pixels.shape[1])
        sheet.image(left, top, pixels)
        left += pixels.shape[1] + gap
    show(sheet.array())


@contextlib.contextmanager
def progress() -> Iterator[OnProgress]:
    """A progress bar, and an image that improves during an inversion, as `on_progress` of a `Session`.

    with notebook.progress() as on_progress:
        session.invert(on_progress)
    """
    from IPython.display import Image as Shown
    from IPython.display import display

    shown = None
    with tqdm.tqdm(total=100, bar_format="{desc}: {bar}{postfix}") as bar:

        def on_progress(update: ProgressUpdate) -> None:
            nonlocal shown
            bar.set_description_str(update.task, refresh=False)
            bar.set_postfix_str(update.message, refresh=False)
            bar.update(round(100 * update.fraction) - bar.n)
            if update.image is None:
                return
            image = Shown(_png(update.image))
            if shown is None:
                shown = display(image, display_id=True)
            else:
                shown.update(image)

        yield on_progress


def _uint8(image: ArrayLike) -> np.ndarray:
    array = np.asarray(image)
    return array if array.dtype == np.uint8 else images.to_uint8(array)


def _png(image: ArrayLike) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(_uint8(image)).save(stream, "PNG")
    return stream.getvalue()


# --- files in and out ---


def upload(prompt: str) -> Path | None:
    """Asks for a file on Colab.

    Args:
      prompt: text that says which file to upload.

    Returns:
      Path of the uploaded file; None if the dialog is canceled, and outside Colab.
    """
    if not in_colab():
        return None
    from google.colab import files  # type: ignore[import-not-found]

    print(f"{prompt}; Cancel continues without it")
    return next(map(Path, files.upload()), None)


def download(directory: Path) -> Path:
    """Packs a directory into a .zip file beside it, which Colab then downloads.

    Returns:
      Path of the .zip file.
    """
    path = Path(shutil.make_archive(str(directory), "zip", directory))
    if in_colab():
        from google.colab import files  # type: ignore[import-not-found]

        files.download(str(path))
    return path


def output_directory(path: str) -> Path:
    """Creates a directory if it is missing; on Colab, /content/drive is mounted first if the directory is in it."""
    if in_colab() and path.startswith("/content/drive/"):
        from google.colab import drive  # type: ignore[import-not-found]

        drive.mount("/content/drive")
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


# --- programs ---


def run_program(path: Path, ok: Sequence[int] = (0,), **flags: Any) -> int:
    """Runs a Python program, and shows its output as it appears.

    `run_program(Path("invert.py"), image_path="car.png", paste_back=True)` runs
    `python invert.py --image_path car.png --paste_back`.

    Args:
      path: path of the program.
      ok: exit codes that are not an error.
      **flags: True stands for a flag without a value, a tuple for several values, and None leaves the flag out.

    Returns:
      The exit code.

    Raises:
      RuntimeError: the exit code is not one of `ok`.
    """
    arguments: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        arguments += [] if value is None else [f"--{name}", *map(str, values)]
    print("$ python", shlex.join([path.name, *arguments]), flush=True)
    return run_command([sys.executable, path, *arguments], ok)


def run_command(command: Sequence[str | Path], ok: Sequence[int] = (0,)) -> int:
    """Runs a command, and shows its output as it appears. Interrupting the cell interrupts the command.

    Args:
      command: the program and its arguments.
      ok: exit codes that are not an error.

    Returns:
      The exit code.

    Raises:
      RuntimeError: the exit code is not one of `ok`.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "TQDM_MININTERVAL": "0.5"}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        assert process.stdout is not None
        try:
            while data := os.read(process.stdout.fileno(), 1 << 16):
                print(decoder.decode(data), end="", flush=True)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # programs of samjax finish the file that they are writing
            process.wait()
            raise
    if process.returncode not in ok:
        name = Path(command[1] if command[0] == sys.executable else command[0]).name
        raise RuntimeError(f"{name} ended with exit code {process.returncode}; its last lines say why")
    return process.returncode
