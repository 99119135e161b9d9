"""What all tests share: two CPU devices, strict types, and the golden files.

Golden files hold what the reference computed, NCHW; `tests/golden/fill.py` holds the rules that made its weights.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tests marked gpu are run with JAX_PLATFORMS=cuda,cpu
# Most of the suite's time is compilation, here and in the programs that tests start, and its arrays are small. The
# accelerators' tests keep all optimizations.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import pytest

# Before JAX starts its backends, which happens at the first array.
jax.config.update("jax_num_cpu_devices", 2)  # so that sharding over devices is tested, not only written
jax.config.update("jax_numpy_dtype_promotion", "strict")  # a stray float64 or integer is an error

GOLDEN = Path(__file__).parent / "golden"


LONG = (
    "test_inversion", "test_demo", "test_training", "test_train_offsets", "test_train_invertibility", "test_invert",
    "test_mask_rcnn", "test_pipeline", "test_lpips", "test_stylegan2", "test_analysis", "test_evaluate",
    "test_learned_start", "test_invert_folder", "test_e4e", "test_session", "test_image_channels", "test_convolution",
    "test_networks", "test_deeplab", "test_train_encoder", "test_harm",
)  # fmt: skip
"""The files that take longest, longest first: whichever worker is free gets the next, and none is left alone at the
end with one of these."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def shared_compilations(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one worker of pytest-xdist has compiled, another need not; for this run only."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp().parent / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs() -> Iterator[None]:
    """What one file compiled, no other needs; kept, it comes to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimized() -> Iterator[None]:
    """XLA's optimizations, for tests that run longer than they compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The directory of the reference cases and of the checkpoint files."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Mapping[str, np.ndarray]]:
    """`golden("lpips_A")` reads that case once and gives its arrays, not to be written to."""
    cases: dict[str, Mapping[str, np.ndarray]] = {}

    def read(name: str) -> Mapping[str, np.ndarray]:
        if name not in cases:
            with np.load(GOLDEN / f"{name}.npz") as file:
                arrays = {key: file[key] for key in file.files}
            for array in arrays.values():
                array.flags.writeable = False
            cases[name] = arrays
        return cases[name]

    return read


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the tests away from what the person who runs them has downloaded."""
    monkeypatch.setenv("SAMJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser for tests marked `browser`: the system's Chromium, or else Playwright's own."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=False)
        yield browser
        browser.close()
