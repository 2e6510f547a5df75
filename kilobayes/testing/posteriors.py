"""What every posterior must do, alone and together with an adapter."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kilobayes import train, tree
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.optim import AdamW
from kilobayes.posteriors import ask
from kilobayes.random import Streams, generator
from kilobayes.testing.adapters import check_configuration, check_merge
from kilobayes.testing.tiny import TinyRows, close, expect, nll, scores, tiny_model, tiny_start
from kilobayes.types import Adapter, Params, Posterior, Progress

STEPS = 12


@dataclass(frozen=True, eq=False)
class ToyEnergy:
    """A linear model on fixed features in the place of a language model: what fitted posteriors may ask."""

    features: Tensor
    labels: Tensor

    @classmethod
    def make(cls, rows: int = 40) -> ToyEnergy:
        gen = generator(17)
        return cls(torch.randn(rows, 4, generator=gen), torch.randint(3, (rows,), generator=gen))

    def logits(self, theta: Params) -> Tensor:
        """``(S, N, 3)``."""
        return torch.einsum("nf,sfc->snc", self.features, theta["a/weight"]) + theta["b/bias"][:, None, :]


def walk(seeds: list[int], steps: int = STEPS) -> list[Params]:
    """A random trajectory of a stack of toy leaves; a member's depends on its own seed alone."""
    streams = Streams([generator(seed, 5) for seed in seeds])
    like = {"a/weight": torch.zeros(len(seeds), 4, 3), "b/bias": torch.zeros(len(seeds), 3)}
    theta = tree.map_params(streams.normal, like)
    out = [theta]
    for _ in range(steps):
        theta = {key: value + 0.3 * streams.normal(value) for key, value in theta.items()}
        out.append(theta)
    return out


