"""Scores of a few tokens after the last one equal the same entries of all logits."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import get_peft_model

from kilobayes import host
from kilobayes.errors import KilobayesError
from kilobayes.host.answers import answers
from tests.host.tiny import make

TOKENS = [7, 3, 40]
LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 40,
}  # fmt: skip


def llama() -> tf.LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).eval()


def hosted(stack: int = 1):
    config = host.KilobayesConfig(adapter="LoRA(r=2)", stack=stack, init_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(llama(), config).eval()


def padded(side: str) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 64, (3, 6), generator=gen)
    mask = torch.ones_like(ids)
    for row, length in enumerate((6, 3, 5)):
        if side == "left":
            mask[row, : 6 - length] = 0
        else:
            mask[row, length:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stack", [1, 3])
def test_they_are_entries_of_all_logits(side, stack):
    model, inputs = hosted(stack), padded(side)
    with host.outer(model, stack):
        whole = model(**inputs).logits
        last = torch.tensor([5, 5, 5] if side == "left" else [5, 2, 4]).repeat(stack)
        with answers(model, TOKENS):
            found = model(**inputs).logits
        again = model(**inputs).logits
    assert found.shape == (3 * stack, 3)
    expected = whole[torch.arange(3 * stack), last][:, TOKENS]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(again, whole)  # and the head is back
    assert not any("answers" in name for name, _ in model.named_modules())


def test_with_real_tokens_only():
    model, inputs = hosted(), padded("right")
    with answers(model, TOKENS):
        expected = model(**inputs).logits
        with host.real_tokens(model):
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_adapter():
    model, inputs = hosted(), padded("left")
    with answers(model, TOKENS):
        model(**inputs).logits.square().sum().backward()
    assert all(v.grad is not None and bool(v.grad.any()) for v in host.read(model).values())


def test_a_classifier_has_no_output_matrix():
    with (
        pytest.raises(KilobayesError, match="BertForSequenceClassification has none"),
        answers(make("bert"), [1]),
    ):
        pass


def test_entered_twice():
    model, inputs = hosted(), padded("right") | {"counts": torch.tensor([3, 2, 3])}
    with answers(model, TOKENS):
        expected = model(**inputs).logits
        with answers(model, TOKENS):
            assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)
        with pytest.raises(KilobayesError, match="has a AnswerHead"), answers(model, [1, 2]):
            pass
    assert expected[1].detach().softmax(-1)[2] == 0.0
    assert bool((expected[0] > -100).all())
