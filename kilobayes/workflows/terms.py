"""Sums of runs as text, ``"0.5*runs/a + 0.5*runs/b - 0.2*runs/c"``: read by a pattern, never evaluated."""

from __future__ import annotations

import math
import re

from kilobayes.errors import KilobayesError

LIKE = 'as in "0.5*runs/a + 0.5*runs/b - 0.2*runs/c"'
NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
TERM = re.compile(
    rf"""(?:(?P<over>{NUMBER})(?:\s*/\s*(?P<under>{NUMBER}))?\s*\*\s*)?  # 0.5* or 1/3*
    (?:"(?P<double>[^"]+)"|'(?P<single>[^']+)'|(?P<plain>[^\s"'*]+))""",
    re.VERBOSE,
)
SIGN = re.compile(r"\s+([+-])\s+")


def parse(text: str) -> dict[str, float]:
    """Coefficients by folder, in order; a folder that is named twice counts in sum.

    A term is ``folder`` or ``number*folder``, the number as ``0.5`` or ``1/3``. Plus and minus stand between
    spaces, since names of folders may hold them; names with spaces or stars are quoted.

    Raises:
        KilobayesError: it is no such sum, and where that shows.
    """
    found: dict[str, float] = {}
    first = re.match(r"\s*([+-])?\s*", text)
    assert first is not None  # it matches nothing, too
    sign, at = first[1] or "+", first.end()
    while True:
        term = TERM.match(text, at)
        if term is None:
            raise _odd(text, at, "a folder is expected")
        under = float(term["under"] or 1)
        value = float(term["over"] or 1) / under if under else math.nan
        if not math.isfinite(value):
            raise _odd(text, at, "that is no number")
        name = term["double"] or term["single"] or term["plain"]
        found[name] = found.get(name, 0.0) + (-value if sign == "-" else value)
        at = term.end()
        if not text[at:].strip():
            return found
        between = SIGN.match(text, at)
        if between is None:
            raise _odd(text, at, "plus or minus between spaces is expected")
        sign, at = between[1], between.end()


def _odd(text: str, at: int, wanted: str) -> KilobayesError:
    rest = text[at : at + 30].strip()
    return KilobayesError(
        f"{text[:200]!r} is no sum of runs", f"{wanted} at {rest!r}" if rest else wanted, LIKE
    )