def observed(posterior: Posterior, trajectory: list[Params]) -> Any:
    """The state at the end of a trajectory, the weights changed in place as an optimiser does."""
    steps = len(trajectory) - 1
    theta = tree.clone(trajectory[0])
    state = posterior.init(theta, generator(1))
    for step, weights in enumerate(trajectory[1:], 1):
        before, kept = state, flat_copy(state)
        for key, value in theta.items():
            value.copy_(weights[key])
        state = posterior.observe(state, theta, Progress(step, steps, max(1, steps // 3), 40))
        expect(
            not tree.first_difference(kept, tree.flatten_state(before)),
            "observe changed the state it was given",
        )
    kept = flat_copy(state)
    for value in theta.values():
        value.fill_(float("nan"))
    expect(
        not tree.first_difference(kept, tree.flatten_state(state)),
        "the state shares memory with the live weights",
    )
    return state


def flat_copy(state: Any) -> Params:
    """A state's tensors by name, copied."""
    return tree.clone(tree.flatten_state(state))


def stored(posterior: Posterior, state: Any) -> Any:
    """A state written to a safetensors file and read back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        write_atomically(path, tree.flatten_state(state))
        return tree.unflatten_state(posterior, read_tensors(path)[0])


def check_posterior(posterior: Posterior) -> None:
    """What a posterior must do on weights that wander, without a model.

    Raises:
        AssertionError: what it does instead.
    """
    check_configuration(posterior, "posteriors")
    members = ask.members(posterior)
    seeds = list(range(20, 20 + members))
    trajectory, energy = walk(seeds), ToyEnergy.make()
    state = observed(posterior, trajectory)
    _check_members(posterior, state, seeds)
    if not hasattr(posterior, "base"):  # an ensemble's members share the draws of what is fitted afterwards
        alone = [observed(posterior, walk([seed])) for seed in (20, 21)]
        odd = tree.first_difference(
            flat_copy(tree.concatenate_states(alone)), flat_copy(observed(posterior, walk([20, 21])))
        )
        expect(not odd, f"{odd} of a member depends on the other members")
    state = ask.fit(posterior, state, energy, generator(2))
    _check_members(posterior, state, seeds)
    check_draws(posterior, state)
    theta = posterior.sample(state, members + 2, generator(3))
    logits = energy.logits(theta)
    out = ask.transform(posterior, state, logits)
    expect(
        out.shape == logits.shape and out.dtype == logits.dtype,
        "transform changes the shape or dtype of scores",
    )
    expect(bool(torch.isfinite(out).all()), "transform gives scores that are not finite")
    _check_objective(posterior, trajectory[0], energy)


def _check_members(posterior: Posterior, state: Any, seeds: list[int]) -> None:
    tensors = tree.flatten_state(state)
    for name, value in tensors.items():
        expect(
            value.shape[0] == len(seeds),
            f"{name} {tuple(value.shape)} has no leading axis of {len(seeds)} members",
        )
    parts = [tree.state_member(state, index) for index in range(len(seeds))]
    odd = tree.first_difference(tree.flatten_state(tree.concatenate_states(parts)), tensors)
    expect(not odd, f"{odd} differs after taking the members apart and joining them")
    odd = tree.first_difference(tree.flatten_state(stored(posterior, state)), tensors)
    expect(not odd, f"{odd} differs after saving and loading")


def check_draws(posterior: Posterior, state: Any) -> None:
    """Draws have the mean's shapes and dtypes, repeat, survive a file, and are as many as ``support``."""
    mean = posterior.mean(state)
    members, support = tree.size(mean), posterior.support(state)
    back = stored(posterior, state)
    for count in (1, members, 2 * members + 1):
        draws = posterior.sample(state, count, generator(4))
        expect(set(draws) == set(mean), "draws have other leaves than the mean")
        for key, value in draws.items():
            expect(
                value.shape == (count, *mean[key].shape[1:]),
                f"{count} draws of {key} are {tuple(value.shape)}",
            )
            expect(
                value.dtype == mean[key].dtype,
                f"draws of {key} are {value.dtype}, the mean {mean[key].dtype}",
            )
            expect(bool(torch.isfinite(value).all()), f"draws of {key} are not finite")
        expect(
            not tree.first_difference(draws, posterior.sample(state, count, generator(4))),
            "draws do not repeat",
        )
        expect(
            not tree.first_difference(draws, posterior.sample(back, count, generator(4))),
            "draws change in a file",
        )
    count = 3 * members
    distinct = len(tree.flat(posterior.sample(state, count, generator(5))).unique(dim=0))
    expected = count if support is None else support
    expect(distinct == expected, f"{count} draws hold {distinct} different ones; support says {support}")


def _check_objective(posterior: Posterior, theta: Params, energy: ToyEnergy) -> None:
    """One finite loss per member, whose gradient reaches every leaf of that member alone."""
    leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
    members = tree.size(theta)
    streams = Streams([generator(6, member) for member in range(members)])

    def loss_of(given: Params) -> Tensor:
        logits = energy.logits(given).log_softmax(-1)
        return -logits.gather(-1, energy.labels.expand(members, -1)[..., None])[..., 0]

    state = posterior.init(leaves, generator(1))
    loss = ask.objective(posterior, state, leaves, loss_of, streams, Progress(1, STEPS, 4, 40))
    expect(
        loss.shape == (members,),
        f"the objective is {tuple(loss.shape)}, not one number for each of {members} members",
    )
    expect(bool(torch.isfinite(loss).all()), "the objective is not finite")
    loss[0].backward()
    for key, leaf in leaves.items():
        expect(leaf.grad is not None and bool(leaf.grad[0].any()), f"the objective has no gradient in {key}")
        assert leaf.grad is not None
        expect(
            not bool(leaf.grad[1:].any()),
            f"the first member's objective has a gradient in other members' {key}",
        )


def check_pair(adapter: Adapter, posterior: Posterior, epochs: int = 6, lr: float = 2e-2) -> None:
    """An adapter trained under a posterior: the loss falls, and what was fitted predicts alike in every way.

    Raises:
        AssertionError: what happens instead.
    """
    rows, seeds = TinyRows.make(), list(range(30, 30 + ask.members(posterior)))
    model = tiny_model(adapter)
    settings = train.Settings(
        lr=lr, epochs=epochs, batch_size=8, seeds=tuple(seeds), optimiser=AdamW(clip=1.0)
    )
    trained = train.fit(model, rows, nll, posterior, tiny_start(model, seeds), settings)
    expect(not trained.diverged, f"members {trained.diverged} diverged at lr={lr}")
    first, last = trained.losses[:6].mean(0), trained.losses[-6:].mean(0)
    expect(bool((last < first).all()), f"the losses went from {first.tolist()} to {last.tolist()}")
    with torch.no_grad():
        energy = ModelEnergy(model, TinyRows.make(24, seed=1))
        state = ask.fit(posterior, trained.state, energy, generator(2))
        check_draws(posterior, state)
        theta = posterior.sample(state, len(seeds) + 2, generator(3))
        together = scores(model, theta, rows)
        for index in range(tree.size(theta)):
            alone = scores(model, tree.member(theta, index), rows)[0]
            expect(close(together[index], alone), f"draw {index} in a stack differs from the same draw alone")
        check_merge(model, tree.member(posterior.mean(state), 0), rows)


@dataclass(frozen=True, eq=False)
class ModelEnergy:
    """A tiny model on calibration rows."""

    model: Any
    rows: TinyRows

    @property
    def labels(self) -> Tensor:
        return self.rows.labels

    def logits(self, theta: Params) -> Tensor:
        """``(S, N, C)``."""
        return scores(self.model, theta, self.rows)
