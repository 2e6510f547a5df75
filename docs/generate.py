"""Pages that are read from the code, and formulas as MathML, so that the documentation works offline."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from typer.main import get_command

from kilobayes.catalog import ADAPTERS, POSTERIORS, catalog
from kilobayes.cli import app as command_line
from kilobayes.metrics import DEFINITIONS, HIGHER_IS_BETTER, LOWER_IS_BETTER
from kilobayes.metrics.calibration import BINS
from kilobayes.report.words import TITLES

FOLDER = Path(__file__).parent / "_build" / "generated"
MATHML = "http://www.w3.org/1998/Math/MathML"
ACCENTS = ("ˉ", "^", "~", "˜", "ˆ")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    first = list(head)
    lines = [first, ["---"] * len(first), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def metrics() -> str:
    """Every metric under its key in metrics.json."""

    def better(key: str) -> str:
        return "higher" if key in HIGHER_IS_BETTER else "lower" if key in LOWER_IS_BETTER else "neither"

    rows = [
        [f"`{key}`", TITLES.get(key, key).format(bins=BINS), text.format(bins=BINS), better(key)]
        for key, text in DEFINITIONS.items()
    ]
    return table(["key", "in the report", "definition", "better"], rows)


def methods(kind: str) -> str:
    """Every adapter or posterior with a link to its page and to its paper."""
    rows = []
    for name, entry in catalog(kind).items():
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else ""
        rows.append([f"[{name}]({name.lower()}.md)", entry.summary, paper])
    return table(["method", "what it is", "arXiv"], rows)


def commands() -> Iterator[str]:
    """A section for each command, its arguments and flags as ``--help`` has them."""
    group: Any = get_command(command_line)
    for name, command in group.commands.items():
        yield f"## kilobayes {name}\n\n{command.help}\n"
        rows = []
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                shown = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
                rows.append([f"`{shown}`", parameter.help or "", "required" if parameter.required else ""])
                continue
            flags = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
            default = "required" if parameter.required else ""
            if not (parameter.required or parameter.default is False or parameter.default in (None, "")):
                default = f"`{parameter.default}`"
            text, found, rest = (parameter.help or "").rpartition(" [default: ")
            rows.append([flags, text if found else rest, f"`{rest.removesuffix(']')}`" if found else default])
        yield table(["argument or flag", "meaning", "default"], rows) + "\n"


def write(app: Sphinx) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    pages = {
        "commands": "\n".join(commands()),
        "metrics": metrics(),
        "adapters": methods(ADAPTERS),
        "posteriors": methods(POSTERIORS),
    }
    for name, text in pages.items():
        (FOLDER / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def mathml(text: str, block: bool) -> str:
    """A formula as MathML, which browsers draw themselves."""
    ElementTree.register_namespace("", MATHML)
    found = latex2mathml.tex2mathml(text, as_block=block)
    root = ElementTree.fromstring(re.sub(r"&(?!lt;|gt;|amp;)\w+;", lambda m: html.unescape(m[0]), found))
    for node in root.iter(f"{{{MATHML}}}munderover"):
        letter, below, above = node
        if above.text in ACCENTS:  # docutils sets the index of an accented letter below it
            accented = ElementTree.Element(f"{{{MATHML}}}mover")
            accented.extend([letter, above])
            node.tag = f"{{{MATHML}}}msub"
            node[:] = [accented, below]
    for node in root.iter(f"{{{MATHML}}}mover"):
        node.set(
            "accent", "false"
        )  # true accents touch the letter where no font for mathematics is installed
    return ElementTree.tostring(root, encoding="unicode")


def visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(
        f'<div style="margin: 1em; line-height: 2">{mathml(node.astext(), block=True)}</div>'
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
