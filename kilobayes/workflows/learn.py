"""The training of one adapter on one base, whatever its rows are: the loop, then the posterior's own fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes import host, train
from kilobayes.checkpoint import Checkpoint
from kilobayes.errors import KilobayesError
from kilobayes.host.vocabulary import HiddenHead, hidden_states
from kilobayes.metrics.cost import measure
from kilobayes.models import Base
from kilobayes.modes import recomputing
from kilobayes.optim import AdamW
from kilobayes.options import Options
from kilobayes.posteriors import ask
from kilobayes.protocols import Energy
from kilobayes.random import generator
from kilobayes.step import Nll, TrainData
from kilobayes.tasks.protocol import Task
from kilobayes.tree import state_member
from kilobayes.types import Posterior, Progress
from kilobayes.workflows import chunks
from kilobayes.workflows.attach import member_seeds, start

Watch = Callable[[Progress, Tensor], None]


@dataclass(frozen=True, eq=False)
class Learned:
    """What training gives.

    Attributes:
        state: of the posterior, fitted.
        trained: what the loop returned.
        cost: seconds of training and fit, peak memory, bytes of the leaves that were trained.
    """

    state: Any
    trained: train.Trained
    cost: dict[str, float]


@contextmanager
def choosing(model: nn.Module, task: Task, nll: Nll) -> Iterator[Nll]:
    """Within it, training computes only what a choice between classes needs; gives the loss back."""
    with ExitStack() as stack:
        for within in (host.packed, host.read_token, host.real_tokens, task.within):
            stack.enter_context(within(model))
        yield nll


@contextmanager
def writing(model: nn.Module, loss: Callable[[HiddenHead], Nll]) -> Iterator[Nll]:
    """Within it, training stops before the output matrix; gives the loss made for the hidden states."""
    with ExitStack() as stack:
        stack.enter_context(host.packed(model))
        stack.enter_context(host.real_tokens(model))
        yield loss(stack.enter_context(hidden_states(model)))


def check_calibration(posterior: Posterior, options: Options, rows: Any) -> None:
    """Raises KilobayesError: a posterior that needs calibration rows gets none."""
    if ask.needs_calibration(posterior) and not rows:
        raise KilobayesError(
            f"{options.posterior} needs rows to calibrate on", "none", "as in --calibration 0.2"
        )


def settings_of(options: Options, seeds: list[int]) -> train.Settings:
    """What the options say of the loop, for a stack of these seeds."""
    return train.Settings(
        lr=options.lr,
        epochs=options.epochs,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        seeds=tuple(seeds),
        warmup=options.warmup,
        optimiser=AdamW(weight_decay=options.weight_decay, clip=options.clip),
        autocast=options.autocast,
        max_seconds=60 * options.max_minutes,
    )


def learn(
    model: nn.Module,
    base: Base,
    data: TrainData,
    within: AbstractContextManager[Nll],
    posterior: Posterior,
    options: Options,
    energy: Energy,
    *,
    about: dict[str, Any],
    checkpoint: Path | None = None,
    watch: Watch | None = None,
) -> Learned:
    """Train a posterior's members on rows, then fit what is fitted afterwards.

    Args:
        model: hosts the adapter on ``base``.
        within: :func:`choosing` or :func:`writing`, which the loop runs in.
        energy: the model on the rows that the posterior is fitted on; it brings its own contexts.
        about: what else makes two runs the same: the base's fingerprint, the rows' digest.
        checkpoint: file to keep the training state in, and to resume from if ``options.resume``.
        watch: told of every step.

    Raises:
        KilobayesError: every member diverged, a checkpoint of another run, or as the posterior's fit.
    """
    save = None
    if checkpoint is not None:
        save = Checkpoint(checkpoint, options.identity() | about, resume=options.resume)
    seeds = member_seeds(options.seed, ask.members(posterior))
    settings, at_once = settings_of(options, seeds), options.at_once
    with measure() as cost:
        with within as nll, recomputing(model, options.gradient_checkpointing):
            trained = chunks.fit(
                model, data, nll, posterior, lambda some: start(model, base, some), settings, at_once,
                energy=energy, save=save, watch=watch,
            )  # fmt: skip
        state = ask.fit(posterior, _sound(trained, len(seeds)), energy, generator(options.seed, 6))
    numbers = sum(leaf[0].numel() for leaf in host.read(model).values())
    return Learned(state, trained, dict(cost) | {"trained_bytes": 4.0 * numbers * len(seeds)})


def _sound(trained: train.Trained, members: int) -> Any:
    """The state without members that blew up: they are not pooled with those that learned."""
    kept = [member for member in range(members) if member not in trained.diverged]
    return trained.state if len(kept) == members else state_member(trained.state, torch.tensor(kept))
