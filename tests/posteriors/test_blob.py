"""BLoB's divergence, weights, noise and gradients against closed forms, brute force and the base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from kilobayes import step, train, tree
from kilobayes.adapters import LoRA
from kilobayes.modes import checkpointing, evaluation
from kilobayes.optim import AdamW
from kilobayes.posteriors import BLoB, Ensemble, Point
from kilobayes.posteriors.blob import BLoBState, divergence, share
from kilobayes.random import Streams, generator
from kilobayes.testing.tiny import TinyRows, installed, nll, perturbed, scores, tiny_model, tiny_start
from kilobayes.types import Params, Progress

ROWS = TinyRows.make(27, seed=4)
FIRST = Progress(1, 100, 10, 50)
NOISES = ["row", "flipout", "step"]


def streams(members: int = 1, seed: int = 3) -> Streams:
    return Streams([generator(seed, m) for m in range(members)])


def leaves(members: int = 1, rank: int = 3, width: int = 5, out: int = 4) -> Params:
    """A site's factors away from where they start, and widths that differ from entry to entry."""
    gen = generator(2)
    return {
        "s/A": torch.randn(members, rank, width, generator=gen),
        "s/B": torch.randn(members, out, rank, generator=gen),
        "s/A~G": 0.3 + torch.rand(members, rank, width, generator=gen),
    }


def drawn(noise: str, theta: Params, rows: int, seed: int = 3) -> Params:
    """Leaves ``(S, B or 1, ...)``."""
    method, members = BLoB(noise=noise), tree.size(theta)
    out = method.perturb(method.init(theta, generator(1)), theta, rows, streams(members, seed), FIRST)
    return {key: value.unflatten(0, (members, -1)) for key, value in out.items()}


@pytest.mark.parametrize(("scale", "expected"), [(0.0025, 3.8821), (0.00125, 4.5752), (0.2, 0.0)])
def test_divergence_of_an_entry(scale: float, expected: float) -> None:
    """The values at both ends of the default start, and zero at the prior."""
    found = divergence(torch.zeros(1, 1), torch.full((1, 1), scale), 0.2)
    assert float(found) == pytest.approx(expected, abs=5e-5)


def test_divergence_is_torchs_and_zero_only_at_the_prior() -> None:
    gen = generator(4)
    mean, scale = torch.randn(2, 3, 5, generator=gen), torch.rand(2, 3, 5, generator=gen) + 0.1
    expected = kl_divergence(Normal(mean, scale), Normal(0.0, 0.7)).sum(dim=(1, 2))
    torch.testing.assert_close(divergence(mean, scale, 0.7), expected)
    for odd in (mean * 0 + 0.01, mean * 0):
        width = torch.full_like(odd, 0.7 if odd.any() else 0.71)
        assert (divergence(odd, width, 0.7) > 0).all()


@pytest.mark.parametrize("cycle", [1, 2, 10, 60])
def test_weights_of_a_cycle_double_and_sum_to_the_papers(cycle: int) -> None:
    weights = [share(i, cycle) for i in range(1, cycle + 1)]
    exact = (2 ** (cycle + 1) - 2) / (2 ** (cycle + 1) - 1)
    assert sum(weights) == pytest.approx(exact, rel=1e-12)
    assert all(b == pytest.approx(2 * a) for a, b in pairwise(weights))
    assert weights[-1] == pytest.approx(2**cycle / (2 ** (cycle + 1) - 1))


def test_weights_of_the_papers_longest_cycle_do_not_overflow() -> None:
    assert sum(share(i, 2356) for i in range(1, 2357)) == pytest.approx(1.0)


def test_weight_of_the_divergence_over_training() -> None:
    """Evenly it is kl / N; in cycles the same on average; at kl = N / cycle a cycle's sum is the paper's."""
    steps = [Progress(i, 60, 10, 640) for i in range(1, 61)]
    assert {BLoB(kl=0.5, cost=0.0).weight(p, 10**6) for p in steps} == {0.5 / 640}
    cyclic = [BLoB(kl=0.5, cost=0.0, cycle=20).weight(p, 7) for p in steps]
    assert np.mean(cyclic) == pytest.approx(0.5 / 640, rel=1e-5)
    assert cyclic[:20] == cyclic[20:40] == cyclic[40:]
    paper = [BLoB(kl=640 / 20, cost=0.0, cycle=20).weight(p, 7) for p in steps]
    assert paper[19] == pytest.approx(2**20 / (2**21 - 1))
    assert sum(paper[:20]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("numbers", "expected"), [(100, 1 / 640), (128, 1 / 640), (1280, 0.2 / 1280)])
