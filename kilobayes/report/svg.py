"""Turn a matplotlib figure into an inline SVG whose colours and fonts come from the page's style sheet.

Matplotlib knows only fixed colours, so figures are drawn in ``colour(role)``: placeholder colours, each of
which becomes ``var(--role)`` here. One drawing then serves light, dark and print.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
from matplotlib.figure import Figure

ARM_COLOURS = 6
_ARMS = [f"arm-{number}" for number in range(1, ARM_COLOURS + 1)]
ROLES = ("ink", "muted", "grid", "surface", "right", "wrong", "inside", "outside", *_ARMS)
"""What a colour is for; the style sheet gives each role its colour in light and in dark."""
_PLACEHOLDERS = {f"#0f1e{number:02x}": f"var(--{role})" for number, role in enumerate(ROLES)}
_IDS = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def colour(role: str) -> str:
    """The placeholder colour to draw with; ``role`` is one of ``ROLES``."""
    return f"#0f1e{ROLES.index(role):02x}"


def inline_svg(figure: Figure, key: str) -> str:
    """The figure as one ``<svg>`` element for an HTML page: no namespaces, metadata, fixed size or fonts.

    It is hidden from assistive technology; the element around it carries the description.

    Args:
        key: makes the ids unique among the figures of a page; letters, digits and hyphens.
    """
    # Text stays text; a salt makes ids, and so the whole page, reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "hatch.linewidth": 0.7}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _tidy(root, key)
    _, _, width, height = root.get("viewBox", "0 0 1 1").split()
    root.attrib.clear()
    root.attrib.update({"viewBox": f"0 0 {width} {height}", "aria-hidden": "true", "focusable": "false"})
    return ElementTree.tostring(root, encoding="unicode").strip()


def _tidy(root: ElementTree.Element, key: str) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag, element.tail = _local(element.tag), None
        element.text = element.text if element.tag == "text" else None
        kept = {_local(name): value for name, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update(kept)
    shapes = {element.get("id"): element for element in root.iter("path") if element.get("id")}
    for element in root.iter("use"):
        _inline(element, shapes[element.attrib.pop("href")[1:]])
    used = {
        name for element in root.iter() for value in element.attrib.values() for name in _IDS.findall(value)
    }
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        for name, value in element.attrib.items():
            element.set(name, _rewrite(name, value, key))
        _paint(element)
    for parent in list(root.iter()):
        for child in list(parent):
            # Definitions of shapes that now stand where they were used.
            if child.tag == "defs" and not any(part.get("id") for part in child.iter()):
                parent.remove(child)


def _inline(use: ElementTree.Element, shape: ElementTree.Element) -> None:
    """Put the shape in place of a reference to it: without ids, a picture may stand on a page many times."""
    use.tag = "path"
    use.set("d", shape.attrib["d"])
    use.set("transform", f"translate({use.attrib.pop('x', '0')} {use.attrib.pop('y', '0')})")


def _rewrite(name: str, value: str, key: str) -> str:
    if name == "id":
        return f"{key}-{value}"
    value = value.replace("url(#", f"url(#{key}-")
    value = re.sub(r"font-family:[^;]*;?\s*", "", value)
    value = _NUMBER.sub(lambda match: f"{float(match.group()):.2f}".rstrip("0").rstrip("."), value)
    return " ".join(value.split())


def _paint(element: ElementTree.Element) -> None:
    """Move painted attributes into ``style``, where ``var()`` is allowed, and name the colours."""
    styles = [f"{name}: {element.attrib.pop(name)}" for name in ("fill", "stroke") if name in element.attrib]
    styles += [element.attrib["style"]] if element.get("style") else []
    if styles:
        style = "; ".join(styles)
        for placeholder, variable in _PLACEHOLDERS.items():
            style = style.replace(placeholder, variable)
        element.set("style", style.replace("#000000", "var(--ink)"))


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]
