"""Which columns are taken, what a label means, and errors that name the row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kilobayes.errors import KilobayesError
from kilobayes.tasks.data import load_examples


@pytest.mark.parametrize(
    ("labels", "classes", "indices"),
    [
        ([10, 9, 10], ["9", "10"], [1, 0, 1]),
        (["10", "9", "a"], ["9", "10", "a"], [1, 0, 2]),
        ([True, False], ["False", "True"], [1, 0]),
        ([1.0, 0.0], ["0", "1"], [1, 0]),
        ([-1, 1], ["-1", "1"], [0, 1]),
        (["b ", "a", "b"], ["a", "b"], [1, 0, 1]),
    ],
)
def test_class_names_and_their_order(labels: list[Any], classes: list[str], indices: list[int]) -> None:
    found = load_examples((["t"] * len(labels), labels))
    assert (found.classes, found.labels) == (classes, indices)


def test_given_classes_fix_the_order_and_refuse_the_rest() -> None:
    assert load_examples((["t", "u"], [1, 2]), classes=["2", "1", "0"]).labels == [1, 0]
    assert load_examples((["t", "u"], ["1", "2"]), classes=[2, 1]).labels == [1, 0]
    with pytest.raises(KilobayesError) as caught:
        load_examples((["t", "u"], ["cat", "dgo"]), classes=["cat", "dog"])
    assert 'row 2 of the data has the unknown label "dgo"' in caught.value.wrong
    assert caught.value.found == "known classes: cat, dog"
    assert caught.value.remedy == 'did you mean "dog"?'
    with pytest.raises(KilobayesError, match="unknown label"):
        load_examples((["t"], [2]), classes=["cat", "dog"])
    with pytest.raises(KilobayesError, match="named twice"):
        load_examples((["t"], ["1"]), classes=["1", 1])


def columns_found(*names: str, **keywords: Any) -> tuple[list[str], list[str] | None]:
    found = load_examples({name: [name, name] for name in names}, need_labels=False, **keywords)
    return found.texts[:1], found.pairs and found.pairs[:1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("idx", "sentence2", "sentence1", "label"), (["sentence1"], ["sentence2"])),
        (("sentence_A", "sentence_B", "label"), (["sentence_A"], ["sentence_B"])),
        (("question", "sentence", "label"), (["question"], ["sentence"])),
        (("title", "content", "label"), (["content"], None)),
        (("Text", "Label"), (["Text"], None)),
        (("id", "words", "label"), (["words"], None)),
        (("intent", "topic", "text"), (["text"], None)),
    ],
)
def test_text_columns_are_found(names: tuple[str, ...], expected: tuple[list[str], list[str] | None]) -> None:
    assert columns_found(*names) == expected


def test_text_columns_asked_for() -> None:
    assert columns_found("sentence1", "sentence2", text_column="sentence2") == (["sentence2"], None)
    assert columns_found("a", "b", text_column="b", pair_column="a") == (["b"], ["a"])
    assert columns_found("text", "b", pair_column="b") == (["text"], ["b"])
    with pytest.raises(
        KilobayesError, match=r"several columns of text; found: a, b; name it with --text-column"
    ):
        columns_found("a", "b")
    with pytest.raises(
        KilobayesError,
        match='column "txt" is not in the data; found: text, b; did you mean --text-column text',
    ):
        columns_found("text", "b", text_column="txt")


def test_label_columns(sample: SimpleNamespace, tmp_path: Path) -> None:
    row = {"text": "How far is it ?", "coarse_label": 5, "fine_label": 40}
    assert load_examples([row]).classes == ["5"]
    assert load_examples([row], label_column="fine_label").classes == ["40"]
    path = sample.write(tmp_path / "train.csv", sample.rows)
    with pytest.raises(KilobayesError) as caught:
        load_examples(path, label_column="lable")
    assert str(caught.value) == (
        'column "lable" is not in train.csv; found: text, label; did you mean --label-column label?'
    )
    with pytest.raises(KilobayesError, match=r"no label column recognised in the data; found: text, colour"):
        load_examples([{"text": "a", "colour": "b"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "label": 1}, 'row 2 of a.jsonl has no usable text in column "text"; it is empty'),
        ({"text": "  ", "label": 1}, "row 2 of a.jsonl has no usable text .*it is blank"),
        ({"text": 7, "label": 1}, r"row 2 .*it holds 7 \(int\)"),
        ({"text": ["a"], "label": 1}, "row 2 .*list"),
        ({"text": "\ud800", "label": 1}, "row 2 .*half a surrogate pair"),
        ({"text": "a", "label": None}, 'row 2 of a.jsonl has no usable label in column "label"; it is empty'),
        ({"text": "a", "label": " "}, "row 2 .*no usable label"),
        ({"text": "a", "label": float("nan")}, "row 2 .*no usable label .*empty"),
        ({"text": "a", "label": float("inf")}, "row 2 .*it holds inf"),
        ({"text": "a", "label": 2.5}, "row 2 .*it holds 2.5; classes are names or whole numbers"),
        ({"text": "a", "label": [1]}, "row 2 .*no usable label"),
        ({"text": "a"}, "row 2 .*no usable label"),
        ({"label": 1}, "row 2 .*no usable text"),
    ],
)
def test_bad_values_are_named_by_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in ({"text": "fine", "label": 0}, row)))
    with pytest.raises(KilobayesError, match=message):
        load_examples(path)
