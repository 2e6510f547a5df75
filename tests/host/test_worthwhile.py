"""Whether to pack: by timing, or by the environment."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from kilobayes.errors import KilobayesError
from kilobayes.host import kernels, packing
from kilobayes.host.packing import packed, packed_weights, worthwhile

pytestmark = pytest.mark.skipif(not kernels.available(), reason="this torch has no packed products")


def test_the_environment_forces_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_time_ratio", lambda: 0.79)
    for value, wanted in (("0", False), ("1", True), ("", True)):
        monkeypatch.setenv("KILOBAYES_PACK", value)
        assert worthwhile() is wanted
    monkeypatch.setattr(packing, "_time_ratio", lambda: 0.81)
    layer = nn.Linear(4, 4).requires_grad_(False)
    with packed(layer):
        assert not worthwhile()
        assert packed_weights(layer) is None
    assert not worthwhile(torch.float16)
    monkeypatch.setenv("KILOBAYES_PACK", "yes")
    with pytest.raises(KilobayesError, match="KILOBAYES_PACK must be 0 or 1"):
        worthwhile()


def test_deciding_takes_little_time_and_no_random_numbers() -> None:
    before, start = torch.random.get_rng_state(), time.process_time()
    ratio = packing._time_ratio.__wrapped__()
    assert time.process_time() - start < 2.0
    assert 0.05 < ratio < 20.0
    assert torch.equal(torch.random.get_rng_state(), before)
