"""A finished LoRA or run gets a posterior that is fitted: its scores stay, and what is written is a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from transformers import AutoTokenizer

import kilobayes as kb
from kilobayes import cli, host
from kilobayes.energy import ModelEnergy
from kilobayes.posteriors import Point, ask
from kilobayes.random import generator
from kilobayes.tasks.data import load_examples
from kilobayes.workflows.calibrate import Calibrated, calibrate
from kilobayes.workflows.calibration_rows import Sources
from kilobayes.workflows.finetune import load

from .. import small
from ..integrations.training import base, plain, train

ROWS = small.rows(120, 7)
TEXTS = [row["text"] for row in small.rows(25, 9)]


def scores(model: Any, texts: list[str]) -> np.ndarray:
    """What transformers and PEFT say."""
    inputs = AutoTokenizer.from_pretrained(small.base())(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.double().numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A plain LoRA that Trainer trained: layers of two ranks, classes called LABEL_0 to LABEL_2."""
    model = plain(rank_pattern={"value": 2}, alpha_pattern={"value": 6})
    found = train(model, tmp_path_factory.mktemp("trainer"), rows=96, num_train_epochs=10).model
    with torch.no_grad():  # too sure of itself
        for name, value in found.named_parameters():
            if "classifier.modules_to_save" in name:
                value.mul_(10.0)
    return found


