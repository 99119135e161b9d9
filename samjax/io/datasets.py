"""Training data of the invertibility predictor on disk: images with their inversions in each layer alone.

The layout is the authors': FOLDER/LAYER/NAME/final/input.png and reconstruction.png. `samples` gives them in an order
that a seed and the position decide, so that a run which was stopped goes on with what would have come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm
from PIL import Image, ImageFilter

from samjax.config import LATENT_NAMES
from samjax.errors import UserError
from samjax.io import files, images
from samjax.training import Batch


class Example(NamedTuple):
    """One image: its name, its file, and those of its inversions, in the order of the layers."""

    name: str
    image: Path
    inversions: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The examples of a folder, ordered by name, and the layers they have."""

    folder: Path
    latent_names: tuple[str, ...]
    examples: tuple[Example, ...]


class Sample(NamedTuple):
    """One example as it is trained on.

    Attributes:
      image: uint8 [h, w, 3].
      inversions: uint8 [L, h, w, 3], or the error maps made of them before, float16 [L, h, w].
      segments: int32 [h, w] from 0.
    """

    image: np.ndarray
    inversions: np.ndarray
    segments: np.ndarray


Labels = Callable[[str], np.ndarray]
"""From an image's name to its labels [h, w]."""

Targets = Callable[[str], np.ndarray]
"""From an image's name to its true error maps [L, h, w]."""


def find(folder: Path, latent_names: Sequence[str] | None = None) -> Dataset:
    """The examples of a folder.

    Args:
      folder: of `experiments/invert_folder.py`, or of the authors' `single_latent_inv.py`.
      latent_names: the layers wanted; all that are there if None.

    Raises:
      UserError: no such folder, a layer is missing, layers have different images, or some image cannot be read or has
        other proportions than its inversion; all such images are counted, and the first few named.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: make one with experiments/invert_folder.py")
    there = tuple(name for name in LATENT_NAMES if (folder / name).is_dir())
    wanted = tuple(latent_names or there)
    if not wanted or not set(wanted) <= set(there):
        lacking = ", ".join(name for name in wanted if name not in there) or "all layers"
        raise UserError(
            f"{folder} lacks {lacking} (it has {', '.join(there) or 'none'}): make them with invert_folder.py"
        )
    every_final = "*/final/reconstruction.png"
    finished = {name: {path.parts[-3] for path in (folder / name).glob(every_final)} for name in wanted}
    every = set.union(*finished.values())
    if not every:
        raise UserError(f"{folder} holds no finished inversions (LAYER/NAME/final/reconstruction.png)")
    uneven = sorted(name for name in every if any(name not in names for names in finished.values()))
    if uneven:
        raise UserError(
            f"{len(uneven)} of {len(every)} images in {folder} lack some of the layers {','.join(wanted)}"
            f" ({', '.join(uneven[:3])}{', …' if len(uneven) > 3 else ''}): let invert_folder.py finish them"
        )
    examples = []
    for name in sorted(every):
        finals = [folder / layer / name / "final" for layer in wanted]
        examples.append(Example(name, finals[0] / "input.png", tuple(path / "reconstruction.png" for path in finals)))
    with ThreadPoolExecutor() as pool:
        wrong = [problem for problem in pool.map(_problem, examples) if problem]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(examples)} images in {folder} are unusable, among them: {wrong[0]}")
    return Dataset(folder, wanted, tuple(examples))


def _problem(example: Example) -> str | None:
    """What is wrong with the files of an example, from their headers."""
    try:
        sizes = [images.image_size(path) for path in (example.image, *example.inversions)]
    except UserError as error:
        return str(error)
    (height, width), *others = sizes
    for path, (h, w) in zip(example.inversions, others, strict=True):
        if abs(h * width - w * height) > 0.02 * h * width:
            return f"{path} has {w} x {h} pixels, {example.image.name} {width} x {height}: not of one shape"
    return None


def read(example: Example, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An example's image [h, w, 3] and inversions [L, h, w, 3] in uint8, resized by Pillow's Lanczos as the authors do.

    Raises:
      UserError: a file cannot be read.
    """
    first, *rest = (_resized(path, (height, width)) for path in (example.image, *example.inversions))
    return first, np.stack(rest)


def _resized(path: Path, size: tuple[int, int]) -> np.ndarray:
    return images.fit(images.read_image(path, notify=_silent), *size)


def augment(sample: Sample, rng: np.random.Generator) -> Sample:
    """Flipped from left to right for one in two, and blurred (Gaussian, radius 0 to 1) for one in two, all alike.

    Error maps that were made before cannot be those of blurred images, which are then left sharp.
    """
    image, inversions, segments = sample
    if rng.random() > 0.5:
        image, inversions, segments = image[:, ::-1], inversions[:, :, ::-1], segments[:, ::-1]
    if inversions.ndim == 4 and rng.random() > 0.5:
        blur = ImageFilter.GaussianBlur(float(rng.random()))
        filtered = lambda x: np.asarray(Image.fromarray(np.ascontiguousarray(x)).filter(blur))  # noqa: E731
        image, inversions = filtered(image), np.stack([filtered(x) for x in inversions])
    return Sample(image, inversions, segments)


