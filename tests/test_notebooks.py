"""The notebooks, run from top to bottom on the embedded demo; and their two forms, .py and .ipynb, in step."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jupytext
import nbclient
import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode
from PIL import Image

from samjax.io import checkpoints

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "experiments" / "notebooks"
NAMES = ("invert", "compare_pytorch", "train_predictor")


def read(name: str) -> NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def parameters(notebook: NotebookNode) -> list[int]:
    """Where the cells of parameters are."""
    return [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]


# --- as they are in the repository ---


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_in_step(name):
    paired = jupytext.reads((NOTEBOOKS / f"{name}.py").read_text(), "py:percent")
    notebook = read(name)
    kept = [[(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in x.cells] for x in (paired, notebook)]
    assert kept[0] == kept[1], f"run `jupytext --to ipynb experiments/notebooks/{name}.py`"


@pytest.mark.parametrize("name", NAMES)
def test_what_the_repository_keeps(name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    (place,) = parameters(notebook)
    for line in filter(None, notebook.cells[place].source.splitlines()):
        assert re.fullmatch(r"[A-Z_0-9]+ = .+  # .+", line), "one value a line, and what it means"


def test_they_install_in_the_same_way():
    installing = {cell.source for name in NAMES for cell in read(name).cells if '"pip"' in cell.source
                  and "find_spec" in cell.source}  # fmt: skip
    assert len(installing) == 1


# --- run ---


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What kernels and their programs share: a kernel that is this Python, Jupyter's folders, compiled programs."""
    folder = tmp_path_factory.mktemp("jupyter")
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    return folder


@pytest.fixture
def execute(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., NotebookNode]:
    """Runs a notebook in an empty folder with other parameters, as papermill does; without network."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("JUPYTER_PATH", str(shared))
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(shared / name.lower()))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    for name in ("http_proxy", "https_proxy"):  # nothing listens there
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    def run(name: str, **values: object) -> NotebookNode:
        notebook = read(name)
        (place,) = parameters(notebook)
        known = {line.partition(" = ")[0] for line in notebook.cells[place].source.splitlines()}
        assert values.keys() <= known, "a parameter that the notebook does not have"
        injected = "\n".join(f"{key} = {value!r}" for key, value in values.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(injected))
        resources = {"metadata": {"path": str(tmp_path)}}
        return nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()

    return run


def pictures(notebook: NotebookNode) -> list[np.ndarray]:
    """Every picture that was displayed."""
    outputs = (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    found = (output.data["image/png"] for output in outputs if "image/png" in output.get("data", ()))
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def printed(notebook: NotebookNode) -> str:
    """All text that was shown."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.text if output.output_type == "stream" else output.data.get("text/markdown", "")
             for output in outputs]  # fmt: skip
    return "\n".join(texts)


def drawn(notebook: NotebookNode, count: int) -> None:
    """`count` pictures at least were displayed, and there is something on each."""
    found = pictures(notebook)
    assert len(found) >= count
    assert all(min(picture.shape[:2]) > 20 and np.ptp(picture) > 100 for picture in found)


def check_inversion(done: NotebookNode, here: Path) -> None:
    results = here / "scene1"
    assert len(list((results / "edits").iterdir())) == 8
    with np.load(results / "scene1_latents.npz") as saved:
        assert all(np.isfinite(saved[key]).all() for key in saved.files)
        assert saved["loss"].shape == (6,)
    assert "<title>scene1" in (results / "scene1_report.html").read_text()
    assert len(re.findall(r"LPIPS 0\.\d+", printed(done))) == 2
    assert results.with_suffix(".zip").stat().st_size > 10_000


INVERT = {
    "STEPS": 6, "IMAGE": str(ROOT / "samjax/demo/samples/scene1.png"), "THRESHOLD": 0.5, "STRENGTHS": (0.0, 2.0),
    "OUTPUT": "here",
}  # fmt: skip


def test_invert_the_demo_and_an_image_of_ones_own(execute, tmp_path):
    done = execute("invert", **INVERT)
    drawn(done, 18)
    check_inversion(done, tmp_path / "here")


@pytest.mark.slow
def test_invert_with_a_generator_of_ones_own(execute, tmp_path, golden_dir):
    done = execute("invert", GENERATOR=str(golden_dir / "nvidia_A.pkl"), **INVERT)
    assert "converting nvidia_A.pkl" in printed(done)
    drawn(done, 18)
    check_inversion(done, tmp_path / "here")


def test_compare_without_the_authors_code_runs_ours(execute, tmp_path):
    done = execute("compare_pytorch", DEMO_STEPS=4, OUTPUT="here")
    assert "error: --reference: sam_inversion is no checkout of adobe-research/sam_inversion" in printed(done)
    assert "The PyTorch half is off" in printed(done)
    drawn(done, 1)
    ((_, result),) = json.loads((tmp_path / "here/scene0/metrics.json").read_text())["thresholds"].items()
    assert result["metrics"].keys() == {"W+", "F10", "SAM"}
    assert f"| SAM | {result['metrics']['SAM']['LPIPS']:.3f} |" in printed(done)
    assert all(np.isfinite(list(q.values())).all() for q in result["metrics"].values())


def check_training(done: NotebookNode, here: Path, networks: dict[str, str]) -> None:
    """What a training leaves: its networks (folder to kind), figures, pictures, and an inversion that uses them."""
    for name, kind in networks.items():
        arrays = checkpoints.flatten(checkpoints.load_network(here / name / name, kind).variables)
        assert all(np.isfinite(array).all() for array in arrays.values())
        assert (here / name / f"{name}.zip").exists()
        rows = [json.loads(line) for line in (here / name / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(list(row.values())).all() for row in rows)
        assert any("val_loss" in row for row in rows)
    assert "of the area gets the layer of the true maps, in validation" in printed(done)
    (result,) = (here / "inversions").glob("*/metrics.json")
    ((_, inverted),) = json.loads(result.read_text())["thresholds"].items()
    assert 0 < inverted["metrics"]["SAM"]["LPIPS"] < 1


def test_train_for_a_generator_of_ones_own(execute, tmp_path, golden_dir):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i in (0, 1):
        shutil.copy(ROOT / f"samjax/demo/samples/scene{i}.png", photographs)
    done = execute(
        "train_predictor", OUTPUT="here", GENERATOR=str(golden_dir / "nvidia_A.pkl"), PHOTOGRAPHS=str(photographs),
        INVERSION_STEPS=2, PREDICTOR_STEPS=1,
    )  # fmt: skip
    assert "2 photographs, 1 of them for validation" in printed(done)
    drawn(done, 6)
    check_training(done, tmp_path / "here", {"predictor": "invertibility"})


@pytest.mark.slow
def test_train_for_the_demo_and_go_on(execute, tmp_path):
    values = {"SCENES": 8, "INVERSION_STEPS": 1, "TRAIN_ENCODER": True, "ENCODER_STEPS": 1, "PREDICTOR_STEPS": 2}
    done = execute("train_predictor", OUTPUT="here", **values)
    drawn(done, 8)
    check_training(done, tmp_path / "here", {"encoder": "e4e", "predictor": "invertibility"})
    again = printed(execute("train_predictor", OUTPUT="here", **values))
    assert "resuming: 30 of 30 inversions are done" in again
    assert "resuming after step 2 of 2" in again
    assert "resuming: threshold 0.350 is done" in again
