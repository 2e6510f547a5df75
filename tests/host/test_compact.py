"""The smallest file: what comes back, what it costs, and which base it is of."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from kilobayes import host, spec, tree
from kilobayes.catalog import catalog
from kilobayes.errors import KilobayesError
from kilobayes.host.compact import FILE, export_compact, load_compact, narrow, widen
from tests.host.tiny import batch, config, make


def moved(model, seed=3):
    gen = torch.Generator().manual_seed(seed)
    theta = tree.map_params(
        lambda t: t.detach() + 0.02 * torch.randn(t.shape, generator=gen), host.read(model)
    )
    host.write(model, theta)


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize("name", catalog("adapters"))
def test_every_adapter_comes_back(name, stack, tmp_path):
    model = get_peft_model(make("bert"), config("bert", adapter=name, stack=stack)).eval()
    adapter, sites = spec.adapter(name), host.sites(model)
    start = {k: v.detach() for k, v in host.read(model).items() if not k.startswith("classifier")}
    found = export_compact(model, tmp_path)
    back = load_compact(make("bert"), tmp_path).eval()
    inputs = {k: torch.cat([v] * stack) for k, v in batch("bert").items()}
    assert torch.equal(back(**inputs).logits, model(**inputs).logits)
    assert found["error"] == 0.0
    assert found["file"] == (tmp_path / FILE).stat().st_size
    known = adapter.stored(sites) if hasattr(adapter, "stored") else 4 * tree.numbers(start)
    if name not in ("RoseLoRA", "BLoRA"):  # whose bytes are those after training
        assert found["adapter"] == stack * known
    # a few names, not one a site
    assert found["file"] - found["adapter"] - found["head"] - found["check"] < 1500


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_narrow_numbers_cost_what_is_said(dtype, tmp_path):
    model = get_peft_model(make("bert"), config("bert", adapter="LoRA(r=4)"))
    moved(model)
    found = export_compact(model, tmp_path, dtype=dtype)
    before = {p: host.layers(model)[p].get_delta_weight("default") for p in host.layers(model)}
    back = load_compact(make("bert"), tmp_path)
    after = {p: host.layers(back)[p].get_delta_weight("default") for p in before}
    apart = sum(float((after[p] - before[p]).square().sum()) for p in before)
    whole = sum(float(before[p].square().sum()) for p in before)
    assert found["error"] == pytest.approx((apart / whole) ** 0.5, rel=1e-4)
    limit = {"float16": 2**-11, "bfloat16": 2**-8, "int8": 0.02}[dtype]  # of either factor
    assert 0 < found["error"] < 2 * limit
    assert found["adapter"] < 0.55 * export_compact(model, tmp_path / "whole")["adapter"]


def test_a_group_of_int8_is_off_by_half_a_step_at_most():
    gen = torch.Generator().manual_seed(1)
    values = {"A": torch.randn(2, 3, 50, generator=gen) * 10.0 ** torch.randn(2, 3, 1, generator=gen)}
    back = widen(narrow(values, "int8"))["A"]
    rows = torch.nn.functional.pad(values["A"].flatten(1), (0, -150 % 64)).unflatten(1, (-1, 64))
    # half a step, and the rounding of the step itself to float16
    allowed = rows.abs().amax(dim=2, keepdim=True) / 127 * (0.5 + 127 * 2**-10)
    off = torch.nn.functional.pad((back - values["A"]).flatten(1), (0, -150 % 64)).unflatten(1, (-1, 64))
    assert bool((off.abs() <= allowed).all())


def test_numbers_too_large_for_the_type():
    with pytest.raises(KilobayesError, match=r"A holds numbers too large for float16.*bfloat16"):
        narrow({"A": torch.full((1, 3), 1e6)}, "float16")


def test_another_base_is_refused_and_the_site_named(tmp_path):
    model = get_peft_model(make("bert"), config("bert"))
    export_compact(model, tmp_path)
    other = make("bert")
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if n.endswith("query.weight")).add_(0.05)
    with pytest.raises(KilobayesError, match=r"another base model.*query.*check value"):
        load_compact(other, tmp_path)


def test_parts_of_two_adapters(tmp_path):
    model = get_peft_model(make("bert"), config("bert", adapter="LoRA(r=4)"))
    export_compact(model, tmp_path)
    get_peft_model(make("bert"), config("bert", adapter="LoRA(r=3)")).peft_config["default"].save_pretrained(
        str(tmp_path)
    )
    with pytest.raises(KilobayesError, match=r"parts of two adapters.*r=3.*r=4"):
        load_compact(make("bert"), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(KilobayesError, match=r"adapter_config.json is missing"):
        load_compact(make("bert"), tmp_path)


def test_wrong_input(tmp_path):
    model = get_peft_model(make("bert"), config("bert"))
    with pytest.raises(KilobayesError, match="dtype 'fp16' is not known"):
        export_compact(model, tmp_path, dtype="fp16")
    biased = get_peft_model(make("bert"), config("bert", bias="all"))
    with pytest.raises(KilobayesError, match="only adapters and linear heads"):
        export_compact(biased, tmp_path)
