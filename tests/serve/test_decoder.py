"""Texts written side by side are those that each run writes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kilobayes.host import joined
from kilobayes.language import LanguageModel
from kilobayes.lm.prompts import encode
from kilobayes.lm.sampling import Sampling
from kilobayes.random import generator
from kilobayes.serve.decoder import Decoder, Writing
from kilobayes.serve.shelf import Shelf

PROMPTS = ["once there was a", "a dog", "the big red sun sat", "boy and girl ran"]


def request(number: int) -> tuple[str, str, Sampling]:
    temperature = 0.0 if number % 3 == 0 else 1.3
    settings = Sampling(max_new_tokens=3 + number % 7, temperature=temperature, alternatives=number % 3)
    return ("one", "two")[number % 2], PROMPTS[number % 4], settings


def test_sequences_of_two_runs_that_come_and_go_are_written_as_alone(shelf: Shelf, folder: Path) -> None:
    alone = {name: LanguageModel.load(folder / name, device="cpu") for name in ("one", "two")}
    decoder = shelf.speakers["one"][0]
    assert shelf.speakers["two"][0] is decoder
    told: list[list[Any]] = [[] for _ in range(12)]
    most = 0
    for number, steps in enumerate(told):
        name, prompt, settings = request(number)
        ids = encode(alone[name].tokenizer, prompt)[1]
        gen = generator(number, 9, 0, 0)
        decoder.put(shelf.speakers[name][1], Writing(ids, settings, gen, steps.append))
        decoder.step()
        most = max(most, len({s.run for s in decoder.active}) * len(decoder.active))
    assert most > 4  # three or more at a time, of both runs
    while decoder.busy:
        decoder.step()
    texts = set()
    for number, steps in enumerate(told):
        name, prompt, settings = request(number)
        wanted = alone[name].generate(prompt, settings, seed=number)[0].completions[0].generated
        assert [step.tokens[0] for step in steps] == wanted.tokens
        assert steps[-1].finish == [wanted.finish]
        assert [step.top[0] for step in steps] == [[t for t, _ in each] for each in wanted.alternatives]
        for mine, theirs in (("log_probs", wanted.log_probs), ("entropy", wanted.entropy)):
            assert [getattr(step, mine)[0] for step in steps] == pytest.approx(theirs, abs=1e-5)
        assert [step.information[0] for step in steps] == pytest.approx(wanted.information, abs=1e-5)
        texts.add(tuple(wanted.tokens))
    assert len(texts) > 6


def test_one_that_nobody_waits_for_makes_room(shelf: Shelf) -> None:
    decoder = shelf.speakers["one"][0]
    kept: list[Any] = []
    left = Writing([3, 4], Sampling(max_new_tokens=50), generator(0), lambda step: None)
    stays = Writing([4, 3, 5], Sampling(max_new_tokens=4), generator(0), kept.append)
    decoder.put(0, left)
    decoder.put(1, stays)
    decoder.step()
    assert decoder.active == [left, stays]
    left.ended = True
    while decoder.busy:
        decoder.step()
    assert left.written <= 2
    assert kept[-1].finish[0]
    assert decoder.cache is None


def test_an_error_of_the_model_is_told_and_the_next_text_is_written(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = shelf.speakers["one"][0]
    told: list[Any] = []

    def broken(self: Any, *args: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_forward", broken)
        decoder.put(0, Writing([3], Sampling(max_new_tokens=2), generator(0), told.append))
        decoder.step()
    assert isinstance(told[0], RuntimeError)
    assert not decoder.busy
    decoder.put(0, Writing([3], Sampling(max_new_tokens=2), generator(0), told.append))
    while decoder.busy:
        decoder.step()
    assert told[-1].finish[0]


def test_masks_are_joined_at_their_ends_and_common_padding_goes() -> None:
    one, other = torch.tensor([[0, 1, 1]]), torch.tensor([[1]])
    mask = joined.join_masks(one, other)
    assert mask.tolist() == [[0, 1, 1], [0, 0, 1]]

    class Layer:
        keys = values = torch.arange(6.0).reshape(2, 1, 3, 1)

    cache: Any = type("Cache", (), {"layers": [Layer()]})()
    kept = joined.keep(cache, mask, torch.tensor([1]))
    assert kept.tolist() == [[0, 0, 1]]  # a layer of another kind keeps its places
    assert cache.layers[0].keys.flatten().tolist() == [3.0, 4.0, 5.0]