@pytest.fixture
def adapter(trained: Any, tmp_path: Path) -> Path:
    trained.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def held(tmp_path: Path) -> str:
    return str(small.write(tmp_path / "val.jsonl", ROWS))


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    def nll(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        return float(np.mean(np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))

    return float(np.exp(minimize_scalar(nll, bounds=(-3, 3), method="bounded").x))


def test_a_lora_keeps_its_scores_and_gets_the_best_temperature(
    adapter: Path, trained: Any, held: str
) -> None:
    done = calibrate(adapter, Sources(held), classes=small.LABELS)
    logits = scores(trained, [row["text"] for row in ROWS])
    labels = np.array([small.LABELS.index(row["label"]) for row in ROWS])
    found = done.before.predict(done.rows.calibration).logits[0].numpy()
    np.testing.assert_allclose(found, logits, atol=1e-4)
    temperature = best_temperature(logits, labels)
    assert temperature > 1.1
    assert done.fitted.state.temperature.item() == pytest.approx(temperature, rel=1e-3)
    assert done.fitted.card.posterior.startswith("Temperature(base=Point(")
    assert done.notes == []


def test_the_command_writes_a_run_that_others_read(
    adapter: Path, trained: Any, held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = str(small.write(tmp_path / "test.jsonl", small.rows(50, 11)))
    out = tmp_path / "run"
    words = ["calibrate", str(adapter), "--data", held, "--test", test, "--classes", "warm,cold,fresh"]
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert cli.run([*words, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["nll"] < found["before"]["nll"]
    assert found["after"]["accuracy"] == found["before"]["accuracy"]
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert {"report.html", "metrics.json", "predictions.jsonl", "README.md", "run.yaml"} <= {
        path.name for path in out.iterdir()
    }
    temperature = load_file(out / "posterior.safetensors")["temperature"].item()
    expected = torch.from_numpy(scores(trained, TEXTS) / temperature).softmax(-1).numpy()
    np.testing.assert_allclose(kb.load(out).predict_proba(TEXTS), expected, atol=1e-5)
    source = str(small.write(tmp_path / "new.jsonl", [{"text": text} for text in TEXTS]))
    assert cli.run(["predict", str(out), "--input", source, "--output", str(tmp_path / "o.jsonl")]) == 0
    assert [row["text"] for row in small.read(tmp_path / "o.jsonl")] == TEXTS
    capsys.readouterr()
    assert cli.run(["evaluate", str(out), "--data", test, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["nll"] == pytest.approx(found["after"]["nll"], abs=1e-6)
    assert cli.run([*words, "--out", str(out)]) == 2
    assert "holds something already" in capsys.readouterr().err


def test_the_order_of_the_classes(adapter: Path, held: str) -> None:
    """Trained as warm, cold, fresh; sorted is another order, which is told. A configuration settles it."""
    by_name = calibrate(adapter, Sources(held))
    assert by_name.fitted.card.classes == ["cold", "fresh", "warm"]
    assert "classes in another order" in by_name.notes[0]
    named = {"id2label": {str(i): label for i, label in enumerate(small.LABELS)}}
    (adapter / "config.json").write_text(json.dumps(named))
    settled = calibrate(adapter, Sources(held))
    assert settled.fitted.card.classes == small.LABELS
    assert settled.notes == []
    numbers = [row | {"label": small.LABELS.index(row["label"])} for row in ROWS]
    (adapter / "config.json").unlink()
    whole = calibrate(adapter, Sources([row for row in numbers if row["label"] != 1]))
    assert whole.fitted.card.classes == ["0", "1", "2"]
    assert whole.fitted.card.label_kind == "int"


@pytest.mark.parametrize("spec", ["Temperature(TFB())", "Temperature(Laplace(over='*/A', rank=4))"])
def test_posteriors_that_are_fitted_afterwards(spec: str, adapter: Path, held: str, tmp_path: Path) -> None:
    alone = calibrate(adapter, Sources(held), spec, classes=small.LABELS)
    assert any("stand for them" in note for note in alone.notes)
    rows = small.rows(64, 1)
    done = calibrate(adapter, Sources(held, train=rows), spec, classes=small.LABELS)
    assert not any("stand for them" in note for note in done.notes)
    for found in (alone, done):
        assert found.fitted.predict(found.rows.calibration).mutual_info.max() > 0
    assert not same(alone, done)
    mean = done.fitted.posterior.mean(done.fitted.state)
    assert all(torch.equal(value, mean[key]) for key, value in host.read(done.before.model).items())


def same(one: Calibrated, other: Calibrated) -> bool:
    a, b = (done.fitted.predict(done.rows.calibration).logits for done in (one, other))
    return a.shape == b.shape and bool(torch.equal(a, b))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "swag"
    classifier = kb.Classifier(
        small.base(), "LoRA(r=2)", "SWAG(rank=2)", epochs=3, lr=0.02, batch_size=8, max_length=24
    )
    rows = small.rows(60, 1)
    classifier.fit([row["text"] for row in rows], [row["label"] for row in rows]).save(folder)
    return folder


def test_a_run_keeps_what_training_gave_it(run: Path, held: str, tmp_path: Path) -> None:
    done = calibrate(run, Sources(held))
    assert done.fitted.card.posterior.startswith("Temperature(base=SWAG(rank=2")
    before = load(run)
    for name in ("average", "squares", "deviations"):
        ours, theirs = (getattr(state, name) for state in (done.fitted.state.inner, before.state))
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    energy = ModelEnergy(before.model, before.task, before.encode(done.rows.calibration))
    logits = ask.logits(before.posterior, before.state, energy, 10, generator(before.card.seed, 6))
    labels = torch.tensor(done.rows.calibration.labels)
    assert done.fitted.state.temperature.item() != 1.0

    def nll(temperature: float) -> float:
        mixed = (logits.double() / temperature).softmax(-1).mean(0)
        return -float(mixed[torch.arange(len(labels)), labels].log().mean())

    best = done.fitted.state.temperature.item()
    assert nll(best) <= min(nll(best * 1.05), nll(best / 1.05), nll(1.0))
    classifier = kb.calibrate(run, data=held)
    assert np.array_equal(classifier.predict_proba(TEXTS), done.fitted.predict(examples()).probs.numpy())
    classifier.save(tmp_path / "again")
    twice = calibrate(tmp_path / "again", Sources(held))
    assert twice.fitted.card.posterior == done.fitted.card.posterior
    assert twice.fitted.state.temperature.item() == pytest.approx(best)


def examples() -> Any:
    return load_examples(TEXTS, need_labels=False)


def test_a_run_can_take_another_posterior(run: Path, held: str) -> None:
    done = calibrate(run, Sources(held, train=small.rows(60, 1)), "Temperature(TFB(SWAG(rank=2)))")
    assert done.fitted.state.inner.sigma.item() >= 0
    fresh = calibrate(run, Sources(held), "Point()")
    assert isinstance(fresh.fitted.posterior, Point)
    mean = load(run).posterior.mean(load(run).state)
    assert all(torch.equal(v, fresh.fitted.state.theta[k]) for k, v in mean.items())


def test_trained_biases_are_kept(held: str, tmp_path: Path) -> None:
    model = plain(bias="lora_only")
    for name, value in model.named_parameters():
        if value.requires_grad and name.endswith("base_layer.bias"):
            value.data += 0.5
    model.save_pretrained(tmp_path / "lora")
    kb.calibrate(tmp_path / "lora", held, "Point()", classes=small.LABELS).save(tmp_path / "run")
    expected = torch.from_numpy(scores(model, TEXTS)).softmax(-1).numpy()
    np.testing.assert_allclose(kb.load(tmp_path / "run").predict_proba(TEXTS), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Unless you set `save_projection=True`")
@pytest.mark.parametrize("kind", ["VeRA", "VB-LoRA"])
def test_other_methods_of_pefts_are_calibrated_too(kind: str, held: str, tmp_path: Path) -> None:
    from peft import VBLoRAConfig, VeraConfig, get_peft_model

    common: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    config = (
        VeraConfig(r=8, **common)
        if kind == "VeRA"
        else VBLoRAConfig(r=2, num_vectors=8, vector_length=8, **common)
    )
    model: Any = get_peft_model(base(), config)
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=gen)
    model.save_pretrained(str(tmp_path / "peft"))
    done = calibrate(tmp_path / "peft", Sources(held), classes=small.LABELS, model=str(small.base()))
    expected = scores(model, [row["text"] for row in ROWS])
    np.testing.assert_allclose(
        done.before.predict(done.rows.calibration).logits[0].numpy(), expected, atol=1e-4
    )
