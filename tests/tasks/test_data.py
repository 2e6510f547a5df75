"""Examples from objects, data sets and directories; limits; the public sets with their counts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kilobayes.errors import KilobayesError
from kilobayes.tasks.data import Examples, available_splits, load_examples


def test_every_kind_of_object_gives_the_same_examples(sample: SimpleNamespace) -> None:
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    texts, labels = [row["text"] for row in sample.rows], [row["label"] for row in sample.rows]
    for source in (
        sample.rows,
        (texts, labels),
        (np.array(texts), pandas.Series(labels)),
        {"text": texts, "label": labels},
        pandas.DataFrame(sample.rows, index=[5, 5, 1]),
        datasets.Dataset.from_list(sample.rows),
        datasets.Dataset.from_list(sample.rows[::-1]).select([2, 1, 0]),
        datasets.DatasetDict({"train": datasets.Dataset.from_list(sample.rows)}),
        sample.expected,
    ):
        assert load_examples(source) == sample.expected


def test_class_labels_survive_datasets_parquet_and_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "what": datasets.ClassLabel(names=["neg", "pos", "odd"]),
            "n": [datasets.Value("int8")],
        }
    )
    data = datasets.Dataset.from_dict(
        {"sentence": ["a b", "c d"], "what": [1, 0], "n": [[1], [2]]}, features=features
    )
    data.to_parquet(str(tmp_path / "train.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    expected = Examples(["a b", "c d"], None, [1, 0], ["neg", "pos", "odd"])
    for source in (data, tmp_path / "train.parquet", tmp_path / "saved"):
        assert load_examples(source) == expected
    # Evaluation data may hold the indices, or their names in another order.
    assert load_examples((["x"], [1]), classes=expected.classes).labels == [1]
    assert load_examples((["x"], ["1"]), classes=expected.classes).labels == [1]
    assert load_examples(data, classes=["odd", "pos", "neg"]).labels == [1, 2]
    assert load_examples(data, classes=[0, 1]).labels == [1, 0]
    hidden = datasets.Dataset.from_dict(
        {"sentence": ["a", "b"], "what": [0, -1], "n": [[], []]}, features=features
    )
    with pytest.raises(KilobayesError, match=r"row 2 of the dataset .*it holds -1.*labels are public"):
        load_examples(hidden)


def test_labels_are_optional_for_prediction(sample: SimpleNamespace) -> None:
    assert load_examples(["a b", "c"], need_labels=False) == Examples(["a b", "c"], None, None, [])
    pairs = load_examples([("a", "b"), ("c", "d")], need_labels=False, classes=[0, 1])
    assert pairs == Examples(["a", "c"], ["b", "d"], None, ["0", "1"])
    assert load_examples(sample.rows, need_labels=False).labels is None
    with pytest.raises(KilobayesError, match="no label column"):
        load_examples(["a", "b"])


def test_examples_take_and_show(sample: SimpleNamespace) -> None:
    examples = Examples(["a", "b", "c"], ["x", "y", "z"], [0, 1, 0], ["n", "p"])
    assert examples.take(np.array([2, 0, 2])) == Examples(
        ["c", "a", "c"], ["z", "x", "z"], [0, 0, 0], ["n", "p"]
    )
    assert examples.shown(1) == "b / y"
    assert sample.expected.shown(0) == "good, really"


def test_limit_is_stratified_seeded_and_in_order() -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    source = ([f"t{i}" for i in range(100)], labels)
    some = load_examples(source, limit=10, seed=1)
    assert some.labels == [0] * 6 + [1] * 3 + [2]
    assert [int(text[1:]) for text in some.texts] == sorted(int(text[1:]) for text in some.texts)
    assert some == load_examples(source, limit=10, seed=1)
    assert some != load_examples(source, limit=10, seed=2)
    assert len(load_examples(source, limit=1000)) == 100
    assert len(load_examples(source[0], limit=7, need_labels=False)) == 7
    with pytest.raises(KilobayesError, match="not positive"):
        load_examples(source, limit=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((["a"], [1, 2]), "the columns differ in length; text: 1, label: 2"),
        ([], "the data has no rows"),
        (3, "the data are not a list of rows; found int"),
        (("ab", "cd"), "no label column"),
        ([{"text": "a", "label": 1}, 3], "row 2 of the data is no dictionary"),
    ],
)
def test_bad_objects(source: Any, message: str) -> None:
    with pytest.raises(KilobayesError, match=message):
        load_examples(source)


@pytest.mark.parametrize(
    ("name", "sizes", "classes", "pairs"),
    [
        ("rte", {"train": 2490, "validation": 277}, 2, True),
        ("mrpc", {"train": 3668, "validation": 408, "test": 1725}, 2, True),
        ("cola", {"train": 8551, "validation": 1043}, 2, False),
        ("trec", {"train": 5452, "test": 500}, 6, False),
        ("sst2", {"train": 67349, "validation": 872, "test": 1821}, 2, False),
        ("ag_news", {"train": 10001, "test": 7600}, 4, False),
    ],
)
def test_public_sets_load_with_their_published_counts(
    name: str, sizes: dict[str, int], classes: int, pairs: bool
) -> None:
    folder = Path(os.environ.get("KILOBAYES_DATA", "")) / name
    if "KILOBAYES_DATA" not in os.environ or not folder.is_dir():
        pytest.skip(f"KILOBAYES_DATA does not hold {name}")
    assert available_splits(folder) == list(sizes)
    for split, size in sizes.items():
        examples = load_examples(folder, split)
        assert (len(examples), len(examples.classes), examples.pairs is not None) == (size, classes, pairs)
