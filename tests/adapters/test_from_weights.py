"""OLoRA and LoRA-XS, whose constants come from the base's weights, on every kind of base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaForSequenceClassification

from kilobayes import host, tree
from kilobayes.adapters import LoRA, LoRAXS, OLoRA
from kilobayes.testing.tiny import TinyRows, close, perturbed, scores, tiny_base, tiny_model, tiny_start
from kilobayes.types import Adapter, delta

from ..host.tiny import batch, config, make

METHODS: list[Any] = [OLoRA(r=3, alpha=5.0), LoRAXS(r=5, alpha=3.0)]
INPUTS, _ = TinyRows.make(6).batch(torch.arange(6))


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("part", ["c_attn", "attn.c_proj", "mlp.c_fc"])  # the second is square
def test_the_layers_of_gpt2_are_adapted_as_linear_layers_are(method: Adapter, part: str) -> None:
    """PEFT's OLoRA decomposes the transposed weight: wrong in silence where it is square, else an error."""
    model = get_peft_model(make("gpt2"), config("gpt2", adapter=method, target_modules=[part])).eval()
    layer = next(iter(host.layers(model).values()))
    base: Any = layer.get_base_layer()
    with torch.no_grad():
        assert layer.dequantised().shape == (layer.d_out, layer.d_in) == tuple(base.weight.T.shape)
        linear = torch.nn.Linear(layer.d_in, layer.d_out)
        linear.weight.copy_(base.weight.T)
        linear.bias.copy_(base.bias)
        other = get_peft_model(torch.nn.ModuleDict({"body": linear}), _on("body", method)).base_model.body
        for key, value in layer.constants["default"].items():
            assert close(other.constants["default"][key], value, 1e-6)
        for key, leaf in layer.kilobayes_leaves["default"].items():
            other.kilobayes_leaves["default"][key].copy_(leaf)
        x = torch.randn(4, 5, layer.d_in, generator=torch.Generator().manual_seed(1))
        assert close(layer(x), other(x), 1e-6)
        assert not close(layer(x), base(x), 1e-2)
        assert close(layer.get_delta_weight("default"), other.get_delta_weight("default").T, 1e-6)


def _on(part: str, method: Adapter) -> host.KilobayesConfig:
    return host.KilobayesConfig(adapter=method, target_modules=[part])


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base(method: Adapter, dtype: torch.dtype, tmp_path: Path) -> None:
    """NumPy knows no bfloat16, where the published LoRA-XS fails; constants stay in float32."""
    model = tiny_model(method, base=tiny_base().to(dtype))
    full = tiny_model(method, base=tiny_base().to(dtype).float())
    theta = perturbed(tiny_start(full, [4]), size=0.2)
    for net in (model, full):
        host.write(net, theta)
        assert {v.dtype for v in host.constants(net).values()} == {torch.float32}
    for key, value in host.constants(model).items():
        assert close(value, host.constants(full)[key], 1e-5)
    for name, layer in host.layers(model).items():
        theirs = host.layers(full)[name].get_delta_weight("default")
        assert close(layer.get_delta_weight("default"), theirs, 1e-5)
    with torch.no_grad():
        found, wanted = model(**INPUTS).logits, full(**INPUTS).logits
        assert found.dtype == dtype
        assert close(found.float(), wanted, 0.1)
        model.save_pretrained(str(tmp_path))
        again: Any = PeftModel.from_pretrained(tiny_base().to(dtype), str(tmp_path)).eval()  # type: ignore[arg-type]
        assert torch.equal(again(**INPUTS).logits, found)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_several_adapters_on_one_model_do_not_see_each_other(method: Adapter) -> None:
    """Each has its vectors from the base's own weights, which none of them changes."""
    rows = TinyRows.make(6)
    others: list[Any] = [*METHODS, LoRA(r=2), LoRAXS(r=2), OLoRA(r=7)]
    alone = tiny_model(method)
    host.write(alone, perturbed(tiny_start(alone, [4]), size=0.3))
    wanted = {k: v.clone() for k, v in host.constants(alone).items()}
    theta = {k: v.detach().clone() for k, v in host.read(alone).items()}
    expected = scores(alone, theta, rows).detach()
    model = tiny_model(others[0])
    host.write(model, perturbed(tiny_start(model, [5]), size=0.3))
    for index, other in enumerate([*others[1:], method]):
        settings = _config(other)
        model.add_adapter(f"a{index}", settings)
    model.set_adapter(f"a{len(others) - 1}")
    assert not tree.first_difference(host.constants(model), wanted)
    host.write(model, theta)
    assert torch.equal(scores(model, theta, rows).detach(), expected)
    model.set_adapter("default")
    model.delete_adapter(f"a{len(others) - 1}")
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**INPUTS).logits, tiny_base()(**INPUTS).logits)


def _config(method: Adapter) -> host.KilobayesConfig:
    base = tiny_model(LoRA(r=1)).peft_config["default"]
    return host.KilobayesConfig(
        adapter=method,
        target_modules=base.target_modules,
        exclude_modules=base.exclude_modules,
        task_type="SEQ_CLS",
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_base_in_four_bits(method: Adapter, tmp_path: Path) -> None:
    """Constants of the weights as they are after rounding; the weights themselves are left alone."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    make("llama").save_pretrained(tmp_path)
    rounding = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base, plain = (
        LlamaForSequenceClassification.from_pretrained(
            tmp_path, quantization_config=rounding, device_map="cpu"
        ).eval()
        for _ in range(2)
    )
    for net in (base, plain):
        for module in net.modules():  # as some CPUs would, at the first evaluation
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    model = get_peft_model(base, config("llama", adapter=method, init_weights=True)).eval()
    inputs = batch("llama")
    expected = _hidden(plain, inputs)
    assert close(_hidden(model, inputs), expected, 1e-3)  # the start
    with torch.no_grad():
        for leaf in host.read(model).values():
            leaf += 0.2
    with model.disable_adapter():
        assert torch.equal(_hidden(model, inputs), expected)
    layer = next(iter(host.layers(model).values()))
    weight = layer.dequantised().float()
    x = torch.randn(2, 3, layer.d_in, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        update = delta(layer.operator("default"), layer.d_in)[0]
        found = layer(x)
        assert close(found, x @ (weight + update).T, 1e-4)
        assert not close(found, x @ weight.T, 0.05)


def _hidden(net: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return net(output_hidden_states=True, **inputs).hidden_states[-1]


@pytest.mark.parametrize(("method", "rank"), [(METHODS[0], 6), (METHODS[1], 5)])
def test_export_as_plain_lora_gives_the_same_scores(method: Adapter, rank: int, tmp_path: Path) -> None:
    """OLoRA's takes twice the rank, since the base it is loaded on is the original one."""
    model = tiny_model(method)
    host.write(model, perturbed(tiny_start(model, [4]), size=0.3))
    host.export_lora(model, tmp_path)
    plain: Any = PeftModel.from_pretrained(tiny_base(), str(tmp_path)).eval()  # type: ignore[arg-type]
    assert plain.peft_config["default"].r == rank
    with torch.no_grad():
        assert close(plain(**INPUTS).logits, model(**INPUTS).logits, 1e-5)
