r"""A language model on some rows, as posteriors ask for it: its classes are the vocabulary, its rows tokens.

Scores and labels are those of the learned tokens, of as many rows as memory allows, evenly spaced: a
temperature is one number, and some hundreds of tokens tell it. Curvature is that of all rows trained on. Of a
vocabulary no exact generalised Gauss-Newton matrix can be had, so it is estimated: for each row one label is
drawn for every learned token from the model's own prediction, and

.. math:: F = \sum_i \mathbb E\, g_i g_i^\top, \qquad
          g_i = \frac{1}{\sqrt m} \sum_t \nabla_\theta \log p_\theta(\hat y_{it} \mid x_{i, \le t}), \qquad
          \hat y_{it} \sim p_\theta(\cdot \mid x_{i, \le t})

with m the mean number of learned tokens of a row. Labels are drawn apart, and the mean of each term is zero,
so products of different tokens vanish on average, and F is the matrix of the training loss, in which a row
counts as one observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kilobayes import host, parametrise, tree
from kilobayes.errors import KilobayesError
from kilobayes.host.vocabulary import IGNORED, HiddenHead, hidden_states
from kilobayes.modes import evaluation
from kilobayes.predict import TOKENS_IN_FLIGHT
from kilobayes.protocols import Jacobian
from kilobayes.tasks.lm import Language
from kilobayes.tasks.packing import Tokens
from kilobayes.types import Params

NUMBERS = 1 << 27  # scores that a posterior gets at once: 0.5 GB
LEAST_TOKENS, MOST_TOKENS = 256, 4096
DRAWS = 16  # more than any posterior here fits with
DERIVATIVES = 1 << 25  # numbers of a batch's derivatives: 128 MB


@contextmanager
def running(model: nn.Module, backward: bool = False) -> Iterator[HiddenHead]:
    """Within it, the model runs in evaluation mode up to its output matrix."""
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.callback(host.install, model, None)
        stack.enter_context(host.packed(model, backward=backward))
        stack.enter_context(host.real_tokens(model))
        yield stack.enter_context(hidden_states(model))


def forward(
    model: nn.Module, head: HiddenHead, task: Language, tokens: Tokens, rows: Tensor, members: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``(S, n, d)`` at the n learned tokens of some rows, the labels there, and whose they are.

    The last is each token's place among ``rows``.
    """
    device = next(model.parameters()).device
    inputs, labels = task.collate(tokens, rows)
    model(**{k: v.to(device) for k, v in inputs.items()})
    hidden = host.check_rows(head.take(), members, len(rows))
    at = (labels != IGNORED).nonzero(as_tuple=True)
    places = tuple(a.to(device) for a in at)
    return hidden[:, places[0], places[1]], labels[at].to(device), at[0]


