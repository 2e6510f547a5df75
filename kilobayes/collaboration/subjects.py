"""What users learn, as a party needs it: one loss for all in training, and what adapters say of rows.

Two of one interface: a choice between classes, and a language model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kilobayes import host, tree
from kilobayes.energy import ModelEnergy
from kilobayes.lm.energy import LanguageEnergy, evenly, forward, running
from kilobayes.lm.predict import token_scores
from kilobayes.metrics.scores import accuracy
from kilobayes.predict import TOKENS_IN_FLIGHT, Rows, class_nll, logits
from kilobayes.step import Nll, TrainData
from kilobayes.tasks.classify import Encoded
from kilobayes.tasks.data import Examples
from kilobayes.tasks.lm import Language, TokenRows
from kilobayes.tasks.packing import Tokens
from kilobayes.tasks.protocol import Task
from kilobayes.tasks.text import Documents
from kilobayes.types import Params
from kilobayes.workflows.language import row_nll
from kilobayes.workflows.learn import choosing, writing


class Subject(Protocol):
    """What users learn on one hosted model; ``rows`` are what :meth:`encode` gives."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def task(self) -> Any: ...

    def encode(self, rows: Any) -> Any:
        """Tokens of a user's rows."""
        ...

    def joined(self, users: Sequence[Any]) -> tuple[TrainData, list[Tensor]]:
        """All users' rows as one set, and whose are which, from their rows before they are encoded."""
        ...

    def training(self, data: Any, own: Sequence[Tensor]) -> AbstractContextManager[Nll]:
        """What the model is put into while it trains on joined rows; gives the loss."""
        ...

    def losses(self, theta: Params, rows: Any, draws: int) -> Tensor:
        """Mean nats of a row, or token, of each of V users: leaves ``(V draws, ...)`` to ``(V,)``."""
        ...

    def predictions(self, theta: Params, rows: Any, draws: int, most: int) -> Tensor:
        """Log-probabilities ``(V, N, C)`` of at most about ``most`` rows, or token positions, of the rows."""
        ...

    def energy(self, rows: Any) -> Any:
        """The model on rows, as posteriors ask for it."""
        ...

    def figures(self, theta: Params, rows: Any, transform: Any) -> dict[str, float]:
        """What one user's draws ``(n, ...)`` score on rows."""
        ...


@dataclass(frozen=True, eq=False)
class Choosing:
    """Users who choose between classes, by a head or by a decoder's answers."""

    model: nn.Module
    task: Task

    def encode(self, rows: Examples) -> Encoded:
        return self.task.encode(rows)

    def joined(self, users: Sequence[Examples]) -> tuple[TrainData, list[Tensor]]:
        def every(part: str) -> Any:
            found = [getattr(user, part) for user in users]
            return None if found[0] is None else [x for own in found for x in own]

        parts = {k: every(k) for k in ("texts", "pairs", "labels", "options")}
        encoded = self.task.encode(replace(users[0], **parts))
        return Rows(self.task, encoded), list(torch.arange(len(encoded)).split([len(u) for u in users]))

    @contextmanager
    def training(self, data: Any, own: Sequence[Tensor]) -> Iterator[Nll]:
        with choosing(self.model, self.task, class_nll(self.task)) as nll:
            yield nll

    def _logs(self, theta: Params, rows: Encoded, draws: int) -> Tensor:
        found = logits(self.model, theta, self.task, rows).double().log_softmax(dim=-1)
        return found.unflatten(0, (-1, draws)).logsumexp(dim=1) - math.log(draws)

    def losses(self, theta: Params, rows: Encoded, draws: int) -> Tensor:
        assert rows.labels is not None
        return self.task.nll(self._logs(theta, rows, draws), rows.labels).mean(dim=1)

    def predictions(self, theta: Params, rows: Encoded, draws: int, most: int) -> Tensor:
        return self._logs(theta, self.energy(rows).part(most).encoded, draws)

    def energy(self, rows: Encoded) -> ModelEnergy:
        return ModelEnergy(self.model, self.task, rows)

    def figures(self, theta: Params, rows: Encoded, transform: Any) -> dict[str, float]:
        assert rows.labels is not None
        scores = transform(logits(self.model, theta, self.task, rows))
        mixed = scores.double().log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(scores))
        nll = self.task.nll(mixed[None], rows.labels)[0].mean()
        right = accuracy(mixed.exp().numpy(), rows.labels.numpy())
        return {"nll": float(nll), "accuracy": float(right), "rows": float(len(rows))}


@dataclass(frozen=True, eq=False)
class Writing:
    """Users who write."""

    model: nn.Module
    task: Language

    def encode(self, rows: Documents) -> Tokens:
        return self.task.encode(rows)

    def joined(self, users: Sequence[Documents]) -> tuple[TrainData, list[Tensor]]:
        each = [self.task.encode(user) for user in users]
        names = ("ids", "labels", "starts", "documents", "bytes")
        parts: Any = {name: [x for tokens in each for x in getattr(tokens, name)] for name in names}
        whole = Tokens(**parts)
        return TokenRows(self.task, whole), list(torch.arange(len(whole)).split([len(t) for t in each]))

    @contextmanager
    def training(self, data: Any, own: Sequence[Tensor]) -> Iterator[Nll]:
        counted = data.tokens.counted
        # a user's loss is in nats per token of its own rows, as if it were alone
        per_row = torch.tensor([[sum(counted[i] for i in rows.tolist()) / len(rows)] for rows in own])
        with writing(self.model, lambda head: row_nll(head, per_row)) as nll:
            yield nll

    @torch.inference_mode()
    def losses(self, theta: Params, rows: Tokens, draws: int) -> Tensor:
        device, members = next(self.model.parameters()).device, tree.size(theta)
        lengths = torch.tensor([len(row) for row in rows.ids])
        size = max(1, TOKENS_IN_FLIGHT // (members * int(lengths.max())))
        total, count = torch.zeros(members // draws, dtype=torch.float64), 0
        with running(self.model) as head, host.outer(self.model, members):
            host.install(self.model, host.build(self.model, {k: v.to(device) for k, v in theta.items()}))
            for some in lengths.argsort(stable=True).split(size):
                hidden, labels, _ = forward(self.model, head, self.task, rows, some, members)
                each = head.vocabulary.nll(hidden.flatten(0, 1), labels.repeat(members)).double()
                mixed = (-each).reshape(-1, draws, len(labels)).logsumexp(dim=1) - math.log(draws)
                total, count = total - mixed.sum(dim=1).cpu(), count + len(labels)
        return total / count

    def predictions(self, theta: Params, rows: Tokens, draws: int, most: int) -> Tensor:
        found = LanguageEnergy(self.model, self.task, evenly(rows, most)).logits(theta)
        logs = found.log_softmax(dim=-1).unflatten(0, (-1, draws))
        return logs.logsumexp(dim=1) - math.log(draws)

    def energy(self, rows: Tokens) -> LanguageEnergy:
        return LanguageEnergy(self.model, self.task, rows)

    def figures(self, theta: Params, rows: Tokens, transform: Any) -> dict[str, float]:
        found = token_scores(self.model, theta, self.task, rows, transform=transform)
        nats = found.nll.astype(np.float64)
        bits = nats.sum() / math.log(2.0) / found.bytes.sum()
        means = {"nll": nats.mean(), "perplexity": np.exp(nats.mean()), "bits_per_byte": bits}
        means |= {"accuracy": found.right.mean(), "tokens": len(nats), "rows": len(found.bytes)}
        return {key: float(value) for key, value in means.items()}
