"""The notebooks: their two forms, .py and .ipynb, are the same, and they run from top to bottom."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jupytext
import nbclient
import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode
from PIL import Image

from samjax.io import checkpoints
from samjax.notebook import run_program

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "experiments" / "notebooks"
NAMES = ("invert", "compare_pytorch", "train_predictor")


def read(name: str) -> NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def parameters(notebook: NotebookNode) -> list[int]:
    """Positions of the cells with parameters."""
    return [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]


# --- as files ---


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same(name):
    paired = jupytext.reads((NOTEBOOKS / f"{name}.py").read_text(), "py:percent")
    notebook = read(name)
    kept = [[(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in x.cells] for x in (paired, notebook)]
    assert kept[0] == kept[1], f"run `jupytext --to ipynb experiments/notebooks/{name}.py`"


@pytest.mark.parametrize("name", NAMES)
def test_files_have_no_outputs_and_documented_parameters(name):
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


@pytest.mark.parametrize("name", NAMES)
def test_they_download_nothing_of_samjax(name):
    source = "\n".join(cell.source for cell in read(name).cells)
    assert set(re.findall(r"https?://[^\s\"')]+", source)) <= {
        "https://HOST/OWNER/samjax.git", "https://github.com/adobe-research/sam_inversion"
    }  # fmt: skip
    if name != "compare_pytorch":  # only the installed package
        code = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "code")
        assert "experiments" not in code
        assert "sys.path" not in code


# --- installation ---


@pytest.fixture(scope="module")
def installation() -> str:
    """The cell that installs samjax, which is the same in all notebooks."""
    (cell,) = {cell.source for name in NAMES for cell in read(name).cells if "find_spec" in cell.source}
    return cell


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run in place of an installation, as if samjax were missing."""
    commands: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "getoutput", lambda command: "580.65.06")
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    return commands


def test_without_samjax_the_message_says_what_to_give(installation, commands):
    with pytest.raises(Exception, match="set the parameter SAMJAX to its git address") as raised:
        exec(installation, {"SAMJAX": None})
    assert commands == []
    assert raised.value._render_traceback_() == [f"error: {raised.value}"]


@pytest.mark.parametrize(
    ("given", "package"),
    [
        ("https://host/owner/samjax.git", "samjax[train] @ git+https://host/owner/samjax.git"),
        ("git+ssh://host/samjax.git@main", "samjax[train] @ git+ssh://host/samjax.git@main"),
        ("samjax-0.1.0-py3-none-any.whl", "samjax-0.1.0-py3-none-any.whl[train]"),
    ],
)
def test_samjax_is_installed_from_what_is_given(installation, commands, given, package):
    exec(installation, {"SAMJAX": given})
    assert commands == [[sys.executable, "-m", "pip", "install", "-q", package, "jax[cuda13]"]]


def test_the_comparison_finds_its_checkout(installation, tmp_path, monkeypatch):
    (find,) = (cell.source for cell in read("compare_pytorch").cells if "CHECKOUT is None" in cell.source)
    monkeypatch.chdir(NOTEBOOKS)
    names: dict[str, object] = {"SAMJAX": None, "CHECKOUT": None}
    exec(f"{installation}\n{find}", names)
    assert names["checkout"] == ROOT
    for place, given in ((tmp_path, None), (ROOT, str(tmp_path))):
        monkeypatch.chdir(place)
        with pytest.raises(Exception, match="set the parameter CHECKOUT to the directory that contains experiments"):
            exec(find, {**names, "CHECKOUT": given})


# --- programs ---


def test_flags_and_exit_codes_of_programs(tmp_path, capsys):
    program = tmp_path / "program.py"
    program.write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    flags = {"image_path": Path("a b.png"), "strengths": (0.0, 2.0), "paste_back": True, "weights": None}
    assert run_program(program, ok=(0, 3), **flags) == 3
    assert capsys.readouterr().out.splitlines() == [
        "$ python program.py --image_path 'a b.png' --strengths 0.0 2.0 --paste_back",
        "['--image_path', 'a b.png', '--strengths', '0.0', '2.0', '--paste_back']",
    ]
    with pytest.raises(RuntimeError, match=r"program\.py ended with exit code 3"):
        run_program(program)


# --- run ---


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the kernels share: how to start this Python, Jupyter's files, and compiled programs."""
    directory = tmp_path_factory.mktemp("jupyter")
    kernel = directory / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    return directory


