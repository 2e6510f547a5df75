"""Every adapter and every posterior on a decoder that chooses, with rows that lack options."""

from __future__ import annotations

import pytest

from kilobayes.catalog import ADAPTERS, POSTERIORS, catalog
from kilobayes.options import Options
from kilobayes.tasks.questions import load_questions
from kilobayes.workflows.finetune import fit_examples
from tests.small_choice import base, questions


@pytest.mark.parametrize("scoring", ["letters", "text"])
@pytest.mark.parametrize("name", catalog(POSTERIORS))
def test_posteriors(name: str, scoring: str) -> None:
    check(Options(posterior=name, adapter="LoRA(r=2)", model=base(), **SHORT), scoring)


@pytest.mark.parametrize("name", catalog(ADAPTERS))
def test_adapters(name: str) -> None:
    check(Options(posterior="Temperature(SWAG(start=0.0))", adapter=name, model=base(), **SHORT), "letters")


SHORT: dict = {"task": "choice", "epochs": 1, "batch_size": 4, "max_length": 40, "lr": 0.003, "samples": 3}


def check(options: Options, scoring: str) -> None:
    rows = load_questions(questions(14, 4), answers="text" if scoring == "text" else None)
    train, held = rows.take(range(8)), rows.take(range(8, 14))
    found = fit_examples(options, train, held).predict(held)
    assert found.logits.isfinite().all()
    for probs, own in zip(found.probs, held.options):
        assert probs[: len(own)].sum().item() == pytest.approx(1.0)
        assert not probs[len(own) :].any()
    assert bool((found.mutual_info >= 0.0).all())
