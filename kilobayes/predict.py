"""Prediction over posterior samples: one forward for many, probabilities averaged, never scores."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes import host, tree
from kilobayes.modes import evaluation
from kilobayes.tasks.classify import Encoded
from kilobayes.tasks.protocol import Task
from kilobayes.types import Params

TOKENS_IN_FLIGHT = (
    1 << 15
)  # rows x members x tokens of a forward; bounds memory, and more gains nothing on a CPU


@dataclass(frozen=True, eq=False)
class Predictive:
    """Class scores of S samples and what follows from them.

    Attributes:
        logits: ``(S, N, C)`` float32.
    """

    logits: Tensor

    @property
    def probs(self) -> Tensor:
        """Probabilities averaged over the samples: ``(N, C)``."""
        return self.logits.double().softmax(dim=-1).mean(dim=0)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the averaged probabilities, in nats: ``(N,)``."""
        return torch.special.entr(self.probs).sum(dim=-1)

    @property
    def mutual_info(self) -> Tensor:
        """Entropy of the average minus average entropy, nats, ``(N,)``: what the samples disagree about."""
        each = torch.special.entr(self.logits.double().softmax(dim=-1)).sum(dim=-1)
        return (self.entropy - each.mean(dim=0)).clamp(min=0.0)


@dataclass(frozen=True, eq=False)
class Rows:
    """Encoded rows of a task, as the training loop asks for them."""

    task: Task
    encoded: Encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return self.task.collate(self.encoded, rows), self.task.labels(self.encoded, rows)


def class_nll(task: Task) -> Any:
    """The loop's negative log-likelihood of a classification output: labels ``(S, B)`` to nats ``(S, B)``."""

    def nll(output: Any, labels: Tensor) -> Tensor:
        logits = task.readout(output)
        return task.nll(host.check_rows(logits, *labels.shape), labels)

    return nll


@torch.inference_mode()
def bare(model: nn.Module, task: Task, encoded: Encoded, batch_size: int = 32) -> Predictive:
    """What a model without an adapter says of some rows: one sample. ``model`` is transformers' own."""
    device = next(model.parameters()).device
    with torch.inference_mode(False):
        out = torch.empty(1, len(encoded), len(task.classes))
    with evaluation(model), task.within(model):
        for rows in torch.tensor([len(row) for row in encoded.ids]).argsort(stable=True).split(batch_size):
            if len(rows):
                inputs = {k: v.to(device) for k, v in task.collate(encoded, rows).items()}
                out[0, rows] = task.readout(model(**inputs)).float().cpu()
    return Predictive(out)


@torch.inference_mode()
def logits(
    model: nn.Module,
    theta: Params,
    task: Task,
    encoded: Encoded,
    *,
    batch_size: int = 32,
    tokens_in_flight: int = TOKENS_IN_FLIGHT,
    pack: bool = True,
) -> Tensor:
    """Class scores ``(S, N, C)``, float32 on the CPU, of a stack on every row.

    Rows are taken in the order of their length, so little is padded; S is cut into chunks that keep a forward
    within ``tokens_in_flight``. The order of rows and the chunks change nothing but rounding.
    """
    device = next(model.parameters()).device
    members = tree.size(theta)
    lengths = torch.tensor([len(row) for row in encoded.ids])
    with torch.inference_mode(False):  # an ordinary tensor, which may be differentiated through later
        out = torch.empty(members, len(encoded), len(task.classes))
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.callback(host.install, model, None)
        stack.enter_context(host.read_token(model))
        stack.enter_context(host.real_tokens(model))
        stack.enter_context(task.within(model))
        if pack:
            stack.enter_context(host.packed(model, backward=False))
        batches = [b for b in lengths.argsort(stable=True).split(batch_size) if len(b)]
        longest = max((int(lengths[b].max()) * len(b) for b in batches), default=1)
        chunk = max(1, min(members, tokens_in_flight // longest))
        for first in range(0, members, chunk):
            part = {k: v[first : first + chunk].to(device) for k, v in theta.items()}
            host.install(model, host.build(model, part))
            count = tree.size(part)
            with host.outer(model, count):
                for rows in batches:
                    inputs = {k: v.to(device) for k, v in task.collate(encoded, rows).items()}
                    scores = host.check_rows(task.readout(model(**inputs)), count, len(rows))
                    out[first : first + count, rows] = scores.float().cpu()
    return out
