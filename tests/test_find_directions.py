"""Finding directions: what is written, what a scorer receives, and messages about bad input."""

import json
from pathlib import Path

import find_directions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
from PIL import Image

from samjax import demo, directions, driver, generation
from samjax.demo import scenes
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.io import directions as files
from samjax.io.weights import load_lpips
from samjax.nets import stylegan2
from samjax.testing import TINY, tiny_generator


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    path = tmp_path_factory.mktemp("generator") / "tiny.safetensors"
    checkpoints.save_safetensors(path, TINY, tiny_generator())
    return path


@pytest.fixture
def find(generator, tmp_path):
    """Runs the program on the tiny generator and returns its output directory."""

    def run(**options):
        folder = tmp_path / "found"
        small = {"generator": generator, "output_path": folder, "count": 2, "samples": 200, "images": 2, "scored": 24}
        find_directions.main(find_directions.Arguments(**small | options))
        return folder

    return run


def notes(path: Path) -> dict:
    with safetensors.safe_open(path, "numpy") as file:
        return {key: json.loads(text) for key, text in file.metadata().items()}


def test_a_file_a_direction_and_a_sheet(find):
    folder = find(layers="1-2")
    assert sorted(p.name for p in folder.iterdir()) == [
        "ganspace.png", "ganspace_00.safetensors", "ganspace_01.safetensors"
    ]  # fmt: skip
    found = directions.ganspace(
        directions.sample_styles(TINY, tiny_generator(), key=jax.random.key(0), samples=200), count=2
    )
    for i in range(2):
        name = f"ganspace_{i:02d}"
        read = files.read(folder / f"{name}.safetensors", TINY.num_ws, TINY.w_dim)
        np.testing.assert_array_equal(read[name], directions.spread_over(found.vectors[i], TINY, (1, 3)))
        said = notes(folder / f"{name}.safetensors")
        stated = {"name": name, "method": "ganspace", "layers": "1-2", "generator": "tiny.safetensors"}
        assert said.items() >= {**stated, "class_idx": None}.items()
        assert said["value"] == pytest.approx(found.values[i])
        assert 0 < said["typical_strength"] <= 8
    with Image.open(folder / "ganspace.png") as sheet:
        assert np.ptp(np.asarray(sheet)) > 100


def test_sefa_looks_at_its_layers_alone(find):
    at_one = files.read(find(method="sefa", layers="0") / "sefa_00.safetensors", TINY.num_ws, TINY.w_dim)["sefa_00"]
    assert np.abs(at_one[0]).max() > 0
    assert np.abs(at_one[1:]).max() == 0


def test_the_typical_strength_changes_images_as_asked(find):
    folder = find(typical_change=0.02)
    way = files.read(folder / "ganspace_00.safetensors", TINY.num_ws, TINY.w_dim)["ganspace_00"]
    typical = notes(folder / "ganspace_00.safetensors")["typical_strength"]
    params = tiny_generator()
    ws = directions.seed_styles(TINY, params, range(2), 0.7)
    still, moved = (generation.draw(TINY, params, ws + s * way) for s in (0.0, typical))
    # Linear interpolation between the strengths tried, and two digits.
    assert float(np.mean(directions.image_change(load_lpips("alex"), still, moved))) == pytest.approx(0.02, rel=0.35)


def test_scores_of_samples(find, tmp_path):
    """The score is an entry of w itself: the direction is the one along which that entry grows."""
    ws = directions.seed_styles(TINY, tiny_generator(), range(200))[:, 0]
    table = tmp_path / "third.csv"
    table.write_text("seed,score\n" + "".join(f"{i},{value}\n" for i, value in enumerate(ws[:, 2])))
    folder = find(scores=table)
    way = files.read(folder / "third.safetensors", TINY.num_ws, TINY.w_dim)["third"]
    assert way[0, 2] / np.linalg.norm(way[0]) > 0.9
    assert notes(folder / "third.safetensors")["value"] > 0.99

    table.write_text("seed,score\n" + "".join(f"{i},{int(value > 0)}\n" for i, value in enumerate(ws[:, 2])))
    way = files.read(find(scores=table) / "third.safetensors", TINY.num_ws, TINY.w_dim)["third"]
    assert way[0, 2] / np.linalg.norm(way[0]) > 0.9


