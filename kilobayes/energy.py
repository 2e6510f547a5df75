"""The model on some rows, as posteriors ask for it: class scores of a stack, and exact derivatives by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes import host, parametrise
from kilobayes.modes import evaluation
from kilobayes.posteriors import ask
from kilobayes.predict import TOKENS_IN_FLIGHT, Predictive, logits
from kilobayes.protocols import Jacobian
from kilobayes.tasks.classify import Encoded
from kilobayes.tasks.protocol import Task
from kilobayes.types import Params, Posterior

NUMBERS_IN_FLIGHT = 1 << 25  # of a batch's derivatives: 128 MB in float32


@dataclass(frozen=True, eq=False)
class ModelEnergy:
    """A hosted model on encoded rows.

    Args:
        trained: the rows that it was trained on, if these are others.
    """

    model: nn.Module
    task: Task
    encoded: Encoded
    batch_size: int = 32
    trained: Encoded | None = None

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def labels(self) -> Tensor:
        return self.task.labels(self.encoded, torch.arange(len(self.encoded)))

    @property
    def train(self) -> ModelEnergy:
        if self.trained is None:
            return self
        return ModelEnergy(self.model, self.task, self.trained, self.batch_size)

    def part(self, rows: int) -> ModelEnergy:
        if rows >= len(self.encoded):
            return self
        even = torch.arange(rows) * len(self.encoded) // rows
        trained = self.encoded if self.trained is None else self.trained
        return ModelEnergy(self.model, self.task, self.encoded.take(even), self.batch_size, trained)

    def restrict(self, draws: Params, around: Params) -> Params:
        return parametrise.restrict(host.method(self.model), draws, around)

    def logits(self, theta: Params) -> Tensor:
        return logits(self.model, theta, self.task, self.encoded, batch_size=self.batch_size)

    def jacobians(
        self, theta: Params, keys: Sequence[str], combine: Callable[[Tensor], Tensor]
    ) -> Iterator[Jacobian]:
        """Derivatives through a stack of as many equal members as there are rows: one member sees one row.

        So one backward pass gives every row its own derivative, whatever adapter built the operators; padding
        touches nothing but attention's mask.
        """
        lengths = torch.tensor([len(row) for row in self.encoded.ids])
        numbers = sum(theta[key].numel() for key in keys) * max(len(self.task.classes) - 1, 1)
        longest = max(int(lengths.max()), 1) if len(lengths) else 1
        fit = min(NUMBERS_IN_FLIGHT // max(numbers, 1), TOKENS_IN_FLIGHT // longest, self.batch_size)
        with ExitStack() as stack:
            stack.enter_context(evaluation(self.model))
            stack.callback(host.install, self.model, None)
            stack.enter_context(host.read_token(self.model))
            stack.enter_context(host.packed(self.model))
            stack.enter_context(self.task.within(self.model))
            for rows in lengths.argsort(stable=True).split(max(fit, 1)):
                if len(rows):
                    yield self._derivatives(theta, keys, combine, rows)

    def _derivatives(
        self, theta: Params, keys: Sequence[str], combine: Callable[[Tensor], Tensor], rows: Tensor
    ) -> Jacobian:
        device = next(self.model.parameters()).device
        wanted = list(keys)
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {k: v.detach().to(device).expand(len(rows), *v.shape[1:]) for k, v in theta.items()}
            leaves |= {k: leaves[k].clone().requires_grad_() for k in wanted}
            allowed = self.restrict(leaves, leaves)  # no derivative along what draws cannot move
            host.install(self.model, host.build(self.model, allowed))
            inputs = {k: v.to(device) for k, v in self.task.collate(self.encoded, rows).items()}
            scores = host.check_rows(self.task.readout(self.model(**inputs)), len(rows), 1)[:, 0].float()
            weights = combine(scores.detach())
            sums = (scores[:, :, None] * weights).sum(dim=(0, 1))
            found: list[list[Tensor]] = []
            for index in range(len(sums)):
                more = index + 1 < len(sums)
                found.append(
                    list(torch.autograd.grad(sums[index], [leaves[k] for k in wanted], retain_graph=more))
                )
        each = {
            k: torch.stack([g[at] for g in found], dim=1) if len(found) > 1 else found[0][at][:, None]
            for at, k in enumerate(wanted)
        }
        return Jacobian(rows, scores.detach(), each)


def predict(
    energy: ModelEnergy, posterior: Posterior, state: Any, *, samples: int, gen: torch.Generator
) -> Predictive:
    """The posterior predictive of every row.

    Args:
        samples: draws of a continuous posterior, in all: an ensemble's members share them, and get at least
            one each.
        gen: where the draws come from.
    """
    return Predictive(ask.predictive(posterior, state, energy, samples, gen))
