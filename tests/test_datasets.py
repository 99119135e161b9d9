"""Training data from disk: reproducible order, batches from any step on, augmentation, segments and true maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from killing import write_data
from PIL import Image, ImageFilter

from samjax.errors import UserError
from samjax.training import data as datasets
from samjax.training.data import Sample


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> datasets.Dataset:
    return datasets.find(write_data(tmp_path_factory.mktemp("data"), 5, size=16))


@pytest.fixture(scope="module")
def labels(data, tmp_path_factory) -> datasets.Labels:
    """The left and the right half of every image."""
    folder = tmp_path_factory.mktemp("labels")
    halves = np.repeat(np.array([[3, 7]]), 8, axis=1).repeat(16, axis=0)
    datasets.cache_segments(folder, paths(data), (16, 16), lambda _: halves)
    return lambda name: datasets.read_labels(folder, (16, 16), name)


def paths(data: datasets.Dataset) -> dict[str, Path]:
    return {example.name: example.image for example in data.examples}


def drawn(data, labels, start: int, stop: int, **options) -> list[np.ndarray]:
    source = datasets.samples(data, labels, (16, 16), train=True, seed=options.pop("seed", 0))
    return [batch.image for batch in datasets.batches(source, 2, start, stop, **options)]


def test_segments_are_numbered_from_zero_and_found_once(data, labels, tmp_path):
    np.testing.assert_array_equal(np.unique(labels("p0")), [0, 1])
    calls = []

    def segment(image: np.ndarray) -> np.ndarray:
        assert image.shape == (16, 16, 3)
        calls.append(1)
        return np.zeros((16, 16), int)

    for _ in range(2):
        datasets.cache_segments(tmp_path, paths(data), (16, 16), segment)
    assert len(calls) == 5
    (tmp_path / "p3.png").unlink()
    with pytest.raises(UserError, match="p3"):
        datasets.read_labels(tmp_path, (16, 16), "p3")


def test_batches_from_any_step_are_those_of_an_uninterrupted_run(data, labels):
    whole = drawn(data, labels, 0, 8)
    assert all((x == y).all() for x, y in zip(whole[5:], drawn(data, labels, 5, 8), strict=True))
    assert all((x == y).all() for x, y in zip(whole, drawn(data, labels, 0, 8, threads=1), strict=True))
    assert not all((x == y).all() for x, y in zip(whole, drawn(data, labels, 0, 8, seed=1), strict=True))


def test_parts_of_a_batch_make_up_the_whole(data, labels):
    halves = [drawn(data, labels, 0, 4, part=(i, 2)) for i in range(2)]
    for whole, *parts in zip(drawn(data, labels, 0, 4), *halves, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_an_epoch_has_every_example_once(data, labels):
    source = datasets.samples(data, labels, (16, 16), train=True)
    # Blur and flips hardly change the mean color of an image.
    color = lambda image: image.mean((0, 1))  # noqa: E731
    known = np.stack([color(np.asarray(Image.open(example.image))) for example in data.examples])
    nearest = lambda image: int(np.abs(known - color(image)).sum(1).argmin())  # noqa: E731
    orders = [[nearest(source[i].image) for i in range(epoch * 5, epoch * 5 + 5)] for epoch in range(3)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len(set(map(tuple, orders))) > 1


def test_validation_is_in_order_and_unchanged_and_its_last_batch_is_full(data, labels):
    source = datasets.samples(data, labels, (16, 16), train=False)
    first, second, third = datasets.batches(source, 2, 0, 3)
    given = [np.asarray(Image.open(example.image)) for example in data.examples]
    np.testing.assert_array_equal(
        np.concatenate((first.image, second.image, third.image)), np.stack([*given, given[4]])
    )
    assert first.inversions.shape == (2, 2, 16, 16, 3)
    assert datasets.to_batch(first).images.dtype == np.float32


class Always:
    """A random generator with given values."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)


def test_augmentation_does_the_same_to_all():
    rng = np.random.default_rng(0)
    sample = Sample(
        rng.integers(0, 255, (8, 8, 3), np.uint8),
        rng.integers(0, 255, (2, 8, 8, 3), np.uint8),
        rng.integers(0, 4, (8, 8)).astype(np.int32),
    )
    same = datasets.augment(sample, Always(0.2, 0.2))  # type: ignore[arg-type]
    assert all((x == y).all() for x, y in zip(same, sample, strict=True))
    flipped = datasets.augment(sample, Always(0.9, 0.2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(flipped.image, sample.image[:, ::-1])
    np.testing.assert_array_equal(flipped.inversions, sample.inversions[:, :, ::-1])
    np.testing.assert_array_equal(flipped.segments, sample.segments[:, ::-1])
    blurred = datasets.augment(sample, Always(0.2, 0.9, 0.7))  # type: ignore[arg-type]
    expected = Image.fromarray(sample.inversions[1]).filter(ImageFilter.GaussianBlur(0.7))
    np.testing.assert_array_equal(blurred.inversions[1], np.asarray(expected))
    np.testing.assert_array_equal(blurred.segments, sample.segments)


def test_true_maps_are_computed_once_and_replace_inversions(data, labels, tmp_path):
    calls = []

    def compare(image: np.ndarray, inversions: np.ndarray) -> np.ndarray:
        calls.append(1)
        return np.abs(image - inversions).mean(-1)

    for part in ((0, 2), (1, 2), (0, 1)):
        datasets.cache_targets(tmp_path, data, (16, 16), compare, part=part)
    assert len(calls) == 5
    targets = lambda name: datasets.read_targets(tmp_path, name)  # noqa: E731
    plain = datasets.samples(data, labels, (16, 16), train=False)
    source = datasets.samples(data, labels, (16, 16), train=False, targets=targets)
    batch, expected = datasets.to_batch(source[3]), datasets.to_batch(plain[3])
    np.testing.assert_array_equal(batch.images, expected.images)
    difference = np.abs(expected.images - expected.inversions).mean(-1)
    np.testing.assert_allclose(batch.inversions, difference, rtol=1e-3)  # half precision
    (tmp_path / "p3.npy").write_bytes(b"not an array")
    with pytest.raises(UserError, match="p3"):
        source[3]


def test_augmentation_flips_maps_without_blur():
    rng = np.random.default_rng(0)
    sample = Sample(
        rng.integers(0, 255, (8, 8, 3), np.uint8), rng.random((2, 8, 8)).astype(np.float16), np.zeros((8, 8), np.int32)
    )
    flipped = datasets.augment(sample, Always(0.9))  # type: ignore[arg-type]
    np.testing.assert_array_equal(flipped.image, sample.image[:, ::-1])
    np.testing.assert_array_equal(flipped.inversions, sample.inversions[:, :, ::-1])


def test_images_without_inversions(tmp_path: Path):
    for i in range(3):
        Image.new("RGB", (20, 10), (i, 0, 0)).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    held = datasets.image_samples(paths, size=(8, 8), train=False)
    assert [int(held[i][0, 0, 0]) for i in range(len(held))] == [0, 1, 2]
    drawn = datasets.image_samples(paths, size=(8, 8), train=True, seed=3)
    assert sorted(int(drawn[i][0, 0, 0]) for i in range(3)) == [0, 1, 2]
