"""Training data on disk: images, and their inversions in each layer alone.

Inversions have the authors' layout: DIRECTORY/LAYER/NAME/final/input.png and reconstruction.png, as
`samjax.training.inversions` writes them. The order of samples and their augmentation depend on the seed and the
position alone, so that a resumed run sees the batches of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm
from PIL import Image, ImageFilter

from samjax import batching
from samjax.errors import UserError
from samjax.io import files, images
from samjax.latents import LATENT_NAMES
from samjax.training.predictor import Batch


class Example(NamedTuple):
    """The files of one image.

    Attributes:
      name: name of the image.
      image: file of the image.
      inversions: files of its inversions, one for each layer.
    """

    name: str
    image: Path
    inversions: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The examples of a directory, ordered by name, and their layers."""

    directory: Path
    latent_names: tuple[str, ...]
    examples: tuple[Example, ...]


class Segmented(NamedTuple):
    """One image with its segments.

    Attributes:
      image: uint8 [h, w, 3].
      segments: int32 [h, w], labels from 0.
    """

    image: np.ndarray
    segments: np.ndarray


class Sample(NamedTuple):
    """One example in memory.

    Attributes:
      image: uint8 [h, w, 3].
      inversions: uint8 [L, h, w, 3], or precomputed error maps, float16 [L, h, w].
      segments: int32 [h, w], labels from 0.
    """

    image: np.ndarray
    inversions: np.ndarray
    segments: np.ndarray


Labels = Callable[[str], np.ndarray]
"""Maps the name of an image to its segments [h, w]."""

Targets = Callable[[str], np.ndarray]
"""Maps the name of an image to its true error maps [L, h, w]."""


def find(directory: Path, latent_names: Sequence[str] | None = None) -> Dataset:
    """Finds the examples of a directory.

    Args:
      directory: output of `experiments/invert_folder.py`, or of the authors' `single_latent_inv.py`.
      latent_names: the layers to use; all layers in the directory if None.

    Raises:
      UserError: there is no such directory, a layer is missing, layers have different images, or some image cannot be
        read or has a different aspect ratio from its inversion. The message counts such images and names the first.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: make one with experiments/invert_folder.py")
    there = tuple(name for name in LATENT_NAMES if (directory / name).is_dir())
    wanted = tuple(latent_names or there)
    if not wanted or not set(wanted) <= set(there):
        lacking = ", ".join(name for name in wanted if name not in there) or "all layers"
        raise UserError(
            f"{directory} lacks {lacking} (it has {', '.join(there) or 'none'}): make them with"
            " experiments/invert_folder.py"
        )
    every_final = "*/final/reconstruction.png"
    finished = {name: {path.parts[-3] for path in (directory / name).glob(every_final)} for name in wanted}
    every = set.union(*finished.values())
    if not every:
        raise UserError(f"{directory} holds no finished inversions (LAYER/NAME/final/reconstruction.png)")
    uneven = sorted(name for name in every if any(name not in names for names in finished.values()))
    if uneven:
        raise UserError(
            f"{len(uneven)} of {len(every)} images in {directory} lack some of the layers {','.join(wanted)}"
            f" ({', '.join(uneven[:3])}{', …' if len(uneven) > 3 else ''}): let"
            " experiments/invert_folder.py finish them"
        )
    examples = []
    for name in sorted(every):
        finals = [directory / layer / name / "final" for layer in wanted]
        examples.append(Example(name, finals[0] / "input.png", tuple(path / "reconstruction.png" for path in finals)))
    with ThreadPoolExecutor() as pool:
        wrong = [problem for problem in pool.map(_problem, examples) if problem]
    if wrong:
        raise UserError(f"{len(wrong)} of {len(examples)} images in {directory} are unusable, among them: {wrong[0]}")
    return Dataset(directory, wanted, tuple(examples))


def _problem(example: Example) -> str | None:
    """What is wrong with the files of an example, judged by their headers."""
    try:
        sizes = [images.image_size(path) for path in (example.image, *example.inversions)]
    except UserError as error:
        return str(error)
    (height, width), *others = sizes
    for path, (h, w) in zip(example.inversions, others, strict=True):
        if abs(h * width - w * height) > 0.02 * h * width:
            return f"{path} has {w} x {h} pixels, {example.image.name} {width} x {height}: the aspect ratios differ"
    return None


def read(example: Example, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads an example, resized by Pillow's Lanczos filter as in the authors' code.

    Returns:
      Image [h, w, 3] and inversions [L, h, w, 3], both uint8.

    Raises:
      UserError: a file cannot be read.
    """
    first, *rest = (_resized(path, (height, width)) for path in (example.image, *example.inversions))
    return first, np.stack(rest)


def _resized(path: Path, size: tuple[int, int]) -> np.ndarray:
    return images.fit(images.read_image(path, notify=_silent), *size)


def augment(sample: Sample, rng: np.random.Generator) -> Sample:
    """Random augmentation, the same for all arrays of a sample.

    A sample is flipped from left to right with probability 1/2, and blurred with probability 1/2 (Gaussian, radius 0 to
    1). With precomputed error maps, which belong to the sharp image, there is no blur.
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
    """The samples of a dataset as a Grain dataset with random access.

    Args:
      dataset: the dataset.
      labels: segments of its images.
      size: height and width of the samples.
      train: repeats the dataset forever, shuffled in every epoch, with augmentation; otherwise every example comes
        once, in order.
      seed: seed of order and augmentation.
      targets: true error maps to use instead of inversions.
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


