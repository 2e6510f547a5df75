"""VB-LoRA through the real loop and its file: what is frozen stays frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kilobayes import host, spec, train
from kilobayes.adapters.vblora import NEVER, VBLoRA
from kilobayes.host.compact import export_compact, load_compact
from kilobayes.posteriors import SWAG, Point
from kilobayes.random import generator
from kilobayes.testing import check_pair
from kilobayes.testing.tiny import TinyRows, nll, perturbed, scores, tiny_base, tiny_model, tiny_start
from kilobayes.types import Params

ADAPTER = VBLoRA(r=3, h=11, b=16, k=2)
SETTINGS = train.Settings(lr=2e-2, epochs=4, seeds=(0, 1), batch_size=8)


def choice(theta: Params) -> dict[str, Tensor]:
    found = {key: value for key, value in theta.items() if "logits" in key}
    return {key: value.topk(2).indices.sort(-1).values for key, value in found.items()}


def test_a_tail_over_frozen_indices_averages_and_draws_within_one_choice() -> None:
    model, rows = tiny_model(ADAPTER), TinyRows.make(48)
    start = tiny_start(model, [0, 1])
    first = train.fit(model, rows, nll, Point(), start, SETTINGS)
    assert any(not torch.equal(v, choice(start)[k]) for k, v in choice(first.state.theta).items())
    frozen = ADAPTER.freeze_indices(first.state.theta, host.sites(model))
    posterior = SWAG(rank=3, start=0.0)
    second = train.fit(model, rows, nll, posterior, frozen, SETTINGS)
    assert second.losses[-8:].mean() < first.losses[:8].mean()
    drawn = choice(posterior.sample(second.state, 4, generator(1)))
    for key, wanted in choice(frozen).items():
        average = second.state.average[key]
        assert torch.equal(choice({key: average})[key], wanted)
        assert torch.equal(drawn[key], wanted.repeat_interleave(2, dim=0))
        assert int((average == NEVER).sum()) == average.numel() - wanted.numel()


@pytest.mark.parametrize(("k", "h", "stack"), [(1, 90, 1), (2, 90, 3), (4, 300, 1)])
def test_a_compact_file_has_the_bytes_of_the_formula_and_the_same_scores(
    k: int, h: int, stack: int, tmp_path: Path
) -> None:
    adapter, rows = VBLoRA(r=2, h=h, k=k), TinyRows.make(12)
    model = tiny_model(adapter, stack=stack)
    host.write(model, perturbed(tiny_start(model, list(range(stack))), size=0.5))
    sizes = export_compact(model, tmp_path)
    assert sizes["adapter"] == stack * adapter.stored(host.sites(model))
    back = load_compact(tiny_base(), tmp_path)
    with torch.no_grad():
        assert torch.equal(scores(back, host.read(back), rows), scores(model, host.read(model), rows))


@pytest.mark.parametrize("posterior", ["Laplace(over='*/bank', structure='full')", "BLoB(over='*/bank')"])
def test_posteriors_on_the_bank_alone(posterior: str) -> None:
    check_pair(VBLoRA(h=16), spec.posterior(posterior))
