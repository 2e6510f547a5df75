"""From positions to text: what can be shown so far, and where a stop string ends it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kilobayes.lm.generated import Step
from kilobayes.lm.replies import after

BEFORE = 8  # tokens of the prompt that the text is decoded behind


@dataclass(frozen=True)
class Piece:
    """What a position adds.

    Attributes:
        text: to be shown now; may be "" while a character or a stop string is unfinished.
        token: the token's own text; None of one that ended the text and is not part of it.
        log_prob, entropy, information: of the position, nats.
        top: the most probable tokens and their log-probabilities.
        finish: ``stop``, ``length`` or ``uncertain`` at the end, else "".
    """

    text: str
    token: str | None
    log_prob: float
    entropy: float
    information: float
    top: list[tuple[str, float]]
    finish: str


class Shown:
    """One text while it is written.

    Args:
        prompt: its tokens.
        stops: strings that end it, and are not shown.
        ends: tokens that end it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str], ends: set[int]) -> None:
        self.tokenizer, self.before, self.stops, self.ends = tokenizer, list(prompt[-BEFORE:]), stops, ends
        self.tokens: list[int] = []
        self.shown = 0

    def add(self, step: Step) -> Piece:
        """The next position."""
        token, finish = step.tokens[0], step.finish[0]
        part = finish != "uncertain" and not (finish == "stop" and token in self.ends)
        last = [*self.before, *self.tokens][-1:]
        name = after(self.tokenizer, last, [token], special=True) if part else None
        top = [
            (after(self.tokenizer, last, [t], special=True), math.log(p) if p > 0 else -9999.0)
            for t, p in zip(step.top[0], step.top_probs[0])
        ]
        if part:
            self.tokens.append(token)
        whole = after(self.tokenizer, self.before, self.tokens)
        found = [whole.index(word) for word in self.stops if word in whole]
        if found:
            whole, finish = whole[: min(found)], "stop"
        until = len(whole) if finish else self._safe(whole)
        text = whole[self.shown : until]
        self.shown = max(self.shown, until)
        return Piece(text, name, step.log_probs[0], step.entropy[0], step.information[0], top, finish)

    def _safe(self, whole: str) -> int:
        """How much cannot change any more: no part of a character, nor the beginning of a stop string."""
        end = len(whole.rstrip("\ufffd"))
        held = [
            size
            for word in self.stops
            for size in range(1, min(len(word), end + 1))
            if whole[:end].endswith(word[:size])
        ]
        return end - max(held, default=0)