def samples(
    dataset: Dataset,
    labels: Labels,
    size: tuple[int, int],
    *,
    train: bool,
    seed: int = 0,
    targets: Targets | None = None,
) -> Any:
    """The samples of a dataset by position: a Grain dataset.

    Args:
      dataset: of `find`.
      labels: of its images.
      size: height and width.
      train: shuffles, anew in every epoch, and augments, for ever; otherwise each example comes once, in order.
      seed: of order and augmentation.
      targets: error maps to give instead of inversions.
    """
    import grain

    def load(example: Example) -> Sample:
        if targets is not None:
            return Sample(_resized(example.image, size), targets(example.name), labels(example.name))
        return Sample(*read(example, *size), labels(example.name))

    source = grain.MapDataset.source(dataset.examples).seed(seed)
    if not train:
        return source.map(load)
    return source.shuffle().repeat().map(load).random_map(augment)


def pictures(
    paths: Sequence[Path], *, size: tuple[int, int], fit: images.Fit = "stretch", train: bool, seed: int = 0
) -> Any:
    """Images alone, uint8 [h, w, 3], by position: a Grain dataset.

    Args:
      paths: of the files.
      size: height and width.
      fit: how images of another shape are brought to it.
      train: shuffles, anew in every epoch, for ever; otherwise each image comes once, in order.
      seed: of the order.
    """
    import grain

    source = grain.MapDataset.source(list(paths)).seed(seed)
    source = source.shuffle().repeat() if train else source
    return source.map(lambda path: images.fit(images.read_image(path, notify=_silent), *size, fit))


def batches(
    source: Any, batch_size: int, start: int, stop: int, *, part: tuple[int, int] = (0, 1), threads: int = 8
) -> Iterator[Any]:
    """The batches from number `start` to `stop`, read ahead.

    Args:
      source: of `samples` or `pictures`.
      batch_size: over all processes.
      start: number of the first batch; any gives what a run from 0 would have given.
      stop: number after the last one.
      part: which of how many equal parts of each batch to give.
      threads: that read.

    Yields:
      What the source gives, stacked along a new first axis; a last batch beyond the source's end is filled up by its
      last example.
    """
    import jax

    index, count = part
    own = batch_size // count
    last = len(source) - 1

    def rows(number: int) -> list[int]:
        first = number * batch_size + index * own
        return [min(i, last) for i in range(first, first + own)]

    with ThreadPoolExecutor(threads) as pool:
        ask = lambda number: [pool.submit(source.__getitem__, i) for i in rows(number)]  # noqa: E731
        waiting = [ask(number) for number in range(start, min(start + 2, stop))]
        for number in range(start, stop):
            chosen = [future.result() for future in waiting.pop(0)]
            if number + 2 < stop:
                waiting.append(ask(number + 2))
            yield jax.tree.map(lambda *arrays: np.stack(arrays), *chosen)


def to_batch(samples: Sample) -> Batch:
    """Stacked samples as a training step takes them."""
    image, inversions, segments = samples
    made = inversions.astype(np.float32) if inversions.dtype == np.float16 else images.to_float(inversions)
    return Batch(images.to_float(image), made, segments.astype(np.int32))


def cache_segments(
    folder: Path, dataset: Dataset, size: tuple[int, int], segment: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Makes the label images that `folder` does not have yet.

    Args:
      folder: label images, NAME.png.
      dataset: of `find`.
      size: height and width of the labels.
      segment: from an image [h, w, 3] in [-1, 1] to labels [h, w].

    Raises:
      UserError: an image cannot be read, or the disk refuses.
    """
    for example in tqdm.tqdm(dataset.examples, unit="image", desc="segments", leave=False):
        path = folder / f"{example.name}.png"
        if not path.exists():
            image = images.to_float(_resized(example.image, size))
            labels = np.unique(segment(image), return_inverse=True)[1].reshape(size)
            images.save_segments(path, np.minimum(labels, 255))


def read_labels(folder: Path, size: tuple[int, int], name: str) -> np.ndarray:
    """What `cache_segments` made of the image `name`. Raises UserError if it is no longer there."""
    return images.read_segments(folder / f"{name}.png", *size, size)


def cache_targets(
    folder: Path,
    dataset: Dataset,
    size: tuple[int, int],
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Makes the true error maps that `folder` does not have yet.

    Args:
      folder: half-precision arrays [L, h, w], NAME.npy.
      dataset: of `find`.
      size: height and width of the maps.
      compare: from an image [h, w, 3] and its inversions [L, h, w, 3] in [-1, 1] to error maps [L, h, w].
      part: which of how many equal parts of the dataset to make.

    Raises:
      UserError: an image cannot be read, or the disk refuses.
    """
    index, count = part
    for example in tqdm.tqdm(dataset.examples[index::count], unit="image", desc="true maps", leave=False):
        path = folder / f"{example.name}.npy"
        if not path.exists():
            made = compare(*map(images.to_float, read(example, *size)))
            with files.whole_file(path) as file:
                np.save(file, np.asarray(made, np.float16))


def read_targets(folder: Path, name: str) -> np.ndarray:
    """What `cache_targets` made of the image `name`. Raises UserError if it is no longer there or damaged."""
    path = folder / f"{name}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, and the same command makes it again") from error


def _silent(_: str) -> None:
    """Takes what `images.read_image` has to say of an image."""
