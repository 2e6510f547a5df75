"""Adaptive averaging: its three branches by scripted scores, and what it must equal in the limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobayes import tree
from kilobayes.options import Options
from kilobayes.posteriors import ASWA, SWA
from kilobayes.posteriors.aswa import ASWAState
from kilobayes.random import generator
from kilobayes.tasks.data import Examples
from kilobayes.testing.posteriors import ToyEnergy, walk
from kilobayes.types import Params, Progress
from kilobayes.workflows.finetune import Fitted, fit_examples

from .. import small

ROWS = 10


@dataclass
class Scripted:
    """Answers each question after weights with accuracies, in tenths, that were written down before."""

    answers: list[list[int]]
    asked: list[Params] = field(default_factory=list)
    labels: Tensor = field(default_factory=lambda: torch.zeros(ROWS, dtype=torch.long))

    def logits(self, theta: Params) -> Tensor:
        self.asked.append(tree.clone(theta))
        right = torch.arange(ROWS) < torch.tensor(self.answers.pop(0))[:, None]
        return torch.stack([right.float(), (~right).float()], dim=-1)


def point(*values: float) -> Params:
    return {"s/A": torch.tensor(values)[:, None].expand(-1, 3).clone()}


def run(method: ASWA, points: list[Params], energy: Any) -> list[ASWAState]:
    """States after each epoch of one step; all of them belong to the tail."""
    state, states = method.init(points[0], generator(1)), []
    for step, theta in enumerate(points, 1):
        progress = Progress(step, len(points), 1, 10)
        state = method.validate(method.observe(state, theta, progress), theta, progress, energy)
        states.append(state)
    return states


EAGER = ASWA(start=0.0, score="accuracy")


def test_three_branches_each_member_for_itself() -> None:
    """Answers are (running, provisional) by epoch; the average's own is remembered."""
    answers = [
        *([5, 5], [5, 5]),  # the first epoch: both start at the running weights
        *([4, 4], [6, 4]),  # soft; reject
        *([9, 5], [6, 5]),  # hard: 9 > 6; soft although tied with its 5, and 5 is not above it
        *([9, 6], [9, 7]),  # soft: 9 is not above 9; soft: 7 >= 5 and 6 < 7
    ]
    energy = Scripted(answers)
    points = [point(0.0, 0.0), point(3.0, 3.0), point(9.0, 6.0), point(1.0, 9.0)]
    first, second, third, fourth = run(EAGER, points, energy)
    assert first.average["s/A"][:, 0].tolist() == [0.0, 0.0]
    assert first.count.tolist() == [1.0, 1.0]
    assert second.average["s/A"][:, 0].tolist() == [1.5, 0.0]
    assert second.count.tolist() == [2.0, 1.0]
    assert third.average["s/A"][:, 0].tolist() == [9.0, 3.0]
    assert third.count.tolist() == [1.0, 2.0]
    assert fourth.average["s/A"][:, 0].tolist() == [5.0, 5.0]  # the reset counts one: (9 + 1) / 2
    assert fourth.count.tolist() == [2.0, 3.0]
    assert fourth.score.tolist() == [0.9, 0.7]
    assert [float(theta["s/A"][0, 0]) for theta in energy.asked] == [0.0, 0.0, 3.0, 1.5, 9.0, 4.0, 1.0, 5.0]


def test_a_rejected_average_leaves_every_byte() -> None:
    odd = torch.tensor([[0.1, -0.0, 1e-45, 3.0e38]])  # a denormal, a negative zero, nearly too large
    points = [{"s/A": odd.clone()}, {"s/A": torch.full_like(odd, -7.7)}, {"s/A": torch.full_like(odd, 5.0)}]
    states = run(EAGER, points, Scripted([[5], [5], [1], [2], [4], [4]]))
    for state in states:
        assert state.average["s/A"].view(torch.int32).tolist() == odd.view(torch.int32).tolist()
        assert state.count.tolist() == [1.0]


def test_always_better_is_swa() -> None:
    points = [{k: v * (1 + 0.3 * i) for k, v in theta.items()} for i, theta in enumerate(walk([1, 2], 11))]
    answers = [[min(epoch + at, 10)] * 2 for epoch in range(12) for at in (0, 1)]  # ties at the end
    states = run(EAGER, points, Scripted(answers))
    swa = SWA(start=0.0, by_epoch=True)
    state = swa.init(points[0], generator(1))
    for step, theta in enumerate(points, 1):
        state = swa.observe(state, theta, Progress(step, len(points), 1, 10))
    assert states[-1].count.tolist() == state.count.tolist() == [12.0, 12.0]
    for key, value in state.average.items():  # rounded at each epoch here, once at the end there
        torch.testing.assert_close(states[-1].average[key], value, rtol=1e-6, atol=1e-6)


