"""What the notebooks here share: programs with their output in sight, rows of pictures, files in and out.

Nothing here starts JAX: a TPU serves one process at a time, and a program that a notebook runs is another process.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from IPython.display import Image as Shown
from IPython.display import display
from numpy.typing import ArrayLike
from PIL import Image

from samjax.io import images
from samjax.io.sheets import Sheet, resize

EXPERIMENTS = Path(__file__).resolve().parents[1]
IN_COLAB = "google.colab" in sys.modules


# --- programs ---


def run(program: str, ok: Sequence[int] = (0,), **flags: Any) -> int:
    """Runs a program of `experiments/` and shows what it prints, as it prints it.

    `run("invert.py", image_path="car.png", paste_back=True)` is
    `python experiments/invert.py --image_path car.png --paste_back`.

    Args:
      program: its file.
      ok: exit codes that are no failure.
      **flags: a tuple gives several values; None leaves the flag out.

    Returns:
      The exit code.

    Raises:
      RuntimeError: it failed.
    """
    arguments: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        arguments += [] if value is None else [f"--{name}", *map(str, values)]
    print("$ python", shlex.join([f"experiments/{program}", *arguments]), flush=True)
    return stream([sys.executable, str(EXPERIMENTS / program), *arguments], ok)


def stream(command: Sequence[str | Path], ok: Sequence[int] = (0,)) -> int:
    """Runs a command and shows what it prints, as it prints it; stopping the cell stops it too.

    Raises:
      RuntimeError: its exit code, which is returned, is not one of `ok`.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "TQDM_MININTERVAL": "0.5"}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        assert process.stdout is not None
        try:
            while data := os.read(process.stdout.fileno(), 1 << 16):
                print(decoder.decode(data), end="", flush=True)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # on which the programs here leave what is finished whole
            process.wait()
            raise
    if process.returncode not in ok:
        raise RuntimeError(f"{Path(command[1]).name} ended with code {process.returncode}: its last lines say why")
    return process.returncode


@contextlib.contextmanager
def running() -> Iterator[Callable[[Any], None]]:
    """A bar, and a picture that improves where there is one, for what a `studio.Session` tells on its way."""
    picture = None
    with tqdm.tqdm(total=100, bar_format="{desc}: {bar}{postfix}") as bar:

        def tell(told: Any) -> None:
            nonlocal picture
            bar.set_description_str(told.what, refresh=False)
            bar.set_postfix_str(told.words, refresh=False)
            bar.update(round(100 * told.share) - bar.n)
            if told.picture is not None:
                shown = Shown(_png(told.picture))
                if picture is None:
                    picture = display(shown, display_id=True)
                else:
                    picture.update(shown)

        yield tell


# --- pictures ---


def show(picture: ArrayLike) -> None:
    """Displays a picture [h, w, 3], uint8 or floats in [-1, 1]."""
    display(Shown(_png(picture)))


def _png(picture: ArrayLike) -> bytes:
    array = np.asarray(picture)
    stream = io.BytesIO()
    Image.fromarray(array if array.dtype == np.uint8 else images.to_uint8(array)).save(stream, "PNG")
    return stream.getvalue()


def show_row(pictures: Mapping[str, ArrayLike], height: int = 256) -> None:
    """Displays pictures side by side under their titles."""
    edge, head = 12, 30
    shown = []
    for picture in map(np.asarray, pictures.values()):
        pixels = picture if picture.dtype == np.uint8 else images.to_uint8(picture)
        shown.append(resize(pixels, height, round(height * pixels.shape[1] / pixels.shape[0])))
    sheet = Sheet(sum(x.shape[1] + edge for x in shown) + edge, height + head + edge)
    left = edge
    for title, pixels in zip(pictures, shown, strict=True):
        sheet.text(left, 8, title, 15, width=pixels.shape[1])
        sheet.image(left, head, pixels)
        left += pixels.shape[1] + edge
    show(sheet.array())


# --- files in and out ---


def upload(what: str) -> Path | None:
    """On Colab asks for a file, and gives its path; None where the dialog is cancelled, and everywhere else."""
    if not IN_COLAB:
        return None
    from google.colab import files  # type: ignore[import-not-found]

    print(f"{what}; Cancel goes on without")
    return next(map(Path, files.upload()), None)


def download(folder: Path) -> Path:
    """Packs a folder into a .zip beside it, which on Colab the browser saves; gives its path."""
    path = Path(shutil.make_archive(str(folder), "zip", folder))
    if IN_COLAB:
        from google.colab import files  # type: ignore[import-not-found]

        files.download(str(path))
    return path


def output_folder(path: str) -> Path:
    """The folder `path`, made where it is missing; on Colab one in /content/drive is in your Google Drive."""
    if IN_COLAB and path.startswith("/content/drive/"):
        from google.colab import drive  # type: ignore[import-not-found]

        drive.mount("/content/drive")
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)
