"""Generators with classes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax import Pipeline, analysis, directions, generation, losses
from samjax.config import Options, check_class
from samjax.errors import UserError
from samjax.io.checkpoints import LoadedNetwork
from samjax.nets import stylegan2
from samjax.testing import TINY, random_lpips, tiny_generator

CONFIG = dataclasses.replace(TINY, c_dim=3)


@pytest.fixture(scope="module")
def params() -> stylegan2.Params:
    return tiny_generator(CONFIG)


def mean_of_class(params: stylegan2.Params, class_idx: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean style of a class, and the standard error of a mean of 2,000 samples."""
    z = jax.random.normal(jax.random.key(5), (2000, CONFIG.z_dim))
    ws = stylegan2.map_z(CONFIG, params, z, jax.nn.one_hot(jnp.full(2000, class_idx), 3))[:, 0]
    return np.asarray(ws.mean(0)), np.asarray(ws.std(0)) / np.sqrt(2000)


def test_prior_start_and_directions_are_those_of_the_class(params):
    means = [mean_of_class(params, k) for k in range(3)]
    tolerance = 8 * max(error.max() for _, error in means)  # each is the mean of other samples
    assert min(np.abs(means[0][0] - means[k][0]).max() for k in (1, 2)) > 2 * tolerance, "the classes differ"
    for k in (0, 2):
        key = jax.random.key(0)
        prior = losses.generator_prior(CONFIG, params, key=key, samples=2000, class_idx=k)
        styles = directions.sample_styles(CONFIG, params, key=key, samples=2000, class_idx=k)
        for found in (prior.mean_w, styles.mean):
            np.testing.assert_allclose(found, means[k][0], rtol=0, atol=tolerance)
    of_all = losses.generator_prior(CONFIG, params, key=jax.random.key(0), samples=6000)
    np.testing.assert_allclose(of_all.mean_w, np.mean([mean for mean, _ in means], 0), rtol=0, atol=2 * tolerance)


def test_seeds_take_the_classes_in_turn_or_the_one_given(params):
    z = np.stack([generation.random_z(seed, CONFIG.z_dim) for seed in (4, 5)])
    for class_idx, classes in ((None, [1, 2]), (2, [2, 2])):
        found = directions.seed_styles(CONFIG, params, [4, 5], class_idx=class_idx)
        expected = stylegan2.map_z(CONFIG, params, jnp.asarray(z), jnp.eye(3)[np.asarray(classes)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_pipeline_notes_that_no_class_was_given(params, monkeypatch):
    monkeypatch.setattr("samjax.pipeline.weights.load_lpips", random_lpips)
    generator = LoadedNetwork(CONFIG, params, {})
    with pytest.warns(UserWarning, match="has 3 classes: its prior is that of all; class_idx chooses one"):
        of_all = Pipeline(generator)
    notes: list[str] = []
    chosen = Pipeline(generator, options=Options(class_idx=1), notify=notes.append)
    assert notes == []
    assert of_all.settings != chosen.settings
    target = np.zeros((1, *chosen.category.target_size, 3), np.float32)
    mean, error = mean_of_class(params, 1)
    np.testing.assert_allclose(chosen.start(target[0])[0], mean, rtol=0, atol=8 * error.max())
    best = analysis.start_latents(
        CONFIG, chosen.networks, target, chosen.config, kind="best", samples=4, class_idx=1, key=jax.random.key(0)
    )
    assert np.isfinite(best).all()


def test_results_of_another_class_are_not_resumed(params, monkeypatch, tmp_path):
    monkeypatch.setattr("samjax.pipeline.weights.load_lpips", random_lpips)
    first, other = (Pipeline(LoadedNetwork(CONFIG, params, {}), options=Options(class_idx=k)) for k in (0, 1))
    size = (CONFIG.img_resolution, CONFIG.img_resolution)
    image, labels = np.zeros((*size, 3), np.uint8), np.zeros(size, np.int32)
    maps = np.zeros((len(first.layers), *size), np.float32)
    first.analyze(image, segments=labels, maps=maps, directory=tmp_path)
    (tmp_path / "measured.npz").touch()
    first.analyze(image, segments=labels, maps=maps, directory=tmp_path)
    with pytest.raises(UserError, match=r"holds results of other settings \(class_idx\)"):
        other.analyze(image, segments=labels, maps=maps, directory=tmp_path)


@pytest.mark.parametrize(
    ("config", "class_idx", "message"),
    [
        (TINY, 0, "this generator has no classes: leave --class_idx out"),
        (CONFIG, 3, "--class_idx 3: this generator has the classes 0 to 2"),
        (CONFIG, -1, "--class_idx -1: this generator has the classes 0 to 2"),
    ],
)
def test_classes_that_a_generator_lacks(config, class_idx, message):
    with pytest.raises(UserError, match=message):
        check_class(config, class_idx)
    check_class(config, None)