def test_never_better_is_the_first_epoch() -> None:
    points = [point(2.0), point(5.0), point(-3.0), point(8.0)]
    states = run(EAGER, points, Scripted([[7], [7], *([[6], [6]] * 3)]))
    assert states[-1].average["s/A"].tolist() == points[0]["s/A"].tolist()
    assert states[-1].count.tolist() == [1.0]


@pytest.mark.parametrize("score", ["nll", "accuracy"])
def test_constant_weights_are_their_average(score: str) -> None:
    theta = walk([1, 2, 3], 1)[1]
    states = run(ASWA(start=0.0, score=score), [theta] * 9, ToyEnergy.make())
    assert not tree.first_difference(states[-1].average, theta)
    assert states[-1].count.tolist() == [9.0] * 3


@pytest.mark.parametrize("score", ["nll", "accuracy"])
def test_the_score_is_that_of_the_average_and_never_falls(score: str) -> None:
    energy = ToyEnergy.make()
    states = run(ASWA(start=0.0, score=score), walk([1, 2, 3], 30), energy)
    counts = torch.stack([state.count for state in states])
    steps = counts.diff(dim=0)
    assert bool((steps == 1).any())
    assert bool((steps == 0).any())
    before = torch.full((3,), -torch.inf, dtype=torch.float64)
    for state in states:
        log_probs = energy.logits(state.average).double().log_softmax(-1)
        picked = log_probs.gather(-1, energy.labels.expand(3, -1)[..., None])[..., 0].mean(1)
        right = (log_probs.argmax(-1) == energy.labels).double().mean(1)
        torch.testing.assert_close(state.score, picked if score == "nll" else right, rtol=1e-12, atol=0)
        assert bool((state.score >= before).all())
        before = state.score


def test_weights_that_are_no_numbers_are_never_taken() -> None:
    points = [point(1.0), point(float("nan")), point(3.0)]

    class Linear:
        labels = torch.zeros(4, dtype=torch.long)

        def logits(self, theta: Params) -> Tensor:
            return theta["s/A"][:, None, :2].expand(-1, 4, -1)

    for score in ("nll", "accuracy"):
        states = run(ASWA(start=0.0, score=score), points, Linear())
        assert states[1].average["s/A"].tolist() == [[1.0] * 3]
        assert states[2].average["s/A"].tolist() == [[2.0] * 3]


def test_only_the_tail_is_looked_at() -> None:
    method, energy = ASWA(start=0.5, score="accuracy"), Scripted([[1], [1], [1], [1]])
    states = run(method, [point(float(i)) for i in range(4)], energy)
    assert [float(theta["s/A"][0, 0]) for theta in energy.asked] == [2.0, 2.0, 3.0, 2.5]
    assert states[1].count.tolist() == [0.0]
    # stopped by the clock before its tail, it is the last point
    stopped = method.observe(states[0], point(7.0), Progress(1, 1, 1, 10))
    assert stopped.average["s/A"].tolist() == [[7.0] * 3]
    assert stopped.score.tolist() == [0.0]  # files hold no infinities


@pytest.mark.parametrize("wrong", [{"start": 1.0}, {"score": "brier"}, {"rate_held": 0.0}, {"anneal": 0.6}])
def test_settings_outside_their_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ASWA(**wrong)


def examples(count: int, seed: int) -> Examples:
    found = small.rows(count, seed)
    labels = [small.LABELS.index(row["label"]) for row in found]
    return Examples([row["text"] for row in found], None, labels, small.LABELS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_looking_does_not_change_the_training(checkpointing: bool) -> None:
    """Against SWA at the same rates: losses bit for bit; the remembered score is the one predictions have."""

    def fitted(posterior: str) -> Fitted:
        options = Options(
            model=small.base(),
            adapter="LoRA(r=2)",
            posterior=posterior,
            epochs=4,
            batch_size=8,
            lr=0.01,
            max_length=24,
            gradient_checkpointing=checkpointing,
        )
        return fit_examples(options, examples(50, 1), held)

    held = examples(40, 2)
    ours, swa = fitted("Ensemble(ASWA(start=0.2), members=2)"), fitted("Ensemble(SWA(start=0.2), members=2)")
    assert ours.trained is not None
    assert swa.trained is not None
    assert torch.equal(ours.trained.losses, swa.trained.losses)
    assert bool((ours.state.count >= 1).all())
    log_probs = ours.predict(held).logits.double().log_softmax(-1)
    picked = log_probs.gather(-1, torch.tensor(held.labels).expand(2, -1)[..., None])[..., 0].mean(1)
    torch.testing.assert_close(picked, ours.state.score, rtol=1e-5, atol=1e-6)
