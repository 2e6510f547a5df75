"""The one training loop: a stack of S members at once, each with its own data order, seed, rate and clipping.

A member of a stack takes the steps that it would take alone: its rows, its noise and its start come from its
own seed, and one member's loss has no gradient in another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes import checkpoint, host, optim, parametrise
from kilobayes.errors import KilobayesError
from kilobayes.modes import checkpointing, evaluation
from kilobayes.posteriors import ask
from kilobayes.protocols import Energy
from kilobayes.random import Streams, generator
from kilobayes.step import Interrupts, Nll, Processes, Step, TrainData
from kilobayes.tree import clone, map_state, size
from kilobayes.types import Params, Posterior, Progress


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        lr: peak learning rate, one for all members or one each.
        epochs: passes over the data.
        batch_size: rows of a member in an optimiser step.
        accumulate: micro-batches that an optimiser step is split into.
        seeds: one per member: its data order and noise.
        warmup: fraction of training of the linear warm-up; then the rate decays linearly to zero.
        optimiser: AdamW's constants.
        autocast: "bf16" runs the forward under bfloat16 autocast; "no" leaves dtypes alone.
        max_seconds: stop after so long, as if training had been planned shorter; 0 never.
        steps: optimiser steps in all, whatever ``epochs`` says; 0 goes by epochs.
    """

    lr: float | tuple[float, ...] = 5e-4
    epochs: int = 8
    batch_size: int = 16
    accumulate: int = 1
    seeds: tuple[int, ...] = (0,)
    warmup: float = 0.06
    optimiser: optim.AdamW = field(default=optim.AdamW())
    autocast: str = "no"
    max_seconds: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise KilobayesError(f"{name} must be at least 1", f"found {getattr(self, name)}")

    def rates(self) -> Tensor:
        """Peak learning rates ``(S,)``."""
        lr = self.lr if isinstance(self.lr, tuple) else (self.lr,) * len(self.seeds)
        if len(lr) != len(self.seeds):
            raise KilobayesError(f"{len(lr)} learning rates for {len(self.seeds)} members")
        return torch.tensor(lr, dtype=torch.float32)


class Diverged(KilobayesError):
    """Every member met a NaN or blew up."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What :func:`fit` returns.

    Attributes:
        state: the posterior's state, K members, on the CPU.
        losses: mean NLL of each member and step ``(steps, K)``, in nats per row, penalties aside.
        diverged: members that met a NaN or blew up, and were frozen there.
        stopped: "" when training ran to its end, else why it ended early ("time"); a checkpoint then holds
            where it stood, not what was made of it; "until" when it was only to go so far.
    """

    state: Any
    losses: Tensor
    diverged: list[int]
    stopped: str = ""


