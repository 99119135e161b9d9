"""The rules of the house: who imports whom, how long programs are, and which addresses the project knows."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("samjax", "ckpt_convert")
PROGRAMS = sorted((ROOT / "experiments").rglob("*.py"))
THIN = (
    "invert",
    "invert_folder",
    "evaluate",
    "evaluate_learned",
    "generate",
    "train_encoder",
    "train_offsets",
    "train_invertibility",
)
"""Programs of at most 120 lines: arguments, one or two calls of the library, saving."""

LEVELS = (
    {"errors", "nets", "batching"},
    {"latents", "config", "layer_selection", "losses", "inversion", "editing", "metrics", "io"},
    {
        "driver",
        "analysis",
        "learned_start",
        "segmentation",
        "runtime",
        "demo",
        "generation",
        "directions",
        "testing",
        "loading",
    },
    {"results"},
    {"pipeline", "report"},
    {"session", "evaluation", "training", "notebook", "cli"},
)
"""Rooms of samjax. A room imports rooms of its own level and of those before it, never of a later one."""


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports(path: Path, *, typing_too: bool = False) -> Iterator[str]:
    """The modules that a file imports, anywhere in it; those under TYPE_CHECKING are for readers, not for Python."""
    module = tree(path)
    skipped: set[ast.AST] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_too:
            skipped |= set(ast.walk(node))
    for node in ast.walk(module):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def test_the_library_has_no_import_circle():
    graph = {name: {found for found in imports(path) if found in MODULES} for name, path in MODULES.items()}
    # A package is imported before its modules, so what its __init__ imports comes first.
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            pytest.fail(" -> ".join((*trail[trail.index(name) :], name)))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_library_never_imports_converters_or_torch():
    for name, path in MODULES.items():
        roots = {found.partition(".")[0] for found in imports(path, typing_too=True)}
        assert "torch" not in roots, name
        if name.startswith("samjax"):
            assert not roots & {"ckpt_convert", "experiments"}, name


def room(name: str) -> str | None:
    """`samjax.io.files` is in the room io; None for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def test_every_room_imports_only_rooms_before_it():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    wrong = []
    for name, path in MODULES.items():
        here = room(name)
        if not name.startswith("samjax.") or here is None:
            continue
        assert here in level, f"{here} has no level: add it to LEVELS and to docs/architecture.md"
        for found in imports(path):
            there = room(found)
            if found.startswith("samjax") and there is not None and level[there] > level[here]:
                wrong.append(f"{name} imports {found}")
    assert not wrong


def test_the_architecture_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for number, rooms in enumerate(LEVELS, 1):
        for name in rooms:
            assert re.search(rf"^\| {number} \| .*`{name}/?`", page, re.MULTILINE), name


def test_networks_know_no_files():
    for name, path in MODULES.items():
        if name.startswith("samjax.nets"):
            others = {found for found in imports(path) if found.startswith("samjax")}
            assert all(found.startswith("samjax.nets") for found in others), name


def is_program(path: Path) -> bool:
    return 'if __name__ == "__main__":' in path.read_text("utf-8")


def test_no_program_imports_another():
    names = {path.stem for path in PROGRAMS if is_program(path)}
    for path in PROGRAMS:
        if "notebooks" not in path.parts:
            assert not {found.split(".")[0] for found in imports(path)} & (names - {"demo"}), path


def test_programs_are_thin():
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in PROGRAMS if "notebooks" not in path.parts}
    assert sum(lines.values()) <= 4200
    for path, count in lines.items():
        if path.stem in THIN:
            assert count <= 120, path


def test_programs_say_how_they_are_run():
    for path in PROGRAMS:
        if is_program(path) and "notebooks" not in path.parts:
            text = ast.get_docstring(tree(path)) or ""
            assert f"python {path.relative_to(ROOT).as_posix()}" in text, path


def test_nothing_private_is_reached_from_outside():
    """No module uses a name with a leading underscore of another module of ours."""
    for path in (*MODULES.values(), *PROGRAMS):
        ours = {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (getattr(node, "module", None) or alias.name).partition(".")[0] in PACKAGES
        }
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                assert not private or node.attr in ("_replace", "_asdict", "_fields"), f"{path}: {ast.unparse(node)}"


ADDRESSES = (
    "https://www.cs.cmu.edu/~SAMInversion/",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2/networks",
    "http://sceneparsing.csail.mit.edu/model/pytorch/",
    "https://dl.fbaipublicfiles.com/detectron2/",
    "https://raw.githubusercontent.com/adobe-research/sam_inversion/",
    "https://drive.google.com/open?id=154JgKpzCPW82qINcVieuPH3fZ2e0P812",
    "https://github.com/adobe-research/sam_inversion",
    "https://github.com/facebookresearch/detectron2",
    "https://github.com/NVlabs/",
    "https://keepachangelog.com/",
    "https://semver.org/",
    "http://www.apache.org/licenses/",
    "http://www.w3.org/",  # names of XML, which nothing fetches
    "https://git-lfs.github.com/spec/v1",  # how a pointer of Git LFS begins
    "http://127.0.0.1",
)
"""Beginnings of every address that may stand in the project; none of them is an account of ours."""


def test_every_address_is_known():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    if not paths:
        pytest.skip("not a git checkout: there is no list of the project's files")
    strangers = []
    for path in paths:
        if not path.is_file() or path.suffix in (".png", ".jpg", ".npz", ".npy", ".pt", ".pkl", ".safetensors"):
            continue
        for found in re.findall(r"\bhttps?://[\w-]+\.[^\s\"'`<>)\]}\\]*", path.read_text("utf-8")):
            if path.name != Path(__file__).name and not found.startswith(ADDRESSES):
                strangers.append(f"{path.relative_to(ROOT)}: {found}")
    assert not strangers
