"""What every posterior must do together with every adapter, through the real loop on a tiny model."""

from __future__ import annotations

from typing import Any

import torch

from kilobayes import parametrise, train, tree
from kilobayes.energy import ModelEnergy
from kilobayes.optim import AdamW
from kilobayes.posteriors import ask
from kilobayes.random import generator
from kilobayes.testing.adapters import check_merge
from kilobayes.testing.posteriors import check_draws
from kilobayes.testing.tiny import (
    CLASSES,
    TinyRows,
    TinyTask,
    close,
    expect,
    nll,
    scores,
    tiny_model,
    tiny_start,
)
from kilobayes.types import Adapter, Posterior


def check_pair(adapter: Adapter, posterior: Posterior, epochs: int = 6, lr: float = 2e-2) -> None:
    """An adapter trained under a posterior: the loss falls, and what was fitted predicts alike in every way.

    Raises:
        AssertionError: what happens instead.
    """
    rows, seeds = TinyRows.make(), list(range(30, 30 + ask.members(posterior)))
    model = tiny_model(adapter)
    # an adapter's own factors are for rates at which heads learn too: here the fastest leaf takes lr
    factors = {} if ask.optimises(posterior) else parametrise.rates(adapter, tiny_start(model, [0]))
    fastest = max([1.0, *factors.values()])
    settings = train.Settings(
        lr=lr / fastest, epochs=epochs, batch_size=8, seeds=tuple(seeds), optimiser=AdamW(clip=1.0)
    )
    held = TinyRows.make(24, seed=1)
    energy: Any = ModelEnergy(model, TinyTask(), held, trained=rows)  # type: ignore[arg-type]
    trained = train.fit(model, rows, nll, posterior, tiny_start(model, seeds), settings, energy=energy)
    expect(not trained.diverged, f"members {trained.diverged} diverged at lr={lr}")
    first, last = trained.losses[:6].mean(0), trained.losses[-6:].mean(0)
    expect(bool((last < first).all()), f"the losses went from {first.tolist()} to {last.tolist()}")
    with torch.no_grad():
        state = ask.fit(posterior, trained.state, energy, generator(2))
        check_draws(posterior, state)
        theta = posterior.sample(state, len(seeds) + 2, generator(3))
        together = scores(model, theta, rows)
        for index in range(tree.size(theta)):
            alone = scores(model, tree.member(theta, index), rows)[0]
            expect(close(together[index], alone), f"draw {index} in a stack differs from the same draw alone")
        out = ask.predictive(posterior, state, energy, len(seeds) + 2, generator(3))
        expect(out.shape[1:] == (len(held), CLASSES), f"predictions are {tuple(out.shape)}")
        expect(bool(torch.isfinite(out).all()), "predictions are not finite")
        check_merge(model, tree.member(posterior.mean(state), 0), rows)
