"""A party of several users against parties of one; language models and moments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kilobayes import tree
from kilobayes.collaboration.party import Party, gather
from kilobayes.collaboration.settings import Together
from kilobayes.errors import KilobayesError
from kilobayes.options import Options
from kilobayes.random import generator
from kilobayes.tasks.text import Documents
from tests import small, small_lm

USERS = {name: small.rows(30 + 12 * at, at) for at, name in enumerate("abc")}


def options(**more: Any) -> Options:
    plain = {"model": small.base(), "adapter": "LoRA(r=2, dropout=0.2)", "posterior": "Point()", "lr": 0.01}
    return Options(**plain | {"batch_size": 8, "max_length": 24} | more)


def party(folder: Path, people: Any = USERS, together: dict[str, Any] | None = None, **more: Any) -> Party:
    settings = Together(**{"steps": 6, "warmup_steps": 3, "every": 3} | (together or {}))
    return gather(options(**more), settings, people, folder, ["warm", "cold", "fresh"])


def words(count: int, seed: int) -> Documents:
    gen = generator(seed)
    pick = small_lm.WORDS[: 20 * (seed + 1)]
    rows = [[pick[int(i)] for i in torch.randint(len(pick), (9,), generator=gen)] for _ in range(count)]
    return Documents("text", [" ".join(row) for row in rows])


WRITERS = {name: words(14 + 5 * at, at) for at, name in enumerate("xy")}
WRITING = {"task": "lm", "model": str(small_lm.base()), "target_modules": "q_proj,v_proj",
           "max_length": 8, "adapter": "LoRA(r=2)"}  # fmt: skip


def same(one: Any, other: Any, place: int) -> None:
    for key, value in other.items():
        torch.testing.assert_close(one[key][place : place + 1], value, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("task", ["classify", "lm"])
def test_users_in_a_stack_are_users_alone(tmp_path: Path, task: str) -> None:
    """Also after leaves were replaced in the middle."""
    people, more = (WRITERS, WRITING) if task == "lm" else (USERS, {})
    reference = small.write(tmp_path / "ref.jsonl", [{"text": "red w1 w2"}, {"text": "blue w3"}])
    if task == "lm":
        small.write(reference, [{"text": r} for r in words(3, 5).rows])
    shared = {"reference": str(reference)}
    together = party(tmp_path / "all", people, shared, **more)
    first = together.train(3)
    other = tree.map_params(lambda t: t.flip(0) + 0.01, first)
    predictions, losses = together.predictions(), together.losses(first)
    together.adopt(other)
    assert (together.step, together.adopted) == (3, 3)
    last = together.train(6)
    figures = together.test()
    assert losses.shape == (len(people),) * 2
    for place, name in enumerate(people):
        alone = party(tmp_path / name, {name: people[name]}, shared, **more)
        same(first, alone.train(3), place)
        torch.testing.assert_close(
            predictions[place].float(), alone.predictions()[0].float(), rtol=5e-3, atol=5e-3
        )
        torch.testing.assert_close(losses[place], alone.losses(first)[0], rtol=1e-3, atol=1e-3)
        alone.adopt(tree.member(other, place))
        same(last, alone.train(6), place)
        assert alone.rows == [together.rows[place]]
        assert alone.test()[0]["nll"] == pytest.approx(figures[place]["nll"], abs=2e-3)
    assert len(set(together.rows)) == len(people)


def test_losses_and_figures_of_a_language_model_are_nats_per_token(tmp_path: Path) -> None:
    """By the model's own scores, one text at a time."""
    made = party(tmp_path, WRITERS, **WRITING)
    theta = made.train(3)
    from kilobayes.testing.tiny import installed

    rows = made.held[1]["trust"]
    for v in range(2):
        total = count = 0.0
        with installed(made.model, tree.member(theta, v)), torch.no_grad():
            for ids, labels in zip(rows.ids, rows.labels):
                logs = made.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
                total -= float(logs[torch.arange(len(labels)), torch.tensor(labels)].sum())
                count += len(labels)
        assert float(made.losses(theta)[1, v]) == pytest.approx(total / count, abs=1e-4)
    figures = made.test("trust")[1]
    assert figures["nll"] == pytest.approx(total / count, abs=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)


def test_a_round_of_nothing_is_no_round(tmp_path: Path) -> None:
    """Leaves replaced by themselves: bit for bit the uninterrupted training; a new process goes on, too."""
    people = {"a": USERS["a"], "b": USERS["b"]}
    whole = party(tmp_path / "one", people).train(6)
    parts = party(tmp_path / "two", people)
    parts.adopt(parts.train(3))
    again = party(tmp_path / "two", people)
    assert (again.step, again.adopted) == (3, 3)
    assert not tree.first_difference(again.train(6), whole)
    with pytest.raises(KilobayesError, match="another run"):
        party(tmp_path / "two", people, lr=0.02)


def test_moments_are_shared_and_go_on(tmp_path: Path) -> None:
    people = {"a": USERS["a"], "b": USERS["b"]}
    more = {"adapter": "LoRAXS(r=3)", "posterior": "Temperature(SWAG(rank=0, start=0.2))"}
    made = party(tmp_path, people, {"share": "moments", "draws": 4}, **more)
    before = made.update()
    assert {k.rpartition("~")[2] for k in before if "~" in k} == {"mean", "variance"}
    sent = made.train(3)
    key = next(k for k in sent if k.endswith("~variance") and float(sent[k].max()) > 0)
    assert made.losses(sent).shape == (2, 2)
    made.adopt(tree.map_params(lambda t: t.mean(dim=0, keepdim=True).repeat(2, *[1] * (t.dim() - 1)), sent))
    back = made.update()
    torch.testing.assert_close(back[key][0], sent[key].mean(dim=0), rtol=1e-4, atol=1e-12)
    made.train(6)
    states = made.finish()
    assert float(states[0].inner.count) > 2
    assert float(states[0].temperature) != 1.0
    made.save([tmp_path / "users" / n for n in people])
    from kilobayes.workflows.finetune import load

    fitted = load(tmp_path / "users" / "b")
    probs = fitted.predict(made.held[1]["test"]).probs.numpy()
    labels = made.held[1]["test"].labels.numpy()
    nll = -np.log(probs[np.arange(len(labels)), labels]).mean()
    assert nll == pytest.approx(made.test()[1]["nll"], abs=1e-4)


def test_what_users_cannot_have(tmp_path: Path) -> None:
    for posterior, share, words in (
        ("BLoB()", "mean", "cannot be trained under"),
        ("Point(prior_precision=1.0)", "mean", "cannot be trained under"),
        ("Ensemble(SWAG())", "mean", "cannot be trained under"),
        ("SWAG(rank=10)", "moments", "means and variances"),
    ):
        with pytest.raises(KilobayesError, match=words):
            party(tmp_path, USERS, {"share": share}, posterior=posterior)
    with pytest.raises(KilobayesError, match="no rows to measure trust on"):
        party(tmp_path, dict.fromkeys("ab", str(small.data(tmp_path / "d"))), None, calibration="0")
