"""What every posterior must do by itself, on weights that wander."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kilobayes import tree
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.posteriors import ask
from kilobayes.protocols import Jacobian
from kilobayes.random import Streams, generator
from kilobayes.testing.adapters import check_configuration
from kilobayes.testing.tiny import expect
from kilobayes.types import Params, Posterior, Progress

STEPS = 12


@dataclass(frozen=True, eq=False)
class ToyEnergy:
    """A linear model on fixed features in the place of a language model: what fitted posteriors may ask."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.features)

    @property
    def train(self) -> ToyEnergy:
        return self

    def part(self, rows: int) -> ToyEnergy:
        """At most so many of the rows."""
        return ToyEnergy(self.features[:rows], self.labels[:rows])

    @classmethod
    def make(cls, rows: int = 40) -> ToyEnergy:
        gen = generator(17)
        return cls(torch.randn(rows, 4, generator=gen), torch.randint(3, (rows,), generator=gen))

    def logits(self, theta: Params) -> Tensor:
        """``(S, N, 3)``."""
        return torch.einsum("nf,sfc->snc", self.features, theta["a/weight"]) + theta["b/bias"][:, None, :]

    def each(self, theta: Params) -> Tensor:
        """``(N, 3)`` of a stack of N, a member for each row, or of one member for all."""
        weight, bias = theta["a/weight"].expand(len(self), -1, -1), theta["b/bias"]
        return torch.einsum("nf,nfc->nc", self.features, weight) + bias

    def jacobians(
        self, theta: Params, keys: Sequence[str], combine: Callable[[Tensor], Tensor]
    ) -> Iterator[Jacobian]:
        """Written out: the model is linear in its leaves."""
        for rows in torch.arange(len(self)).split(7):
            logits = self.logits(theta)[0, rows]
            weights = combine(logits)
            parts = {
                "a/weight": torch.einsum("bf,bcr->brfc", self.features[rows], weights),
                "b/bias": weights.mT,
            }
            yield Jacobian(rows, logits, {key: parts[key] for key in keys})


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


def observed(posterior: Posterior, trajectory: list[Params], seeds: Sequence[int] = ()) -> Any:
    """The state at the end of a trajectory, the weights changed in place as an optimiser does.

    Args:
        seeds: one per member, for the noise of the posterior's own leaves; 0, 1, ... if not given.
    """
    steps, energy = len(trajectory) - 1, ToyEnergy.make()
    seeds = seeds or range(tree.size(trajectory[0]))
    theta = tree.clone(trajectory[0])
    theta |= tree.clone(ask.extend(posterior, theta, Streams([generator(seed, 8) for seed in seeds])))
    state = posterior.init(theta, generator(1))
    for step, weights in enumerate(trajectory[1:], 1):
        before, kept = state, flat_copy(state)
        for key, value in weights.items():
            theta[key].copy_(value)
        progress = Progress(step, steps, max(1, steps // 3), 40)
        state = posterior.observe(state, theta, progress)
        if progress.epoch_ended:
            state = ask.validate(posterior, state, theta, progress, energy)
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
    state = observed(posterior, walk(seeds), seeds)
    _check_members(posterior, state, seeds)
    if not hasattr(posterior, "base"):  # an ensemble's members share the draws of what is fitted afterwards
        alone = [observed(posterior, walk([seed]), [seed]) for seed in (20, 21)]
        odd = tree.first_difference(
            flat_copy(tree.concatenate_states(alone)),
            flat_copy(observed(posterior, walk([20, 21]), [20, 21])),
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
    _check_objective(posterior, trajectory[0], energy, seeds)


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
        expect(set(tree.plain(draws)) == set(mean), "draws have other leaves than the mean")
        for key, value in tree.plain(draws).items():
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
    count = 40 * members  # masks of the kit's few columns repeat themselves; they do not all agree
    distinct = len(tree.flat(posterior.sample(state, count, generator(5))).unique(dim=0))
    holds = distinct > members if support is None else distinct == support
    expect(holds, f"{count} draws hold {distinct} different ones; support says {support}")


def _check_objective(posterior: Posterior, start: Params, energy: ToyEnergy, seeds: list[int]) -> None:
    """One finite loss per member, whose gradient reaches every leaf of that member alone."""
    members, rows = tree.size(start), len(energy.labels)
    streams = Streams([generator(seed, 6) for seed in seeds])
    whole = start | ask.extend(posterior, start, streams)
    leaves = {key: value.clone().requires_grad_() for key, value in whole.items()}
    state, progress = posterior.init(leaves, generator(1)), Progress(1, STEPS, 4, 40)
    drawn = ask.perturb(posterior, state, leaves, rows, streams, progress)
    expect(
        set(tree.plain(drawn)) == set(start),
        f"the weights drawn for a step are {sorted(drawn)}, the adapter's {sorted(start)}",
    )
    expect(
        tree.size(drawn) in (members, members * rows),
        f"{tree.size(drawn)} draws for {members} members of {rows} rows: not one for all, nor one for each",
    )
    each = {key: value.unflatten(0, (members, -1)) for key, value in drawn.items()}
    logits = torch.stack(
        [energy.each({key: value[m] for key, value in each.items()}) for m in range(members)]
    ).log_softmax(-1)
    loss = -logits.gather(-1, energy.labels.expand(members, -1)[..., None])[..., 0].mean(dim=1)
    penalty = ask.penalty(posterior, state, leaves, progress)
    expect(
        penalty.shape == (members,),
        f"the penalty is {tuple(penalty.shape)}, not one number for each of {members} members",
    )
    loss = loss + penalty
    expect(bool(torch.isfinite(loss).all()), "the objective is not finite")
    loss[0].backward()
    for key, leaf in leaves.items():
        expect(leaf.grad is not None and bool(leaf.grad[0].any()), f"the objective has no gradient in {key}")
        assert leaf.grad is not None
        expect(
            not bool(leaf.grad[1:].any()),
            f"the first member's objective has a gradient in other members' {key}",
        )