def fit(
    model: nn.Module,
    data: TrainData,
    nll: Nll,
    posterior: Posterior,
    start: Params,
    settings: Settings,
    *,
    energy: Energy | None = None,
    save: checkpoint.Checkpoint | None = None,
    watch: Callable[[Progress, Tensor], None] | None = None,
    own: Sequence[Tensor] | None = None,
    until: int | None = None,
) -> Trained:
    """Train the stack ``start`` on the hosted ``model`` and collect the posterior.

    The base runs in evaluation mode: its own dropout would draw from the global generator, and differ between
    a member in a stack and alone. Use the adapter's dropout. Under ``torchrun`` or ``accelerate launch`` each
    process takes its share of every member's rows. The first Ctrl-C ends training after the step, a second
    one at once.

    Args:
        model: a model with a hosted adapter; its parameters stay as they are, ``start`` is installed instead.
        nll: the task's negative log-likelihood of a batch, rows grouped by member.
        start: initial leaves ``(S, ...)``, S = ``len(settings.seeds)``.
        energy: the model on calibration rows, for a posterior that looks at them while training.
        save: where to keep checkpoints and whether to resume from one.
        watch: called after every step with the losses ``(S,)``.
        own: the rows of each member in ``data``, where these are not everyone's. A step then takes a full
            batch of each, and all of training is one epoch: members of other numbers of rows have none in
            common, and ``progress.rows`` is their mean number.
        until: go no further than this step, and leave a checkpoint there to go on from; the schedule is that
            of all steps.

    Raises:
        Diverged: every member did; the message names the learning rate.
        KilobayesError: no rows; another number of members than seeds.
        KeyboardInterrupt: passed on after a checkpoint was written.
    """
    stack = size(start)
    if stack != len(settings.seeds):
        raise KilobayesError(
            f"a stack of {stack} members needs {stack} seeds", f"found {len(settings.seeds)}"
        )
    if not len(data) or (own is not None and not all(map(len, own))):
        raise KilobayesError("there are no rows to train on")
    if own is not None and len(own) != stack:
        raise KilobayesError(f"a stack of {stack} members needs {stack} sets of rows", f"found {len(own)}")
    device = next(model.parameters()).device
    if ask.validates(posterior) and energy is None:
        raise KilobayesError(
            f"{type(ask.innermost(posterior)).__name__} looks at calibration rows while it trains",
            "found none",
        )
    theta = dict(sorted(clone(start).items()))
    theta |= ask.extend(posterior, theta, Streams([generator(seed, 8) for seed in settings.seeds]))
    theta = {k: v.to(device).requires_grad_() for k, v in theta.items()}
    rates = settings.rates().to(device)
    streams = Streams([generator(seed, 1) for seed in settings.seeds])
    state = posterior.init(theta, generator(settings.seeds[0], 3))
    moments = optim.init(theta)
    per_epoch = -(-len(data) // settings.batch_size)
    steps = settings.steps or per_epoch * settings.epochs
    per_epoch, rows = (per_epoch, len(data)) if own is None else (steps, sum(map(len, own)) // stack)
    last = steps if until is None else min(until, steps)
    losses = torch.full((steps, stack), float("nan"))
    alive = torch.ones(stack, dtype=torch.bool, device=device)
    memo: Params = {}  # of the adapter's own
    done, began = 0, time.monotonic()
    if save is not None and (found := save.load(posterior, state, theta, moments, streams)) is not None:
        state, done, losses, alive = found.state, found.step, found.losses, found.alive.to(device)
        memo = found.memo
    processes = Processes(device)
    work = Step(
        model,
        data,
        nll,
        posterior,
        streams,
        settings.seeds,
        settings.batch_size,
        settings.accumulate,
        processes,
        own,
    )
    groups = parametrise.rates(work.method, theta) | ask.rates(posterior, theta)

    def planned(step: int) -> float:
        return optim.linear((step - 0.5) / steps, settings.warmup)

    stopped = ""
    try:
        # dropout of the adapter is drawn by the loop, from the members' own streams: evaluation mode loses
        # nothing
        with Interrupts() as interrupts, evaluation(model), checkpointing(model):
            for index in range(done, last):
                progress = Progress(index + 1, steps, per_epoch, rows)
                loss, drawn = work.run(state, theta, progress, settings.autocast)
                gradients = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in theta.items()}
                alive &= (
                    torch.isfinite(loss)
                    & torch.isfinite(optim.norms(gradients))
                    & ~_exploded(losses, loss, index)
                )
                losses[index] = loss.cpu()
                if not alive.any():
                    raise _diverged(settings, losses, index)
                moving = rates * alive * ask.rate(posterior, progress, planned)
                if ask.optimises(posterior):
                    with torch.no_grad():
                        state = ask.update(posterior, state, theta, drawn, gradients, moving, progress)
                else:
                    optim.step(settings.optimiser, moments, theta, gradients, moving, index + 1, groups)
                memo = parametrise.project(work.method, theta, gradients, memo, progress)
                before, state, done = state, posterior.observe(state, theta, progress), index + 1
                if energy is not None and progress.epoch_ended and ask.validates(posterior):
                    state = ask.validate(posterior, state, theta, progress, energy)
                if watch is not None:
                    watch(progress, loss)
                late = bool(settings.max_seconds) and time.monotonic() - began > settings.max_seconds
                late, interrupted = processes.any(late and not progress.done, interrupts.seen)
                due = late or interrupted or done == last or (save is not None and save.due(progress))
                if save is not None and processes.first and due:
                    save.write(done, state, theta, moments, streams, losses, alive, memo)
                if interrupted:
                    raise KeyboardInterrupt
                if late:
                    stopped = "time"
                    progress = replace(progress, steps=done)
                    parametrise.project(work.method, theta, gradients, memo, progress)
                    state = posterior.observe(before, theta, progress)
                    break
    finally:
        host.install(model, None)
    stopped = stopped or ("until" if last < steps else "")
    return Trained(map_state(Tensor.cpu, state), losses[:done], (~alive).nonzero()[:, 0].tolist(), stopped)


def _exploded(losses: Tensor, loss: Tensor, index: int, factor: float = 10.0) -> Tensor:
    """Members whose loss is ten times that before the first update, and at least 10 nats."""
    if index == 0:
        return torch.zeros_like(loss, dtype=torch.bool)
    return loss > (factor * losses[0].to(loss)).clamp(min=10.0)


def _diverged(settings: Settings, losses: Tensor, index: int) -> Diverged:
    rates = ", ".join(f"{r:g}" for r in sorted(set(settings.rates().tolist())))
    last = ", ".join(f"{v:.3g}" for v in losses[max(0, index - 2) : index + 1, 0].tolist())
    lower = min(settings.rates().tolist()) / 10
    return Diverged(
        f"training diverged at step {index + 1} with learning rate {rates}",
        f"last losses: {last}",
        f"try a tenth of it, as in --lr {lower:g}",
    )
