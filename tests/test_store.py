"""Saved runs: equal to those in memory, refused when damaged or of another base, safe from a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kilobayes import host, store
from kilobayes.checkpoint import read_tensors
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_lines, write_text_atomically
from kilobayes.options import Options
from kilobayes.predict import logits
from kilobayes.tasks.data import load_examples
from kilobayes.workflows.finetune import Fitted, fit_examples, load

from . import small

ROWS = small.rows(40, 3)
POSTERIORS = [
    "Point()",
    "SWAG(rank=2)",
    "Temperature(Point())",
    "Temperature(Ensemble(SWAG(rank=2), members=2))",
    "Ensemble(Point(), members=3)",
]


def fit(posterior: str) -> Fitted:
    options = Options(
        data="d", model=small.base(), posterior=posterior, epochs=2, lr=0.01, adapter="LoRA(r=2)"
    )
    examples = load_examples(ROWS)
    return fit_examples(options, examples, load_examples(ROWS[:12], classes=examples.classes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SWAG."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    fitted = fit("SWAG(rank=2)")
    store.save(folder, fitted.model, fitted.posterior, fitted.state, fitted.card)
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_loaded_run_predicts_exactly_what_it_did_in_memory(posterior: str, tmp_path: Path) -> None:
    fitted = fit(posterior)
    texts = load_examples([r["text"] for r in small.rows(30, 8)], need_labels=False)
    before = fitted.predict(texts).logits
    sizes = store.save(tmp_path, fitted.model, fitted.posterior, fitted.state, fitted.card)
    assert torch.equal(fitted.predict(texts).logits, before)
    again = load(tmp_path)
    assert torch.equal(again.predict(texts).logits, before)
    assert again.card == fitted.card
    members = 3 if "members=3" in posterior else 2 if "members=2" in posterior else 1
    assert sizes["head"] == members * 4 * (3 * 16 + 3)
    assert sizes["adapter"] == members * 4 * 4 * 2 * 32


def test_peft_loads_the_mean(saved: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(
        small.base(), num_labels=3, ignore_mismatched_sizes=True
    )
    model: Any = PeftModel.from_pretrained(base, str(saved)).eval()
    ours = load(saved)
    mean = ours.posterior.mean(ours.state)
    theirs = host.read(model)
    assert set(theirs) == set(mean)
    assert all(torch.equal(theirs[k], v) for k, v in mean.items())
    texts = [r["text"] for r in ROWS]
    tokens = AutoTokenizer.from_pretrained(small.base())(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**tokens).logits
    encoded = ours.encode(load_examples(texts, need_labels=False))
    torch.testing.assert_close(
        found[None], logits(ours.model, mean, ours.task, encoded), rtol=1e-4, atol=1e-5
    )


def test_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(small.base(), tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(KilobayesError, match=r"is not the one this run was trained on.*fingerprint"):
        load(run, model=str(other))
    load(run, model=str(shutil.copytree(small.base(), tmp_path / "same")))


def edit(run: Path, **changes: Any) -> None:
    card = json.loads((run / "posterior.json").read_text())
    write_json(run / "posterior.json", {k: v for k, v in (card | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "abc"}, "classes is 'abc'"),
        ({"classes": ["a", "a"]}, "classes are"),
        ({"classes": ["a", 3]}, "classes is"),
        ({"classes": ["a", "b"]}, "classifier|do not fit|cannot be loaded"),
        ({"samples": 0}, "0 samples"),
        ({"samples": True}, "samples is True"),
        ({"samples": "ten"}, "samples is 'ten'"),
        ({"fingerprint": None}, "fingerprint"),
        ({"format": 99}, "newer kilobayes"),
        ({"format": []}, "damaged"),
        ({"posterior": "SWAG(rank=__import__('os').system('true'))"}, "is not a method's specification"),
        ({"posterior": "Ensemble(SWAG(rank=2), members=2)"}, "does not hold"),
        ({"posterior": "Temperature(SWAG(rank=2))"}, "does not hold"),
        ({"posterior": "(" * 3000}, "not a method's specification"),
        ({"adapter": "LoRA(r=3)"}, "of different runs"),
        ({"target_modules": ["x"]}, "of different runs"),
        ({"max_length": -3}, "-3 tokens"),
        ({"dtype": "float7"}, "unknown dtype"),
        ({"label_kind": "object"}, "labels of 'object'"),
    ],
)
def test_a_card_that_was_tampered_with(run: Path, changes: dict[str, Any], message: str) -> None:
    edit(run, **changes)
    with pytest.raises(KilobayesError, match=message) as error:
        load(run)
    assert len(str(error.value)) < 4000


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"posterior": 3}', "\x00", "null"])
def test_a_card_that_is_no_json(run: Path, text: str) -> None:
    (run / "posterior.json").write_text(text)
    with pytest.raises(KilobayesError, match="is damaged"):
        load(run)


@pytest.mark.parametrize("name", ["posterior.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_tensors(run: Path, name: str, keep: int) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:keep])
    with pytest.raises(KilobayesError, match=f"{name} is damaged"):
        load(run)


@pytest.mark.parametrize(
    "name", ["posterior.safetensors", "adapter_model.safetensors", "adapter_config.json"]
)
def test_missing_files(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(KilobayesError, match=f"{name} is missing"):
        load(run)


def test_a_pickle_in_place_of_the_adapter_is_not_read(run: Path) -> None:
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")
    with pytest.raises(KilobayesError, match="is missing"):
        load(run)


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(k for k in tensors if part in k)


@pytest.mark.parametrize("change", ["drop", "shape", "extra member", "nan", "rename"])
def test_a_posterior_that_does_not_fit(run: Path, change: str) -> None:
    path = run / "posterior.safetensors"
    tensors, _ = read_tensors(path)
    key = first(tensors, "/A")
    if change == "drop":
        del tensors[key]
    elif change == "shape":
        tensors[key] = tensors[key][..., :-1].contiguous()
    elif change == "extra member":
        tensors = {k: torch.cat([v, v]) for k, v in tensors.items()}
    elif change == "nan":
        tensors[key].flatten()[0] = float("nan")
    else:
        tensors[key + "x"] = tensors.pop(key)
    save_file(tensors, path)
    with pytest.raises(KilobayesError, match="does not hold a SWAG"):
        load(run)


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"peft_type": "LORA", "r": 2}', '{"peft_type": "KILOBAYES", "adapter": "X"}']
)
def test_a_damaged_adapter_configuration(run: Path, text: str) -> None:
    (run / "adapter_config.json").write_text(text)
    with pytest.raises(KilobayesError, match=r"cannot be loaded|of different runs|X"):
        load(run)


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failing_disk_leaves_the_files_that_were_there(
    saved: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    fitted = fit("SWAG(rank=2, scale=0.5)")
    for broken in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, full)
            with pytest.raises(OSError, match="No space left"):
                store.save(run, fitted.model, fitted.posterior, fitted.state, fitted.card)
            with pytest.raises(OSError, match="No space left"):
                write_json(run / "posterior.json", {})
        assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    assert load(run).card.posterior == load(saved).card.posterior


def test_text_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "made" / "a.txt"
    write_text_atomically(path, "é\n")
    with pytest.raises(ValueError, match="JSON"):
        write_lines(path, [{"a": 1}, {"a": float("nan")}])
    assert path.read_text(encoding="utf-8") == "é\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_run_that_does_not_read_back_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fit("Point()")
    monkeypatch.setattr(store, "read_tensors", lambda path: ({}, {}))
    with pytest.raises(KilobayesError, match="does not read back as it was written"):
        store.save(tmp_path, fitted.model, fitted.posterior, fitted.state, fitted.card)
