from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

import kilobayes as kb
from kilobayes import cli, host, spec, store, tree
from kilobayes.errors import KilobayesError
from kilobayes.models import load_base
from kilobayes.types import Params, Progress, delta
from kilobayes.workflows.arithmetic import combine
from kilobayes.workflows.finetune import fingerprint_of, load

from .. import small, small_lm

Make = Callable[..., str]
SWAG = "SWAG(rank=3, start=0.0)"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A run whose weights were drawn, not trained."""
    place = tmp_path_factory.mktemp("runs")

    def one(seed: int, adapter: str = "LoRA(r=2)", posterior: str = "Point()", **more: Any) -> str:
        folder = place / f"{seed}-{abs(hash((adapter, posterior, repr(more)))):x}"
        if folder.exists():
            return str(folder)
        classes = more.pop("classes", small.LABELS)
        base = load_base(small.base(), classes)
        print_ = fingerprint_of(base)
        targets = more.pop("targets", ["query", "value"])
        config = host.KilobayesConfig(adapter=adapter, target_modules=targets, task_type="SEQ_CLS")
        model = get_peft_model(base.model, config)
        gen = torch.Generator().manual_seed(seed)
        made, leaves = spec.posterior(posterior), host.read(model)
        count = getattr(made, "members", 1)
        like = {k: torch.zeros(count, *v.shape[1:]) for k, v in leaves.items()}
        state = made.init(like, gen)
        for step in range(1, 9):
            theta = {k: 0.3 * torch.randn(v.shape, generator=gen) for k, v in like.items()}
            state = made.observe(state, theta, Progress(step, 8, 1, 8))
        card: dict[str, Any] = {"max_length": 24, "samples": 4, "seed": seed} | more
        card |= {"base": small.base(), "fingerprint": print_, "classes": list(classes)}
        card |= {"posterior": repr(made), "adapter": repr(host.method(model))}
        card |= {"target_modules": [site.name for site in host.sites(model)]}
        store.save(folder, model, made, state, store.Card(**card))
        return str(folder)

    return one


def updates(model: Any, theta: Params) -> dict[str, np.ndarray]:
    built = host.build(model, theta)
    return {s.name: delta(built[s.name], s.d_in).detach().double().numpy() for s in host.sites(model)}


def heads(theta: Params) -> Params:
    return {k: v for k, v in theta.items() if tree.split_key(k)[1] in ("weight", "bias")}


def check(found: Any, runs: list[Any], weights: list[float], tolerance: float = 1e-5) -> None:
    """Updates are the sum, and heads its share, by numpy."""
    theta = found.posterior.mean(found.state)
    each = [updates(r.model, r.posterior.mean(r.state)) for r in runs]
    for site, matrix in updates(found.model, theta).items():
        wanted = sum(w * e[site] for w, e in zip(weights, each, strict=True))
        np.testing.assert_allclose(matrix, wanted, atol=tolerance * np.abs(wanted).max())
    own = [heads(r.posterior.mean(r.state)) for r in runs]
    assert len(own[0]) == 2
    for key, value in heads(theta).items():
        wanted_head = sum(w * h[key] for w, h in zip(weights, own, strict=True)) / sum(weights)
        torch.testing.assert_close(value, wanted_head, atol=1e-5, rtol=1e-5)


def test_loras_are_summed_by_their_updates(make: Make, tmp_path: Path) -> None:
    """Exactly at the sum of the ranks, at a lower one as well as can be; saved, the same."""
    a, b = make(1), make(2)
    runs = [load(Path(f)) for f in (a, b)]
    found = combine({a: 0.7, b: 0.6})
    assert (found.how, found.card.adapter) == ("updates", repr(kb.LoRA(r=4, alpha=4.0)))
    assert found.lost < 1e-6
    check(found, runs, [0.7, 0.6])
    lower = combine({a: 0.7, b: 0.6}, rank=1)
    exact, best = (updates(f.model, f.state.theta) for f in (found, lower))
    apart = whole = 0.0
    for site, matrix in exact.items():
        u, s, vt = np.linalg.svd(matrix[0])
        np.testing.assert_allclose(best[site][0], s[0] * np.outer(u[:, 0], vt[0]), atol=1e-5)
        apart, whole = apart + (s[1:] ** 2).sum(), whole + (s**2).sum()
    assert lower.lost == pytest.approx((apart / whole) ** 0.5, rel=1e-4)
    plain = combine({a: 0.7, b: 0.6}, how="leaves")
    assert plain.lost > 0.3
    # through files, in Python and by the command line
    one = kb.combine({a: 0.7, b: 0.6}, tmp_path / "one")
    assert cli.run(["arithmetic", f"0.7*{a} + 0.6*{b}", "--out", str(tmp_path / "two")]) == 0
    two = kb.load(tmp_path / "two")
    texts = [row["text"] for row in small.rows(5)]
    np.testing.assert_array_equal(one.predict_proba(texts), two.predict_proba(texts))
    told = json.loads((tmp_path / "two" / "arithmetic.json").read_text())
    assert told["terms"] == {a: 0.7, b: 0.6}
    with pytest.raises(KilobayesError, match="holds a run already"):
        kb.combine({a: 1.0}, tmp_path / "one")


@pytest.mark.parametrize("adapter", ["LoRAXS(r=3)", "MoRA(r=2)"])
def test_linear_adapters_stay_what_they_are(make: Make, adapter: str) -> None:
    a, b = make(1, adapter), make(2, adapter)
    found = combine({a: 0.5, b: -0.2})
    assert found.how == "leaves"
    check(found, [load(Path(f)) for f in (a, b)], [0.5, -0.2])
    assert found.card.adapter == repr(spec.adapter(adapter))


def test_swag_of_a_linear_adapter_has_the_sum_s_moments(make: Make) -> None:
    a, b = (make(s, "LoRAXS(r=3)", f"Temperature({SWAG})") for s in (1, 2))
    found = combine({a: 0.5, b: 0.5})
    assert found.card.posterior == repr(kb.SWAG(rank=6))
    assert "Temperatures" in found.notes[0]
    runs = [load(Path(f)) for f in (a, b)]
    check(found, runs, [0.5, 0.5])
    variance = [
        tree.flat(r.posterior.sample(r.state, 4000, torch.Generator().manual_seed(1))).var(0) for r in runs
    ]
    own = tree.flat(found.posterior.sample(found.state, 4000, torch.Generator().manual_seed(2))).var(0)
    torch.testing.assert_close(own, (variance[0] + variance[1]) / 4, rtol=0.2, atol=0)


def test_other_posteriors_are_summed_by_draws(make: Make) -> None:
    a, b = make(1, posterior=SWAG), make(2)
    found = combine({a: 0.5, b: 0.5}, samples=3)
    assert found.card.posterior == repr(kb.Ensemble(kb.Point(), members=3))
    assert found.card.samples == 3
    assert tree.size(found.state.theta) == 3
    drawn = updates(found.model, found.state.theta)
    still = load(Path(b))
    half = updates(still.model, still.posterior.mean(still.state))
    site = next(iter(drawn))
    rest = 2 * drawn[site] - half[site]  # draws of the first run's updates
    assert np.linalg.matrix_rank(rest[1], tol=1e-4) == 2
    assert np.abs(rest[0] - rest[1]).max() > 0.01
    point = combine({a: 0.5, b: 0.5}, posterior="point")
    check(point, [load(Path(a)), still], [0.5, 0.5])


def test_different_adapters_have_a_sum_of_updates(make: Make) -> None:
    a, b = make(1), make(2, "LoRAXS(r=3)")
    found = combine({a: 0.5, b: 0.5})
    assert found.card.adapter == repr(kb.LoRA(r=5, alpha=5.0))
    check(found, [load(Path(f)) for f in (a, b)], [0.5, 0.5])
    with pytest.raises(KilobayesError, match="leaves of different"):
        combine({a: 0.5, b: 0.5}, how="leaves")
    with pytest.raises(KilobayesError, match="low rank"):
        combine({a: 0.5, make(1, "MoRA(r=2)"): 0.5})


def test_one_run_s_head_serves_runs_of_other_classes(make: Make) -> None:
    a, b = make(1), make(2, classes=["x", "y"])
    with pytest.raises(KilobayesError, match="different classes"):
        combine({a: 1.0, b: 1.0})
    found = combine({b: 1.0, a: 1.0}, head=a)
    assert found.card.classes == small.LABELS
    first = load(Path(a))
    ours, theirs = heads(found.state.theta), heads(first.posterior.mean(first.state))
    assert not tree.first_difference(ours, theirs)
    difference = combine({a: 1.0, make(2): -1.0}, head=a)
    assert not tree.first_difference(heads(difference.state.theta), theirs)
    with pytest.raises(KilobayesError, match="sum to 0"):
        combine({a: 1.0, make(2): -1.0})


def test_language_models(tmp_path: Path) -> None:
    run = str(small_lm.run("Point()"))
    found = combine({run: 0.5})
    assert found.how == "updates"
    assert not heads(found.state.theta)
    kb.combine({run: 0.5}, tmp_path / "half")
    theta = store.read_card(tmp_path / "half", "lm")
    assert theta.adapter == repr(kb.LoRA(r=2, alpha=2.0))


def test_what_does_not_go_together(make: Make, tmp_path: Path) -> None:
    a = make(1)
    for other, said in ((make(1, targets=["key"]), "different modules"), (make(1, paired=True), "pairs")):
        with pytest.raises(KilobayesError, match=said):
            combine({a: 0.5, other: 0.5})
    damaged = Path(make(3))
    card = dataclasses.replace(store.read_card(damaged), fingerprint="0" * 64)
    (damaged / "posterior.json").write_text(json.dumps(dataclasses.asdict(card)))
    with pytest.raises(KilobayesError, match="different bases"):
        combine({a: 0.5, str(damaged): 0.5})
    with pytest.raises(KilobayesError, match="ensemble"):
        combine({make(1, posterior="Ensemble(Point(), members=2)"): 1.0}, posterior="point")
    with pytest.raises(KilobayesError, match="equal parts"):
        combine({make(1, posterior="Ensemble(Point(), members=2)"): 1.0}, samples=3)
    with pytest.raises(KilobayesError, match="nothing to sum"):
        combine({})
    with pytest.raises(KilobayesError, match="gives no head"):
        combine({a: 1.0}, head="runs/x")
    assert cli.run(["arithmetic", f"0.5*{a}", "--out", a]) == 2
    assert cli.run(["arithmetic", "0.5*", "--out", str(tmp_path / "o")]) == 2
    assert not (tmp_path / "o").exists()
