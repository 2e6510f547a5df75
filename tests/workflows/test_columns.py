"""Predicting and evaluating read the columns that a run was trained on."""

from pathlib import Path

import pytest

from kilobayes.errors import KilobayesError
from kilobayes.files import write_text_atomically
from kilobayes.workflows.data import load_as_trained

ROWS = [{"note": "mine", "remark": "other", "kind": "a"}, {"note": "yours", "remark": "else", "kind": "b"}]


def run(folder: Path, text: str) -> Path:
    write_text_atomically(folder / "run.yaml", text)
    return folder


def test_columns_of_the_training_are_looked_up(tmp_path: Path) -> None:
    folder = run(tmp_path, "text_column: remark\nlabel_column: kind\n")
    found = load_as_trained(folder, ROWS)
    assert (found.texts, found.labels) == (["other", "else"], [0, 1])
    assert load_as_trained(folder, ROWS, need_labels=False).labels is None


def test_a_named_column_wins(tmp_path: Path) -> None:
    folder = run(tmp_path, "text_column: remark\nlabel_column: kind\n")
    assert load_as_trained(folder, ROWS, text_column="note").texts == ["mine", "yours"]


def test_other_data_may_name_them_differently(tmp_path: Path) -> None:
    folder = run(tmp_path, "text_column: remark\n")
    assert load_as_trained(folder, [{"text": "plain"}], need_labels=False).texts == ["plain"]
    with pytest.raises(KilobayesError, match="column"):
        load_as_trained(folder, [{"number": 3}], need_labels=False)
