r"""How far several answers to one question agree: clusters that say the same, and the entropy over them.

.. math:: H = -\sum_c \frac{n_c}{n} \log \frac{n_c}{n}

where n_c of n sampled texts are in cluster c: semantic entropy (Kuhn, Gal and Farquhar, arXiv:2302.09664) in
its form that counts texts. They cluster by entailment, asked of a second model. Here two texts say the same
if their normalised words are equal, or overlap enough and agree in every number and negation. No model is
needed, the measure is symmetric, and clusters, the connected components, do not depend on the order of the
texts. It errs on one side: paraphrases in other words stay apart, so H is rather too high than too low. Names
that differ in a long text may go unseen; ``overlap=None`` asks for equality. Negations are known in English.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WORDS = re.compile(r"(?<!\w)-?\d+(?:[.,:]\d+)*|\w+(?:['’]\w+)*")
ARTICLES = {"a", "an", "the"}
NEGATIONS = {
    "cannot", "neither", "never", "no", "nobody", "none", "nor", "not", "nothing", "nowhere", "without",
}  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """What several texts have in common.

    Attributes:
        clusters: of each text, in order; 0 is the first text's.
        entropy: over clusters, nats; 0 where all texts say the same, log n where each says something else.
        share: of the texts that are in the largest cluster; of equally large ones the first.
        best: index of the text in that cluster whose words are most like the others'.
    """

    clusters: list[int]
    entropy: float
    share: float
    best: int


def words(text: str) -> list[str]:
    """Lower-case words without articles and punctuation, numbers whole; a text without any is itself one."""
    found = [w.replace("’", "'") for w in WORDS.findall(text.casefold())]
    found = [re.sub(r"(?<=\d),(?=\d{3})", "", w) for w in found]
    return [w for w in found if w not in ARTICLES] or found or [text.strip()]


def token_f1(one: Sequence[str], other: Sequence[str]) -> float:
    """2 x words in common / words in both, repeats counted; 1 for the same words in any order."""
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / (len(one) + len(other))


def agreement(texts: Sequence[str], overlap: float | None = 0.8) -> Agreement:
    """Clusters of texts that say the same.

    Args:
        overlap: token-F1 from which on two texts say the same; None asks for equal words in equal order.

    Raises:
        ValueError: no texts, or an overlap that is not above 0 and at most 1.
    """
    if not texts:
        raise ValueError("there are no texts to compare")
    if overlap is not None and not 0 < overlap <= 1:
        raise ValueError(f"overlap must be above 0 and at most 1, found {overlap}")
    each = [words(text) for text in texts]
    alike = np.array([[token_f1(a, b) for b in each] for a in each])
    cluster = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if cluster[i] != cluster[j] and _same(each[i], each[j], alike[i, j], overlap):
                low, high = sorted((cluster[i], cluster[j]))
                cluster = [low if c == high else c for c in cluster]
    numbers = {c: n for n, c in enumerate(dict.fromkeys(cluster))}
    clusters = [numbers[c] for c in cluster]
    shares = np.bincount(clusters) / len(texts)
    within = np.array(clusters) == int(shares.argmax())
    best = int(np.where(within, alike[:, within].mean(axis=1), -1.0).argmax())
    entropy = max(float(-(shares * np.log(shares)).sum()), 0.0)
    return Agreement(clusters, entropy, float(shares.max()), best)


def _same(one: list[str], other: list[str], alike: float, overlap: float | None) -> bool:
    if one == other:
        return True
    return overlap is not None and alike >= overlap and _marks(one) == _marks(other)


def _marks(found: list[str]) -> Counter[str]:
    """Numbers, and how often something is denied."""
    signs = ("not" if w in NEGATIONS or w.endswith("n't") else w for w in found)
    return Counter(w for w in signs if w == "not" or any(c.isdigit() for c in w))
