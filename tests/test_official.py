"""The official categories at full size, from files as their authors distribute them to edited images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samjax.io import images
from samjax.nets.stylegan2 import StyleGAN2Config

pytest.importorskip("torch")
import official_files  # after the line above, which it needs

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture(scope="module")
def invert():
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import invert

        yield invert
    finally:
        sys.path.remove(str(EXPERIMENTS))


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    """An image of smooth shapes, 400 x 300 pixels, which is not the size of any category."""
    y, x = np.mgrid[0:300, 0:400].astype(np.float32)
    channels = [128 + 100 * np.sin(x / 40 + phase) * np.cos(y / 60 - phase) for phase in (0.0, 1.0, 2.0)]
    image = np.stack(channels, -1).clip(0, 255).astype(np.uint8)
    image[100:220, 120:300] = (200, 30, 40)
    Image.fromarray(image).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.slow
@pytest.mark.parametrize(("category", "shape"), [("cars", (384, 512)), ("faces", (1024, 1024)), ("cats", (256, 256))])
def test_a_category_from_its_files_to_edits(invert, category, shape, image_path, tmp_path):
    official_files.write(category, tmp_path / "weights")
    for edit in sorted((tmp_path / "weights" / "edits" / category).iterdir())[1:]:
        edit.unlink()  # one is enough
    invert.main(
        invert.Arguments(
            image_path=image_path, image_category=category, weights=tmp_path / "weights", output_path=tmp_path / "out",
            num_opt_steps=2, edit_strengths=(0.0, 1.0), fit="crop", paste_back=True,
        )
    )  # fmt: skip
    folder = tmp_path / "out" / "photo"
    summary = json.loads((folder / "metrics.json").read_text())
    (result,) = summary["thresholds"].values()
    assert set(result["metrics"]) == {"SAM"}
    assert np.isfinite(list(result["metrics"]["SAM"].values())).all()
    assert images.image_size(folder / "reconstruction_T0.225.png") == shape
    assert images.image_size(folder / "pasted" / "reconstruction_T0.225.png") == (300, 400)
    (edit,) = (path.stem for path in (tmp_path / "weights" / "edits" / category).iterdir())
    assert (folder / "edits" / edit / "T0.225_mul1.png").exists()
    assert images.image_size(folder / "pasted" / edit / "T0.225_mul1.png") == (300, 400)
    assert (folder / "report.html").stat().st_size > 10_000


def test_small_files_of_the_same_formats_reach_the_same_names(tmp_path):
    """NVIDIA's PyTorch and TensorFlow files of the same generator hold the same parameters."""
    config = StyleGAN2Config(16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8)
    official_files.write_tensorflow(tmp_path / "tf.pkl", config)
    official_files.write_nvidia(tmp_path / "pt.pkl", config, None)
    from ckpt_convert import convert

    first, second = (convert.read(tmp_path / name).params for name in ("tf.pkl", "pt.pkl"))
    assert first.keys() == second.keys()
    for name, array in first.items():
        # TensorFlow stores the bias of styles minus one, which rounds twice.
        np.testing.assert_allclose(array, second[name], rtol=0, atol=2e-7 * max(1, np.abs(array).max()))
