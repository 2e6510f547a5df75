"""Members of a stack with rows of their own, and training that pauses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kilobayes import optim, step, train, tree
from kilobayes.adapters import LoRA
from kilobayes.checkpoint import Checkpoint
from kilobayes.errors import KilobayesError
from kilobayes.posteriors import SWAG, Point
from kilobayes.random import Streams, generator
from kilobayes.testing.tiny import TinyRows, nll, perturbed, tiny_model, tiny_start
from kilobayes.types import Posterior, Progress

ROWS = TinyRows.make(30, seed=4)
OWN = [torch.arange(0, 3), torch.arange(3, 14), torch.arange(14, 30)]  # 3, 11 and 16 rows, batches of 8
METHOD = LoRA(r=2, dropout=0.25)
SEEDS = (5, 2, 11)


def fit(posterior: Posterior, who: list[int], **more: Any) -> train.Trained:
    model = tiny_model(METHOD)
    start = tiny_start(model, [7] * len(who))
    settings = train.Settings(lr=0.02, batch_size=8, seeds=tuple(SEEDS[i] for i in who), steps=9)
    return train.fit(model, ROWS, nll, posterior, start, settings, own=[OWN[i] for i in who], **more)


def test_full_batches_go_on_over_ends_of_epochs() -> None:
    found = torch.cat([step.full_batch(5, at, 3, 8) for at in range(3)])
    assert torch.equal(found, torch.cat([step.order(5, epoch, 3) for epoch in range(8)]))
    found = torch.cat([step.full_batch(2, at, 11, 8) for at in range(11)])
    assert torch.equal(found.bincount(), torch.full((11,), 8))  # 11 steps of 8 are 8 epochs of 11
    assert torch.equal(found[:11], step.order(2, 0, 11))


@pytest.mark.parametrize("posterior", [Point(), SWAG(rank=0, start=0.4)])
def test_members_with_rows_of_their_own_equal_runs_alone(posterior: Posterior) -> None:
    together = fit(posterior, [0, 1, 2])
    assert together.losses.shape == (9, 3)
    for place in range(3):
        alone = fit(posterior, [place])
        torch.testing.assert_close(together.losses[:, place], alone.losses[:, 0], rtol=1e-4, atol=1e-5)
        one = tree.flatten_state(tree.state_member(together.state, place))
        other = tree.flatten_state(alone.state)
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-3, atol=2e-5)


def test_a_pause_changes_nothing(tmp_path: Path) -> None:
    whole = fit(SWAG(rank=2, start=0.2), [0, 1, 2])
    for until in (1, 4, 4, 9):  # the second time there is nothing to do
        save = Checkpoint(tmp_path / "c.safetensors", {"a": 1}, resume=True)
        parts = fit(SWAG(rank=2, start=0.2), [0, 1, 2], save=save, until=until)
        assert parts.stopped == ("until" if until < 9 else "")
        assert len(parts.losses) == until
    assert torch.equal(parts.losses, whole.losses)
    assert not tree.first_difference(tree.flatten_state(parts.state), tree.flatten_state(whole.state))


def test_replaced_leaves_meet_the_moments_and_the_schedule_that_were_there(tmp_path: Path) -> None:
    """Against a loop written out: leaves replaced after step 4, everything else as it was."""
    save = Checkpoint(tmp_path / "c.safetensors", {}, resume=True)
    model = tiny_model(METHOD)
    other = perturbed(tiny_start(model, [7, 7]), size=0.05)
    fit(Point(), [0, 2], save=save, until=4)
    save.change({f"theta|{key}": value for key, value in other.items()} | {"adopted": torch.tensor(4)})
    assert int(save.read()["adopted"]) == 4
    found = fit(Point(), [0, 2], save=save)
    assert "adopted" not in save.read()

    theta = {k: v.requires_grad_() for k, v in sorted(tiny_start(model, [7, 7]).items())}
    streams = Streams([generator(seed, 1) for seed in (5, 11)])
    one = step.Processes(torch.device("cpu"))
    work = step.Step(model, ROWS, nll, Point(), streams, (5, 11), 8, 1, one, [OWN[0], OWN[2]])
    moments, state = optim.init(theta), Point().init(theta, generator(0))
    for index in range(9):
        if index == 4:
            for key, value in theta.items():
                value.data.copy_(other[key])
        work.run(state, theta, Progress(index + 1, 9, 9, 9), "no")
        gradients = {k: v.grad if v.grad is not None else torch.zeros_like(v) for k, v in theta.items()}
        rates = 0.02 * torch.ones(2) * optim.linear((index + 0.5) / 9, 0.06)
        optim.step(optim.AdamW(), moments, theta, gradients, rates, index + 1, {})
    for key, value in theta.items():
        torch.testing.assert_close(found.state.theta[key], value.detach(), rtol=1e-6, atol=1e-7)
    assert not all(
        torch.equal(v, w) for v, w in zip(theta.values(), fit(Point(), [0, 2]).state.theta.values())
    )


def test_misfits_are_named() -> None:
    model, empty = tiny_model(METHOD), torch.arange(0)
    start, settings = tiny_start(model, [7, 7]), train.Settings(seeds=(1, 2), steps=3)
    for own, words in (([OWN[0]], "2 members needs 2 sets of rows"), ([OWN[0], empty], "no rows")):
        with pytest.raises(KilobayesError, match=words):
            train.fit(model, ROWS, nll, Point(), start, settings, own=own)
