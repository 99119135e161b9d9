"""Bad files of every kind are read or refused: a few in the default suite, ten thousand in a slow test."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import fuzzing
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samjax.errors import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted(fuzzing.seeds(tmp_path_factory.mktemp("sources")).iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_ten_thousand_bad_files(sources):
    command = [sys.executable, fuzzing.__file__, "--count", "10000", "--sources", str(sources[0].parent)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env={"PYTHONPATH": str(root)})
    found = json.loads(done.stdout)
    assert found["files"] == 10_000
    assert found["refused"] > 8000  # the others are valid: damage of numbers in a pickle cannot be seen
    assert not {problem: found[problem] for problem in fuzzing.PROBLEMS if found[problem]}, found["examples"]


def test_valid_files_are_not_refused(sources, tmp_path):
    """Otherwise the readers would be given nothing that reaches their depths."""
    accepted = set()
    for source in sources:
        for name in set(fuzzing.READERS_OF[source.suffix]) - {"LPIPS", "encoder", "predictor"}:
            try:
                fuzzing.readers()[name](source, tmp_path / f"{source.name} {name}")
            except UserError:
                continue
            accepted.add((source.name, name))
    assert {name for name, _ in accepted} == {source.name for source in sources}
    assert {name for _, name in accepted} == set(fuzzing.readers()) - {"LPIPS", "encoder", "predictor"}


def check(rng: random.Random, source: Path, name: str, work: Path) -> None:
    """Makes a bad file and gives it to a reader."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path = fuzzing.bad_file(rng, source, work / "file", f"touch {work / 'canary'}")
    message = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images, about what was dropped
            fuzzing.readers()[name](path, work / "out")
    except UserError as error:
        message = str(error)
    assert message.isprintable()
    if message:
        assert name == "LPIPS" or path.name in message
        assert not (work / "out").exists()
    assert {entry.name for entry in work.iterdir()} <= {path.name, "out"}


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), data=st.data())
def test_bad_files_are_read_or_refused(rng, data, sources, tmp_path):
    source = data.draw(st.sampled_from(sources))
    check(rng, source, data.draw(st.sampled_from(fuzzing.READERS_OF[source.suffix])), tmp_path / "work")