def test_cost_limits_the_weight_where_there_are_many_numbers_for_the_rows(
    numbers: int, expected: float
) -> None:
    assert BLoB(cost=0.2).weight(Progress(1, 60, 10, 640), numbers) == pytest.approx(expected)


def test_divergence_does_not_use_up_the_norm_that_gradients_are_clipped_at() -> None:
    """LoRA's A of MiniLM and 300 rows: below a tenth of clip = 1; the bound's own is seventeen and more."""
    norms = {}
    for cost in (BLoB().cost, 0.0):
        method, theta = BLoB(cost=cost), {"s/A": torch.zeros(1, 96, 384)}
        theta |= method.extend(theta, streams())
        g = theta["s/A~G"].requires_grad_()
        method.penalty(method.init(theta, generator(1)), theta, Progress(1, 152, 19, 300)).sum().backward()
        assert g.grad is not None
        norms[cost] = float(g.grad.norm())
    assert norms[BLoB().cost] < 0.1
    assert norms[0.0] > 17.0


def test_penalty_is_the_weighted_divergence_of_the_chosen_leaves() -> None:
    theta, method = leaves(2), BLoB(kl=0.3, cost=0.0, prior=0.5)
    found = method.penalty(method.init(theta, generator(1)), theta, FIRST)
    expected = kl_divergence(Normal(theta["s/A"], theta["s/A~G"].square()), Normal(0.0, 0.5)).sum(dim=(1, 2))
    torch.testing.assert_close(found, 0.3 / 50 * expected)


def test_widths_start_between_half_the_square_of_epsilon_and_it() -> None:
    theta = {"s/A": torch.zeros(2, 100, 200), "s/B": torch.zeros(2, 3, 100)}
    method = BLoB(epsilon=0.1)
    new = method.extend(theta, streams(2))
    assert list(new) == ["s/A~G"]
    low, high = 0.1 / 2**0.5, 0.1
    g = new["s/A~G"].double()
    assert float(g.min()) >= low - 1e-7
    assert float(g.max()) <= high + 1e-7
    assert abs(float(g.mean()) - (low + high) / 2) < 5 * (high - low) / (12 * g.numel()) ** 0.5  # uniform
    assert float(g.var()) == pytest.approx((high - low) ** 2 / 12, rel=0.02)
    assert not torch.equal(g[0], g[1])
    state = method.init(theta | new, generator(1))
    assert set(state.average) == {"s/A", "s/B"}
    assert set(state.scale) == {"s/A"}  # nothing is kept of the widths that B does not have
    assert 0.005 <= float(state.scale["s/A"].min()) < float(state.scale["s/A"].max()) <= 0.01 + 1e-7
    assert method.rates(theta | new) == {"s/A~G": method.speed}


