"""Texts from runs, adapters and bases: the same tokens as the slow way, whatever the batch; wrong input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import kilobayes as kb
from kilobayes.errors import KilobayesError
from kilobayes.language import LanguageModel
from kilobayes.lm.sampling import Sampling

from . import small_lm
from .decoders import member_probs, slowly

MODELS = os.environ.get("KILOBAYES_MODELS")
STORIES = Path(MODELS or "") / "stories260K"
real = pytest.mark.skipif(not STORIES.is_dir(), reason="KILOBAYES_MODELS names no folder with stories260K")
PROMPTS = ["ba de fi", "go", "ku la me ni po ra", "so tu"]
WARM = {"max_new_tokens": 6, "temperature": 1.0}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return kb.load(small_lm.run(), device="cpu")


def test_a_run_averages_over_its_draws_under_its_temperature(lm: LanguageModel) -> None:
    (reply,) = lm.generate("ba de fi", max_new_tokens=3)
    text = [1, *(4 + small_lm.WORDS.index(word) for word in ("ba", "de", "fi"))]
    theta = lm.draws()
    assert theta is not None
    assert all(len(v) == 4 for v in theta.values())
    for at, token in enumerate(reply.best.generated.tokens):
        each = (member_probs(lm.model, theta, text).log() / small_lm.TEMPERATURE).softmax(-1)
        probs = each.mean(dim=0)
        assert token == int(probs.argmax())
        assert reply.best.generated.entropy[at] == pytest.approx(
            float(-(probs * probs.log()).sum()), rel=1e-4
        )
        text.append(token)
    assert max(reply.best.generated.information) > 0.01
    assert lm.tokenizer.decode(text[4:]) == reply.text.strip()
    (two,) = lm.generate("ba de fi", max_new_tokens=3, samples=2)
    assert two.best.generated.entropy != reply.best.generated.entropy


def test_texts_depend_on_the_seed_and_their_place_alone(lm: LanguageModel) -> None:
    def texts(**options) -> list[list[list[int]]]:
        replies = lm.generate(PROMPTS, completions=2, **(WARM | options))
        return [[c.generated.tokens for c in r.completions] for r in replies]

    whole = texts()
    assert texts(batch_size=1) == whole
    assert texts(batch_size=4) == whole
    assert texts(seed=1) != whole
    assert all(len(r) == 2 for r in whole)
    replies = lm.generate(PROMPTS[:2], completions=3, **WARM)
    assert [[c.generated.tokens for c in r.completions][:2] for r in replies] == whole[:2]
    assert all(r.agreement is not None and len(r.agreement.clusters) == 3 for r in replies)
    assert replies[0].text == replies[0].completions[replies[0].agreement.best].text


def test_a_string_or_the_end_of_text_stops_it(lm: LanguageModel) -> None:
    (free,) = lm.generate("go", max_new_tokens=8)
    word = free.best.pieces[3].strip()
    (cut,) = lm.generate("go", max_new_tokens=8, stop=["never", word])
    end = next(i for i, piece in enumerate(free.best.pieces) if word in piece)
    assert cut.best.generated.tokens == free.best.generated.tokens[: end + 1]
    assert cut.best.generated.finish == "stop"
    assert word not in cut.text
    assert free.text.startswith(cut.text)
    assert lm.stop_ids() == {2}
    lm.model.get_base_model().generation_config.eos_token_id = [2, 5]
    assert lm.stop_ids() == {2, 5}
    lm.model.get_base_model().generation_config.eos_token_id = 2


def test_a_conversation_is_read_in_the_models_template(lm: LanguageModel) -> None:
    chat = [{"role": "de", "content": "fi go"}, {"role": "ku", "content": "la"}]
    (reply,) = lm.generate(chat, max_new_tokens=2)
    assert reply.prompt == "de fi go ku la ba"
    expected = slowly_from(lm, lm.tokenizer(reply.prompt, add_special_tokens=False).input_ids)
    assert reply.best.generated.tokens == expected
    assert len(lm.generate([chat, "go", chat], max_new_tokens=2)) == 3
    with pytest.raises(KilobayesError, match=r"a text or a conversation; found \[\{'content': 'x'\}\]"):
        lm.generate([{"content": "x"}])
    bare = AutoTokenizer.from_pretrained(small_lm.base())
    bare.chat_template = None
    with pytest.raises(KilobayesError, match="no template for conversations"):
        LanguageModel(lm.model, bare).generate(chat)


def slowly_from(lm: LanguageModel, ids: list[int]) -> list[int]:
    text = list(ids)
    for _ in range(2):
        each = (member_probs(lm.model, lm.draws(), text).log() / small_lm.TEMPERATURE).softmax(-1)
        text.append(int(each.mean(dim=0).argmax()))
    return text[len(ids) :]


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_a_base_or_adapter_alone_speaks_as_in_transformers(adapted: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_lm.base(), dtype=torch.float32)
    name = small_lm.base()
    if adapted:
        config = LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(model, config)
        model.save_pretrained(tmp_path)
        name = tmp_path
    alone = LanguageModel.load(name, device="cpu")
    assert alone.draws() is None
    replies = alone.generate(PROMPTS, max_new_tokens=8)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = torch.tensor([alone.tokenizer(prompt).input_ids])
        theirs = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        assert reply.best.generated.tokens == theirs[0, ids.shape[1] :].tolist()
        assert not any(reply.best.generated.information)


def test_wrong_input_is_explained(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(KilobayesError, match="prompt 2 is empty"):
        lm.generate(["go", "  "])
    with pytest.raises(KilobayesError, match="prompt 1 has 49 tokens; the model takes 48"):
        lm.generate("go " * 48)
    with pytest.raises(KilobayesError, match="there are no prompts"):
        lm.generate([])
    with pytest.raises(KilobayesError, match="3 completions would be the same; temperature 0"):
        lm.generate("go", completions=3)
    with pytest.raises(KilobayesError, match="--completions"):
        lm.generate("go", completions=0)
    with pytest.raises(KilobayesError, match="samples must be at least 1"):
        lm.generate("go", samples=0)
    with pytest.raises(KilobayesError, match="a text or a conversation"):
        lm.generate([3])
    with pytest.raises(KilobayesError, match=r"holds a classifier.*kilobayes predict"):
        LanguageModel.load(small_lm.run(task="classify"))
    with pytest.raises(KilobayesError, match="there is no file or directory"):
        LanguageModel.load(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"task_type": "SEQ_CLS"}))
    with pytest.raises(KilobayesError, match="does not continue texts; task_type SEQ_CLS"):
        LanguageModel.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(KilobayesError, match="damaged"):
        LanguageModel.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(KilobayesError, match=r"no adapter_model\.safetensors"):
        LanguageModel.load(tmp_path)


def test_a_linearised_posterior_is_refused(lm: LanguageModel) -> None:
    from kilobayes.posteriors import Laplace

    odd = LanguageModel(lm.model, lm.tokenizer, Laplace(), lm.state)
    with pytest.raises(KilobayesError, match="a linearised posterior does not generate"):
        odd.generate("go")


def test_a_text_stops_at_the_end_of_the_context(lm: LanguageModel) -> None:
    (reply,) = lm.generate("go " * 44, max_new_tokens=20, stop=[])
    written = reply.best.generated
    assert (len(written.tokens), written.finish) in {(3, "length")} | {(n, "stop") for n in (1, 2, 3)}


@real
def test_a_real_models_text_is_its_documented_one() -> None:
    lm = LanguageModel.load(STORIES, device="cpu")
    (reply,) = lm.generate("Once upon a time", max_new_tokens=40)
    assert reply.text.startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw"
    )
    assert "".join(reply.best.pieces) == reply.text


@real
@pytest.mark.parametrize("layers", [None, [3, 4]], ids=["all", "upper"])
def test_a_real_model_under_draws_equals_the_slow_way(layers: list[int] | None) -> None:
    lm = LanguageModel.load(STORIES, device="cpu")
    config = kb.KilobayesConfig(
        adapter=kb.LoRA(r=4), target_modules=["q_proj", "v_proj"], layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(lm.model, config).eval()
    gen = torch.Generator().manual_seed(2)
    theta = {k: 0.2 * torch.randn(4, *v.shape[1:], generator=gen) for k, v in kb.read(model).items()}
    from kilobayes.lm.decode import generate
    from kilobayes.lm.prompts import encode, padded

    texts = ["Once upon a time", "Lily saw a"]
    ids, mask = padded(lm.tokenizer, [encode(lm.tokenizer, text)[1] for text in texts])
    for sampling in (Sampling(5), Sampling(5, temperature=0.9, top_p=0.95)):
        gens = [torch.Generator().manual_seed(i) for i in range(2)]
        found = generate(model, theta, ids, mask, sampling, gen=gens)
        gens = [torch.Generator().manual_seed(i) for i in range(2)]
        for ours, theirs in zip(found, slowly(model, theta, ids, mask, sampling, gens), strict=True):
            assert ours.tokens == theirs["tokens"]
            for name in ("log_probs", "entropy", "information"):
                np.testing.assert_allclose(getattr(ours, name), theirs[name], rtol=2e-3, atol=5e-5)
