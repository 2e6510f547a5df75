"""The one training loop: a stack of S members at once, each with its own data order, seed, rate and clipping.

A member of a stack takes the steps that it would take alone: its rows, its noise and its start come from its own
seed, and one member's loss has no gradient in another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from kilobayes import checkpoint, host, optim
from kilobayes.errors import KilobayesError
from kilobayes.posteriors import ask
from kilobayes.random import Streams, generator
from kilobayes.tree import clone, size
from kilobayes.types import Params, Posterior, Progress


class TrainData(Protocol):
    """Rows to train on, as a task encodes them."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs and labels of some rows, in their order."""
        ...


Nll = Callable[[Any, Tensor], Tensor]  # (model output, labels (S B)) -> nats (S B)


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

    def rates(self) -> Tensor:
        """Peak learning rates ``(S,)``."""
        lr = self.lr if isinstance(self.lr, tuple) else (self.lr,) * len(self.seeds)
        if len(lr) != len(self.seeds):
            raise KilobayesError(f"{len(lr)} learning rates for {len(self.seeds)} members")
        return torch.tensor(lr)


@dataclass(frozen=True, eq=False)
class Trained:
    """What :func:`fit` returns.

    Attributes:
        state: the posterior's state, K members.
        losses: mean loss of each member and step ``(steps, K)``, in nats per row.
        diverged: members that met a NaN or blew up, and were frozen there.
        stopped: "" when training ran to its end, else why it ended early ("time").
    """

    state: Any
    losses: Tensor
    diverged: list[int]
    stopped: str = ""


def order(seed: int, epoch: int, rows: int) -> Tensor:
    """A member's permutation of the rows in an epoch: a function of its seed and the epoch alone."""
    return torch.randperm(rows, generator=generator(seed, epoch, 2))


