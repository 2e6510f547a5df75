"""What generation says of the tokens that it writes; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Step:
    """One position of the sequences that are still being written.

    Attributes:
        rows: which sequences these are ``(R,)``.
        tokens: the chosen tokens ``(R,)``; of a sequence that ends as ``uncertain`` it is not written.
        log_probs: of the chosen tokens under the average, nats ``(R,)``.
        entropy, information: of the average, and mutual information with the draw, nats ``(R,)``.
        top, top_probs: the most probable tokens ``(R, K)`` and their averaged probabilities.
        finish: ``stop``, ``length`` or ``uncertain`` of a sequence that ends here, else "".
    """

    rows: list[int]
    tokens: list[int]
    log_probs: list[float]
    entropy: list[float]
    information: list[float]
    top: list[list[int]]
    top_probs: list[list[float]]
    finish: list[str]


@dataclass(eq=False)
class Generated:
    """A sequence: tokens with their uncertainty, lists of one length, and why it ended.

    Attributes:
        tokens: ids, the one that stopped it included.
        log_probs: of each token under the average, nats, before temperature, top-k and top-p.
        entropy, information: of the average, and mutual information with the draw, nats.
        alternatives: the most probable tokens at each position, with their averaged probabilities.
        finish: ``stop``, ``length`` or ``uncertain``.
        doubt: entropy and mutual information where an ``uncertain`` sequence ended.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    information: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: str = ""
    doubt: tuple[float, float] | None = None

    def add(self, step: Step, at: int) -> None:
        """The next position, from row ``at`` of a step."""
        self.finish = step.finish[at]
        if self.finish == "uncertain":
            self.doubt = (step.entropy[at], step.information[at])
            return
        self.tokens.append(step.tokens[at])
        self.log_probs.append(step.log_probs[at])
        self.entropy.append(step.entropy[at])
        self.information.append(step.information[at])
        self.alternatives.append(list(zip(step.top[at], step.top_probs[at])))

    @property
    def log_prob(self) -> float:
        """Sum of the tokens' log-probabilities, nats."""
        return math.fsum(self.log_probs)

    @property
    def perplexity(self) -> float:
        """exp of minus the mean log-probability of a token; NaN where there is none."""
        return math.exp(-self.log_prob / len(self.tokens)) if self.tokens else math.nan

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of a position, nats; NaN where there is none."""
        return math.fsum(self.entropy) / len(self.entropy) if self.entropy else math.nan

    @property
    def mean_information(self) -> float:
        """Mean mutual information of a position, nats; NaN where there is none."""
        return math.fsum(self.information) / len(self.information) if self.information else math.nan
