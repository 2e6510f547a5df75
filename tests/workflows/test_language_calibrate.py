"""A finished LoRA of a language model gets a posterior: its scores stay, and other commands read the run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize_scalar
from transformers import AutoModelForCausalLM, AutoTokenizer

import kilobayes as kb
from kilobayes import cli
from kilobayes.errors import KilobayesError
from kilobayes.tasks.text import Documents
from kilobayes.workflows.calibration_rows import Sources
from kilobayes.workflows.language_calibrate import calibrate

from .. import small_lm

TEXTS = [" ".join(small_lm.WORDS[(i * j) % 60] for j in range(1, 20)) for i in range(1, 13)]
HELD = Documents("text", TEXTS[:8])


@pytest.fixture(scope="module")
def model() -> Any:
    """A plain LoRA of PEFT's, its B drawn so that it says something."""
    base = AutoModelForCausalLM.from_pretrained(small_lm.base())
    base.config._name_or_path = str(small_lm.base())
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    found = get_peft_model(base, config)
    gen = torch.Generator().manual_seed(1)
    for name, value in found.named_parameters():
        if "lora_B" in name:
            value.data = 0.3 * torch.randn(value.shape, generator=gen)
    found.peft_config["default"].base_model_name_or_path = str(small_lm.base())
    return found.eval()


@pytest.fixture
def adapter(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def scores(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """What transformers and PEFT say at every token of the held-out texts, and the tokens."""
    tokenizer = AutoTokenizer.from_pretrained(small_lm.base())
    logits, labels = [], []
    for text in HELD.rows:
        ids = [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        with torch.no_grad():
            logits.append(model(torch.tensor([ids[:-1]])).logits[0].double().numpy())
        labels += ids[1:]
    return np.concatenate(logits), np.array(labels)


def test_a_lora_keeps_its_scores_and_gets_the_best_temperature(adapter: Path, model: Any) -> None:
    done = calibrate(adapter, Sources(HELD))
    logits, labels = scores(model)

    def nll(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        return float(np.mean(np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))

    assert done.before.scores(HELD).nll.mean() == pytest.approx(nll(0.0), abs=1e-5)
    best = float(np.exp(minimize_scalar(nll, bounds=(-3, 3), method="bounded").x))
    assert float(done.fitted.state.temperature) == pytest.approx(best, rel=1e-3)
    assert done.fitted.scores(HELD).nll.mean() == pytest.approx(nll(np.log(best)), abs=1e-5)
    assert any("are few" in note for note in done.notes)


def test_the_command_writes_a_run_that_others_read(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in (("validation", TEXTS[:8]), ("test", TEXTS[6:])):
        (data / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in rows) + "\n")
    out = tmp_path / "run"
    flags = ["--data", str(data), "--test", "test", "--out", str(out), "--json"]
    assert cli.run(["calibrate", str(adapter), *flags]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["after"]["nll"][0] < found["before"]["nll"][0]
    assert any("2 of the rows evaluated on were also calibrated on" in note for note in found["notes"])
    assert {"report.html", "metrics.json", "README.md", "run.yaml", "cost.json"} <= {
        path.name for path in out.iterdir()
    }
    assert cli.run(["evaluate", str(out), "--data", str(data), "--split", "test", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["metrics"]
    assert again["nll"] == pytest.approx(found["after"]["nll"], abs=1e-5)
    assert cli.run(["generate", str(out), "--prompt", "ba be", "--max-new-tokens", "3"]) == 0
    assert cli.run(["calibrate", str(out), "--data", str(data), "--out", str(tmp_path / "again")]) == 0
    assert cli.run(["calibrate", str(adapter), *flags]) == 2  # it holds a run


@pytest.mark.parametrize(
    "posterior",
    ["Laplace(structure='diag')", "Temperature(Laplace(structure='kron'))", "TFB(samples=2, rows=64)",
     "Temperature(TFB(samples=2, rows=64))"],
)  # fmt: skip
def test_posteriors_that_are_fitted_afterwards(posterior: str, adapter: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = kb.calibrate(adapter, HELD, posterior)
    assert any("stand for them in the fit" in str(w.message) for w in warned)
    assert "linearised=True" not in repr(found.posterior)
    found.save(tmp_path / "run")
    again = kb.load(tmp_path / "run")
    sampling: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 4, "samples": 4}
    (one,), (other,) = (each.generate("ba be bi", **sampling) for each in (found, again))
    assert one.text == other.text
    information = one.completions[0].generated.information
    assert information == other.completions[0].generated.information
    assert max(information) > 0


def test_training_texts_are_used_where_they_are_given(adapter: Path) -> None:
    train = Documents("text", TEXTS[4:])
    given = calibrate(adapter, Sources(HELD, train=train), "Laplace(structure='diag')")
    alone = calibrate(adapter, Sources(HELD), "Laplace(structure='diag')")
    assert not any("stand for them" in note for note in given.notes)
    assert any("4 of the rows calibrated on were also trained on" in note for note in given.notes)
    assert not torch.equal(given.fitted.state.precision, alone.fitted.state.precision)


def test_what_cannot_be_calibrated_is_said(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(KilobayesError, match="comes of training"):
        calibrate(adapter, Sources(HELD), "SWAG(rank=2)")
    with pytest.raises(KilobayesError, match="too few to calibrate on"):
        calibrate(adapter, Sources(HELD.take([0])))
    config = adapter / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"task_type": "SEQ_CLS"}))
    with pytest.raises(KilobayesError, match="not for --task lm"):
        calibrate(adapter, Sources(HELD))
    with pytest.raises(KilobayesError, match="has no split"):
        calibrate(adapter, Sources({"text": TEXTS}, split="held"))


def test_a_model_without_a_posterior_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(KilobayesError, match="no posterior to save"):
        kb.LanguageModel.load(small_lm.base()).save(tmp_path)
