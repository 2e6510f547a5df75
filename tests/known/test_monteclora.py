"""MonteCLoRA through the real loop: what published code gets wrong, ours provably does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobayes import train, tree
from kilobayes.adapters import LoRA
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.optim import AdamW
from kilobayes.posteriors import Ensemble, MonteCLoRA
from kilobayes.posteriors.monteclora import MonteCLoRAState
from kilobayes.random import generator
from kilobayes.testing.tiny import TinyRows, tiny_model, tiny_start
from kilobayes.types import Params, Progress

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")

ROWS = TinyRows.make(27, seed=4)  # 27 rows in batches of 8: the last one of an epoch has 3
QUIET: dict[str, Any] = {"eta": 0.0, "cooperative": False}  # the likelihood alone


def run(method: Any, *, recompute: bool = False, **changes: Any) -> tuple[Params, train.Trained]:
    plain = {
        "lr": 0.01,
        "epochs": 2,
        "batch_size": 8,
        "seeds": (5,),
        "optimiser": AdamW(clip=0.5, epsilon=1e-5),
    }
    settings = train.Settings(**plain | changes)
    model: Any = tiny_model(LoRA(r=2))
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    start = tiny_start(model, list(settings.seeds))
    model.double()
    start = tree.map_params(Tensor.double, start)
    return start, train.fit(model, ROWS, double_nll, method, start, settings)


def double_nll(output: Any, labels: Tensor) -> Tensor:
    scores = output.logits.reshape(*labels.shape, -1).log_softmax(-1)
    return -scores.gather(-1, labels[..., None])[..., 0]


def assert_close(a: MonteCLoRAState, b: MonteCLoRAState, tolerance: float) -> None:
    ours, other = tree.flatten_state(a), tree.flatten_state(b)
    assert set(ours) == set(other)
    for key, value in ours.items():
        assert float((value - other[key]).abs().max()) <= tolerance * max(1.0, float(value.abs().max())), key


@pytest.mark.parametrize("method", [MonteCLoRA(**QUIET), MonteCLoRA(noise="row", **QUIET)])
def test_one_step_of_the_likelihood_moves_mean_scales_and_weights(method: MonteCLoRA) -> None:
    """Published code replaces A in the forward pass, so that A never trains and s and a get no gradient."""
    start, trained = run(method, epochs=1, batch_size=27)
    state = trained.state
    assert trained.losses.shape == (1, 1)
    moved = [k for k, v in state.theta.items() if k.endswith("/B") and not torch.equal(v, start[k].cpu())]
    assert len(moved) == sum(k.endswith("/B") for k in start)
    start, trained = run(method, epochs=2, batch_size=27)  # B starts at zero: the second step reaches A
    for key, value in trained.state.theta.items():
        assert not torch.equal(value, start[key]), key
    for key, value in trained.state.own.items():
        assert float(value.abs().min()) > 0, key


@pytest.mark.parametrize("method", [MonteCLoRA(epsilon=2.0), MonteCLoRA(mixture=True, noise="row")])
@pytest.mark.parametrize(
    "changes", [{"accumulate": 4}, {"recompute": True}, {"recompute": True, "accumulate": 3}]
)
def test_neither_accumulation_nor_checkpointing_changes_a_step(
    method: MonteCLoRA, changes: dict[str, Any]
) -> None:
    """Noise is drawn once a step: nothing is popped from a buffer when layers are run a second time."""
    assert_close(run(method, epochs=1, **changes)[1].state, run(method, epochs=1)[1].state, 1e-9)


@pytest.mark.parametrize("method", [MonteCLoRA(), MonteCLoRA(mixture=True), MonteCLoRA(noise="row")])
def test_members_of_a_stack_equal_runs_alone(method: MonteCLoRA) -> None:
    seeds, rates = (5, 2), (0.01, 0.03)
    together = run(Ensemble(method, members=2), seeds=seeds, lr=rates, epochs=1)[1]
    for index, (seed, rate) in enumerate(zip(seeds, rates)):
        alone = run(method, seeds=(seed,), lr=rate, epochs=1)[1]
        assert_close(tree.state_member(together.state, index), alone.state, 1e-9)
        torch.testing.assert_close(together.losses[:, index], alone.losses[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method", [MonteCLoRA(epsilon=2.0), MonteCLoRA(mixture=True), MonteCLoRA(components=1)]
)
def test_a_saved_posterior_draws_what_it_drew(method: MonteCLoRA, tmp_path: Path) -> None:
    """And its draws differ: the predictive distribution that published code does not have."""
    state = run(method, epochs=1)[1].state
    write_atomically(tmp_path / "state.safetensors", tree.flatten_state(state))
    back = tree.unflatten_state(method, read_tensors(tmp_path / "state.safetensors")[0])
    drawn = method.sample(state, 4, generator(3))
    assert not tree.first_difference(drawn, method.sample(back, 4, generator(3)))
    for key, value in drawn.items():
        assert len(value.flatten(1).unique(dim=0)) == (4 if key.endswith("/A") else 1)
    assert set(drawn) == set(state.theta)


class Watched(MonteCLoRA):
    """MonteCLoRA that writes down what it draws."""

    def perturb(self, state: Any, theta: Params, rows: int, streams: Any, progress: Progress) -> Params:
        drawn = super().perturb(state, theta, rows, streams, progress)
        key = next(key for key in drawn if key.endswith("/A"))
        SEEN.append((drawn[key] - theta[key]).detach().clone())
        return drawn


SEEN: list[Tensor] = []


def test_no_two_steps_share_noise_and_its_size_is_as_stated() -> None:
    """Standard deviation epsilon / sqrt(3 n) |pi| at the start: about 0.6 of epsilon times LoRA's."""
    SEEN.clear()
    run(Watched(epsilon=0.5, **QUIET), lr=1e-9, epochs=25, batch_size=27)
    assert len(SEEN) == 25
    found = torch.stack(SEEN)[:, 0]
    assert len(found.flatten(1).unique(dim=0)) == 25
    pi = (torch.randn(50000, 4, generator=generator(1))).softmax(-1)
    expected = 0.5**2 / (3 * found.shape[-1]) * float(pi.square().sum(dim=1).mean())
    each = found.square().mean(dim=(1, 2))
    assert abs(float(each.mean()) - expected) < 5 * float(each.std()) / 5
