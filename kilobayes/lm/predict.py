"""What a language model's averaged predictions say of every learned token."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from kilobayes import host, tree
from kilobayes.lm.energy import forward, running
from kilobayes.metrics.language import TokenScores
from kilobayes.predict import TOKENS_IN_FLIGHT
from kilobayes.tasks.lm import Language
from kilobayes.tasks.packing import Tokens
from kilobayes.types import Params

NUMBERS_AT_ONCE = 1 << 23  # scores of all draws


@torch.inference_mode()
def token_scores(
    model: nn.Module,
    theta: Params,
    task: Language,
    tokens: Tokens,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
) -> TokenScores:
    """The averaged probabilities of S draws at every learned token; nothing of the vocabulary's size is kept.

    Args:
        theta: draws ``(S, ...)``.
        transform: of scores ``(S, n, V)``, such as a temperature's.
        batch_size: rows of a forward, at most.
    """
    device, members = next(model.parameters()).device, tree.size(theta)
    lengths = torch.tensor([len(row) for row in tokens.ids])
    longest = max(int(lengths.max()), 1)
    size = max(1, min(batch_size, TOKENS_IN_FLIGHT // (members * longest)))
    columns: list[Tensor] = []
    owners: list[Tensor] = []
    with running(model) as head, host.outer(model, members):
        host.install(model, host.build(model, {k: v.to(device) for k, v in theta.items()}))
        chunk = max(1, NUMBERS_AT_ONCE // (members * len(head.vocabulary.weight)))
        for rows in lengths.argsort(stable=True).split(size):
            hidden, labels, whose = forward(model, head, task, tokens, rows, members)
            owners.append(rows[whose])
            for part in torch.arange(len(labels), device=device).split(chunk):
                scores = head.vocabulary.scores(hidden[:, part])
                scores = scores if transform is None else transform(scores)
                columns.append(_columns(scores.log_softmax(dim=-1), labels[part]).cpu())
    found = torch.cat(columns, dim=1).numpy()
    of_row = torch.cat(owners).numpy()
    documents = np.asarray(tokens.documents)[of_row]
    order = np.lexsort((of_row, documents))  # rows were taken by their length
    nll, confidence, right, entropy, information = found[:, order]
    sizes = np.asarray(tokens.bytes)
    return TokenScores(nll, confidence, right > 0, entropy, information, documents[order], sizes)


def _columns(logs: Tensor, labels: Tensor) -> Tensor:
    """NLL, top probability, whether the top is right, entropy and mutual information ``(5, n)``."""
    index = labels.expand(len(logs), -1)[..., None]
    nll = math.log(len(logs)) - logs.gather(-1, index)[..., 0].logsumexp(dim=0)
    probs = logs.exp()
    each = -(probs * logs).nan_to_num().sum(dim=-1).mean(dim=0)  # 0 times -infinity is 0
    probs = probs.mean(dim=0)
    confidence, best = probs.max(dim=-1)
    entropy = torch.special.entr(probs).sum(dim=-1)
    right = (best == labels).to(nll)
    information = (entropy - each).clamp(min=0.0)
    if len(logs) == 1:
        information = torch.zeros_like(entropy)  # not the rounding of two ways to the same entropy
    return torch.stack([nll, confidence, right, entropy, information])