def test_a_scorer_of_images(find, tmp_path):
    """It receives uint8 images, and its score grows along the direction."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\n"
        "def light(images):\n"
        "    assert images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    folder = find(scorer=f"{file}:light", scored=100)
    way = files.read(folder / "light.safetensors", TINY.num_ws, TINY.w_dim)["light"]
    ws = np.asarray(stylegan2.map_z(TINY, tiny_generator(), jax.random.normal(jax.random.key(9), (32, TINY.z_dim))))
    dark, light = (
        driver.render(TINY, tiny_generator(), {"W+": jnp.asarray(ws + s * way)}, {}, batch_size=8).mean((1, 2, 3))
        for s in (-1, 1)
    )
    assert np.mean(light > dark) > 0.9
    assert (folder / "light.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "3"}, r"--layers .*there are .*, counted from 0"),
        ({"layers": "2-1"}, "--layers"),
        ({"count": 0}, "--count must be at least 1"),
        ({"samples": 1}, "--samples must be at least 2"),
        ({"typical_change": 0.0}, "--typical_change must be a number above 0"),
        ({"typical_change": float("inf")}, "--typical_change must be a number above 0"),
        ({"seed": 99999999999999999999}, "--seed must lie between"),
        ({"count": 9999}, f"ganspace finds at most {TINY.w_dim} directions"),
        ({"count": 8, "samples": 5}, "ganspace finds at most 4 directions"),
        ({"count": 9999, "method": "sefa"}, f"sefa finds at most {TINY.w_dim} directions"),
        ({"method": "sefa", "scores": Path("none.csv")}, "--method sefa uses no scores"),
        ({"method": "supervised"}, "takes --scores"),
        ({"scorer": "score"}, r"give FILE\.py:NAME"),
        ({"scorer": "none.py:score"}, "there is no file"),
        ({"scores": Path("none.csv")}, r"--scores: none\.csv cannot be read: No such file or directory$"),
        ({"generator": Path("none")}, "none"),
    ],
)
def test_bad_arguments(find, tmp_path, options, message):
    if options.get("layers") == "3":
        options = {"layers": str(TINY.num_ws)}
    with pytest.raises(UserError, match=message):
        find(**options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_names_stay_in_the_directory(find, tmp_path):
    folder = find(name="../../zz")
    assert {path.parent for path in tmp_path.rglob("*.safetensors")} == {folder}


def test_a_generator_as_distributed(find, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMJAX_CACHE", str(tmp_path / "cache"))
    assert (find(generator=Path(__file__).parent / "golden" / "nvidia_A.pkl") / "ganspace_00.safetensors").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(images):\n    raise RuntimeError('no card')", "failed with RuntimeError: no card"),
        ("def f(images):\n    return 1.0", "returned 1 numbers for 16 images"),
        ("def f(images):\n    return ['a'] * len(images)", "failed with ValueError"),
        ("def f(images):\n    return [1.0] * len(images)", "scores are the same"),
        ("def g(images):\n    return 1.0", "has no function 'f'"),
        ("import nothing_of_this_name", "failed with ModuleNotFoundError"),
    ],
)
def test_scorers_that_do_not_work(find, tmp_path, body, message):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(UserError, match=message):
        find(scorer=f"{tmp_path / 'mine.py'}:f")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed\n1\n", "has no column score: "),
        ("a;b\n1;2\n", "has no column seed and no column score: "),
        ("seed,score\n1,2\n1,much\n", "row 2 does not hold"),
        ("seed,score\n1\n", "row 1 does not hold"),
        ("seed,score\n-1,1\n2,2\n", "between 0 and 4294967295"),
        ("seed,score\n1,1\n", "at least 2"),
        ("seed,score\n1,nan\n2,1\n", "not finite"),
        ("", "no column seed"),
        ("seed,score\n", "at least 2"),
    ],
)
def test_invalid_scores(find, tmp_path, text, message):
    (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        find(scores=tmp_path / "scores.csv")


# --- their effect on images of the demo ---


@pytest.fixture(scope="module")
def factor_changes():
    """A function of directions and the layers that they act on: [K, factors], by how many standard deviations each
    factor changes with a strength of 1.

    The factors of an image are those with which the renderer draws it, found by gradient descent from the factors of
    the unedited image.
    """
    generator = demo.load_generator()
    config, params = generator.config, generator.params
    z = scenes.normalize_factors(jax.random.normal(jax.random.key(5), (6, scenes.NUM_FACTORS)))
    ws = np.asarray(stylegan2.map_z(config, params, z))
    side, adam = 32, optax.adam(0.04)
    drawn = jax.vmap(lambda z: scenes.render(z, side).image)

    @jax.jit
    def step(targets, z, moments):
        gradients = jax.grad(lambda z: jnp.sum(jnp.mean((drawn(z) - targets) ** 2, (1, 2, 3))))(z)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float32 to an int32 power
            updates, moments = adam.update(gradients, moments)
        return scenes.normalize_factors(z + updates), moments

    def read(ws, z):
        made = driver.render(config, params, {"W+": jnp.asarray(ws)}, {}, batch_size=6)
        factor = made.shape[1] // side
        targets = jnp.asarray(np.clip(made, -1, 1).reshape(len(ws), side, factor, side, factor, 3).mean((2, 4)))
        moments = adam.init(z)
        for _ in range(40):
            z, moments = step(targets, z, moments)
        return z

    still = read(ws, z)

    def changes(found, layers):
        ways = np.stack([directions.spread_over(vector, config, layers) for vector in found.vectors])
        moved = np.concatenate([ws + s * way for s in (1, -1) for way in ways])
        up, down = np.split(np.asarray(read(moved, jnp.tile(still, (2 * len(ways), 1)))), 2)
        return (up - down).reshape(len(ways), len(ws), -1).mean(1) / 2

    return changes


COLORS = [scenes.FACTORS.index(name) for name in ("red", "green", "blue")]
SIZE = [scenes.FACTORS.index("scale")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layers", "factors"),
    [
        ("ganspace", None, COLORS),
        ("ganspace", None, SIZE),
        # SeFa looks at weights only, and over all layers those of shapes are the strongest.
        ("sefa", (6, 14), COLORS),
        ("sefa", (2, 14), SIZE),
    ],
)
def test_color_and_size_are_among_the_first_eight(factor_changes, method, layers, factors):
    """Some direction changes one of these factors by half a standard deviation, and no other factor more."""
    generator = demo.load_generator()
    styles = directions.sample_styles(generator.config, generator.params, key=jax.random.key(0))
    if method == "sefa":
        found = directions.sefa(generator.config, generator.params, styles, layers=layers)
    else:
        found = directions.ganspace(styles)
    changed = np.abs(factor_changes(found, layers))
    assert any(row.argmax() in factors and row.max() > 0.5 for row in changed), np.round(changed, 2)
