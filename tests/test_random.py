from __future__ import annotations

import itertools

import torch

from kilobayes.random import Streams, generator


def test_seeds_give_different_streams_and_repeat() -> None:
    seeds = [
        *itertools.product(range(12), range(6)),
        *((s,) for s in range(40)),
        (0, 0, 0),
        (-1,),
        (2**40,),
        (2**40, 1),
    ]
    first = {tuple(torch.randint(2**62, (2,), generator=generator(*seed)).tolist()) for seed in seeds}
    assert len(first) == len(seeds)
    assert torch.equal(torch.randn(3, generator=generator(4, 2)), torch.randn(3, generator=generator(4, 2)))


def test_a_member_draws_alone_what_it_draws_in_company() -> None:
    like = torch.empty(3, 2, 5)
    together = Streams([generator(s) for s in (4, 9, 2)])
    alone = Streams([generator(9)])
    for draw in ("normal", "keep", "normal"):
        arguments = (0.3,) if draw == "keep" else ()
        a, b = getattr(together, draw)(like, *arguments), getattr(alone, draw)(like[:1], *arguments)
        assert a.shape == like.shape
        assert torch.equal(a[1], b[0])
        assert not torch.equal(a[0], a[1])


def test_dtype_is_kept() -> None:
    streams = Streams([generator(1)])
    assert streams.normal(torch.empty(1, 2, dtype=torch.float64)).dtype == torch.float64
    assert streams.keep(torch.empty(1, 2, dtype=torch.bfloat16), 0.5).dtype == torch.bfloat16


def test_frequencies_are_right() -> None:
    count, p = 40_000, 0.3
    streams = Streams([generator(5), generator(6)])
    kept = streams.keep(torch.empty(2, count), p).mean(dim=1)
    assert ((kept - p).abs() < 5 * (p * (1 - p) / count) ** 0.5).all()
    noise = streams.normal(torch.empty(2, count))
    assert (noise.mean(dim=1).abs() < 5 / count**0.5).all()
    assert ((noise.var(dim=1) - 1).abs() < 5 * (2 / count) ** 0.5).all()


def test_state_and_restore() -> None:
    streams, like = Streams([generator(1), generator(2)]), torch.empty(2, 7)
    streams.normal(like)
    state = streams.state()
    first = streams.normal(like)
    other = Streams([generator(8), generator(9)])
    other.restore(state)
    assert torch.equal(other.normal(like), first)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    Streams([generator(1)]).normal(torch.empty(1, 3))
    assert torch.equal(before, torch.random.get_rng_state())