def rows_of_step(seed: int, step: int, rows: int, batch: int) -> Tensor:
    """Rows of a member in step ``step`` (from 0): the last batch of an epoch may be shorter."""
    per_epoch = -(-rows // batch)
    epoch, at = divmod(step, per_epoch)
    return order(seed, epoch, rows)[at * batch : (at + 1) * batch]


def fit(
    model: nn.Module,
    data: TrainData,
    nll: Nll,
    posterior: Posterior,
    start: Params,
    settings: Settings,
    *,
    save: checkpoint.Checkpoint | None = None,
    watch: Callable[[Progress, Tensor], None] | None = None,
) -> Trained:
    """Train the stack ``start`` on the hosted ``model`` and collect the posterior.

    The base runs in evaluation mode: its own dropout would draw from the global generator, and differ between a
    member in a stack and alone. Use the adapter's dropout.

    Args:
        model: a model with a hosted adapter; its parameters stay as they are, ``start`` is installed instead.
        nll: the task's negative log-likelihood of a batch, rows grouped by member.
        start: initial leaves ``(S, ...)``, S = ``len(settings.seeds)``.
        save: where to keep checkpoints and whether to resume from one.
        watch: called after every step with the losses ``(S,)``.

    Raises:
        KilobayesError: every member diverged; the message names the learning rate.
        KeyboardInterrupt: passed on after a checkpoint was written.
    """
    stack = size(start)
    device = next(model.parameters()).device
    theta = {k: v.to(device).requires_grad_() for k, v in sorted(clone(start).items())}
    rates = settings.rates().to(device)
    streams = Streams([generator(seed, 1) for seed in settings.seeds])
    state = posterior.init(theta, generator(settings.seeds[0], 3))
    moments = optim.init(theta)
    per_epoch = -(-len(data) // settings.batch_size)
    steps = per_epoch * settings.epochs
    losses = torch.full((steps, stack), float("nan"))
    alive = torch.ones(stack, dtype=torch.bool, device=device)
    done, began = 0, time.monotonic()
    if save is not None and (found := save.load(posterior, state, theta, moments, streams)) is not None:
        state, done, losses, alive = found.state, found.step, found.losses, found.alive.to(device)
    work = _Work(model, data, nll, settings, streams, posterior)
    mode = model.training
    model.eval()
    # dropout of the adapter is drawn by the loop, from the members' own streams, so evaluation mode loses nothing
    stopped = ""
    try:
        for index in range(done, steps):
            progress = Progress(index + 1, steps, per_epoch, len(data))
            loss = work.step(state, theta, progress)
            gradients = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in theta.items()}
            alive &= torch.isfinite(loss) & torch.isfinite(optim.norms(gradients)) & ~_exploded(losses, loss, index)
            losses[index] = loss.cpu()
            if not alive.any():
                raise _diverged(settings, losses, index)
            shape = optim.linear((index + 0.5) / steps, settings.warmup)
            factor = ask.rate(posterior, progress, shape)
            optim.step(settings.optimiser, moments, theta, gradients, rates * alive * factor, index + 1, work.groups)
            state = posterior.observe(state, theta, progress)
            done = index + 1
            if watch is not None:
                watch(progress, loss)
            if save is not None and save.due(progress):
                save.write(done, state, theta, moments, streams, losses, alive)
            if settings.max_seconds and time.monotonic() - began > settings.max_seconds and not progress.done:
                stopped = "time"
                state = posterior.observe(state, theta, replace(progress, steps=done))
                break
    except KeyboardInterrupt:
        if save is not None:
            save.write(done, state, theta, moments, streams, losses, alive)
        raise
    finally:
        host.install(model, None)
        model.train(mode)
    return Trained(state, losses[:done], (~alive).nonzero()[:, 0].tolist(), stopped)


@dataclass
class _Work:
    """One optimiser step's forward and backward passes."""

    model: nn.Module
    data: TrainData
    nll: Nll
    settings: Settings
    streams: Streams
    posterior: Posterior

    def __post_init__(self) -> None:
        self.method = host.method(self.model)
        self.groups = getattr(self.method, "rates", dict)()

    def step(self, state: Any, theta: Params, progress: Progress) -> Tensor:
        """Losses ``(S,)`` of a step over the micro-batches; gradients are in ``theta``'s ``.grad``."""
        settings, stack = self.settings, len(self.settings.seeds)
        rows = [rows_of_step(s, progress.step - 1, len(self.data), settings.batch_size) for s in settings.seeds]
        process = PartialState()
        if process.num_processes > 1:  # each process takes its share of every member's rows
            rows = [r[process.process_index :: process.num_processes] for r in rows]
        for value in theta.values():
            value.grad = None
        count = len(rows[0])
        size_ = -(-count // settings.accumulate)
        total = torch.zeros(stack, device=next(iter(theta.values())).device)
        dropped = self.method.drop(theta, self.streams) if getattr(self.method, "dropout", 0.0) else theta
        factors = Factors(self.model)
        for at in range(0, count, size_):
            part = [r[at : at + size_] for r in rows]
            share = len(part[0]) / count
            inputs, labels = self.data.batch(torch.cat(part))

            def nll(given: Params, inputs: dict = inputs, labels: Tensor = labels) -> Tensor:
                factors.use(dropped if given is theta else given)
                with torch.autocast(total.device.type, torch.bfloat16, enabled=settings.autocast == "bf16"):
                    output = self.model(**{k: v.to(total.device) for k, v in inputs.items()})
                return self.nll(output, labels.to(total.device).reshape(stack, -1))

            loss = ask.objective(self.posterior, state, theta, nll, self.streams, progress)
            (loss.sum() * share).backward()
            total += loss.detach() * share
        factors.backward()
        if process.num_processes > 1:
            for value in theta.values():
                value.grad = reduce(value.grad, reduction="mean")
            total = reduce(total, reduction="mean")
        return total


class Factors:
    """Operators built once per optimiser step, their gradients collected, then one backward into the leaves.

    The passes of gradient accumulation and of checkpointing's recomputation all meet detached factors; how an
    adapter builds them from a bank, logits or coefficients is differentiated once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.theta: Params | None = None
        self.pairs: list[tuple[host.Built, host.Built]] = []

    def use(self, theta: Params) -> None:
        """Install the operators of a stack; the same stack is built once."""
        if theta is not self.theta:
            built = host.build(self.model, theta)
            detached = host.detach(built)
            host.install(self.model, detached)
            self.pairs.append((built, detached))
            self.theta = theta

    def backward(self) -> None:
        roots, gradients = [], []
        for built, detached in self.pairs:
            for path, operator in built.items():
                for name, root in vars(operator).items():
                    leaf = getattr(detached[path], name)
                    if isinstance(leaf, Tensor) and leaf.grad is not None:
                        roots.append(root)
                        gradients.append(leaf.grad)
        if roots:
            torch.autograd.backward(roots, gradients)


def _exploded(losses: Tensor, loss: Tensor, index: int, factor: float = 10.0) -> Tensor:
    """Members whose loss is ten times that of their first steps, and at least 10 nats."""
    if index < 5:
        return torch.zeros_like(loss, dtype=torch.bool)
    first = losses[:5].mean(dim=0).to(loss)
    return loss > (factor * first).clamp(min=10.0)


def _diverged(settings: Settings, losses: Tensor, index: int) -> KilobayesError:
    rates = ", ".join(f"{r:g}" for r in sorted(set(settings.rates().tolist())))
    last = ", ".join(f"{v:.3g}" for v in losses[max(0, index - 2) : index + 1, 0].tolist())
    lower = min(settings.rates().tolist()) / 5
    return KilobayesError(
        f"training diverged at step {index + 1} with learning rate {rates}",
        f"last losses: {last}",
        f"try a lower one, as in --lr {lower:g}",
    )
