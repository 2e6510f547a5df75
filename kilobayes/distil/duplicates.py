r"""How many made-up inputs are those of the data, word for word or nearly.

Exact duplicates have the same words in the same order. Near ones are not exact, and for some row of the data

.. math:: J(a, b) = \frac{|G_a \cap G_b|}{|G_a \cup G_b|} \ge \tau

with :math:`G` the set of runs of five characters. All pairs are compared, so the counts are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from kilobayes.distil.rows import Row, normal

RUN = 5  # characters
AT_ONCE = 256


@dataclass(frozen=True)
class Duplicates:
    """Counts of rows.

    Attributes:
        rows: that were looked at.
        known: that they were compared with.
        exact, near: of ``rows``, those that are some known row, and those that only nearly are.
    """

    rows: int
    known: int
    exact: int
    near: int


def duplicates(rows: Sequence[Row], known: Sequence[Row], threshold: float = 0.8) -> Duplicates:
    """Counts the rows that are among the known ones.

    Args:
        threshold: the least Jaccard index of a near duplicate.
    """
    ours, theirs = [normal(row) for row in rows], [normal(row) for row in known]
    if not ours or not theirs:
        return Duplicates(len(ours), len(theirs), 0, 0)
    among = set(theirs)
    exact = np.array([text in among for text in ours])
    nearest = similarity(ours, theirs).max(axis=1)
    return Duplicates(
        len(ours), len(theirs), int(exact.sum()), int((~exact & (nearest >= threshold - 1e-9)).sum())
    )


def similarity(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """Jaccard indices ``(n, m)`` of the texts' sets of runs of characters, some rows at a time."""
    counter = CountVectorizer(
        analyzer="char", ngram_range=(RUN, RUN), binary=True, dtype=np.float32, lowercase=False
    )
    framed = [f"##{text}##" for text in (*first, *second)]  # so that the shortest text has a run
    sets = counter.fit_transform(framed).tocsr()
    a, b = sets[: len(first)], sets[len(first) :].T.tocsc()
    sizes = np.asarray(sets.sum(axis=1)).ravel()
    out = np.empty((len(first), len(second)), dtype=np.float32)
    for at in range(0, len(first), AT_ONCE):
        part = slice(at, at + AT_ONCE)
        common = (a[part] @ b).toarray()
        whole = sizes[: len(first)][part, None] + sizes[None, len(first) :] - common
        out[part] = common / np.maximum(whole, 1.0)
    return out
