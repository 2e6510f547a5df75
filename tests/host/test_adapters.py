"""What adapters may bring beside two factors: shared leaves, constants, operators of any form."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from kilobayes import host, tree
from kilobayes.errors import KilobayesError
from kilobayes.types import LowRank, Params, Site

from .tiny import batch, close, config, gradients, loop, make, repeated, same, scores


@dataclass(frozen=True, eq=False)
class Mixed:
    """``x -> mix (fixed x)``, through a bend where there is one."""

    mix: Tensor  # (S, o, 4)
    fixed: Tensor  # (1, 4, i)
    bend: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        hidden = x @ self.fixed.mT
        return (hidden if self.bend is None else torch.tanh(self.bend * hidden)) @ self.mix.mT


@dataclass(frozen=True)
class Toy:
    """A bank ``(S, 3, 4)`` shared by all sites, coefficients ``(S, o, 3)``, a fixed projection ``(4, i)``."""

    form: str = "low rank"

    def freeze(self, sites: list[Site]) -> Params:
        gen = torch.Generator().manual_seed(5)
        own = {f"{s.name}/fixed": torch.randn(4, s.d_in, generator=gen) for s in sites}
        return own | {"*/common": torch.ones(())}

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        theta = {"*/bank": torch.randn(stack, 3, 4, generator=gen)}
        theta |= {f"{s.name}/mix": torch.randn(stack, s.d_out, 3, generator=gen) * 0.2 for s in sites}
        return theta

    def build(self, params: Params, constants: Params, site: Site) -> LowRank | Mixed:
        b, fixed = params["mix"] @ params["bank"], constants["common"] * constants["fixed"]
        if self.form == "low rank":
            return LowRank(fixed.expand(len(b), *fixed.shape), b)
        bend = torch.ones(len(b), 1, 1) if self.form == "bent" else None
        return Mixed(b, fixed.expand(len(b), *fixed.shape), bend)


FORMS = ["low rank", "linear", "bent"]


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    """Configurations read the toy adapter from its text, as they do those of the catalogue."""

    def adapter(value):
        return value if isinstance(value, Toy) else Toy(value.partition("'")[2].partition("'")[0])

    monkeypatch.setattr("kilobayes.host.config.spec", SimpleNamespace(adapter=adapter))


def toy(form: str, kind: str = "bert", stack: int = 1, **options):
    return get_peft_model(make(kind, **options), config(kind, adapter=Toy(form), stack=stack)).eval()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("form", FORMS)
def test_any_operator_runs_as_a_stack(form, kind):
    model, inputs = toy(form, kind, stack=3), batch(kind)
    assert [k for k in host.read(model) if k.startswith("*/")] == ["*/bank"]
    expected = loop(model, inputs, 3)
    zipped = scores(model(**repeated(inputs, 3)))
    close(zipped, expected)
    with host.outer(model, 3):
        close(scores(model(**inputs)), expected)
    theirs = gradients(model, expected)
    for key, gradient in gradients(model, zipped).items():
        close(gradient, theirs[key])
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_shared_leaves_are_saved_once_and_constants_not_at_all(form, low, tmp_path):
    model, inputs = toy(form, stack=2), batch("bert")
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    # and one number for each site that has constants, by which another base is told
    assert sum(v.numel() for v in held.values()) == 2 * (12 + 6 * 32 * 3 + 32 * 3 + 3) + 6
    again = PeftModel.from_pretrained(make("bert"), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    same(host.read(again), host.read(model))
    again.delete_adapter("default")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("form", FORMS)
def test_operators_merge_where_they_are_linear(form):
    model, inputs = toy(form), batch("bert")
    expected = model(**inputs).logits
    if form == "bent":
        with pytest.raises(KilobayesError, match=r"not a linear map.*Mixed.*unmerged"):
            model.merge_adapter()
        assert torch.equal(model(**inputs).logits, expected)
        return
    model.merge_adapter()
    close(model(**inputs).logits, expected)
    model.unmerge_adapter()
    close(model(**inputs).logits, expected)
    clone = copy.deepcopy(model)
    host.write(clone, tree.map_params(lambda t: 2 * t, host.read(clone)))
    close(model(**inputs).logits, expected)
    assert not torch.allclose(clone(**inputs).logits, expected, atol=1e-3)


def test_constants_keep_their_precision_and_follow_the_base():
    model, inputs = toy("linear"), batch("bert")
    layer = next(iter(host.layers(model).values()))
    before = layer.constants["default"]["fixed"].clone()
    expected = model(**inputs).logits
    model.bfloat16()
    assert torch.equal(layer.constants["default"]["fixed"], before)
    assert {p.dtype for p in host.read(model).values()} == {torch.bfloat16}
    model.float()
    close(model(**inputs).logits, expected, 0.05)


def test_shared_leaves_export_and_export_refuses_other_operators(tmp_path):
    model, inputs = toy("low rank"), batch("bert")
    host.export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(make("bert"), tmp_path / "plain")
    close(plain(**inputs).logits, model(**inputs).logits, 1e-6)
    with pytest.raises(KilobayesError, match=r"not of low rank.*Mixed"):
        host.export_lora(toy("linear"), tmp_path / "no")


def test_nothing_is_merged_where_a_part_cannot_be(monkeypatch):
    monkeypatch.undo()  # names of the catalogue
    model = get_peft_model(
        make("bert"), config("bert", target_modules=["query"], init_weights=False, task_type=None)
    )
    more = config("bert", adapter="HydraLoRA()", target_modules=["key"], task_type=None)
    model.add_adapter("second", more)
    model.base_model.set_adapter(["default", "second"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KilobayesError, match="'second' is not a linear map"):
        model.merge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_adapter_starts_from_a_merged_base(monkeypatch):
    monkeypatch.undo()
    model = get_peft_model(make("bert"), config("bert"))
    model.merge_adapter()
    with pytest.raises(KilobayesError, match=r"default in .*query.*unmerge_adapter\(\) first"):
        model.add_adapter("second", config("bert", adapter="OLoRA()"))
