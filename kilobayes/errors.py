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


def explained(error: BaseException) -> KilobayesError | None:
    """What a person can mend, in three parts; None for what is a fault of the program."""
    if isinstance(error, KilobayesError):
        return error
    if hasattr(error, "format_message"):  # typer's own, of whichever click it carries
        context = getattr(error, "ctx", None)
        remedy = f"{context.command_path} --help" if context else "kilobayes --help"
        return KilobayesError(error.format_message().rstrip("."), remedy=remedy)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        place = (
            f"{error.filename} cannot be read or written"
            if error.filename
            else "a file cannot be read or written"
        )
        return KilobayesError(
            place, error.strerror or str(error), "check the path, its permissions and the disk"
        )
    if type(error).__name__ == "SafetensorError":
        return KilobayesError("a file of tensors cannot be written", str(error)[:300], "check the disk")
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        found = str(error).splitlines()[0][:200]
        return KilobayesError("the memory does not suffice", found, "lower --batch-size, or --max-length")
    return None
