"""Conversion of others' checkpoints: the same generator out of every format, and nothing but errors out of bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckpt_convert import convert
from samjax.io import checkpoints
from samjax.nets import stylegan2

GOLDEN = Path(__file__).parent / "golden"
FILES = ("nvidia_A.pkl", "tensorflow_A.pkl", "rosinality_A.pt")


@pytest.fixture(scope="session")
def reference() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "stylegan2_A.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each golden file, converted."""
    root = tmp_path_factory.mktemp("converted")
    for name in FILES:
        convert.convert(GOLDEN / name, root / name)
    return {name: root / name for name in FILES}


def error(found: object, expected: np.ndarray) -> float:
    """Largest difference, relative to the spread of what is expected."""
    return float(np.abs(np.asarray(found) - expected).max() / (expected.max() - expected.min()))


# Float32 sums over some hundred channels in another order: 1e-4 of the spread, as for the network itself.
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_reference_generator(name, folders, reference):
    config, params, _ = checkpoints.load_generator(folders[name])
    assert config == stylegan2.StyleGAN2Config(64, 32, 0, 48, 3, 4, 1024, 48)
    for key, truncation in {
        "ws": {},
        "ws_psi07": {"truncation_psi": 0.7},
        "ws_psi05_cut4": {"truncation_psi": 0.5, "truncation_cutoff": 4},
    }.items():
        assert error(stylegan2.map_z(config, params, reference["z"], **truncation), reference[key]) < TOLERANCE, key
    for noise in ("const", "none"):
        image, features = stylegan2.synthesize(config, params, reference["ws_in"], noise=noise)
        expected = reference[f"img_{noise}"].transpose(0, 2, 3, 1)
        assert error(image, expected) < TOLERANCE
        if noise == "none":
            for r in (4, 8, 16, 32):
                assert error(features[r], reference[f"feat_{r}"].transpose(0, 2, 3, 1)) < TOLERANCE, r
