"""HydraLoRA on a model: never merged, switched off at will, and its LoRA at the mean gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from kilobayes import host, tree
from kilobayes.adapters import HydraLoRA
from kilobayes.adapters.hydralora import mean_gates, with_mean_gate
from kilobayes.errors import KilobayesError
from kilobayes.testing.tiny import (
    TARGETS,
    TinyRows,
    close,
    perturbed,
    scores,
    tiny_base,
    tiny_model,
    tiny_start,
)

MERGES: list[Callable[[Any, Path], Any]] = [
    lambda model, folder: model.merge_adapter(),
    lambda model, folder: model.merge_and_unload(),
    lambda model, folder: model.merge_and_unload(safe_merge=True),
    host.export_lora,
    host.export_merged,
]


@pytest.mark.parametrize("trained", [False, True])
def test_it_is_never_merged(trained: bool, tmp_path: Path) -> None:
    model, rows = tiny_model(HydraLoRA(r=2)), TinyRows.make(6)
    start = tiny_start(model, [0])
    host.write(model, perturbed(start) if trained else start)
    theta, before = tree.clone(host.read(model)), {s.name: s.weight().clone() for s in host.sites(model)}
    unmerged = scores(model, theta, rows)
    for merge in MERGES:
        with pytest.raises(KilobayesError, match=r"not a linear map.*heads anew.*with_mean_gate"):
            merge(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert not any(layer.merged for layer in host.layers(model).values())
    assert all(torch.equal(s.weight(), before[s.name]) for s in host.sites(model))
    assert torch.equal(scores(model, theta, rows), unmerged)


def test_it_can_be_switched_off() -> None:
    """The published code raises where its adapters are disabled, and its layers return pairs."""
    model, rows = tiny_model(HydraLoRA(r=2)), TinyRows.make(6)
    host.write(model, perturbed(tiny_start(model, [0])))
    inputs, _ = rows.batch(torch.arange(6))
    hidden = {}
    for name, found in (("on", model), ("base", tiny_base())):
        with torch.no_grad():
            hidden[name] = (found.get_base_model() if name == "on" else found).bert(**inputs)[0]  # type: ignore[operator, union-attr]
    with torch.no_grad(), model.disable_adapter():
        off = model.get_base_model().bert(**inputs)[0]  # type: ignore[operator]
    torch.testing.assert_close(off, hidden["base"])
    assert float((hidden["on"] - off).abs().max()) > 0.01


@pytest.mark.parametrize("router", ["input", "rank"])
def test_mean_gates_are_over_tokens_and_leave_padding_out(router: str) -> None:
    method, rows = HydraLoRA(r=2, router=router), TinyRows.make(8)
    model = tiny_model(method)
    theta = perturbed(tiny_start(model, [0]), size=0.3)
    host.write(model, theta)
    padded = mean_gates(model, [rows.batch(torch.arange(8))[0]])
    alone = mean_gates(model, [rows.batch(torch.tensor([i]))[0] for i in range(8)])
    assert set(padded) == {s.name for s in host.sites(model)}
    for path, gates in padded.items():
        assert gates.shape == (1, 3)
        torch.testing.assert_close(gates, alone[path], rtol=1e-4, atol=1e-5)
    first = host.sites(model)[0].name
    seen: list[Tensor] = []
    hook = host.layers(model)[first].register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    with torch.no_grad():
        model(**rows.batch(torch.tensor([3]))[0])
    hook.remove()
    own = tree.leaves_of(theta, first)
    x = seen[0][0] if router == "input" else seen[0][0] @ own["A"][0].T
    wanted = (x @ own["router"][0].T).softmax(dim=-1).mean(dim=0)
    found = mean_gates(model, [rows.batch(torch.tensor([3]))[0]])[first][0]
    torch.testing.assert_close(found, wanted)


def test_the_lora_at_the_mean_gate_is_plain_peft(tmp_path: Path) -> None:
    """Exact where the gates do not depend on the token; read back by PEFT alone."""
    method, rows = HydraLoRA(r=2, alpha=3.0), TinyRows.make(8)
    model = tiny_model(method)
    theta = perturbed(tiny_start(model, [0]))
    theta = {k: 0 * v if k.endswith("/router") else v for k, v in theta.items()}
    host.write(model, theta)
    wanted = scores(model, theta, rows)
    inputs, _ = rows.batch(torch.arange(8))
    gates = mean_gates(model, [inputs])
    lora, plain = with_mean_gate(method, theta, gates)
    config = host.KilobayesConfig(
        adapter=lora, target_modules=TARGETS, exclude_modules=["pooler.dense"], task_type="SEQ_CLS"
    )
    hosted = get_peft_model(tiny_base(), config)  # type: ignore[arg-type]
    host.write(hosted, plain)
    host.export_lora(hosted, tmp_path)
    back = PeftModel.from_pretrained(tiny_base(), str(tmp_path)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert close(back(**inputs).logits[None], wanted)
