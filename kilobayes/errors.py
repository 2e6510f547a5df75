"""Errors in three parts: what is wrong, what was found, what to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KilobayesError(Exception):
    """Bad input, said so that a person can mend it.

    Args:
        wrong: what is wrong, in one clause.
        found: what was found instead.
        remedy: what to type or do.
        exit_code: what the command line returns (2 bad input, 3 an extra is missing).
    """

    def __init__(self, wrong: str, found: str = "", remedy: str = "", exit_code: int = 2) -> None:
        self.wrong, self.found, self.remedy, self.exit_code = wrong, found, remedy, exit_code
        super().__init__("; ".join(part for part in (wrong, found, remedy) if part))


def nearest(word: str, candidates: Iterable[str]) -> str:
    """The candidate closest in spelling to ``word``, or "" when none is close."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return found[0] if found else ""
