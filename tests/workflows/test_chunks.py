"""Members trained some at a time: the stack's result, its divergences, and resuming inside a chunk."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.base import clone
from torch import Tensor

from kilobayes import cli, train, tree
from kilobayes.adapters import LoRA
from kilobayes.checkpoint import read_tensors
from kilobayes.energy import ModelEnergy
from kilobayes.estimator import Classifier
from kilobayes.posteriors import ASWA, SWAG, BLoB, Ensemble, Point
from kilobayes.testing.tiny import TinyRows, TinyTask, nll, tiny_model, tiny_start
from kilobayes.types import Posterior
from kilobayes.workflows import chunks

from .. import small
from .test_resume import SAME, start

ROWS = TinyRows.make(27, seed=4)
SEEDS = (5, 2, 11, 3, 8)


def run(posterior: Posterior, at_once: int, double: bool = False, **changes: Any) -> train.Trained:
    model = tiny_model(LoRA(r=2, dropout=0.25))
    plain: dict[str, Any] = {"lr": 0.01, "epochs": 2, "batch_size": 8, "seeds": SEEDS}
    held: Any = ModelEnergy(model, TinyTask(), TinyRows.make(24, seed=1))  # type: ignore[arg-type]

    def begin(seeds: list[int]) -> Any:
        theta = tiny_start(model, seeds)
        return tree.map_params(Tensor.double, theta) if double else theta

    if double:
        model.double()
    chosen = train.Settings(**plain | changes)
    watch = WATCHED.append
    return chunks.fit(
        model,
        ROWS,
        double_nll if double else nll,
        posterior,
        begin,
        chosen,
        at_once,
        energy=held,
        watch=lambda progress, loss: watch(len(loss)),
    )


WATCHED: list[int] = []


def double_nll(output: Any, labels: Tensor) -> Tensor:
    scores = output.logits.reshape(*labels.shape, -1).log_softmax(-1)
    return -scores.gather(-1, labels[..., None])[..., 0]


@pytest.mark.parametrize(
    ("base", "double", "tolerance"),
    [
        (Point(), True, 1e-9),
        (Point(), False, 1e-5),
        (SWAG(rank=2), True, 1e-9),
        (ASWA(start=0.0), True, 1e-9),
        (BLoB(), False, 1e-4),
    ],
)
def test_chunks_end_where_the_stack_does(base: Posterior, double: bool, tolerance: float) -> None:
    posterior = Ensemble(base, members=5)
    rates = (0.01, 0.002, 0.02, 0.005, 0.01)
    whole = run(posterior, 0, double, lr=rates)
    WATCHED.clear()
    parts = run(posterior, 2, double, lr=rates)
    assert WATCHED == [2] * 8 + [2] * 8 + [1] * 8
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-4, atol=1e-5)
    ours, theirs = tree.flatten_state(parts.state), tree.flatten_state(whole.state)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        size = float(value.abs().max())
        assert ours[key].shape == value.shape
        assert float((ours[key] - value).abs().max()) <= tolerance * size, key


def test_a_chunk_that_diverges_leaves_the_others() -> None:
    rates = (0.01, 1e30, 1e30, 0.01, 1e30)
    posterior = Ensemble(Point(), members=5)
    found, whole = (run(posterior, size, lr=rates) for size in (1, 0))
    assert found.diverged == whole.diverged == [1, 2, 4]
    assert bool(found.losses[:, [1, 2, 4]].isnan().all())
    kept = torch.tensor([0, 3])
    ours, theirs = (tree.state_member(t.state, kept).theta for t in (found, whole))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(train.Diverged, match="diverged at step"):
        run(posterior, 2, lr=1e30)


def test_the_clock_is_shared_out_over_chunks() -> None:
    stopped = run(Ensemble(Point(), members=5), 2, max_seconds=1e-9)
    assert stopped.stopped == "time"
    assert stopped.losses.shape == (1, 5)


POSTERIOR = "Temperature(Ensemble(SWAG(rank=2, start=0.3), members=5))"


def words(data: Path, folder: Path, at_once: int = 2) -> list[str]:
    flags = ["train", "--model", small.base(), "--data", str(data), "--out", str(folder), "--seed", "5"]
    return [*flags, *small.QUICK, "--posterior", POSTERIOR, "--at-once", str(at_once)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, run): five members in chunks of two, which nobody disturbed."""
    folder = tmp_path_factory.mktemp("chunks")
    data, run_ = small.data(folder / "data"), folder / "run"
    assert cli.run(words(data, run_)) == 0
    return data, run_


def test_a_run_in_chunks_is_a_run(reference: tuple[Path, Path], tmp_path: Path) -> None:
    data, folder = reference
    assert len(small.read(folder / "log.jsonl")) == 12
    assert all(len(row["loss"]) == 5 for row in small.read(folder / "log.jsonl"))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["latest-2.safetensors", "latest-4.safetensors", "latest.safetensors"]
    assert cli.run(words(data, tmp_path / "whole", 0)) == 0
    found, other = (read_tensors(f / "posterior.safetensors")[0] for f in (folder, tmp_path / "whole"))
    assert set(found) == set(other)
    for key, value in other.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


def test_a_run_killed_inside_the_second_chunk(
    reference: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """12 steps a chunk and a checkpoint at every third: the second chunk's is at its third step."""
    data, whole = reference
    folder = tmp_path / "run"
    assert start("step:17", "SIGKILL", words(data, folder)).returncode == -signal.SIGKILL
    resume = ["train", "--resume", "--out", str(folder)]
    assert cli.run([*resume, "--at-once", "3"]) == 2
    assert "at_once: 2 there, 3 here" in " ".join(capsys.readouterr().err.split())
    taken: list[int] = []
    step = train.Step.run

    def counted(*args: Any) -> Any:
        taken.append(1)
        return step(*args)

    monkeypatch.setattr(train.Step, "run", counted)
    assert cli.run(resume) == 0
    assert len(taken) == 36 - 12 - 3
    assert [name for name in SAME if not small.same_files(folder, whole, name)] == []


def test_the_classifier_trains_in_chunks() -> None:
    rows = small.rows(40, 3)
    texts, labels = [r["text"] for r in rows], [r["label"] for r in rows]
    plain = Classifier(small.base(), "LoRA(r=2)", "Ensemble(members=3)", epochs=1, lr=0.01, max_length=24)
    whole, parts = (
        clone(plain).set_params(at_once=size).fit(texts, labels).predict_proba(texts[:9]) for size in (0, 1)
    )
    assert abs(whole - parts).max() < 1e-4
