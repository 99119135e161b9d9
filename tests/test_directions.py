"""Finding directions in a generator."""

import jax
import numpy as np
import pytest

from samjax import demo, directions
from samjax.demo import scenes
from samjax.nets import stylegan2
from samjax.testing import TINY, tiny_generator


@pytest.fixture(scope="module")
def styles():
    return directions.sample_styles(TINY, tiny_generator(), key=jax.random.key(0), samples=500, batch_size=200)


# --- methods ---


def test_styles_are_those_of_the_mapping(styles):
    assert styles.ws.shape == (500, TINY.w_dim)
    z = jax.random.normal(jax.random.fold_in(jax.random.key(0), 200), (200, TINY.z_dim))
    mapped = stylegan2.map_z(TINY, tiny_generator(), z)[:, 0]
    np.testing.assert_allclose(styles.ws[200:400], mapped, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(styles.mean, styles.ws.mean(0), rtol=1e-4)
    np.testing.assert_allclose(styles.covariance, np.cov(styles.ws, rowvar=False), rtol=1e-4)


def test_a_unit_of_strength_is_a_standard_deviation(styles):
    for found in (directions.ganspace(styles), directions.sefa(TINY, tiny_generator(), styles)):
        assert found.vectors.shape == (8, TINY.w_dim)
        for vector in found.vectors.astype(np.float64):
            length = np.linalg.norm(vector)
            assert length == pytest.approx(np.std(styles.ws @ vector / length, ddof=1), rel=1e-4)
        assert np.all(np.diff(found.values) <= 0)


def test_ganspace_is_principal_component_analysis(styles):
    found = directions.ganspace(styles, count=3)
    _, deviations, components = np.linalg.svd(styles.ws - styles.ws.mean(0), full_matrices=False)
    for vector, component, deviation in zip(found.vectors, components, deviations, strict=False):
        expected = component * deviation / np.sqrt(len(styles.ws) - 1)
        assert min(np.abs(vector - expected).max(), np.abs(vector + expected).max()) < 1e-3 * np.abs(expected).max()


def test_sefa_moves_the_styles_of_its_layers_most(styles):
    """No direction of unit length changes these layers' normalized modulation more than the first."""
    params = tiny_generator()
    found = directions.sefa(TINY, params, styles, layers=(2, 4), count=TINY.w_dim)
    names = (("b8", "conv1"), ("b16", "conv0"))
    a = np.concatenate([np.asarray(params["synthesis"][b][layer]["affine"]["weight"]) for b, layer in names], axis=1)
    a = a / np.linalg.norm(a, axis=0)
    units = found.vectors / np.linalg.norm(found.vectors, axis=1, keepdims=True)
    moved = np.linalg.norm(units @ a, axis=1)
    np.testing.assert_allclose(moved**2, found.values, rtol=1e-4)
    others = np.random.default_rng(0).standard_normal((200, TINY.w_dim))
    assert np.all(np.linalg.norm(others @ a, axis=1) / np.linalg.norm(others, axis=1) < moved[0])


def test_every_style_has_its_layer():
    weights = directions.affine_weights(TINY, tiny_generator())
    assert len(weights) == TINY.num_ws
    assert {weight.shape for weight in weights} == {(TINY.w_dim, 8)}


@pytest.mark.parametrize("layers", [(3, 3), (-1, 2), (0, 9), (5, 2)])
def test_invalid_ranges(layers):
    with pytest.raises(ValueError, match="this generator has 8"):
        directions.check_layers(TINY, layers)


def test_spread_over_a_range():
    direction = directions.spread_over(np.arange(8), TINY, (2, 5))
    assert direction.shape == (8, 8)
    assert not direction[:2].any()
    assert not direction[5:].any()
    np.testing.assert_array_equal(direction[3], np.arange(8))
    assert directions.spread_over(np.ones(8), TINY).all()


def test_scores_and_classes_recover_their_normal(styles):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(TINY.w_dim)
    scores = styles.ws @ normal + 7
    whitened = np.linalg.cholesky(styles.covariance)
    angle = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))  # noqa: E731
    fit = directions.regression(styles.ws, scores, styles, ridge=1e-6)
    assert angle(fit.vectors[0] @ whitened, normal @ whitened) > 0.999
    assert fit.values[0] == pytest.approx(1, abs=1e-4)
    classes = (scores > np.median(scores)).astype(int)
    split = directions.boundary(styles.ws, classes, styles)
    assert angle(split.vectors[0] @ whitened, normal @ whitened) > 0.97
    assert split.values[0] > 0.97
    against = directions.boundary(styles.ws, 1 - classes, styles)
    np.testing.assert_allclose(against.vectors, -split.vectors, rtol=1e-3, atol=1e-4 * np.abs(split.vectors).max())


@pytest.mark.parametrize(
    ("scores", "message"),
    [([1.0, 1.0, 1.0], "all scores are the same"), ([1.0, 2.0], "expected styles"), ([1.0, np.nan, 2.0], "not finite")],
)
def test_scores_without_a_direction(styles, scores, message):
    with pytest.raises(ValueError, match=message):
        directions.regression(styles.ws[:3], scores, styles)


def test_classes_are_two(styles):
    with pytest.raises(ValueError, match="0 or 1"):
        directions.boundary(styles.ws[:3], [0, 1, 2], styles)


# --- the demo ---


def test_principal_components_of_the_demo_are_its_factors():
    """Its z are the factors of its scenes, and nearly linear in W (98% of each factor's variance or more), so a linear
    fit tells how a direction changes each factor."""
    generator = demo.load_generator()
    config, params, key = generator.config, generator.params, jax.random.key(11)
    styles = directions.sample_styles(config, params, key=key, samples=4000)
    z = jax.random.normal(jax.random.fold_in(key, 0), (4000, config.z_dim))
    factors = np.asarray(scenes.normalize_factors(z))
    slopes, residual, *_ = np.linalg.lstsq(styles.ws - styles.mean, factors - factors.mean(0), rcond=None)
    assert np.all(residual / np.sum((factors - factors.mean(0)) ** 2, axis=0) < 0.03)
    effects = directions.ganspace(styles).vectors @ slopes  # [8, factors]
    strongest = {scenes.FACTORS[np.abs(effect).argmax()]: float(np.abs(effect).max()) for effect in effects}
    assert strongest["scale"] > 0.5, "a standard deviation changes the size by more than half of one of its own"
    assert max(strongest.get(color, 0) for color in ("red", "green", "blue")) > 0.5
