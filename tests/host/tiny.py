"""Tiny random transformers models, one per architecture, made without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from peft import get_peft_model
from torch import Tensor, nn

from kilobayes import host
from kilobayes.adapters import LoRA
from kilobayes.host import KilobayesConfig

SMALL: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "num_labels": 3}
ENCODER = SMALL | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
DECODER = ENCODER | {"num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
T5 = SMALL | {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
GPT2 = SMALL | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 40,
    "use_cache": False,
}
GEMMA = DECODER | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
OPT = SMALL | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "ffn_dim": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 16,
    "use_cache": False,
}

BUILD: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**ENCODER)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**ENCODER)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(**SMALL, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=40)
    ),
    "albert": lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**ENCODER, embedding_size=16)),
    "deberta": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            **ENCODER,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["c2p", "p2c"],
            share_att_key=True,
        )
    ),
    "deberta_conv": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(**ENCODER, relative_attention=True, conv_kernel_size=3, pos_att_type=["c2p"])
    ),
    "modernbert": lambda: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(
            **ENCODER, local_attention=8, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        )
    ),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**GPT2)),
    "llama": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**DECODER)),
    "qwen2": lambda: tf.Qwen2ForSequenceClassification(tf.Qwen2Config(**DECODER)),
    "qwen3": lambda: tf.Qwen3ForSequenceClassification(tf.Qwen3Config(**DECODER, head_dim=8)),
    "mistral": lambda: tf.MistralForSequenceClassification(tf.MistralConfig(**DECODER, sliding_window=4)),
    "gemma": lambda: tf.GemmaForSequenceClassification(tf.GemmaConfig(**DECODER, head_dim=8)),
    "gemma2": lambda: tf.Gemma2ForSequenceClassification(tf.Gemma2Config(**GEMMA)),
    "gemma3": lambda: tf.Gemma3TextForSequenceClassification(tf.Gemma3TextConfig(**GEMMA)),
    "phi": lambda: tf.PhiForSequenceClassification(tf.PhiConfig(**DECODER)),
    "phi3": lambda: tf.Phi3ForSequenceClassification(tf.Phi3Config(**DECODER)),
    "opt": lambda: tf.OPTForSequenceClassification(tf.OPTConfig(**OPT)),
    "t5": lambda: tf.T5ForSequenceClassification(tf.T5Config(**T5)),
    "t5_encoder": lambda: tf.T5EncoderModel(tf.T5Config(**T5)),
    "t5_seq2seq": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "gpt2_lm": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "llama_lm": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
    "qwen2_lm": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)),
    "qwen3_lm": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=8)),
    "mistral_lm": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=4)),
    "gemma_lm": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**DECODER, head_dim=8)),
    "gemma2_lm": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GEMMA, final_logit_softcapping=2.0)),
    "gemma3_lm": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA, final_logit_softcapping=2.0)),
    "phi_lm": lambda: tf.PhiForCausalLM(tf.PhiConfig(**DECODER)),
    "phi3_lm": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**DECODER)),
    "opt_lm": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
    "mixtral_lm": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=4)),
    "qwen2_moe_lm": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **DECODER, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
        )
    ),
    "olmoe_lm": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2)),
    "xlm_roberta": lambda: tf.XLMRobertaForSequenceClassification(tf.XLMRobertaConfig(**ENCODER)),
    "bert_model": lambda: tf.BertModel(tf.BertConfig(**ENCODER)),
}
CLASSIFIERS = [
    "bert", "roberta", "distilbert", "albert", "deberta", "deberta_conv", "modernbert", "gpt2", "llama",
    "qwen2", "opt", "t5",
]  # fmt: skip
OTHERS = ["t5_encoder", "t5_seq2seq", "gpt2_lm", "llama_lm", "mixtral_lm", "bert_model"]
MORE = ["xlm_roberta", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "phi3"]  # classifiers
CAUSAL = [
    "llama_lm", "qwen2_lm", "qwen3_lm", "mistral_lm", "gemma_lm", "gemma2_lm", "gemma3_lm", "phi_lm",
    "phi3_lm", "gpt2_lm", "opt_lm",
]  # fmt: skip
EXPERTS = ["mixtral_lm", "qwen2_moe_lm", "olmoe_lm"]
TASK = dict.fromkeys(CAUSAL + EXPERTS, "CAUSAL_LM") | {
    "t5_encoder": "FEATURE_EXTRACTION",
    "bert_model": "FEATURE_EXTRACTION",
    "t5_seq2seq": "SEQ_2_SEQ_LM",
}


def make(kind: str, seed: int = 0) -> Any:
    """A random model in evaluation mode; its numbers are spread widely, so that differences show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BUILD[kind]()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = torch.randn_like(parameter) * 0.15
    return model.eval()


def config(kind: str, **options: Any) -> KilobayesConfig:
    """A configuration with a random non-zero update."""
    options = {"adapter": LoRA(r=4), "init_weights": False, "task_type": TASK.get(kind, "SEQ_CLS")} | options
    return KilobayesConfig(**options)


def hosted(kind: str, **options: Any) -> Any:
    """A hosted model in evaluation mode whose members differ, heads included."""
    model = get_peft_model(make(kind), config(kind, **options)).eval()
    gen = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for head in host.heads(model).values():
            for parameter in head.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=gen)
    return model


def batch(kind: str, rows: int = 4, length: int = 7, seed: int = 1, left: bool = False) -> dict[str, Tensor]:
    """Token ids with padding, to the right or to the left."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, length), generator=gen)
    mask = torch.ones_like(ids)
    for row in range(rows):
        short = row % 3
        if short:
            where = slice(None, short) if left else slice(length - short, None)
            mask[row, where] = 0
            ids[row, where] = 0
    if kind.startswith("t5") and kind != "t5_encoder":
        ids[:, -1] = 1  # end of sequence: the T5 classifier wants equally many in every row
        mask[:, -1] = 1
    out = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5_seq2seq":
        out["decoder_input_ids"] = torch.randint(3, 64, (rows, 5), generator=gen)
    return out


def scores(output: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return output.logits if "logits" in output else output.last_hidden_state


def repeated(inputs: dict[str, Tensor], stack: int) -> dict[str, Tensor]:
    return {k: v.repeat(stack, *[1] * (v.dim() - 1)) for k, v in inputs.items()}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal relative to the largest entry."""
    assert a.shape == b.shape
    scale = float(b.detach().abs().max()) or 1.0
    error = float((a - b).detach().abs().max()) / scale
    assert error <= tolerance, error


def loop(model: Any, inputs: dict[str, Tensor], stack: int) -> Tensor:
    """Each member alone on the same rows, concatenated; differentiable in the stored parameters."""
    theta, out = host.read(model), []
    for s in range(stack):
        host.install(model, host.build(model, {k: v[s : s + 1] for k, v in theta.items()}))
        out.append(scores(model(**inputs)))
    host.install(model, None)
    return torch.cat(out)


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the logits with respect to every leaf."""
    gen = torch.Generator().manual_seed(9)
    theta = host.read(model)
    loss = (logits * torch.randn(logits.shape, generator=gen)).sum()
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def state(model: Any) -> dict[str, Tensor]:
    """A copy of a model's state."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal bit for bit, in the same order."""
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key
