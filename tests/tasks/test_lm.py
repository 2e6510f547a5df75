"""Rows of a language model: which tokens are learned, windows, templates and packing."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch

from kilobayes.errors import KilobayesError
from kilobayes.tasks.chat import conversation, rendered, tokens_of
from kilobayes.tasks.lm import Language
from kilobayes.tasks.packing import IGNORED, collate, pack, windows
from kilobayes.tasks.text import Documents, load_documents, splits

from ..small_bytes import CHATML, tokenizer


def learned(task: Language, documents: Documents) -> list[str]:
    """The learned text of every row, with the mark that ends it."""
    found = task.encode(documents)
    return [task.tokenizer.decode([t for t in row if t != IGNORED]) for row in found.labels]


@pytest.mark.parametrize(("count", "longest"), [(2, 4), (9, 4), (10, 4), (11, 4), (50, 7)])
def test_windows_lose_nothing(count: int, longest: int) -> None:
    ids = list(range(count))
    rows = windows(ids, longest)
    assert len(rows) == -(-(count - 1) // (longest - 1))
    assert [label for _, labels in rows for label in labels] == ids[1:]
    assert all(len(read) == len(labels) <= longest - 1 for read, labels in rows)
    assert all(labels[:-1] == read[1:] for read, labels in rows)  # each label is the next token


def test_plain_text_is_learned_whole_with_its_end_and_its_bytes_are_counted() -> None:
    texts = ["hello", "äö€ and more than one window of text"]
    found = Language(tokenizer(), 8).encode(Documents("text", texts))
    assert found.bytes == [5, len(texts[1].encode())]
    joined = ["".join(map(chr, [])), ""]
    for row, document in zip(found.labels, found.documents, strict=True):
        joined[document] += " ".join(map(str, row)) + " "
    own = [[*tokenizer()(t)["input_ids"], 2] for t in texts]
    assert [list(map(int, j.split())) for j in joined] == own
    assert found.ids[0][0] == 1
    assert found.truncated == found.dropped == 0


def test_only_the_completion_is_learned() -> None:
    task = Language(tokenizer(), 64)
    assert learned(task, Documents("pairs", [("2+2=", "4"), ("a", "bc")])) == ["4</s>", "bc</s>"]
    found = task.encode(Documents("pairs", [("2+2=", "4")]))
    assert found.labels == [[IGNORED, IGNORED, IGNORED, *task.tokenizer("4")["input_ids"], 2]]
    assert found.ids == [task.tokenizer("2+2=4")["input_ids"]]
    assert found.bytes == [1]


def test_every_reply_of_a_conversation_is_learned_with_the_template_s_mark() -> None:
    chat = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "and"}, {"role": "assistant", "content": "so é"},
    ]  # fmt: skip
    task = Language(tokenizer(CHATML), 99)
    assert learned(task, Documents("chat", [chat])) == ["yo</s>so é</s>"]
    assert task.encode(Documents("chat", [chat])).bytes == [2 + 5]


def test_the_default_template_is_alpaca_s_without_its_first_sentence() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    whole = "### Instruction:\nhi\n\n### Response:\nyo</s>"
    assert rendered(tokenizer(), chat) == whole
    assert rendered(tokenizer(), chat[:1], reply=True) == whole[: -len("yo</s>")]
    assert learned(Language(tokenizer(), 99), Documents("chat", [chat])) == ["yo</s>"]


def test_a_template_that_rewrites_earlier_replies_has_its_last_one_learned() -> None:
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    chat = [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]]  # fmt: skip  # noqa: E501
    pieces = conversation(tokenizer(template), chat)
    assert [p.text for p in pieces if p.answer] == ["<think></think>d</s>"]
    bad = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}??{% endif %}"
    with pytest.raises(KilobayesError, match="otherwise than what comes before a reply"):
        conversation(tokenizer(bad), chat)


def test_a_piece_that_would_join_the_one_before_gets_tokens_of_its_own() -> None:
    from kilobayes.tasks.chat import Piece

    class Joins:
        """Writes "ab" as one token."""

        eos_token_id, eos_token = None, None

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text.replace("ab", "Z")]}

    ids, answers = tokens_of(Joins(), [Piece("xa"), Piece("b", 1, True)], special=False)
    assert ids == [ord("x"), ord("a"), ord("b")]
    assert answers == [False, False, True]


def test_long_answers_are_cut_and_rows_without_one_left_out_and_both_counted() -> None:
    rows = [("p", "abcdefghij"), ("a prompt that is long", "x"), ("p", "ok")]
    found = Language(tokenizer(), 6).encode(Documents("pairs", rows))
    assert (found.truncated, found.dropped, len(found)) == (1, 1, 2)
    assert found.bytes == [5, 0, 2]
    assert found.documents == [0, 2]
    with pytest.raises(KilobayesError, match="no answer lies within"):
        Language(tokenizer(), 6).encode(Documents("pairs", rows[1:2]))


def test_packing_keeps_every_token_and_never_overfills() -> None:
    task = Language(tokenizer(), 12)
    plain = task.encode(Documents("text", ["a" * n for n in (1, 9, 4, 2, 30, 5, 3)]))
    packed = pack(plain, 12)
    every = [sorted(chain.from_iterable(tokens.ids)) for tokens in (packed, plain)]
    assert every[0] == every[1]
    assert sum(packed.counted) == sum(plain.counted)
    assert sum(packed.bytes) == sum(plain.bytes)
    assert all(len(row) <= 12 for row in packed.ids)
    assert len(packed) < len(plain)
    pieces = [row[a:b] for row, s in zip(packed.ids, packed.starts, strict=True) for a, b in zip(s, [*s[1:], len(row)], strict=True)]  # fmt: skip  # noqa: E501
    assert sorted(pieces) == sorted(plain.ids)


def test_positions_start_anew_and_padding_is_a_text_of_its_own() -> None:
    packed = pack(Language(tokenizer(), 12).encode(Documents("text", ["aaaa", "bb", "cccccccc"])), 12)
    inputs, labels = collate(packed, [0, 1], 0)
    assert "attention_mask" not in inputs
    for at in range(2):
        starts = (inputs["position_ids"][at] == 0).nonzero()[:, 0].tolist()
        assert starts[: len(packed.starts[at])] == packed.starts[at]
        assert (labels[at, len(packed.ids[at]) :] == IGNORED).all()
    assert inputs["position_ids"].max() < 12


def test_batches_are_padded_on_the_right_on_either_side_s_tokenizer() -> None:
    rows = Documents("text", ["a", "bbb"])
    both = [Language(tokenizer(None, side), 12) for side in ("left", "right")]
    left, right = (task.collate(task.encode(rows), torch.tensor([0, 1])) for task in both)
    assert torch.equal(left[0]["attention_mask"], right[0]["attention_mask"])
    assert left[0]["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(left[1], right[1])


FORMS = [
    ({"text": "once"}, "text", "once"),
    ({"prompt": "q", "completion": "a"}, "pairs", ("q", "a")),
    ({"question": "q", "answer": "a"}, "pairs", ("q", "a")),
    ({"instruction": "do", "input": "it", "output": "ok"}, "chat",
     [{"role": "user", "content": "do\n\nit"}, {"role": "assistant", "content": "ok"}]),
    ({"instruction": "do", "input": "", "output": "ok"}, "chat",
     [{"role": "user", "content": "do"}, {"role": "assistant", "content": "ok"}]),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "chat",
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
     "chat", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "form", "expected"), FORMS)
def test_forms_of_rows(row: dict[str, object], form: str, expected: object, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    found = load_documents(tmp_path / "train.jsonl")
    assert (found.form, found.rows) == (form, [expected])


def test_columns_by_name_and_text_files(tmp_path: Path) -> None:
    table = {"q": ["a"], "r": ["b"], "other": ["c"]}
    assert load_documents(table, text_column="q", answer_column="r").rows == [("a", "b")]
    assert load_documents(table, text_column="other").rows == ["c"]
    text = "\n\n".join("line of words " * 30 for _ in range(40))
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "test.txt").write_text("short")
    assert sorted(splits(tmp_path)) == ["test", "train"]
    found = load_documents(tmp_path, "train")
    assert "".join(found.rows) == text
    assert len(found) > 2
    with pytest.raises(KilobayesError, match="no answer to learn"):
        load_documents([{"messages": [{"role": "user", "content": "a"}]}])


def test_rows_are_held_out_by_the_seed_alone() -> None:
    rows = Documents("text", [str(i) for i in range(10)])
    kept, held = rows.held_out(0.2, 3)
    assert len(held) == 2
    assert sorted(kept.rows + held.rows) == rows.rows
    assert rows.held_out(2, 3)[1].rows == held.rows != rows.held_out(2, 4)[1].rows
