r"""How well facts were edited: success, generality, portability, locality and fluency; no torch.

Each but fluency is scored twice. With *teacher forcing*, as KnowEdit and EasyEdit score (Zhang et al.,
arXiv:2401.01286), the model reads the right answer up to a token and is asked for that token: the score is
the share of tokens that are its most probable ones. In *free* generation it reads the prompt alone and goes
on greedily: the score is 1 where the text begins with the answer, else 0. The first forgives a wrong first
token, after which the rest is given away; the second is what a user sees.

=========== =============================================================================================
success     of the edit's own prompt (reliability; "efficacy" in ROME, arXiv:2202.05262, and MEMIT,
            arXiv:2210.07229, who compare the probabilities of two answers instead).
generality  of rephrased prompts (ROME's paraphrase score).
portability of prompts whose answers follow from the edit, as aliases of the subject or a step of reasoning.
locality    of prompts about other things: the share of output tokens that are the same as before the edit,
            right or wrong: most probable tokens along the answer, or tokens of the texts generated.
kept        of those that were answered rightly before, the share that still is, all tokens right.
fluency     of the text that goes on from the prompt: 100 times the weighted mean of n-gram entropies in bits.
=========== =============================================================================================

Means are over prompts of a kind, then kinds, then facts. What there are no prompts for is None.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WORDS = re.compile(r"\w+|[^\w\s]")
SCORES = ("success", "generality", "portability", "locality", "kept")
KEYS = (*(f"{name}_{way}" for name in SCORES for way in ("teacher", "free")), "fluency", "fluency_before")


@dataclass(frozen=True)
class Answered:
    """What a model answered to one prompt.

    Attributes:
        answer: the right answer's tokens.
        forced: the most probable token at each of their places, those before given.
        tokens: of the text that the model went on with.
        text: that text.
        right: the right answer's text.
        kind: as of :class:`kilobayes.tasks.edits.Probe`.
    """

    answer: Sequence[int]
    forced: Sequence[int]
    tokens: Sequence[int]
    text: str
    right: str
    kind: str = ""


def unchanged(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of places that hold the same token, of those of the longer list; 1 of two empty lists.

    It is the teacher-forced score of ``after`` where ``before`` is the right answer.
    """
    places = max(len(before), len(after))
    return sum(a == b for a, b in zip(before, after)) / places if places else 1.0


def says(text: str, answer: str) -> bool:
    """Whether a text begins with the answer, spaces aside.

    What follows is not looked at, since an edit is taught its answer's tokens and no end: "Romeo" says
    "Rome".
    """
    return text.strip().startswith(answer.strip())


def ngram_entropy(words: Sequence[str], n: int) -> float:
    r"""Entropy of the distribution of n-grams in bits, :math:`-\sum_g f_g \log_2 f_g`; 0 of none."""
    found = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(found.values())
    return abs(sum(c / total * math.log2(total / c) for c in found.values()))


def fluency(text: str) -> float:
    r"""ROME's generation entropy times 100, :math:`100 \cdot \tfrac12 (\tfrac23 H_2 + \tfrac43 H_3)`.

    H_2 and H_3 are entropies in bits of pairs and triples of words, punctuation marks being words. Text that
    repeats itself has little; it grows with the length, so compare texts of one length only.
    """
    words = WORDS.findall(text)
    return 100.0 * (2 / 3 * ngram_entropy(words, 2) + 4 / 3 * ngram_entropy(words, 3)) / 2


def by_kind(scores: Sequence[tuple[str, float | None]]) -> float | None:
    """The mean over kinds of the means within each; None where nothing was scored."""
    kinds: dict[str, list[float]] = {}
    for kind, score in scores:
        if score is not None:
            kinds.setdefault(kind, []).append(score)
    return mean([sum(found) / len(found) for found in kinds.values()])


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are not None; None where none is left."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def achieved(name: str, answered: Sequence[Answered]) -> dict[str, float | None]:
    """Success, generality or portability, in both ways of scoring."""
    return {
        f"{name}_teacher": by_kind([(a.kind, unchanged(a.answer, a.forced)) for a in answered]),
        f"{name}_free": by_kind([(a.kind, float(says(a.text, a.right))) for a in answered]),
    }


def untouched(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, float | None]:
    """Locality and what was kept, in both ways of scoring, from answers before and after the edit."""
    pairs = list(zip(before, after, strict=True))

    def kept(was: bool, still: bool) -> float | None:
        return float(still) if was else None

    def exact(a: Answered) -> bool:
        return list(a.forced) == list(a.answer)

    return {
        "locality_teacher": by_kind([(b.kind, unchanged(b.forced, a.forced)) for b, a in pairs]),
        "locality_free": by_kind([(b.kind, unchanged(b.tokens, a.tokens)) for b, a in pairs]),
        "kept_teacher": by_kind([(b.kind, kept(exact(b), exact(a))) for b, a in pairs]),
        "kept_free": by_kind(
            [(b.kind, kept(says(b.text, b.right), says(a.text, a.right))) for b, a in pairs]
        ),
    }


def summarise(records: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means over facts of each score, of those facts that have it."""
    return {key: mean([record.get(key) for record in records]) for key in KEYS}
