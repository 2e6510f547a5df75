"""Where made-up inputs come from: a language model, unlabelled text, or pieces of it.

The first is Trans-LoRA's (arXiv:2405.17258). Small models write no usable text, hence the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from kilobayes.distil.rows import Row
from kilobayes.errors import KilobayesError
from kilobayes.language import LanguageModel
from kilobayes.lm.prompts import encode
from kilobayes.lm.sampling import Sampling

BETWEEN = " ||| "  # stands between the texts of a pair in a line
FORMS = ("numbered", "plain", "opening")
Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # texts (N) and seeds (K) to (N, K)


@dataclass(frozen=True, eq=False)
class Continuation:
    """A language model goes on with a list of seeds, in an order of its own for each proposal.

    Args:
        form: ``numbered`` lines, ``plain`` lines, or ``opening``: one to six words of one seed are continued.
        words: longest input in words; 0 for any. What an opening has beyond is cut.

    Raises:
        KilobayesError: an unknown form, no seeds.
    """

    model: LanguageModel
    seeds: Sequence[Row]
    form: str = "numbered"
    shots: int = 5
    words: int = 0
    sampling: Sampling = field(default=Sampling(max_new_tokens=64, temperature=1.0))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise KilobayesError(f"unknown form {self.form!r}", f"known: {', '.join(FORMS)}")
        if not self.seeds:
            raise KilobayesError("a list needs seeds to go on from", remedy="name some with --seeds")

    def propose(self, first: int, count: int) -> list[Row | None]:
        """As :class:`~kilobayes.distil.synthesis.Generator`; the batch is part of what is drawn."""
        prompts = [self._prompt(np.random.default_rng([self.seed, at])) for at in range(first, first + count)]
        stop = () if self.form == "opening" else ("\n",)
        replies = self.model.generate(
            prompts, self.sampling, stop=stop, batch_size=64, seed=self.seed * 1_000_003 + first, samples=1
        )
        return [self._row(prompt, reply.text) for prompt, reply in zip(prompts, replies, strict=True)]

    def _prompt(self, rng: np.random.Generator) -> str:
        order = rng.permutation(len(self.seeds))[: self.shots]
        if self.form == "opening":
            return " ".join(self.seeds[order[0]][0].split()[: int(rng.integers(1, 7))])
        lines = [BETWEEN.join(" ".join(part.split()) for part in self.seeds[at]) for at in order]
        while lines:
            prompt = "\n".join(lines) + "\n"
            if self.form == "numbered":
                numbers = [f"{number}. {line}\n" for number, line in enumerate(lines, 1)]
                prompt = "".join(numbers) + f"{len(lines) + 1}."
            room = self.model.longest
            size = len(encode(self.model.tokenizer, prompt)[1]) + self.sampling.max_new_tokens
            if room is None or size <= room:
                return prompt
            lines = lines[1:]
        raise KilobayesError(
            "not one seed fits into the generator's context",
            f"{self.model.longest} tokens, {self.sampling.max_new_tokens} of them to be written",
            "give shorter seeds, or --form opening",
        )

    def _row(self, prompt: str, text: str) -> Row | None:
        if self.form == "opening":
            words = f"{prompt}{text}".split()
            return (" ".join(words[: self.words or None]),) if len(words) > 1 else None
        parts = tuple(part.strip() for part in text.split(BETWEEN.strip()))
        fits = len(parts) == len(self.seeds[0]) and all(parts)
        if fits and self.words:
            fits = all(len(part.split()) <= self.words for part in parts)
        return parts if fits else None


@dataclass(frozen=True, eq=False)
class Given:
    """Unlabelled texts in the order in which they come."""

    texts: Sequence[Row]

    def propose(self, first: int, count: int) -> list[Row | None]:
        """As :class:`~kilobayes.distil.synthesis.Generator`."""
        return list(self.texts[first : first + count])


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Unlabelled texts, those nearest to a seed first: every seed's nearest, then its second, and so on."""

    seeds: Sequence[Row]
    texts: Sequence[Row]
    similarity: Similarity

    @cached_property
    def order(self) -> np.ndarray:
        """Indices of all texts, nearest first."""
        near = self.similarity([" ".join(row) for row in self.texts], [" ".join(row) for row in self.seeds])
        ranks = np.argsort(np.argsort(-near, axis=0, kind="stable"), axis=0, kind="stable")
        return np.argsort(ranks.min(axis=1), kind="stable")

    def propose(self, first: int, count: int) -> list[Row | None]:
        """As :class:`~kilobayes.distil.synthesis.Generator`."""
        return [self.texts[int(at)] for at in self.order[first : first + count]]


@dataclass(frozen=True, eq=False)
class Perturbation:
    """The beginning of one text and the end of another, cut anywhere; then words are left out at random.

    Beginnings are seeds' and texts', by equal chance; ends are texts'.

    Args:
        drop: chance of each word to be left out.
    """

    seeds: Sequence[Row]
    texts: Sequence[Row]
    drop: float = 0.1
    seed: int = 0

    def propose(self, first: int, count: int) -> list[Row | None]:
        """As :class:`~kilobayes.distil.synthesis.Generator`; there is no end of them."""
        return [self._crossed(np.random.default_rng([self.seed, at])) for at in range(first, first + count)]

    def _crossed(self, rng: np.random.Generator) -> Row | None:
        from_seed = bool(len(self.seeds)) and rng.random() < 0.5
        pool = self.seeds if from_seed else self.texts
        start, end = pool[int(rng.integers(len(pool)))], self.texts[int(rng.integers(len(self.texts)))]
        out = []
        for a, b in zip(start, end, strict=True):
            before, after = a.split(), b.split()
            words = before[: int(rng.integers(len(before) + 1))] + after[int(rng.integers(len(after) + 1)) :]
            out.append(" ".join(word for word in words if rng.random() >= self.drop))
        return tuple(out) if all(out) else None


def by_words(texts: Sequence[str], seeds: Sequence[str]) -> np.ndarray:
    """Cosines ``(N, K)`` of TF-IDF vectors of words and of two in a row."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    weights = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[?!]")
    found = weights.fit_transform([*texts, *seeds])
    near: Any = found[: len(texts)] @ found[len(texts) :].T
    return np.asarray(near.toarray())


def by_embeddings(name: str, device: str = "cpu", batch_size: int = 64) -> Similarity:
    """Cosines of a base model's mean hidden states, tokens of padding left out.

    Args:
        name: of the base, as :func:`kilobayes.models.load_base` takes it.
    """

    def similarity(texts: Sequence[str], seeds: Sequence[str]) -> np.ndarray:
        import torch

        from kilobayes.models import load_base

        base = load_base(name, ("a", "b"), device=device)
        encoder: Any = base.model.base_model
        found = []
        with torch.inference_mode():
            for at in range(0, len(texts) + len(seeds), batch_size):
                part = [*texts, *seeds][at : at + batch_size]
                inputs = base.tokenizer(
                    part, padding=True, truncation=True, max_length=base.longest or 256, return_tensors="pt"
                ).to(device)
                hidden = encoder(**inputs).last_hidden_state
                mask = inputs["attention_mask"][..., None].to(hidden)
                mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
                found.append(torch.nn.functional.normalize(mean.float(), dim=-1).cpu())
        every = torch.cat(found).numpy()
        return np.asarray(every[: len(texts)] @ every[len(texts) :].T)

    return similarity
