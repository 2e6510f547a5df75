"""What a language model replies: texts, how sure each token is, how far texts agree; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kilobayes.lm.generated import Generated
from kilobayes.metrics.agreement import Agreement


@dataclass(frozen=True, eq=False)
class Completion:
    """A text that goes on from a prompt.

    Attributes:
        text: without special tokens, cut before a stop string.
        pieces: text of each token, special tokens included; of a token that is part of a character, a mark.
        alternatives: the most probable tokens at each position, with their averaged probabilities.
        generated: tokens, log-probabilities, entropy and mutual information of each, and why it ended.
    """

    text: str
    pieces: list[str]
    alternatives: list[list[tuple[str, float]]]
    generated: Generated

    def record(self) -> dict[str, Any]:
        """For JSON: nats, means over tokens, and the tokens one by one."""
        from_tokens = self.generated
        out: dict[str, Any] = {
            "text": self.text,
            "finish": from_tokens.finish,
            "log_prob": from_tokens.log_prob,
            "perplexity": _number(from_tokens.perplexity),
            "entropy": _number(from_tokens.mean_entropy),
            "mutual_information": _number(from_tokens.mean_information),
        }
        if from_tokens.doubt is not None:
            out["doubt"] = dict(zip(("entropy", "mutual_information"), from_tokens.doubt))
        out["tokens"] = [
            {"id": id_, "token": piece, "log_prob": log_prob, "entropy": entropy}
            | {"mutual_information": mutual}
            | {"alternatives": [{"token": t, "probability": p} for t, p in others]}
            for id_, piece, log_prob, entropy, mutual, others in zip(
                from_tokens.tokens, self.pieces, from_tokens.log_probs, from_tokens.entropy,
                from_tokens.information, self.alternatives, strict=True,
            )
        ]  # fmt: skip
        return out


@dataclass(frozen=True, eq=False)
class Reply:
    """One or several completions of a prompt.

    Attributes:
        prompt: as the model read it, a conversation in its template.
        agreement: of several completions; None of one.
    """

    prompt: str
    completions: list[Completion]
    agreement: Agreement | None = None

    @property
    def best(self) -> Completion:
        """The completion that most others agree with."""
        return self.completions[self.agreement.best if self.agreement else 0]

    @property
    def text(self) -> str:
        """Of the best completion."""
        return self.best.text

    def record(self) -> dict[str, Any]:
        """For JSON."""
        out: dict[str, Any] = {"prompt": self.prompt, "completions": [c.record() for c in self.completions]}
        if self.agreement is not None:
            found = self.agreement
            out["agreement"] = {"clusters": found.clusters, "entropy": found.entropy, "share": found.share}
            out["agreement"]["best"] = found.best
        return out


def completion(tokenizer: Any, prompt: Sequence[int], found: Generated, stop: Sequence[str]) -> Completion:
    """The text of a sequence, as it stands after its prompt."""
    ids = list(prompt[-1:]) + found.tokens
    pieces, others = [], []
    for at, (token, choices) in enumerate(zip(found.tokens, found.alternatives, strict=True)):
        pieces.append(after(tokenizer, ids[at : at + 1], [token], special=True))
        others.append([(after(tokenizer, ids[at : at + 1], [t], special=True), p) for t, p in choices])
    text = after(tokenizer, prompt, found.tokens)
    ends = [text.index(word) for word in stop if word in text]
    return Completion(text[: min(ends)] if ends else text, pieces, others, found)


def after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int], special: bool = False) -> str:
    """What tokens add to the text of those before: alone, some tokenizers drop a leading space."""
    keywords = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
    start = tokenizer.decode(list(before), **keywords)
    return str(tokenizer.decode([*before, *tokens], **keywords))[len(start) :]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
