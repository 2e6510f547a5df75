"""Hosted LoRA against PEFT's own: the same weights give the same logits and gradients."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kilobayes import host, tree
from kilobayes.adapters import LoRA

from .tiny import TASK, batch, close, config, make, scores

KINDS = ["bert", "roberta", "deberta", "gpt2", "gpt2_lm", "llama", "llama_lm", "t5_seq2seq"]
SCALES = [{}, {"alpha": 3.0}, {"alpha": 5.0, "rslora": True}]


def pair(kind, **lora):
    """A model under PEFT's LoRA and one under ours, with the same random weights."""
    common = {"task_type": TASK.get(kind, "SEQ_CLS")}
    theirs = get_peft_model(
        make(kind),
        LoraConfig(
            r=4,
            lora_alpha=lora.get("alpha", 8.0),
            use_rslora=lora.get("rslora", False),
            fan_in_fan_out="gpt2" in kind,
            **common,
        ),
    ).eval()
    ours = get_peft_model(make(kind), config(kind, adapter=LoRA(r=4, **lora))).eval()
    gen = torch.Generator().manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=gen)
        assert parameter.requires_grad == (".lora_" in name or "modules_to_save" in name)
    return theirs, ours


def as_leaves(theirs, take) -> dict[str, torch.Tensor]:
    """PEFT's trainable parameters (``take`` of each) under our keys, as a stack of one."""
    out = {}
    for name, parameter in theirs.get_base_model().named_parameters():
        if parameter.requires_grad:
            key = name.replace(".lora_A.default.weight", "/A").replace(".lora_B.default.weight", "/B")
            key = key.replace(".modules_to_save.default", "").replace("er.weight", "er/weight")
            head, _, leaf = key.rpartition(".")
            out[key if "/" in key else f"{head}/{leaf}"] = take(parameter)[None]
    return out


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_same_weights_same_logits_same_gradients(kind, scale):
    theirs, ours = pair(kind, **scale)
    host.write(ours, as_leaves(theirs, lambda p: p.detach()))
    inputs = batch(kind)
    expected, logits = scores(theirs(**inputs)), scores(ours(**inputs))
    close(logits, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (expected * weights).sum().backward()
    (logits * weights).sum().backward()
    wanted = as_leaves(theirs, lambda p: p.grad)
    for key, parameter in host.read(ours).items():
        close(parameter.grad, wanted[key])


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_merged_weights_are_those_of_peft(kind):
    theirs, ours = pair(kind)
    host.write(ours, as_leaves(theirs, lambda p: p.detach()))
    wanted = theirs.merge_and_unload().state_dict()
    for key, tensor in ours.merge_and_unload().state_dict().items():
        close(tensor, wanted[key])


def test_the_start_is_distributed_as_pefts():
    fresh = get_peft_model(make("bert"), config("bert", adapter=LoRA(r=64), init_weights=True))
    leaves = host.read(fresh)
    for key in tree.chosen(leaves, "*/A"):
        leaf = leaves[key]
        bound = leaf.shape[-1] ** -0.5
        assert 0.99 * bound < leaf.detach().abs().max() <= bound, key
        spread = float(leaf.detach().square().mean().sqrt()) / bound  # U(-1, 1) has 1 / sqrt 3
        assert abs(spread - 3**-0.5) < 5 * 0.258 / (leaf.numel() ** 0.5)
    other = get_peft_model(make("bert"), LoraConfig(r=64, task_type="SEQ_CLS"))
    spreads = [p.square().mean().sqrt() * 32**0.5 for n, p in other.named_parameters() if ".lora_A." in n]
    assert abs(float(torch.stack(spreads).detach().mean()) - 3**-0.5) < 0.01
