"""Rows of different runs in one forward have the scores that they have alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kilobayes.serve.pool import blocks, filled, rows_of
from kilobayes.serve.shelf import Shelf, load, named
from kilobayes.tasks.data import load_examples
from kilobayes.workflows.finetune import load as load_alone

from .. import small

TEXTS = [row["text"] for row in small.rows(13, 5)]


def asked(shelf: Shelf, name: str, texts: list[str]) -> list:
    _, run = shelf.classifiers[name]
    encoded = shelf.fitted(name).encode(load_examples(texts, need_labels=False))
    return [(run, row) for row in rows_of(encoded)]


@pytest.mark.parametrize(
    ("where", "counts"),
    [([0, 1], [1, 1]), ([0, 0, 0, 1], [2, 3]), ([1, 0, 1, 1, 1, 1, 1], [4, 1]), ([2, 1, 0, 2], [3, 1, 2])],
)
def test_every_row_meets_every_draw_of_its_run_and_no_other(where: list[int], counts: list[int]) -> None:
    rows, members = blocks(where, counts)
    firsts = [sum(counts[:u]) for u in range(len(counts))]
    met = {(row, member) for own, member in zip(rows.tolist(), members.tolist()) for row in own}
    assert met == {(row, firsts[u] + s) for row, u in enumerate(where) for s in range(counts[u])}


def test_blocks_are_of_the_size_that_computes_least() -> None:
    # 8 rows of one run and 8 of another: blocks of 8, nothing repeated
    assert blocks([0] * 8 + [1] * 8, [2, 2])[0].shape == (4, 8)
    # 8 rows of one and one of another: by 8 is 4 x 8.1 = 32.4 rows, by 2 10 x 2.1 = 21, by 1 18 x 1.1 = 19.8
    assert blocks([0] * 8 + [1], [2, 2])[0].shape == (18, 1)


def test_heads_are_filled_with_zeros() -> None:
    two, three = torch.ones(4, 2, 5), torch.ones(1, 3, 5)
    wide, same = filled([{"head/weight": two}, {"head/weight": three}])
    assert wide["head/weight"].shape == (4, 3, 5)
    assert wide["head/weight"].sum() == two.sum()
    assert same["head/weight"] is three


def test_runs_of_one_base_share_a_model(shelf: Shelf) -> None:
    pool = shelf.classifiers["a"][0]
    assert shelf.classifiers["b"][0] is pool
    assert shelf.classifiers["d"][0] is not pool  # linearised: it has no draws of weights
    assert shelf.fitted("d").model is pool.model


def test_mixed_rows_have_the_scores_of_their_run_alone(shelf: Shelf, folder: Path) -> None:
    alone = {
        name: load_alone(folder / name, device="cpu").predict(load_examples(TEXTS, need_labels=False)).logits
        for name in "ab"
    }
    rows = {name: asked(shelf, name, TEXTS) for name in "ab"}
    order = [("ab"[(at * at) % 3 % 2], at) for at in range(len(TEXTS))] + [("b", 0), ("a", 0)]
    assert len({name for name, _ in order}) == 2
    found = shelf.classifiers["a"][0].scores([rows[name][at] for name, at in order])
    for (name, at), scores in zip(order, found, strict=True):
        assert scores.shape == alone[name][:, at].shape
        torch.testing.assert_close(scores, alone[name][:, at], rtol=0, atol=1e-5)
    differ = (alone["a"][:3, :, :2] - alone["b"]).abs().max()
    assert differ > 0.1  # so that a mixed-up run would be seen


def test_a_batch_of_one_run_is_bit_for_bit_what_the_command_line_says(shelf: Shelf, folder: Path) -> None:
    alone = load_alone(folder / "a", device="cpu").predict(load_examples(TEXTS, need_labels=False)).logits
    found = shelf.classifiers["a"][0].scores(asked(shelf, "a", TEXTS))
    assert torch.equal(torch.stack(found, dim=1), alone)


def test_a_linearised_run_answers_a_row_the_same_in_any_company(shelf: Shelf, folder: Path) -> None:
    pool = shelf.classifiers["d"][0]
    first = load_alone(folder / "d", device="cpu").predict(load_examples(TEXTS[:1], need_labels=False))
    together = pool.scores(asked(shelf, "d", [TEXTS[3], TEXTS[0]]))
    torch.testing.assert_close(together[1], first.logits[:, 0], rtol=0, atol=1e-5)


def test_names_of_runs(folder: Path) -> None:
    assert named([str(folder / "a"), f"other={folder / 'b'}"]) == {"a": folder / "a", "other": folder / "b"}
    with pytest.raises(Exception, match="two runs are called a"):
        named([str(folder / "a"), f"a={folder / 'b'}"])


def test_a_missing_run_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no kilobayes run"):
        load({"x": tmp_path / "x"})
