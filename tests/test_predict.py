"""Prediction: one forward for many samples against a plain loop over samples and rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kilobayes import host, tree
from kilobayes.adapters import LoRA
from kilobayes.energy import ModelEnergy, predict
from kilobayes.posteriors import SWAG, Ensemble, Point, Temperature, ask
from kilobayes.predict import Predictive, Rows, class_nll, logits
from kilobayes.random import generator
from kilobayes.tasks.classify import Classify, Encoded
from kilobayes.testing.tiny import CLASSES, TinyRows, installed, perturbed, tiny_model, tiny_start
from kilobayes.types import Params


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **{f"w{i}": i for i in range(4, 90)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=32, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Classify:
    return Classify(tokenizer(), [f"c{i}" for i in range(CLASSES)], max_length=30)


ROWS = TinyRows.make(21, seed=8)
ENCODED = Encoded(ROWS.ids, None, ROWS.labels, 0)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model(LoRA(r=2))


@pytest.fixture(scope="module")
def theta(model: torch.nn.Module) -> Params:
    return perturbed(tiny_start(model, [1, 2, 3, 4, 5]), size=0.2)


@torch.no_grad()
def serial(model: torch.nn.Module, theta: Params) -> Tensor:
    """``(S, N, C)``, one member and one row, without padding, at a time."""
    out = []
    for index in range(tree.size(theta)):
        with installed(model, tree.member(theta, index)):
            out.append(
                torch.cat([model(**ROWS.batch(torch.tensor([row]))[0]).logits for row in range(len(ROWS))])
            )
    return torch.stack(out)


def test_equals_the_serial_loop(model: torch.nn.Module, theta: Params, task: Classify) -> None:
    found, expected = logits(model, theta, task, ENCODED), serial(model, theta)
    assert found.shape == (5, 21, CLASSES)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((found[0] - found[1]).abs().max()) > 0.1


@pytest.mark.parametrize("batch_size", [1, 4, 21, 50])
@pytest.mark.parametrize("tokens", [1, 150, 1 << 20])
@pytest.mark.parametrize("pack", [False, True])
def test_batches_and_chunks_change_rounding_alone(
    model: torch.nn.Module, theta: Params, task: Classify, batch_size: int, tokens: int, pack: bool
) -> None:
    whole = logits(model, theta, task, ENCODED)
    found = logits(model, theta, task, ENCODED, batch_size=batch_size, tokens_in_flight=tokens, pack=pack)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=2e-5)


def test_packed_weights_change_rounding_alone(
    monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, theta: Params, task: Classify
) -> None:
    monkeypatch.setenv("KILOBAYES_PACK", "0")
    plain = logits(model, theta, task, ENCODED)
    monkeypatch.setenv("KILOBAYES_PACK", "1")
    torch.testing.assert_close(logits(model, theta, task, ENCODED), plain, rtol=1e-5, atol=2e-5)


def test_rows_keep_their_order(model: torch.nn.Module, theta: Params, task: Classify) -> None:
    turned = Encoded(ROWS.ids[::-1], None, ROWS.labels.flip(0), 0)
    found, whole = (
        logits(model, theta, task, turned, batch_size=4),
        logits(model, theta, task, ENCODED, batch_size=4),
    )
    torch.testing.assert_close(found.flip(1), whole, rtol=1e-5, atol=2e-5)


def test_no_rows(model: torch.nn.Module, theta: Params, task: Classify) -> None:
    assert logits(model, theta, task, Encoded([], None, None, 0)).shape == (5, 0, CLASSES)


def test_the_model_is_left_as_it_was(theta: Params, task: Classify) -> None:
    model = tiny_model(LoRA(r=2))
    model.base_model.model.bert.embeddings.train()
    modes = [m.training for m in model.modules()]
    logits(model, theta, task, ENCODED)
    assert [m.training for m in model.modules()] == modes
    assert all(layer.installed is None for layer in host.layers(model).values())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_scores_may_be_differentiated_through_afterwards(
    model: torch.nn.Module, theta: Params, task: Classify
) -> None:
    divisor = torch.tensor(2.0, requires_grad=True)
    (logits(model, theta, task, ENCODED) / divisor).sum().backward()
    assert divisor.grad is not None


def reference(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    entropy = -(mean * np.log(mean)).sum(-1)
    return mean, entropy, entropy + (p * np.log(p)).sum(-1).mean(0)


def test_predictive_equals_numpy() -> None:
    scores = 3 * torch.randn(6, 40, 4, generator=generator(2))
    found, (probs, entropy, information) = Predictive(scores), reference(scores.double().numpy())
    np.testing.assert_allclose(found.probs.numpy(), probs, rtol=1e-12)
    np.testing.assert_allclose(found.entropy.numpy(), entropy, rtol=1e-12)
    np.testing.assert_allclose(found.mutual_info.numpy(), information, rtol=1e-9, atol=1e-14)
    assert float(found.mutual_info.min()) > 0
    assert (found.mutual_info <= found.entropy).all()


def test_predictive_at_the_edges() -> None:
    one = Predictive(5 * torch.randn(1, 30, 3, generator=generator(1)))
    assert (one.mutual_info == 0).all()
    same = Predictive(one.logits.repeat(7, 1, 1))
    assert (same.mutual_info >= 0).all()
    assert float(same.mutual_info.max()) < 1e-14
    sure = Predictive(torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]]))
    assert sure.probs.tolist() == [[0.5, 0.5]]
    assert float(sure.entropy) == pytest.approx(np.log(2))
    assert float(sure.mutual_info) == pytest.approx(np.log(2))


def test_the_posterior_predictive(model: torch.nn.Module, task: Classify) -> None:
    method = Ensemble(Temperature(Point()), members=2)
    start = perturbed(tiny_start(model, [1, 2]), size=0.2)
    state = method.init(start, generator(1))
    true = serial(model, start).mean(dim=0).softmax(-1)  # labels that both members know something of
    labelled = Encoded(ROWS.ids, None, torch.multinomial(true, 1, generator=generator(2))[:, 0], 0)
    state = method.fit(state, ModelEnergy(model, task, labelled), generator(1))
    assert state.temperature.unique().numel() == 2
    found = predict(ModelEnergy(model, task, ENCODED), method, state, samples=10, gen=generator(3))
    expected = serial(model, method.mean(state)) / state.temperature[:, None, None]
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=2e-5)
    assert found.logits.dtype == torch.float32


def test_a_seed_gives_the_same_prediction(model: torch.nn.Module, task: Classify) -> None:
    from kilobayes.testing.posteriors import observed

    method = SWAG(rank=2, start=0.0, snapshots=9)
    start = tiny_start(model, [1])
    state = observed(method, [start, *(perturbed(start, seed) for seed in range(5))])
    a, b, c = (
        predict(ModelEnergy(model, task, ENCODED), method, state, samples=4, gen=generator(s)).logits
        for s in (3, 3, 4)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    theta = method.sample(state, ask.count(method, state, 4), generator(3))
    torch.testing.assert_close(a, ask.transform(method, state, serial(model, theta)), rtol=1e-5, atol=2e-5)


def test_rows_and_losses_as_the_loop_asks_for_them(
    model: torch.nn.Module, theta: Params, task: Classify
) -> None:
    rows, chosen = Rows(task, ENCODED), torch.tensor([4, 0, 9, 9])
    inputs, labels = rows.batch(chosen)
    assert len(rows) == 21
    assert labels.tolist() == ROWS.labels[chosen].tolist()
    assert torch.equal(inputs["input_ids"], ROWS.batch(chosen)[0]["input_ids"])
    pair = tree.member(theta, slice(0, 2))
    with torch.no_grad(), installed(model, pair):
        output = model(**{k: v[[0, 1, 2, 3]] for k, v in inputs.items()})  # two rows to each of two members
    found = class_nll(task)(output, labels.reshape(2, 2))
    expected = -serial(model, pair).log_softmax(-1)
    picked = [expected[m, r, ROWS.labels[r]] for m, r in ((0, 4), (0, 0), (1, 9), (1, 9))]
    torch.testing.assert_close(found, torch.stack(picked).reshape(2, 2), rtol=1e-4, atol=1e-5)


def test_some_rows_of_an_energy(model: torch.nn.Module, task: Classify) -> None:
    count = len(ROWS.ids)
    labelled = Encoded(ROWS.ids, None, torch.arange(count) % 3, 0)
    whole = ModelEnergy(model, task, labelled)
    theta = tiny_start(model, [1])
    part = whole.part(count // 2)
    which = torch.arange(count // 2) * count // (count // 2)
    assert torch.equal(part.labels, whole.labels[which])
    torch.testing.assert_close(part.logits(theta), whole.logits(theta)[:, which], rtol=1e-5, atol=2e-5)
    assert whole.part(count + 1) is whole
    assert part.train.encoded is labelled  # of which it is a part
    assert ModelEnergy(model, task, labelled, trained=ENCODED).part(2).train.encoded is ENCODED
