"""Adapters with a part in training, inside transformers' Trainer: pruned on schedule, gates priced."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import kilobayes as kb
from kilobayes import host
from kilobayes.adapters import BLoRA, LoRAXS, RoseLoRA
from kilobayes.errors import KilobayesError
from kilobayes.types import Progress

from .training import Recorder, base, plain, train

ROSE = RoseLoRA(r=4, keep=0.25, start=0.2, end=0.6)


def hosted(adapter: Any) -> Any:
    names = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "seed": 2}
    return get_peft_model(base(), kb.KilobayesConfig(adapter=adapter, **names))


def kept(model: Any) -> float:
    """The largest share of numbers of a row of A, or a column of B, that are not zero."""
    lines = [v if k.endswith("/A") else v.mT for k, v in host.read(model).items() if k[-2:] in ("/A", "/B")]
    return max(float((line != 0).double().mean(dim=-1).max()) for line in lines)


class Shares(Recorder):
    """What is kept after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shares.append(kept(kwargs["model"]))


@pytest.mark.parametrize("watched", [False, True])
def test_roselora_is_pruned_on_its_schedule(watched: bool, tmp_path: Path) -> None:
    seen = Shares()
    callback: Any = kb.PosteriorCallback("Point()", tmp_path / "run") if watched else kb.AdapterCallback()
    model = hosted(ROSE)
    train(model, tmp_path, callback, seen)
    assert len(seen.shares) == 12
    for step, share in enumerate(seen.shares, 1):
        assert share <= ROSE.share(step, 12) + 1 / 16  # a whole number of 16 entries, rounded up
    assert seen.shares[1] == 1.0
    assert seen.shares[-1] == kept(model) <= ROSE.keep
    if watched:
        run: Any = PeftModel.from_pretrained(base(), str(tmp_path / "run"))
        assert kept(run) <= ROSE.keep
        assert kb.load(tmp_path / "run").predict_proba(["a text"]).shape == (1, 3)


def test_without_the_callback_nothing_prunes(tmp_path: Path) -> None:
    model = hosted(ROSE)
    train(model, tmp_path)
    assert kept(model) == 1.0


def test_pruning_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    whole = hosted(ROSE)
    train(whole, tmp_path, kb.AdapterCallback(), **options)
    again = hosted(ROSE)
    train(again, tmp_path, kb.AdapterCallback(), resume=str(tmp_path / "checkpoint-5"), **options)
    theirs = host.read(again)
    assert all(torch.equal(value, theirs[key]) for key, value in host.read(whole).items())
    (tmp_path / "checkpoint-5" / "kilobayes-adapter.safetensors").unlink()
    resume = str(tmp_path / "checkpoint-5")
    with pytest.raises(KilobayesError, match="nothing was collected"):
        train(hosted(ROSE), tmp_path, kb.AdapterCallback(), resume=resume, **options)


@pytest.mark.parametrize("watched", [False, True])
def test_training_that_ends_early_is_pruned_to_the_end(watched: bool, tmp_path: Path) -> None:
    model = hosted(ROSE)
    callback: Any = kb.PosteriorCallback("Point()", tmp_path / "run") if watched else kb.AdapterCallback()
    if watched:
        with pytest.warns(UserWarning, match="ended at step 4 of 12"):
            train(model, tmp_path, callback, Recorder(stop=4))
        assert kept(PeftModel.from_pretrained(base(), str(tmp_path / "run"))) <= ROSE.keep
    else:
        train(model, tmp_path, callback, Recorder(stop=4))
    assert kept(model) <= ROSE.keep


def test_the_price_of_gates_joins_the_gradient() -> None:
    """Once, of the stated price, on top of what the trainer's loss left there."""
    adapter = BLoRA(r=4, bits_prior=0.3, rank_prior=0.7)
    model = hosted(adapter)
    callback = kb.AdapterCallback()
    loader = SimpleNamespace(dataset=range(24), __len__=lambda: 3)
    state = SimpleNamespace(global_step=0, max_steps=12)
    args = SimpleNamespace(gradient_accumulation_steps=1, per_device_train_batch_size=8, world_size=1)
    callback.on_train_begin(args, state, None, model=model, train_dataloader=loader)
    leaves = host.read(model)
    for leaf in leaves.values():
        leaf.grad = torch.full_like(leaf, 2.0)
    callback.on_pre_optimizer_step(args, state, None)
    copies = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    adapter.penalty(copies, Progress(1, 12, 3, 24)).sum().backward()
    moved = 0
    for key, leaf in leaves.items():
        own = copies[key].grad
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, 2.0 + (torch.zeros_like(leaf) if own is None else own))
        moved += own is not None and bool(own.any())
    assert moved == 2 * len(host.sites(model))  # bits and ranks of every matrix


def test_gates_close_under_a_trainer(tmp_path: Path) -> None:
    """With the adapter's own learning rates; without the callback they stay open."""
    ranks = {}
    for name, callbacks in {"with": [kb.AdapterCallback()], "without": []}.items():
        model = hosted(BLoRA(r=4))

        def optimizers(model: Any = model) -> Any:
            return torch.optim.AdamW(kb.parameter_groups(model, 2e-2)), None

        train(model, tmp_path / name, *callbacks, optimizers=optimizers())
        theta = {k: v.detach() for k, v in host.read(model).items()}
        ranks[name] = BLoRA(r=4).structure(theta, host.sites(model)).ranks.double().mean()
    assert ranks["with"] < ranks["without"] == 4


def test_groups_have_the_adapters_factors() -> None:
    model = hosted(LoRAXS(r=4))
    groups = {group["lr"]: group["params"] for group in kb.parameter_groups(model, 0.5, weight_decay=0.1)}
    assert set(groups) == {0.5 * factor for factor in LoRAXS(r=4).rates().values()}
    leaves = host.read(model)
    cores = {id(v) for k, v in leaves.items() if k.endswith("/R")}
    assert {id(p) for p in groups[0.5 * LoRAXS(r=4).rates()["R"]]} == cores
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(found) for found in groups.values()) == len(trained)
    assert all(isinstance(p, nn.Parameter) for found in groups.values() for p in found)


def test_a_model_without_our_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KilobayesError, match="no kilobayes adapter"):
        train(plain(), tmp_path, kb.AdapterCallback())
    with pytest.raises(KilobayesError, match="no kilobayes adapter"):
        kb.parameter_groups(plain(), 1e-3)
