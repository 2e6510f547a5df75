r"""Editing facts of a language model by training an adapter on each for a few steps.

The loss of a fact is the mean negative log-likelihood of the tokens of its new answer, after its prompt, in
nats. Adam takes at most ``steps`` steps at a constant rate and stops once the loss is below ``enough``, but
not before an adapter that prunes itself is done with it. The defaults are those of RoseLoRA's published code
(arXiv:2406.10777): 25 steps at 5e-4, r = 8, alpha = 32, its clamp and dropout.

*Single* edits each start from the unedited model. They are one stack: member s sees fact s alone, in the same
forward as the others, and ends where it would end alone. *Sequential* edits go on from each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes import host, optim, parametrise, tree
from kilobayes.errors import KilobayesError
from kilobayes.modes import evaluation
from kilobayes.random import Streams, generator
from kilobayes.tasks.edits import Pair
from kilobayes.types import Params, Progress

PUBLISHED = "RoseLoRA(start=0.12, end=0.8, clamp=0.003, dropout=0.1)"
Watch = Callable[[int, Tensor], None]  # edits done, losses of the last (S,)


@dataclass(frozen=True)
class Editing:
    """How to edit.

    Args:
        steps: at most so many of each edit.
        lr: learning rate, one for all members of a stack or one each.
        enough: stop at a loss below so many nats per token.
        seed: of the adapter's start and noise; the same for every edit.
        together: single edits in one stack.

    Raises:
        KilobayesError: a number out of its range.
    """

    steps: int = 25
    lr: float | tuple[float, ...] = 5e-4
    enough: float = 0.1
    seed: int = 0
    together: int = 32

    def __post_init__(self) -> None:
        rates = self.lr if isinstance(self.lr, tuple) else (self.lr,)
        if self.steps < 1 or self.together < 1:
            raise KilobayesError("--steps and the size of a stack must be at least 1", f"found {self.steps}")
        if not all(0 < rate < math.inf for rate in rates) or not 0 <= self.enough < math.inf:
            raise KilobayesError(
                "--lr must be above 0, and --enough at least 0", f"found {self.lr}, {self.enough}"
            )

    def rates(self, stack: int) -> Tensor:
        """Of each member ``(S,)``."""
        return torch.tensor(self.lr if isinstance(self.lr, tuple) else (self.lr,) * stack)


@dataclass(frozen=True, eq=False)
class Edited:
    """What training on edits gave.

    Attributes:
        theta: leaves, the member axis first: of single edits, member s after fact s alone; of sequential ones
            a list of stacks, one after each edit.
        steps: taken ``(S,)``.
        losses: last ones seen ``(S,)``, nats per token of the answer; NaN where a member diverged.
    """

    theta: Params
    steps: Tensor
    losses: Tensor


def batch(pairs: Sequence[Pair], pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs ``(R, T)`` padded to the right, and labels: the answers' tokens, -100 elsewhere."""
    rows = [[*pair.prompt, *pair.answer] for pair in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    places = torch.arange(width)
    begin = torch.tensor([len(pair.prompt) for pair in pairs])[:, None]
    labels = ids.masked_fill((places < begin) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask}, labels


def answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over a row's labelled tokens of the negative log-likelihood: ``(R,)``, nats."""
    own = labels[:, 1:]
    nll = nn.functional.cross_entropy(logits[:, :-1].float().mT, own, ignore_index=-100, reduction="none")
    return nll.sum(dim=1) / (own != -100).sum(dim=1)


def learn(model: nn.Module, start: Params, pairs: Sequence[Pair], settings: Editing, pad: int = 0) -> Edited:
    """One edit of each member: member s of ``start`` ``(S, ...)`` is trained on ``pairs[s]``.

    The rows of a batch go to the members in turn, one each; nothing of one reaches another.
    """
    stack, device, method = len(pairs), next(model.parameters()).device, host.method(model)
    theta = {k: v.detach().to(device).clone().requires_grad_() for k, v in sorted(start.items())}
    if tree.size(theta) != stack:
        raise KilobayesError(f"{stack} edits need a stack of as many", f"found {tree.size(theta)}")
    streams = Streams([generator(settings.seed, 1) for _ in pairs])
    rates, groups = settings.rates(stack).to(device), parametrise.rates(method, theta)
    moments = optim.init(theta)
    memo: Params = {}
    inputs, labels = batch(pairs, pad)
    inputs, labels = {k: v.to(device) for k, v in inputs.items()}, labels.to(device)
    settled = math.ceil(getattr(method, "end", 0.0) * settings.steps - 1e-9)  # where pruning is done
    going = torch.ones(stack, dtype=torch.bool, device=device)
    taken, last = torch.zeros(stack, dtype=torch.int64), torch.full((stack,), math.nan)
    try:
        with evaluation(model):
            for index in range(settings.steps):
                progress = Progress(index + 1, settings.steps, settings.steps, 1)
                used = parametrise.drop(method, theta, streams)
                used = parametrise.restrict(method, used, theta, progress)
                host.install(model, host.build(model, used))
                loss = answer_nll(model(**inputs).logits, labels)
                last = torch.where(going.cpu(), loss.detach().float().cpu(), last)
                going = going & torch.isfinite(loss)
                if index >= settled:
                    going = going & (loss >= settings.enough)
                if not going.any():
                    break
                total = (loss + parametrise.penalty(method, theta, progress))[going].sum()
                found = torch.autograd.grad(total, list(theta.values()), allow_unused=True)
                gradients = {
                    k: torch.zeros_like(v) if g is None else g
                    for (k, v), g in zip(theta.items(), found, strict=True)
                }
                ended = {k: v.detach()[~going].clone() for k, v in theta.items()}
                optim.step(optim.AdamW(), moments, theta, gradients, rates * going, index + 1, groups)
                memo = parametrise.project(method, theta, gradients, memo, progress)
                with torch.no_grad():
                    for k, v in theta.items():
                        v[~going] = ended[k]
                taken += going.cpu()
    finally:
        host.install(model, None)
    return Edited(tree.clone(theta), taken, last)


def edit_each(
    model: nn.Module,
    start: Params,
    pairs: Sequence[Pair],
    settings: Editing,
    pad: int = 0,
    watch: Watch | None = None,
) -> Edited:
    """Every edit alone, from the same start of one member; member s of what returns has edit s.

    Args:
        start: ``(1, ...)``.
    """
    parts = []
    for at in range(0, len(pairs), settings.together):
        some = pairs[at : at + settings.together]
        first = {k: v.expand(len(some), *v.shape[1:]) for k, v in start.items()}
        parts.append(learn(model, first, some, settings, pad))
        if watch is not None:
            watch(at + len(some), parts[-1].losses)
    return joined(parts)


def edit_in_turn(
    model: nn.Module,
    start: Params,
    orders: Sequence[Sequence[Pair]],
    settings: Editing,
    pad: int = 0,
    watch: Callable[[int, Params], None] | None = None,
    keep: bool = True,
) -> list[Edited]:
    """Edits one after the other; with several members, each takes its own list of them, equally long.

    Args:
        start: ``(S, ...)``.
        orders: of each member, its edits in order.
        watch: called after each edit with the number done and the weights ``(S, ...)``.
        keep: every state, so that edits can be undone; else the last alone.

    Returns:
        After each edit, what it gave; the last one alone where ``keep`` is False.
    """
    if len({len(order) for order in orders}) != 1:
        raise KilobayesError("every member needs as many edits", f"found {[len(o) for o in orders]}")
    found: list[Edited] = []
    theta = start
    for done, now in enumerate(zip(*orders, strict=True), 1):
        one = learn(model, theta, now, settings, pad)
        theta = one.theta
        found = [*found, one] if keep else [one]
        if watch is not None:
            watch(done, theta)
    return found


def joined(parts: Sequence[Edited]) -> Edited:
    """Stacks of edits as one."""
    return Edited(
        tree.concatenate([part.theta for part in parts]),
        torch.cat([part.steps for part in parts]),
        torch.cat([part.losses for part in parts]),
    )


def begin(model: nn.Module, seeds: Sequence[int]) -> Params:
    """Where edits start: the adapter's own start, an update of zero, for each seed."""
    theta, _ = host.initial(host.method(model), host.sites(model), list(seeds), host.constants(model))
    return theta


def host_on(base: Any, adapter: str, targets: str | None, seed: int) -> nn.Module:
    """The base with the adapter on it.

    Args:
        targets: modules separated by commas, ``"all-linear"``, or None for the architecture's own.
    """
    from kilobayes.options import Options
    from kilobayes.workflows.attach import attach

    return attach(base, Options(task="lm", adapter=adapter, target_modules=targets, seed=seed))
