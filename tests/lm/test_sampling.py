"""What tokens are drawn from equals transformers' own warpers; ranges are checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kilobayes.errors import KilobayesError
from kilobayes.lm.sampling import Sampling, pick, shaped


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_it_is_what_transformers_warpers_keep(temperature: float, top_k: int, top_p: float) -> None:
    scores = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)) * 2
    warped = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    warped = TopPLogitsWarper(top_p)(None, warped)
    found = shaped(scores.softmax(-1), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(found, warped.softmax(-1), rtol=1e-4, atol=1e-7)


def test_a_uniform_number_falls_on_a_token_as_in_numpy() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    numbers = np.linspace(0, 1, 41)[:-1]
    found = pick(probs.expand(40, -1), Sampling(temperature=1.0), torch.tensor(numbers))
    assert found.tolist() == np.select([numbers < 0.25, numbers < 0.75], [1, 3], 4).tolist()
    last = pick(probs, Sampling(temperature=1.0), torch.tensor([np.nextafter(1, 0)]))
    assert last.item() == 4  # never a token of probability zero
    assert pick(probs, Sampling(), torch.zeros(1)).item() == 3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": -0.1}, "--temperature must be at least 0; found -0.1"),
        ({"temperature": float("nan")}, "--temperature must be at least 0"),
        ({"top_p": 0.0}, "--top-p must be above 0 and at most 1; found 0.0"),
        ({"top_p": 1.5}, "--top-p must be above 0"),
        ({"top_k": -1}, "--top-k must be at least 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"stop_entropy": -1.0}, "--stop-entropy must be at least 0"),
        ({"stop_information": float("inf")}, "--stop-information must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(KilobayesError, match=words):
        Sampling(**wrong)
