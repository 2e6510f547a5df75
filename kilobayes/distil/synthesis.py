"""Inputs are proposed until enough of them pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kilobayes.distil.rows import Row, normal
from kilobayes.errors import KilobayesError

Accept = Callable[[Sequence[Row]], np.ndarray]  # (N,) whether each may be kept


class Generator(Protocol):
    """What proposes inputs; see :mod:`kilobayes.distil.generators`."""

    def propose(self, first: int, count: int) -> list[Row | None]:
        """Proposals number ``first`` and on; None where nothing usable came, fewer where there are no more.

        The same call gives the same proposals, so a synthesis that was killed goes on to the same result.
        """
        ...


@dataclass(frozen=True)
class Synthesis:
    """Inputs that were kept, and what was tried.

    Attributes:
        tries: proposals, all told.
        malformed: those that were no input, such as half a pair.
        repeated: those that were there before, seeds included.
        rejected: those that the filter refused.
    """

    rows: list[Row] = field(default_factory=list)
    tries: int = 0
    malformed: int = 0
    repeated: int = 0
    rejected: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the filter's rows that it let pass; NaN where it saw none."""
        seen = len(self.rows) + self.rejected
        return len(self.rows) / seen if seen else float("nan")


def synthesise(
    generator: Generator,
    seeds: Sequence[Row],
    *,
    n: int,
    max_tries: int,
    accept: Accept | None = None,
    at_once: int = 64,
    begin: Synthesis | None = None,
    keep: Callable[[Synthesis], None] = lambda so_far: None,
) -> Synthesis:
    """``n`` different inputs, none of them a seed, each of which passed.

    Args:
        accept: the filter; None lets everything pass.
        at_once: proposals at a time.
        begin: where an earlier call stood.
        keep: told where this one stands, after each batch.

    Raises:
        KilobayesError: ``max_tries`` proposals, or all that there are, and too few passed.
    """
    if n < 1 or max_tries < n:
        raise KilobayesError(f"{max_tries} tries cannot give {n} inputs", remedy="raise --max-tries")
    now = begin or Synthesis()
    seen = {normal(row) for row in (*seeds, *now.rows)}
    while len(now.rows) < n:
        count = min(at_once, max_tries - now.tries)
        proposals = generator.propose(now.tries, count) if count else []
        if not proposals:
            raise _too_few(now, n, max_tries)
        now = _sifted(now, proposals, seen, accept, n)
        keep(now)
    return now


def _sifted(
    now: Synthesis, proposals: Sequence[Row | None], seen: set[str], accept: Accept | None, n: int
) -> Synthesis:
    """One batch later; what is proposed after the last one needed is not counted."""
    usable = [row for row in proposals if row is not None]
    verdicts = iter(np.ones(len(usable), dtype=bool) if accept is None or not usable else accept(usable))
    rows = list(now.rows)
    tries, malformed, repeated, rejected = now.tries, now.malformed, now.repeated, now.rejected
    for row in proposals:
        if len(rows) == n:
            break
        tries += 1
        if row is None:
            malformed += 1
            continue
        passed, key = bool(next(verdicts)), normal(row)
        if key in seen:
            repeated += 1
        elif not passed:
            rejected += 1
        else:
            seen.add(key)
            rows.append(row)
    return Synthesis(rows, tries, malformed, repeated, rejected)


def _too_few(now: Synthesis, n: int, max_tries: int) -> KilobayesError:
    spent = "no more are allowed" if now.tries >= max_tries else "the generator has no more"
    return KilobayesError(
        f"only {len(now.rows)} of {n} inputs passed",
        f"{now.tries} proposals ({spent}): {now.rejected} rejected, {now.repeated} repeated, "
        f"{now.malformed} unusable",
        "raise --max-tries, give other or more unlabelled text or another --generator, ask for fewer "
        "with --inputs, lower --threshold, or filter with --discriminator none",
    )
