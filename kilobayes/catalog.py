"""What methods there are, read from their source, so that listing them imports neither torch nor PEFT."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

ADAPTERS, POSTERIORS = "adapters", "posteriors"


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        name: the class's name.
        summary: first line of its docstring.
        paper: arXiv id, or "" where the docstring names none.
        defaults: options with the source text of their defaults ("" where there is none), in order.
    """

    name: str
    summary: str
    paper: str
    defaults: dict[str, str]


@functools.cache
def catalog(kind: str) -> dict[str, Entry]:
    """Every adapter or posterior of the package's ``__all__``, by name, in alphabetical order."""
    folder = Path(__file__).parent / kind
    order = _exports(folder / "__init__.py")
    found = {
        entry.name: entry
        for path in sorted(folder.glob("*.py"))
        if path.name != "__init__.py"
        for entry in _entries(path)
        if entry.name in order
    }
    return {name: found[name] for name in sorted(order, key=str.lower)}


def _default(value: ast.expr | None) -> str:
    """Source of a default; ``field(default=Point())`` is ``Point()``."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] == "field":
        value = next((k.value for k in value.keywords if k.arg == "default"), None)
    return ast.unparse(value) if value else ""


def _exports(path: Path) -> list[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{path} has no __all__")


def _entries(path: Path) -> list[Entry]:
    module = ast.parse(path.read_text(encoding="utf-8"))
    papers = re.findall(r"arXiv:(\d{4}\.\d{4,5})", ast.get_docstring(module) or "")
    out = []
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            doc = ast.get_docstring(node) or ""
            own = re.findall(r"arXiv:(\d{4}\.\d{4,5})", doc)
            fields = {
                item.target.id: _default(item.value)
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
            out.append(Entry(node.name, doc.split("\n")[0], (own or papers or [""])[0], fields))
    return out