@pytest.fixture
def execute(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., NotebookNode]:
    """Runs a notebook in an empty directory with other parameters, as papermill does; without network."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("JUPYTER_PATH", str(shared))
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(shared / name.lower()))
    compiled = jax.config.jax_compilation_cache_dir or shared / "compiled"  # that of the run, if it has several workers
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
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
        return nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()

    return run


def displayed(notebook: NotebookNode) -> list[np.ndarray]:
    """All images that were displayed."""
    outputs = (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    found = (output.data["image/png"] for output in outputs if "image/png" in output.get("data", ()))
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def printed(notebook: NotebookNode) -> str:
    """All text that was displayed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.text if output.output_type == "stream" else output.data.get("text/markdown", "")
             for output in outputs]  # fmt: skip
    return "\n".join(texts)


def check_displayed(notebook: NotebookNode, count: int) -> None:
    """At least `count` images were displayed, and none of them is empty."""
    found = displayed(notebook)
    assert len(found) >= count
    assert all(min(image.shape[:2]) > 20 and np.ptp(image) > 100 for image in found)


def check_inversion(done: NotebookNode, directory: Path) -> None:
    results = directory / "scene1"
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


@pytest.mark.slow  # a kernel and two whole inversions
def test_invert_the_demo_and_an_image(execute, tmp_path):
    done = execute("invert", **INVERT)
    check_displayed(done, 18)
    check_inversion(done, tmp_path / "here")


@pytest.mark.slow
def test_invert_with_a_generator(execute, tmp_path, golden_dir):
    done = execute("invert", GENERATOR=str(golden_dir / "nvidia_A.pkl"), **INVERT)
    assert "converting nvidia_A.pkl" in printed(done)
    check_displayed(done, 18)
    check_inversion(done, tmp_path / "here")


@pytest.mark.slow
def test_the_comparison_without_the_authors_code_runs_samjax_alone(execute, tmp_path):
    done = execute("compare_pytorch", CHECKOUT=str(ROOT), DEMO_STEPS=2, OUTPUT="here")
    assert "error: --reference: sam_inversion is not a checkout of adobe-research/sam_inversion" in printed(done)
    assert "The PyTorch half was skipped" in printed(done)
    check_displayed(done, 1)
    ((_, result),) = json.loads((tmp_path / "here/scene0/metrics.json").read_text())["thresholds"].items()
    assert result["metrics"].keys() == {"W+", "F10", "SAM"}
    assert f"| SAM | {result['metrics']['SAM']['LPIPS']:.3f} |" in printed(done)
    assert all(np.isfinite(list(q.values())).all() for q in result["metrics"].values())


def check_training(done: NotebookNode, directory: Path, networks: dict[str, str]) -> None:
    """A training leaves its networks (directory to kind), metrics, figures, and an inversion that uses them."""
    for name, kind in networks.items():
        network = checkpoints.load_network(directory / name / name, kind)
        assert all(np.isfinite(array).all() for array in checkpoints.flatten(network.params).values())
        assert (directory / name / f"{name}.zip").exists()
        rows = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(list(row.values())).all() for row in rows)
        assert any("val_loss" in row for row in rows)
    assert "of the area gets the same layer as from the true maps" in printed(done)
    (result,) = (directory / "inversions").glob("*/metrics.json")
    ((_, inverted),) = json.loads(result.read_text())["thresholds"].items()
    assert 0 < inverted["metrics"]["SAM"]["LPIPS"] < 1


@pytest.mark.slow  # its parts are tested in test_train_encoder, test_invert_folder and test_train_invertibility
def test_train_for_a_generator(execute, tmp_path, golden_dir):
    given = tmp_path / "given"
    given.mkdir()
    for i in (0, 1):
        shutil.copy(ROOT / f"samjax/demo/samples/scene{i}.png", given)
    done = execute(
        "train_predictor", OUTPUT="here", GENERATOR=str(golden_dir / "nvidia_A.pkl"), IMAGES=str(given),
        INVERSION_STEPS=2, PREDICTOR_STEPS=1,
    )  # fmt: skip
    assert "2 images, 1 of them for validation" in printed(done)
    check_displayed(done, 6)
    check_training(done, tmp_path / "here", {"predictor": "invertibility"})


@pytest.mark.slow
def test_train_for_the_demo_and_resume(execute, tmp_path):
    values = {"SCENES": 8, "INVERSION_STEPS": 1, "TRAIN_ENCODER": True, "ENCODER_STEPS": 1, "PREDICTOR_STEPS": 2}
    done = execute("train_predictor", OUTPUT="here", **values)
    check_displayed(done, 8)
    check_training(done, tmp_path / "here", {"encoder": "e4e", "predictor": "invertibility"})
    again = printed(execute("train_predictor", OUTPUT="here", **values))
    assert "resuming: 30 of 30 inversions are done" in again
    assert "resuming after step 2 of 2" in again
    assert "resuming: threshold 0.350 is done" in again
