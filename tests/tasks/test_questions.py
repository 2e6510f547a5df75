"""Questions and labelled texts, from the forms that data sets come in, as prompts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kilobayes.errors import KilobayesError
from kilobayes.tasks.prompt import Prompt
from kilobayes.tasks.questions import load_questions

BOTH = ["red", "blue"]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "which?", "choices": BOTH, "answer": 1},
        {"question": "which?", "options": BOTH, "answer": "B"},
        {"question": "which?", "choices": BOTH, "answer": "blue"},
        {"question_stem": "which?", "choices": {"text": BOTH, "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "which?", "choices": {"text": BOTH, "label": ["1", "2"]}, "answerKey": "2"},
        {"question": "which?", "choices": [{"text": "red"}, {"text": "blue"}], "label": "1"},
        {"sentence": "which?", "option1": "red", "option2": "blue", "answer": "2"},
        {"goal": "which?", "sol1": "red", "sol2": "blue", "label": 1},
        {"question": "which?", "answerA": "red", "answerB": "blue", "label": "2"},
        {"question": "which?", "A": "red", "B": "blue", "answer": "B"},
        {"ctx": "which?", "endings": '["red", "blue"]', "label": "1"},
    ],
    ids=lambda row: "-".join(row),
)
def test_forms_of_questions(row: dict) -> None:
    found = load_questions([row])
    assert found.options == [BOTH]
    assert found.labels == [1]
    assert found.classes == ["A", "B"]
    assert found.texts == ["which?\nA. red\nB. blue"]
    assert found.prompt == Prompt("Question: {question}\n{choices}\nAnswer:", ("A", "B"))
    assert (found.prompt.head, found.prompt.cue) == ("Question: ", "\nAnswer:")


def test_numbers_from_zero_or_one_are_told_by_the_whole_column() -> None:
    rows = [{"question": "q", "choices": [*"abc"], "answer": n} for n in (1, 2, 3)]
    assert load_questions(rows).labels == [0, 1, 2]
    rows[2]["answer"] = 0
    assert load_questions(rows).labels == [1, 2, 0]


def test_labels_that_are_words() -> None:
    rows = [
        {"question": "is it?", "passage": "It is.", "label": 1},
        {"question": "?", "passage": ".", "label": 0},
    ]
    found = load_questions(rows, answers="no,yes")
    assert found.prompt == Prompt("{question}\n{passage}\nAnswer:", ("no", "yes"))
    assert (found.texts[0], found.labels, found.classes) == ("is it?\nIt is.", [1, 0], ["0", "1"])
    again = load_questions([{"question": "so?", "passage": "So."}], prompt=found.prompt, need_labels=False)
    assert (again.texts, again.labels) == (["so?\nSo."], None)


def test_templates() -> None:
    rows = [{"q": "why", "n": 3, "option1": "a", "option2": "b", "answer": 0}]
    found = load_questions(rows, template="{{Say}}: {q} {n}\\n(A) {option1} (B) {option2}\\nSo")
    assert (found.prompt.head, found.prompt.cue) == ("{Say}: ", "\nSo")
    assert found.texts == ["why 3\n(A) a (B) b"]
    again = load_questions(rows, template=found.prompt.shown)
    assert again.prompt == found.prompt
    named = load_questions(rows, text_column="q")
    assert named.texts == ["why\nA. a\nB. b"]
    bare = load_questions(["one", "two"], prompt=Prompt("{sentence}\nAnswer:", ("a", "b")), need_labels=False)
    assert bare.texts == ["one", "two"]


def test_options_are_kept_by_the_rows() -> None:
    rows = [{"question": str(i), "choices": [*"abcd"][: 2 + i % 3], "answer": 1} for i in range(6)]
    found = load_questions(rows)
    assert found.classes == ["A", "B", "C", "D"]
    assert [len(o) for o in found.take([2, 0]).options] == [4, 2]
    assert load_questions(found, limit=3).prompt is found.prompt
    fewer = load_questions(rows[:1], classes=found.classes, prompt=found.prompt)
    assert fewer.classes == found.classes


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        ([{"text": "a", "label": 1}], {"template": "{txt}:"}, ["{txt}", "found: text, label", "mean {text}"]),
        ([{"text": "a", "label": 1}], {"template": "Answer:"}, ["names no column"]),
        ([{"text": "a", "label": 1}], {"template": "{text:>9}"}, ["nothing else"]),
        ([{"text": "a", "label": 1}], {"template": "{text"}, ["braces do not match"]),
        ([{"text": "a", "label": 1}], {"answers": "text"}, ["have no options", "option1"]),
        ([{"text": "a", "label": 1}], {"template": "{choices}"}, ["have no options"]),
        ([{"question": "a", "choices": ["x"], "answer": 0}], {}, ["row 1", "1 options"]),
        ([{"question": "a", "choices": ["x", " "], "answer": 0}], {}, ["blank option"]),
        ([{"question": "", "choices": ["x", "y"], "answer": 0}], {}, ["row 1", "question"]),
        ([{"question": "a", "choices": ["x", "y"], "answer": 7}], {}, ["row 1", "answer 7"]),
        ([{"question": "a", "choices": ["x", "y"]}], {}, ["right answers", "--label-column"]),
        ([{"a": "a", "choices": ["x", "y"], "answer": 0}], {}, ["questions", "--text-column"]),
        ([{"question": "a", "choices": [*"xyz"], "answer": 0}], {"answers": "A,B"}, ["3 options", "A,B,C"]),
    ],
)  # fmt: skip
def test_what_is_refused(rows: list, given: dict, words: list[str]) -> None:
    with pytest.raises(KilobayesError) as error:
        load_questions(rows, **given)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_parquet_keeps_lists(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"question": ["q"], "choices": [{"text": BOTH, "label": ["A", "B"]}], "answerKey": ["B"]}
    )
    frame.to_parquet(tmp_path / "train.parquet")
    found = load_questions(tmp_path)
    assert (found.options, found.labels) == ([BOTH], [1])


def test_datasets_keep_lists() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(
        [{"question": "q", "choices": {"text": BOTH, "label": [*"AB"]}, "answerKey": "A"}]
    )
    found = load_questions(rows)
    assert (found.options, found.labels) == ([BOTH], [0])


@pytest.mark.parametrize(
    ("name", "split", "count", "classes"),
    [
        ("arc_easy", "train", 2251, 5), ("openbookqa", "test", 500, 4), ("winogrande", "validation", 1267, 2),
        ("mmlu", "dev", 215, 4), ("piqa", "validation", 1838, 2), ("social_iqa", "validation", 1954, 3),
        ("aqua_rat", "test", 254, 5), ("boolq_closed_book", "validation", 3270, 2),
    ],
)  # fmt: skip
def test_real_questions(name: str, split: str, count: int, classes: int) -> None:
    folder = Path(os.environ.get("KILOBAYES_DATA", "")) / name
    if not os.environ.get("KILOBAYES_DATA") or not folder.is_dir():
        pytest.skip(f"KILOBAYES_DATA does not hold {name}")
    found = load_questions(folder, split)
    assert (len(found), len(found.classes)) == (count, classes)
    assert set(found.labels or []) == set(range(classes)) or classes == 5
    if found.options is not None:
        assert all(label < len(options) for label, options in zip(found.labels, found.options))
