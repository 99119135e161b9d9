"""Examples in docstrings run, and the documentation names files, programs and flags that exist."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
MODULES = ("batching", "config", "latents", "layer_selection", "losses", "io.images", "generation")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"samjax.{name}")
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted
    assert not found.failed


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_name_what_exists(page):
    """They parse, and whatever they import, or take from a module that they import, is there."""
    for block in blocks(page, "python"):
        modules: dict[str, ModuleType] = {}
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    modules[alias.asname or alias.name.partition(".")[0]] = importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert hasattr(modules[node.value.id], node.attr), ast.unparse(node)


def commands(page: Path) -> list[str]:
    """Every command of a shell block, or in backticks, that runs one of our programs."""
    text = page.read_text("utf-8")
    shell = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in [*shell.splitlines(), *inline] if re.search(r"experiments/\S+\.py", line)]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_commands_name_programs_and_flags_that_exist(page):
    for command in commands(page):
        for part in re.split(r"&&|\|", command):
            if not (match := re.search(r"(experiments/\S+\.py)(.*)", part)):
                continue
            path = ROOT / match[1]
            assert path.is_file(), command
            flags = set(re.findall(r"--([A-Za-z_][\w-]*)", match[2].partition("#")[0])) - {"help"}
            if not flags or "notebooks" in match[1]:
                continue
            arguments = importlib.import_module(path.stem).Arguments
            known = {field.name for field in dataclasses.fields(arguments)}
            assert {flag.replace("-", "_") for flag in flags} <= known, command
