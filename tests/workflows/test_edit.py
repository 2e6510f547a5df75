"""Edits: a stack equals edits alone, sequences, undoing bit for bit, and what pruning leaves untouched."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kilobayes import host, tree
from kilobayes.errors import KilobayesError
from kilobayes.models import Base, load_causal
from kilobayes.tasks.edits import Fact, Pair, Probe, encode_pair
from kilobayes.types import Params, delta
from kilobayes.workflows import edit_files
from kilobayes.workflows.edit import (
    Editing,
    answer_nll,
    batch,
    begin,
    edit_each,
    edit_in_turn,
    host_on,
    learn,
)
from kilobayes.workflows.edit_run import edit_facts
from kilobayes.workflows.edit_scores import Questions, ask, columns, greedy, using

from .. import small_lm

ROSE = "RoseLoRA(r=2, keep=0.1, start=0.12, end=0.8)"
FAST = Editing(steps=5, lr=0.03)
FACTS = [
    Fact("ba de", "fi go", rephrased=(Probe("de ba", "fi go"),), locality=(Probe("ku la me", "ni"),)),
    Fact("ku la po", "tu", locality=(Probe("so", "ba de"), Probe("ba", "ra"))),
    Fact("ra so ni fa", "mi po ba", portability=(Probe("fa", "mi", "one"), Probe("ra", "po", "two"))),
]


@functools.cache
def base() -> Base:
    return load_causal(str(small_lm.base()))


def made(adapter: str = "LoRA(r=2)") -> Any:
    own = copy.deepcopy(base().model)
    return host_on(Base(own, base().tokenizer, "tiny", ()), adapter, "v_proj", 0)


@functools.cache
def pairs() -> list[Pair]:
    return [encode_pair(base().tokenizer, f.prompt, f.target) for f in FACTS]


def test_the_loss_is_that_of_the_answer_alone() -> None:
    inputs, labels = batch(pairs(), 0)
    with torch.no_grad():
        logits = base().model(**inputs).logits
    found = answer_nll(logits, labels)
    for row, pair in enumerate(pairs()):
        ids = torch.tensor([[*pair.prompt, *pair.answer]])
        with torch.no_grad():
            log_probs = base().model(input_ids=ids).logits[0].log_softmax(-1)
        begin_ = len(pair.prompt)
        own = [-log_probs[begin_ + i - 1, token] for i, token in enumerate(pair.answer)]
        assert float(found[row]) == pytest.approx(float(sum(own)) / len(own), rel=1e-4)


@pytest.mark.parametrize("adapter", ["LoRA(r=2, dropout=0.2)", ROSE, "VBLoRA(r=2, h=8)"])
def test_a_stack_of_single_edits_equals_edits_done_alone(adapter: str) -> None:
    model = made(adapter)
    start = begin(model, [0])
    stack = edit_each(model, start, pairs(), FAST)
    in_pieces = edit_each(model, start, pairs(), Editing(steps=5, lr=0.03, together=2))
    for s, pair in enumerate(pairs()):
        alone = learn(model, start, [pair], FAST)
        for key, value in alone.theta.items():
            assert torch.allclose(stack.theta[key][s], value[0], atol=2e-4), key
            assert torch.allclose(in_pieces.theta[key][s], value[0], atol=2e-4), key
        assert float(stack.losses[s]) == pytest.approx(float(alone.losses[0]), abs=1e-4)


def test_a_member_stops_where_it_would_alone() -> None:
    model = made()
    start = begin(model, [0])
    settings = Editing(steps=40, lr=0.1, enough=0.5)
    stack = edit_each(model, start, pairs(), settings)
    assert len(set(stack.steps.tolist())) > 1  # not all at once
    assert bool((stack.losses < 0.5).all())
    for s, pair in enumerate(pairs()):
        assert learn(model, start, [pair], settings).steps.tolist() == [stack.steps[s]]


def test_pruning_is_done_before_an_edit_stops() -> None:
    model = made(ROSE)
    edited = edit_each(model, begin(model, [0]), pairs(), Editing(steps=10, lr=0.03, enough=100.0))
    assert edited.steps.tolist() == [8, 8, 8]  # end = 0.8
    for key, value in edited.theta.items():
        lines = value if key.endswith("/A") else value.mT
        assert int((lines != 0).sum(dim=-1).max()) <= -(-lines.shape[-1] // 10)


def test_a_member_that_diverges_leaves_the_others_alone() -> None:
    model = made()
    start = begin(model, [0])
    two = {k: torch.cat([v * float("nan"), v]) for k, v in start.items()}
    both = learn(model, two, pairs()[:2], Editing(steps=4, lr=(0.01, 0.03), enough=0.0))
    alone = learn(model, start, pairs()[1:2], Editing(steps=4, lr=0.03, enough=0.0))
    assert not bool(torch.isfinite(both.losses[0]))
    assert float(both.losses[1]) == pytest.approx(float(alone.losses[0]), abs=1e-4)


def test_sequential_edits_go_on_from_each_other_and_earlier_states_stay() -> None:
    model = made(ROSE)
    start = begin(model, [0])
    states = edit_in_turn(model, start, [pairs()], FAST)
    assert len(states) == 3
    again = edit_in_turn(model, start, [pairs()[:2]], FAST)
    for mine, theirs in zip(states, again):
        assert tree.first_difference(mine.theta, theirs.theta) == ""  # the third edit took nothing back
    third = learn(model, states[1].theta, pairs()[2:], FAST)
    assert tree.first_difference(third.theta, states[2].theta) == ""
    last = edit_in_turn(model, start, [pairs()], FAST, keep=False)
    assert len(last) == 1
    assert tree.first_difference(last[0].theta, states[2].theta) == ""
    with pytest.raises(KilobayesError, match="as many edits"):
        edit_in_turn(model, start, [pairs(), pairs()[:1]], FAST)


def test_entries_that_no_edit_reaches_are_bit_equal_after_a_merge() -> None:
    model = made(ROSE)
    before = {site.name: site.weight().clone() for site in host.sites(model)}
    theta = edit_in_turn(model, begin(model, [0]), [pairs()], FAST)[-1].theta
    host.write(model, theta)
    updates = {s.name: delta(host.build(model, theta)[s.name], s.d_in)[0] for s in host.sites(model)}
    model.merge_adapter()
    for site in host.sites(model):
        zero = updates[site.name] == 0
        assert float(zero.float().mean()) > 0.9
        after = host.layers(model)[site.name].get_base_weight()
        assert torch.equal(after[zero], before[site.name][zero])
        assert not torch.equal(after, before[site.name])


def slowly(model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_text_is_that_without_a_cache() -> None:
    found = greedy(base().model, base().tokenizer, pairs(), 5, set())
    assert found == [slowly(base().model, pair.prompt, 5) for pair in pairs()]
    ends = {found[0][2]}
    short = greedy(base().model, base().tokenizer, pairs()[:1], 5, ends)[0]
    assert short == found[0][: found[0].index(found[0][2])]


def test_rows_find_their_members_again() -> None:
    rows = [[0, 1, 2, 3, 4], [10], [20, 21]]
    seen: dict[int, int] = {}
    for given, places in columns(rows, 6):  # type: ignore[arg-type]
        assert len(given) % 3 == 0
        seen |= {place: row for row, place in zip(given, places) if place >= 0}  # type: ignore[misc]
    assert [seen[m + 3 * i] for m, own in enumerate(rows) for i in range(len(own))] == [
        0,
        1,
        2,
        3,
        4,
        10,
        20,
        21,
    ]


def test_asking_a_stack_is_asking_each_member() -> None:
    model = made()
    questions = [Questions.of(base().tokenizer, fact) for fact in FACTS]
    theta = edit_each(model, begin(model, [0]), pairs(), FAST).theta
    together = ask(model, base().tokenizer, theta, questions, set(), 4)
    for s, question in enumerate(questions):
        alone = ask(model, base().tokenizer, tree.member(theta, s), [question], set(), 4)[0]
        assert together[s] == alone
    untouched = ask(model, base().tokenizer, None, questions, set(), 4)
    with using(model, None):
        logits = model(input_ids=torch.tensor([pairs()[0].prompt])).logits
    assert torch.equal(logits, base().model(input_ids=torch.tensor([pairs()[0].prompt])).logits)
    assert untouched[0].groups["success"][0].tokens == slowly(base().model, pairs()[0].prompt, 2)


@pytest.mark.parametrize("sequential", [True, False])
def test_edits_succeed_and_their_scores_are_whole(sequential: bool) -> None:
    model = made("LoRA(r=4)")
    settings = Editing(steps=40, lr=0.1)
    found = edit_facts(model, base().tokenizer, FACTS, settings, sequential=sequential, tokens=6)
    assert tree.size(found.theta) == len(found.records) == 3
    last = found.records[-1]
    assert last["success_teacher"] == last["success_free"] == 1.0
    assert last["text"] == "mi po ba"
    assert last["portability_teacher"] is not None
    assert last["locality_free"] is None
    assert found.records[0]["generality_free"] in (0.0, 1.0)
    assert (found.means["then_free"] == 1.0) if sequential else (found.means["success_free"] == 1.0)
    assert found.means["diverged"] == 0


def saved(folder: Path, mode: str) -> tuple[Any, Params]:
    model = made(ROSE)
    start = begin(model, [0])
    if mode == "sequential":
        theta = tree.concatenate([e.theta for e in edit_in_turn(model, start, [pairs()], FAST)])
    else:
        theta = edit_each(model, start, pairs(), FAST).theta
    edits = [{"prompt": f.prompt, "target": f.target} for f in FACTS]
    card = {"mode": mode, "base": str(small_lm.base()), "dtype": "float32", "adapter": ROSE, "edits": edits}
    card["fingerprint"] = edit_files.fingerprint(base().model)
    edit_files.save(folder, model, theta, card)
    return model, theta


@pytest.mark.parametrize("mode", ["sequential", "single"])
def test_undo_restores_bit_for_bit(tmp_path: Path, mode: str) -> None:
    _, theta = saved(tmp_path, mode)
    (tmp_path / "metrics.json").write_text("{}", encoding="utf-8")
    (tmp_path / "edits.jsonl").write_text("1\n2\n3\n", encoding="utf-8")
    for left in (2, 1):
        assert len(edit_files.undo(tmp_path)["edits"]) == left
        model, _ = edit_files.load(tmp_path, left)
        theirs = {k: v.detach() for k, v in host.read(model).items()}
        assert tree.first_difference(theirs, tree.member(theta, left - 1)) == ""
        assert (tmp_path / "edits.jsonl").read_text(encoding="utf-8").count("\n") == left
        if mode == "sequential":
            again = host.base_of(edit_files.load_compact(copy.deepcopy(base().model), tmp_path / "adapter"))
            held = {k: v.detach() for k, v in host.read(again).items()}
            assert tree.first_difference(held, tree.member(theta, left - 1)) == ""
    assert (tmp_path / "metrics-before-undo.json").exists()
    assert not (tmp_path / "metrics.json").exists()
    with pytest.raises(KilobayesError, match="2 edits cannot be undone"):
        edit_files.undo(tmp_path, 2)
    edit_files.undo(tmp_path)
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "states").exists()
    if mode == "sequential":
        bare, _ = edit_files.load(tmp_path)
        ids = torch.tensor([pairs()[0].prompt])
        assert torch.equal(bare(input_ids=ids).logits, base().model(input_ids=ids).logits)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    saved(tmp_path, "single")
    with pytest.raises(KilobayesError, match="which edit is meant"):
        edit_files.load(tmp_path)
    with pytest.raises(KilobayesError, match="there is no edit 4"):
        edit_files.load(tmp_path, 4)
    card = json.loads((tmp_path / "edits.json").read_text(encoding="utf-8"))
    (tmp_path / "edits.json").write_text(json.dumps(card | {"fingerprint": "0"}), encoding="utf-8")
    with pytest.raises(KilobayesError, match="not the model that was edited"):
        edit_files.load(tmp_path, 1)
    (tmp_path / "edits.json").write_text('{"mode": "other", "edits": []}', encoding="utf-8")
    with pytest.raises(KilobayesError, match="damaged"):
        edit_files.load(tmp_path, 1)
    with pytest.raises(KilobayesError, match="holds no edits"):
        edit_files.load(tmp_path / "none", 1)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"lr": 0.0}, {"lr": (0.1, -1.0)}, {"enough": -1.0}])
def test_settings_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(KilobayesError):
        Editing(**bad)
    with pytest.raises(KilobayesError, match="need a stack"):
        learn(made(), begin(made(), [0]), pairs(), FAST)
