"""What cannot be calibrated is said in a line, with what to type; nothing is written then."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from kilobayes import cli

from .. import small
from ..integrations.training import base, plain

ROWS = small.rows(60, 7)
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    plain().save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def held(tmp_path: Path) -> str:
    return str(small.write(tmp_path / "val.jsonl", ROWS))


def broken(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_base(folder: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, **sizes))
    there = folder.parent / "other"
    shutil.copytree(small.base(), there)
    model.save_pretrained(there)
    broken(folder, base_model_name_or_path=str(there))


def dora(folder: Path) -> None:
    shutil.rmtree(folder)
    get_peft_model(base(), LoraConfig(use_dora=True, task_type="SEQ_CLS")).save_pretrained(folder)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def headless(folder: Path) -> None:
    """A LoRA without a head, on an encoder without one."""
    there = folder.parent / "encoder"
    shutil.copytree(small.base(), there)
    base().bert.save_pretrained(there)
    shutil.rmtree(folder)
    get_peft_model(base(), LoraConfig(target_modules=["query"])).save_pretrained(folder)
    broken(folder, base_model_name_or_path=str(there))


def damaged(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words", "message"),
    [
        (shutil.rmtree, [], "is no folder of an adapter"),
        (lambda f: (f / "adapter_config.json").unlink(), [], "there is no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").rename(f / "config.json"), [], "but a whole model"),
        (pickled, [], "read by unpickling"),
        (damaged, [], "is damaged"),
        (dora, [], "only plain LoRA.*use_dora"),
        (lambda f: broken(f, peft_type="IA3"), [], "method IA3 cannot be calibrated.*known: LORA"),
        (lambda f: broken(f, task_type="TOKEN_CLS"), [], "is not for --task classify"),
        (lambda f: broken(f, base_model_name_or_path=None), [], "names no base model"),
        (lambda f: broken(f, base_model_name_or_path="nowhere/there"), [], "no local directory"),
        (other_base, [], "does not fit"),
        (lambda f: broken(f, target_modules=["query"]), [], "weights on one side only"),
        (headless, [], "lacks weights that"),
        (None, ["--classes", "warm,cold"], "the adapter has 3 classes"),
        (None, ["--classes", "a,b,c"], 'unknown label "'),
        (None, ["--label-column", "nothing"], "nothing"),
        (None, ["--limit", "5"], "too few to calibrate on"),
        (None, ["--posterior", "SWAG(rank=3)"], "comes of training"),
        (None, ["--posterior", "Temperature(Ensemble(Point(), members=2))"], "2 members"),
        (None, ["--posterior", "Temprature()"], "Temperature"),
    ],
)
def test_what_cannot_be_calibrated_is_said(
    damage: Any,
    words: list[str],
    message: str,
    adapter: Path,
    held: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if damage is not None:
        damage(adapter)
    capsys.readouterr()
    code = cli.run(["calibrate", str(adapter), "--data", held, "--out", str(tmp_path / "run"), *words])
    told = " ".join(capsys.readouterr().err.split())
    assert code == 2, told
    assert re.search(message, told), told
    assert not (tmp_path / "run").exists()


def test_rows_without_labels_are_refused(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = small.write(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    assert cli.run(["calibrate", str(adapter), "--data", str(source), "--out", str(tmp_path / "r")]) == 2
    assert "label" in capsys.readouterr().err
