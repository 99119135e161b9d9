"""The README's Python, as written there, from an empty folder against the built wheel; its time beside the script's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samjax import demo

ROOT = Path(__file__).parent.parent


def readme_snippet() -> str:
    """The block of the README that begins with `import samjax`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    return next(block for block in blocks if block.startswith("import samjax"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's content: what a user has who installs it, without this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(wheel: Path, folder: Path, code: str, **environment: str) -> str:
    """Runs Python in `folder`, where the wheel comes before everything else that is installed."""
    check = f"import samjax, ckpt_convert\nassert samjax.__file__.startswith({str(wheel)!r})\n"
    variables = {**os.environ, "PYTHONPATH": str(wheel), "SAMJAX_CACHE": str(folder.parent / "cache"), **environment}
    variables.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)  # by default, as a user runs it
    done = subprocess.run(
        [sys.executable, "-c", check + code], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_wheel_has_everything(wheel):
    names = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    for name in (
        "samjax/py.typed", "ckpt_convert/py.typed", "samjax/report/templates/report.html.j2",
        "samjax/demo/generator.safetensors", "samjax/demo/edits/blue_car.npy", "samjax/demo/samples/scene0.png",
    ):  # fmt: skip
        assert name in names
    assert {name.partition("/")[0] for name in names} - {"samjax", "ckpt_convert"} == {
        path.name for path in wheel.glob("samjax-*.dist-info")
    }


def test_importing_it_is_quick_and_starts_nothing(wheel, tmp_path):
    code = """
import sys
assert not {"skimage", "jinja2", "tyro", "pooch", "requests", "orbax", "torch"} & set(sys.modules)
import jax
assert not jax._src.xla_bridge._backends  # no device was started
print(samjax.__version__)
"""
    assert run(wheel, tmp_path, code).strip().count(".") == 2


@pytest.mark.slow  # a process that compiles everything; .ci/run makes a pipeline from the installed wheel
def test_the_readmes_lines_run_for_a_generator_of_ones_own(wheel, tmp_path, golden_dir):
    """Converted by the command, and as distributed; a few steps of a small generator."""
    shutil.copy(demo.SAMPLES / "scene1.png", tmp_path / "photo.png")
    code = readme_snippet()
    assert 'from_pretrained("demo")' in code
    own = 'from_pretrained("own", num_opt_steps=2, lpips_type="alex", latent_names="W+,F4", edits_folder=Path("edits"))'
    code = code.replace('from_pretrained("demo")', own).replace('{"blue_car": 2, "dusk": 1}', '{"up": 2}')
    code = code.replace('{3: "F10"}', '{3: "F4"}')
    before = f"""
from pathlib import Path
import numpy as np
from ckpt_convert.__main__ import main
assert main([{str(golden_dir / "rosinality_A.pt")!r}, "own"]) == 0
Path("edits").mkdir()
np.save("edits/up.npy", np.ones(48, np.float32))
"""
    after = f"""
raw = samjax.Pipeline(ckpt_convert.load({str(golden_dir / "rosinality_A.pt")!r}), options=sam.options)
again = raw.invert("photo.png")
assert np.array_equal(again.image, sam.invert("photo.png").image)
assert result.reconstruction.size == (64, 64)
"""
    run(wheel, tmp_path, before + code + after, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert "<title>photo" in (tmp_path / "report.html").read_text()
    assert {"reconstruction.png", "edited.png", "saved"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_readmes_lines_run_for_the_demo_and_are_the_script_to_the_bit(wheel, tmp_path):
    """Prints what both take, each in a process of its own and with its own cache of compiled programs."""
    folder = tmp_path / "python"
    folder.mkdir()
    shutil.copy(demo.SAMPLES / "scene1.png", folder / "photo.png")
    first = """
import time; began = time.perf_counter()
result = samjax.Pipeline.from_pretrained("demo").invert("photo.png")
import json, numpy as np
np.savez("latents.npz", **result.latents)
print(json.dumps([time.perf_counter() - began, dict(result.metrics)]))
"""
    seconds, metrics = json.loads(run(wheel, folder, first).splitlines()[-1])
    run(wheel, folder, readme_snippet())
    command = [sys.executable, str(ROOT / "experiments" / "invert.py"), "--image_path", "photo.png"]
    environment = {**os.environ, "SAMJAX_CACHE": str(tmp_path / "script_cache")}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    began = time.perf_counter()
    subprocess.run(
        [*command, "--output_path", "out", "--generate_edits", "False"],
        cwd=folder, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    print(f"Python {seconds:.1f} s, script {time.perf_counter() - began:.1f} s (which also draws figures and a report)")
    with np.load(folder / "latents.npz") as ours, np.load(folder / "out" / "photo" / "latents_T0.350.npz") as saved:
        for name in ours.files:
            np.testing.assert_array_equal(saved[f"latent_{name}"], ours[name])
    summary = json.loads((folder / "out" / "photo" / "metrics.json").read_text())
    assert summary["thresholds"]["0.350"]["metrics"]["SAM"] == metrics
    script = np.asarray(Image.open(folder / "out" / "photo" / "reconstruction_T0.350.png"))
    np.testing.assert_array_equal(script, np.asarray(Image.open(folder / "reconstruction.png")))
