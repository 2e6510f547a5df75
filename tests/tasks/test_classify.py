"""Tokens, padding, truncation and likelihoods, with two real tokenizers."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kilobayes.errors import KilobayesError
from kilobayes.models import load_base, resolve
from kilobayes.tasks.classify import Classify
from kilobayes.tasks.data import Examples

PAIRS = Examples(["A cat sat on the mat.", "Yes."], ["A dog.", "No, it was not there."], [1, 0], ["n", "y"])


@pytest.fixture(scope="module")
def bert() -> Any:
    try:
        folder = resolve("minilm")
    except KilobayesError as error:
        pytest.skip(str(error))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama() -> Any:
    folder = Path(os.environ.get("KILOBAYES_MODELS", "")) / "stories260K"
    if not (folder / "config.json").is_file():
        pytest.skip("KILOBAYES_MODELS does not point to stories260K")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    return tokenizer


def test_pairs_are_encoded_without_padding_and_collated_to_the_longest(bert: Any) -> None:
    task = Classify(bert, ["n", "y"], 64)
    encoded = task.encode(PAIRS)
    # [CLS] a cat sat on the mat . [SEP] a dog . [SEP]
    tokens = bert.convert_ids_to_tokens(encoded.ids[0])
    assert tokens == ["[CLS]", "a", "cat", "sat", "on", "the", "mat", ".", "[SEP]", "a", "dog", ".", "[SEP]"]
    assert encoded.type_ids is not None
    assert encoded.type_ids[0] == [0] * 9 + [1] * 4
    assert (len(encoded), encoded.truncated) == (2, 0)
    batch = task.collate(encoded, [1, 0])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(value.shape == (2, 13) and value.dtype == torch.int64 for value in batch.values())
    short = len(encoded.ids[1])
    assert batch["attention_mask"].sum(1).tolist() == [short, 13]
    assert batch["input_ids"][0, short:].tolist() == [bert.pad_token_id] * (13 - short)
    assert batch["input_ids"][1].tolist() == encoded.ids[0]
    assert batch["token_type_ids"][0].sum() == sum(encoded.type_ids[1])
    assert task.collate(encoded, torch.tensor([1]))["input_ids"].shape == (1, short)
    assert task.labels(encoded, [1, 0, 1]).tolist() == [0, 1, 0]


def test_truncation_is_counted_and_leaves_short_rows_alone(bert: Any) -> None:
    words = "one two three four five six seven eight nine ten"
    examples = Examples([words, "one two", words], ["ten nine", "x", words], None, [])
    task = Classify(bert, ["n", "y"], 10)
    encoded = task.encode(examples)
    assert encoded.truncated == 2
    assert [len(ids) for ids in encoded.ids] == [10, 6, 10]
    assert encoded.ids[1] == bert("one two", "x")["input_ids"]
    assert encoded.ids[0] == bert(words, "ten nine", truncation=True, max_length=10)["input_ids"]
    assert bert.convert_ids_to_tokens(encoded.ids[0])[-3:] == ["ten", "nine", "[SEP]"]
    assert encoded.type_ids is not None
    assert [len(ids) for ids in encoded.type_ids] == [10, 6, 10]
    with pytest.raises(KilobayesError, match="no labels"):
        task.labels(encoded, [0])
    assert len(task.encode(Examples([], None, None, []))) == 0


def test_padding_side_and_missing_pad_token(bert: Any, llama: Any) -> None:
    left = copy.deepcopy(bert)
    left.padding_side = "left"
    task = Classify(left, ["n", "y"], 64)
    encoded = task.encode(PAIRS)
    batch = task.collate(encoded, [0, 1])
    assert batch["input_ids"][1].tolist() == [0] * (13 - len(encoded.ids[1])) + encoded.ids[1]
    assert batch["attention_mask"][1].tolist() == [0] * (13 - len(encoded.ids[1])) + [1] * len(encoded.ids[1])

    task = Classify(llama, ["n", "y"], 64)
    assert task.pad_id == llama.eos_token_id
    batch = task.collate(task.encode(Examples(["Once upon a time", "A"], None, None, [])), [0, 1])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][1, -1] == llama.eos_token_id
    assert batch["attention_mask"][1, -1] == 0


def test_nll_against_arithmetic() -> None:
    task = Classify.__new__(Classify)  # nll needs no tokenizer
    logits = (
        torch.log(torch.tensor([[[0.2, 0.8], [0.5, 0.5]], [[0.9, 0.1], [0.25, 0.75]]], dtype=torch.float64))
        + 3.0
    )
    expected = -torch.log(torch.tensor([[0.8, 0.5], [0.1, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(task.nll(logits, torch.tensor([1, 0])), expected)
    each = -torch.log(torch.tensor([[0.8, 0.5], [0.9, 0.75]], dtype=torch.float64))
    torch.testing.assert_close(task.nll(logits, torch.tensor([[1, 0], [0, 1]])), each)
    assert task.nll(logits.bfloat16(), torch.tensor([1, 0])).dtype == torch.float32
    far = task.nll(torch.tensor([[[1000.0, 0.0]]]), torch.tensor([1]))
    assert far.item() == 1000.0
    assert task.readout(SimpleNamespace(logits=torch.ones(1, 2, dtype=torch.float16))).dtype == torch.float32


def test_batches_of_a_real_model_equal_single_rows(bert: Any) -> None:
    base = load_base("minilm", ["n", "y"])
    task = Classify(base.tokenizer, ["n", "y"], 32)
    encoded = task.encode(PAIRS)
    with torch.no_grad():
        together = task.readout(base.model(**task.collate(encoded, [0, 1])))
        alone = [task.readout(base.model(**task.collate(encoded, [i]))) for i in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_a_task(bert: Any) -> None:
    with pytest.raises(KilobayesError, match="at least two classes"):
        Classify(bert, ["only"], 64)
    for length in (513, 4):
        with pytest.raises(KilobayesError, match="possible are 5 to 512"):
            Classify(bert, ["n", "y"], length)
    with pytest.raises(KilobayesError, match="read with other classes"):
        Classify(bert, ["y", "n"], 64).encode(PAIRS)


def test_some_of_the_encoded_rows(bert: Any) -> None:
    task = Classify(bert, ("a", "b"), max_length=16)
    found = task.encode(Examples(["one", "two words", "three"], None, [0, 1, 0], ("a", "b")))
    some = found.take(torch.tensor([2, 0]))
    assert some.ids == [found.ids[2], found.ids[0]]
    assert some.labels is not None
    assert some.labels.tolist() == [0, 0]
    assert len(some) == 2