@dataclass(frozen=True, eq=False)
class LanguageEnergy:
    """A hosted language model on token rows.

    Args:
        trained: the rows that it was trained on, if these are others.
        per_row: what a row's loss was divided by in training; that of the rows trained on where it is 0.
        draws: labels drawn for each token, for the curvature.
    """

    model: nn.Module
    task: Language
    tokens: Tokens
    batch_size: int = 16
    trained: Tokens | None = None
    per_row: float = 0.0
    draws: int = 1
    seen: Tokens = field(init=False)

    def __post_init__(self) -> None:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        fit = max(LEAST_TOKENS, min(MOST_TOKENS, NUMBERS // (vocabulary * DRAWS)))
        object.__setattr__(self, "seen", evenly(self.tokens, fit))

    def __len__(self) -> int:
        return sum(self.seen.counted)

    @property
    def labels(self) -> Tensor:
        return torch.tensor([label for row in self.seen.labels for label in row if label != IGNORED])

    @property
    def train(self) -> LanguageEnergy:
        if self.trained is None:
            return self
        return replace(self, tokens=self.trained, trained=None)

    def part(self, rows: int) -> LanguageEnergy:
        """On at most about so many tokens; always of one row."""
        own = self.tokens if self.trained is None else self.trained
        return replace(self, tokens=evenly(self.tokens, rows), trained=own)

    def restrict(self, draws: Params, around: Params) -> Params:
        return parametrise.restrict(host.method(self.model), draws, around)

    @torch.inference_mode()
    def logits(self, theta: Params) -> Tensor:
        """Scores ``(S, N, V)`` in float32 on the CPU at the learned tokens of the rows seen."""
        device, members = next(self.model.parameters()).device, tree.size(theta)
        longest = max(len(row) for row in self.seen.ids)
        size = max(1, min(self.batch_size, TOKENS_IN_FLIGHT // (members * longest)))
        parts = []
        with running(self.model) as head, host.outer(self.model, members):
            host.install(self.model, host.build(self.model, {k: v.to(device) for k, v in theta.items()}))
            for rows in torch.arange(len(self.seen)).split(size):
                hidden, _, _ = forward(self.model, head, self.task, self.seen, rows, members)
                parts.append(head.vocabulary.scores(hidden).cpu())
        with torch.inference_mode(False):  # an ordinary tensor, which may be differentiated through later
            return torch.cat(parts, dim=1).clone()

    def jacobians(
        self, theta: Params, keys: Sequence[str], combine: Callable[[Tensor], Tensor]
    ) -> Iterator[Jacobian]:
        """Refused: a derivative for each word of a vocabulary.

        Raises:
            KilobayesError: always.
        """
        raise KilobayesError(
            "a language model has too many classes to be linearised", remedy="as in Laplace(linearised=False)"
        )

    def sampled(self, theta: Params, keys: Sequence[str], gen: torch.Generator) -> Iterator[Jacobian]:
        """Derivatives g of every row at labels drawn from the model, ``(B, draws, ...)``, scaled as above."""
        numbers = sum(theta[key].numel() for key in keys) * self.draws
        longest = max(len(row) for row in self.tokens.ids)
        fit = max(1, min(DERIVATIVES // max(numbers, 1), TOKENS_IN_FLIGHT // longest, self.batch_size))
        scale = 1.0 / math.sqrt(self.draws * (self.per_row or self.tokens.mean_counted))

        def weigh(scores: Tensor) -> tuple[Tensor, Tensor]:
            drawn = torch.multinomial(scores.softmax(-1).cpu(), self.draws, replacement=True, generator=gen)
            return drawn.to(scores.device), torch.full(drawn.shape, scale, device=scores.device)

        with running(self.model, backward=True) as head:
            for rows in torch.arange(len(self.tokens)).split(fit):
                yield self.derivatives(head, theta, keys, rows, weigh)

    def derivatives(
        self,
        head: HiddenHead,
        theta: Params,
        keys: Sequence[str],
        rows: Tensor,
        weigh: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Jacobian:
        """Derivatives ``(B, R, ...)`` of each row's weighted sums of log-likelihoods; scores are left out.

        Rows meet a stack of as many equal members, one each, so one backward pass gives every row its own.

        Args:
            head: of :func:`running`.
            weigh: scores ``(n, V)`` at the rows' n learned tokens to labels and weights ``(n, R)``.
        """
        device = next(self.model.parameters()).device
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {k: v.detach().to(device).expand(len(rows), *v.shape[1:]) for k, v in theta.items()}
            leaves |= {k: leaves[k].clone().requires_grad_() for k in keys}
            host.install(self.model, host.build(self.model, self.restrict(leaves, leaves)))
            (hidden,), _, _ = forward(self.model, head, self.task, self.tokens, rows, 1)
            chunks = hidden.detach().split(head.vocabulary.chunk)
            found = [weigh(head.vocabulary.scores(chunk)) for chunk in chunks]
            labels, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
            each = []
            for r in range(labels.shape[1]):
                total = -(head.vocabulary.nll(hidden, labels[:, r]) * weights[:, r]).sum()
                more = r + 1 < labels.shape[1]
                each.append(torch.autograd.grad(total, [leaves[k] for k in keys], retain_graph=more))
        gradients = {k: torch.stack([g[at] for g in each], dim=1) for at, k in enumerate(keys)}
        return Jacobian(rows, torch.empty(len(rows), 0), gradients)


def evenly(tokens: Tokens, most: int) -> Tokens:
    """Rows evenly spaced, of at most so many learned tokens together, and one row at least."""
    counted = tokens.counted
    if sum(counted) <= most:
        return tokens
    count = max(1, int(most / (sum(counted) / len(tokens))))
    while True:
        rows = [i * len(tokens) // count for i in range(count)]
        if count == 1 or sum(counted[i] for i in rows) <= most:
            return tokens.take(rows)
        count -= 1