@pytest.mark.parametrize("noise", NOISES)
def test_noise_has_the_widths_and_is_one_map_per_row(noise: str) -> None:
    """Two tokens of a row see the same weights: covariance sum_j x1_j x2_j Omega_j^2, not zero.

    Rows are uncorrelated, unless the step draws once for all; members are independent.
    """
    theta, count = leaves(2), 4000
    gen = generator(9)
    tokens = torch.randn(
        2, 5, generator=gen
    ).double()  # the same two in each row, so that rows can be compared
    found = []
    for seed in range(count // 4 if noise != "step" else count):
        a = drawn(noise, theta, 4, seed)["s/A"].double()
        found.append(torch.einsum("sbrd,td->sbtr", a - theta["s/A"][:, None].double(), tokens))
    rows = torch.stack(found)  # (n, S, B, tokens, r)
    variance = theta["s/A~G"].double() ** 4
    for member in range(2):
        exact = torch.einsum("rd,td,ud->rtu", variance[member], tokens, tokens)
        flat = rows[:, member].flatten(0, 1)
        n = len(flat)
        spread = exact.diagonal(dim1=1, dim2=2)
        error = ((spread[:, :, None] * spread[:, None] + exact**2) / n).sqrt()
        ours = torch.einsum("ntr,nur->rtu", flat, flat) / n
        # flipout's rows of a step share |E|: fourth moments do not average out as fast, by at most B
        slack = 2.0 if noise == "flipout" else 1.0
        assert (flat.mean(dim=0).T.abs() <= 5 * (spread / n).sqrt()).all()
        assert ((ours - exact).abs() <= 5 * slack * error).all()
        assert float((exact[:, 0, 1].abs() / error[:, 0, 1]).max()) > 20  # zero would be seen
    ours = torch.corrcoef(rows[:, :, 0, 0].flatten(1).T)  # two members, three rows of A
    off = ours - torch.eye(6).double()
    assert float(off.abs().max()) < 5 / len(rows) ** 0.5
    if noise != "step":
        between = (rows[:, 0, 0, 0] * rows[:, 0, 1, 0]).mean(dim=0) / rows[:, 0, 0, 0].square().mean(dim=0)
        assert float(between.abs().max()) < 5 * 3**0.5 / len(rows) ** 0.5


def test_flipout_is_one_draw_with_signs() -> None:
    """Rows differ by the signs of an outer product t r^T only."""
    theta = leaves(2) | {"h/bias": torch.zeros(2, 6), "h/bias~G": torch.ones(2, 6)}
    theta |= {"*/bank": torch.zeros(2, 3, 2, 4), "*/bank~G": torch.ones(2, 3, 2, 4)}
    out = drawn("flipout", theta, 7)
    for key in ("s/A", "h/bias", "*/bank"):
        noise = out[key] - theta[key][:, None]
        torch.testing.assert_close(noise.abs(), noise[:, :1].abs().expand_as(noise))
    ratio = (out["s/A"] - theta["s/A"][:, None]).sign()
    ratio = ratio * ratio[:, :1]
    assert torch.equal(ratio, ratio[..., :1] * ratio[..., :1, :] * ratio[..., :1, :1])
    assert {float(v) for v in ratio.unique()} == {-1.0, 1.0}
    bias = (out["h/bias"]).sign()
    assert len(bias[0].unique(dim=0)) > 1


def test_covariance_of_the_update_is_the_papers_kronecker_form() -> None:
    r"""vec(B A), columns below each other: [I_d x B] diag(vec Omega^2) [I_d x B^T]."""
    theta, method = leaves(rank=2, width=3, out=2), BLoB()
    state = method.init(theta, generator(1))
    n = 40_000
    theta_n = method.sample(state, n, generator(6))
    update = (theta_n["s/B"] @ theta_n["s/A"]).double()
    found = update.mT.flatten(1).numpy()
    eye_b = np.kron(np.eye(3), theta["s/B"][0].double().numpy())
    exact = eye_b @ np.diag(state.scale["s/A"][0].double().mT.flatten().numpy() ** 2) @ eye_b.T
    variances = np.diag(exact)
    error = np.sqrt((np.outer(variances, variances) + exact**2) / n)
    assert (np.abs(np.cov(found.T) - exact) <= 5 * error).all()
    mean = (theta["s/B"] @ theta["s/A"])[0].double().mT.flatten().numpy()
    assert (np.abs(found.mean(axis=0) - mean) <= 5 * np.sqrt(variances / n)).all()


def test_draws_are_of_their_member_and_the_rest_is_a_point() -> None:
    theta, method = leaves(3), BLoB()
    state = method.init(theta, generator(1))
    draws = method.sample(state, 9, generator(2))
    assert torch.equal(draws["s/B"], theta["s/B"][tree.spread(3, 9)])
    assert not tree.first_difference(method.mean(state), {k: theta[k] for k in ("s/A", "s/B")})
    none = replace(state, scale=tree.map_params(torch.zeros_like, state.scale))
    assert not tree.first_difference(method.sample(none, 3, generator(2)), method.mean(state))
    turned = BLoBState(dict(reversed(state.average.items())), dict(reversed(state.scale.items())))
    assert not tree.first_difference(draws, method.sample(turned, 9, generator(2)))


# ------------------------------------------------------------------------------------------ in a model


def start_of(model: Any, method: BLoB, seeds: list[int], far: bool = True) -> Params:
    theta = tiny_start(model, seeds)
    theta = dict(sorted((perturbed(theta) if far else theta).items()))
    return theta | method.extend(theta, Streams([generator(s, 8) for s in seeds]))


@pytest.mark.parametrize("noise", NOISES)
def test_an_update_of_zero_is_the_base_for_every_draw(noise: str) -> None:
    model, method = tiny_model(LoRA(r=2)), BLoB(noise=noise, epsilon=1.0)
    theta = start_of(model, method, [5], far=False)  # B is zero
    state = method.init(theta, generator(1))
    draws = method.sample(state, 4, generator(2))
    off = {k: torch.zeros_like(v) if k.endswith("/A") else v for k, v in method.mean(state).items()}
    assert torch.equal(scores(model, draws, ROWS), scores(model, off, ROWS).expand(4, -1, -1))


@pytest.mark.parametrize("noise", NOISES)
def test_nothing_is_drawn_while_the_adapter_is_off(noise: str) -> None:
    model, method = tiny_model(LoRA(r=2)), BLoB(noise=noise, epsilon=1.0)
    theta = start_of(model, method, [5])
    source = streams()
    state, before = method.init(theta, generator(1)), source.state()
    noisy = method.perturb(state, theta, len(ROWS), source, FIRST)
    assert not torch.equal(before, source.state())  # what is drawn is drawn here, once
    inputs, _ = ROWS.batch(torch.arange(len(ROWS)))
    after = source.state()
    with torch.no_grad(), installed(model, noisy):
        on = model(**inputs).logits
        with model.disable_adapter():
            off = model(**inputs).logits
    with torch.no_grad(), model.disable_adapter():
        base = model(**inputs).logits
    assert torch.equal(off, base)
    assert not torch.allclose(on, base, atol=1e-3)
    assert torch.equal(after, source.state())


@contextmanager
def recomputing(model: Any, on: bool) -> Iterator[None]:
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with evaluation(model), checkpointing(model):
        yield


def gradients(noise: str, accumulate: int, recompute: bool = False, over: str = "") -> Params:
    """Of one step of a stack of two, in float64."""
    model, method = tiny_model(LoRA(r=2, dropout=0.25)).double(), BLoB(noise=noise, epsilon=0.5, over=over)
    theta = start_of(model, method, [5, 6])
    theta = {k: v.detach().double().requires_grad_() for k, v in theta.items()}
    posterior = Ensemble(method, members=2)
    work = step.Step(
        model,
        ROWS,
        double_nll,
        posterior,
        Streams([generator(s, 1) for s in (5, 6)]),
        (5, 6),
        8,
        accumulate,
        step.Processes(torch.device("cpu")),
    )
    with recomputing(model, recompute):
        work.run(posterior.init(theta, generator(1)), theta, Progress(1, 8, 4, 27), "no")
    return {k: v.grad for k, v in theta.items() if v.grad is not None}


def double_nll(output: Any, labels: Tensor) -> Tensor:
    logs = output.logits.reshape(*labels.shape, -1).log_softmax(-1)
    return -logs.gather(-1, labels[..., None])[..., 0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("noise", NOISES)
def test_gradients_do_not_depend_on_micro_batches_or_recomputation(noise: str) -> None:
    whole = gradients(noise, 1)
    assert any(key.endswith("A~G") for key in whole)
    again = gradients(noise, 1)
    assert not tree.first_difference(whole, again)
    assert not tree.first_difference(whole, gradients(noise, 1, recompute=True))
    for accumulate in (3, 4):
        parts = gradients(noise, accumulate)
        for key, value in whole.items():
            torch.testing.assert_close(parts[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("noise", NOISES)
def test_gradients_are_those_of_the_reparametrised_loss(noise: str) -> None:
    """Autograd straight through a model that runs row by row, with the noise solved from the draws."""
    model, method = tiny_model(LoRA(r=2)).double(), BLoB(noise=noise, epsilon=0.5, kl=0.7, cost=0.0)
    theta = {k: v.double().requires_grad_() for k, v in start_of(model, method, [5]).items()}
    state, progress = method.init(theta, generator(1)), Progress(1, 8, 4, 27)
    work = step.Step(
        model, ROWS, double_nll, method, streams(), (5,), 8, 1, step.Processes(torch.device("cpu"))
    )
    with evaluation(model):
        _, used = work.run(state, theta, progress, "no")
    found = {k: v.grad for k, v in theta.items()}
    other = {k: v.detach().clone().requires_grad_() for k, v in theta.items()}
    order, loss = step.rows_of_step(5, 0, 27, 8), torch.zeros((), dtype=torch.float64)
    for index, row in enumerate(order):
        inputs, labels = ROWS.batch(row[None])
        one = {}
        for key, value in other.items():
            if key + "~G" in other:
                at = index if noise != "step" else 0
                noise_ = (used[key][at : at + 1] - theta[key]) / theta[key + "~G"].square()
                value = value + other[key + "~G"].square() * noise_.detach()
            if "~" not in key:
                one[key] = value
        with installed(model, one), evaluation(model):
            loss = loss + double_nll(model(**inputs), labels[None]).mean() / len(order)
    for key in other:
        if key.endswith("~G"):
            mean, scale = other[key[:-2]], other[key].square()
            prior = Normal(torch.zeros_like(mean), torch.full_like(scale, 0.2))  # in float64
            loss = loss + 0.7 / 27 * kl_divergence(Normal(mean, scale), prior).sum()
    loss.backward()
    for key, value in other.items():
        torch.testing.assert_close(found[key], value.grad, rtol=1e-7, atol=1e-10)


def trained(posterior: Any, seeds: tuple[int, ...] = (5,)) -> Any:
    model = tiny_model(LoRA(r=2))
    settings = train.Settings(lr=0.01, epochs=3, batch_size=8, seeds=seeds, optimiser=AdamW(clip=0.5))
    return train.fit(model, ROWS, nll, posterior, tiny_start(model, list(seeds)), settings)


@pytest.mark.parametrize("noise", NOISES)
def test_widths_of_nothing_are_lora(noise: str) -> None:
    """Omega near zero and no divergence: the trajectory of a point, up to rounding."""
    point, found = trained(Point()).state.theta, trained(BLoB(noise=noise, epsilon=1e-9, kl=0.0, speed=1e-9))
    for key, value in point.items():
        torch.testing.assert_close(found.state.average[key], value, rtol=1e-3, atol=2e-4)
    assert float(max(v.max() for v in found.state.scale.values())) < 1e-17


@pytest.mark.parametrize("over", ["*/B", "*classifier*", "*", "*/weight"])
@pytest.mark.parametrize("noise", NOISES)
def test_over_any_leaves(noise: str, over: str) -> None:
    found = trained(BLoB(noise=noise, over=over)).state
    chosen = tree.chosen(found.average, over)
    assert sorted(found.scale) == chosen
    draws = BLoB(over=over).sample(found, 2, generator(1))
    moved = sorted(k for k, v in draws.items() if not torch.equal(v[0], v[1]))
    assert moved == chosen


def test_members_train_as_they_would_alone() -> None:
    together = trained(Ensemble(BLoB(), members=2), (5, 9)).state
    for index, seed in enumerate((5, 9)):
        alone = trained(BLoB(), (seed,)).state
        for name, value in tree.flatten_state(alone).items():
            ours = tree.flatten_state(tree.state_member(together, index))[name]
            torch.testing.assert_close(ours, value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prior": 0.0},
        {"epsilon": -1.0},
        {"noise": "token"},
        {"kl": -0.1},
        {"cost": -1.0},
        {"kl": float("inf")},
        {"cycle": -1},
        {"speed": 0.0},
    ],
)
def test_settings_outside_their_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BLoB(**wrong)