def image_samples(
    paths: Sequence[Path], *, size: tuple[int, int], fit: images.Fit = "stretch", train: bool, seed: int = 0
) -> Any:
    """Images uint8 [h, w, 3] as a Grain dataset with random access.

    Args:
      paths: files of the images.
      size: height and width of the samples.
      fit: how images of another aspect ratio are fitted to this size.
      train: repeats the images forever, shuffled in every epoch; otherwise every image comes once, in order.
      seed: seed of the order.
    """
    import grain

    source = grain.MapDataset.source(list(paths)).seed(seed)
    source = source.shuffle().repeat() if train else source
    return source.map(lambda path: images.fit(images.read_image(path, notify=_silent), *size, fit))


def segmented_samples(
    paths: Sequence[Path],
    labels: Labels,
    *,
    size: tuple[int, int],
    fit: images.Fit = "stretch",
    train: bool,
    seed: int = 0,
) -> Any:
    """`Segmented` images as a Grain dataset with random access.

    Args:
      paths: files of the images.
      labels: segments of the images, by name.
      size: height and width of the samples.
      fit: how images of another aspect ratio are fitted to this size.
      train: repeats the images forever, shuffled in every epoch and flipped at random; otherwise every image comes
        once, in order.
      seed: seed of order and flips.
    """
    import grain

    def load(path: Path) -> Segmented:
        return Segmented(images.fit(images.read_image(path, notify=_silent), *size, fit), labels(path.stem))

    def flip(one: Segmented, rng: np.random.Generator) -> Segmented:
        return Segmented(one.image[:, ::-1], one.segments[:, ::-1]) if rng.random() > 0.5 else one

    source = grain.MapDataset.source(list(paths)).seed(seed)
    return source.shuffle().repeat().map(load).random_map(flip) if train else source.map(load)


def batches(
    source: Any, batch_size: int, start: int, stop: int, *, part: tuple[int, int] = (0, 1), threads: int = 8
) -> Iterator[Any]:
    """Reads batches ahead of their use.

    Args:
      source: dataset with random access, from `samples` or `image_samples`.
      batch_size: samples in a batch over all processes.
      start: number of the first batch. Batches do not depend on it.
      stop: number after that of the last batch.
      part: (i, n) for the i-th of n equal parts of every batch.
      threads: number of reading threads.

    Yields:
      Samples stacked along a new first axis. A last batch beyond the end of the source repeats the last sample.
    """
    import jax

    index, count = part
    own = slice(index * batch_size // count, (index + 1) * batch_size // count)
    numbers = (rows[own] for rows in itertools.islice(batching.rows(len(source), batch_size), start, stop))
    with ThreadPoolExecutor(threads) as pool:
        reading = ([pool.submit(source.__getitem__, int(i)) for i in rows] for rows in numbers)
        waiting = list(itertools.islice(reading, 2))
        while waiting:
            chosen = [future.result() for future in waiting.pop(0)]
            waiting.extend(itertools.islice(reading, 1))
            yield jax.tree.map(lambda *arrays: np.stack(arrays), *chosen)


def to_batch(samples: Sample) -> Batch:
    """Converts stacked samples to what a training step takes."""
    image, inversions, segments = samples
    precomputed = inversions.dtype == np.float16
    inversions = inversions.astype(np.float32) if precomputed else images.to_float(inversions)
    return Batch(images.to_float(image), inversions, segments.astype(np.int32))


def cache_segments(
    directory: Path,
    paths: Mapping[str, Path],
    size: tuple[int, int],
    segment: Callable[[np.ndarray], np.ndarray],
    fit: images.Fit = "stretch",
) -> None:
    """Writes the label images NAME.png that a directory does not have yet.

    Args:
      directory: directory of the label images.
      paths: files of the images by name.
      size: height and width of the labels.
      segment: maps an image [h, w, 3] in [-1, 1] to labels [h, w].
      fit: how images of another aspect ratio are fitted to this size.

    Raises:
      UserError: an image cannot be read, or a file cannot be written.
    """
    for name, source in tqdm.tqdm(paths.items(), unit="image", desc="segments", leave=False):
        path = directory / f"{name}.png"
        if not path.exists():
            image = images.to_float(images.fit(images.read_image(source, notify=_silent), *size, fit))
            labels = np.unique(segment(image), return_inverse=True)[1].reshape(size)
            images.save_segments(path, np.minimum(labels, 255))


def read_labels(directory: Path, size: tuple[int, int], name: str) -> np.ndarray:
    """Reads the segments that `cache_segments` wrote for an image.

    Raises:
      UserError: the file is missing or damaged.
    """
    return images.read_segments(directory / f"{name}.png", *size, size)


def cache_targets(
    directory: Path,
    dataset: Dataset,
    size: tuple[int, int],
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Writes the true error maps that a directory does not have yet, as half-precision arrays NAME.npy.

    Args:
      directory: directory of the arrays.
      dataset: the dataset.
      size: height and width of the maps.
      compare: maps an image [h, w, 3] and its inversions [L, h, w, 3], in [-1, 1], to error maps [L, h, w].
      part: (i, n) for the i-th of n equal parts of the dataset.

    Raises:
      UserError: an image cannot be read, or a file cannot be written.
    """
    index, count = part
    for example in tqdm.tqdm(dataset.examples[index::count], unit="image", desc="true maps", leave=False):
        path = directory / f"{example.name}.npy"
        if not path.exists():
            error_maps = compare(*map(images.to_float, read(example, *size)))
            with files.whole_file(path) as file:
                np.save(file, np.asarray(error_maps, np.float16))


def read_targets(directory: Path, name: str) -> np.ndarray:
    """Reads the error maps that `cache_targets` wrote for an image.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = directory / f"{name}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, and run the same command again") from error


def _silent(_: str) -> None:
    """Ignores the notes of `images.read_image`."""
