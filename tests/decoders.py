"""Tiny random causal models with adapters, and generation the slow way: no cache, no padding, no stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from peft import get_peft_model
from torch import Tensor

from kilobayes import host
from kilobayes.lm.sampling import Sampling, shaped

LLAMA: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 40, "use_cache": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40, "use_cache": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 48, "num_attention_heads": 4,
    "max_position_embeddings": 40, "word_embed_proj_dim": 16, "use_cache": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BUILD: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA, sliding_window=5)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=3, n_head=4, pad_token_id=0)
    ),
}
TARGETS = {kind: ["q_proj", "v_proj"] for kind in BUILD} | {"gpt2": ["c_attn"], "bloom": ["query_key_value"]}


def make(kind: str) -> Any:
    """A random model in evaluation mode, its numbers spread widely, so that texts vary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = BUILD[kind]()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = torch.randn_like(parameter) * 0.25
    return model.eval()


def hosted(kind: str, stack: int, layers: list[int] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """The model with an adapter, in all blocks or some, and draws that differ from each other."""
    config = host.KilobayesConfig(
        adapter="LoRA(r=4)", target_modules=TARGETS[kind], layers_to_transform=layers, task_type="CAUSAL_LM"
    )
    model = get_peft_model(make(kind), config).eval()
    gen = torch.Generator().manual_seed(8)
    leaves = host.read(model)
    return model, {k: 0.3 * torch.randn(stack, *v.shape[1:], generator=gen) for k, v in leaves.items()}


def prompts(*lengths: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Random token ids and their mask, padded to the left."""
    gen = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width).long()
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, 61, (length,), generator=gen)
        mask[row, width - length :] = 1
    return ids, mask


def member_probs(model: Any, theta: dict[str, Tensor] | None, text: list[int]) -> Tensor:
    """Probabilities ``(S, V)`` of what follows a text, each member alone, nothing cached."""
    found = []
    for s in range(1 if theta is None else len(next(iter(theta.values())))):
        if theta is not None:
            host.install(model, host.build(model, {k: v[s : s + 1] for k, v in theta.items()}))
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].double())
    if theta is not None:
        host.install(model, None)
    return torch.stack(found).softmax(dim=-1)


def slowly(
    model: Any, theta: Any, ids: Tensor, mask: Tensor, sampling: Sampling, gens: Any = None
) -> list[dict[str, Any]]:
    """Every prompt alone: tokens, log-probabilities, entropy and mutual information from definitions."""
    out = []
    for row in range(len(ids)):
        text = ids[row][mask[row].bool()].tolist()
        start = len(text)
        logs, entropies, informations = [], [], []
        for _ in range(sampling.max_new_tokens):
            each = member_probs(model, theta, text)
            probs = each.mean(dim=0)
            if sampling.temperature:
                at = torch.rand(1, generator=gens[row], dtype=torch.float64)
                token = int((shaped(probs[None], sampling)[0].cumsum(0) <= at).sum())
            else:
                token = int(probs.argmax())
            own = -(each * each.log()).sum(dim=-1).mean()
            whole = -(probs * probs.log()).sum()
            logs.append(float(probs[token].log()))
            entropies.append(float(whole))
            informations.append(float(whole - own))
            text.append(token)
        out.append(
            {"tokens": text[start:], "log_probs": logs, "entropy": entropies, "information": informations}
        )
    return out
