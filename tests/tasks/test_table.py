"""Reading files: every kind gives the same, damage is named by line, nothing reaches for a network."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import kilobayes.hub
import kilobayes.tasks.sources
from kilobayes.errors import KilobayesError
from kilobayes.tasks.data import Examples, available_splits, load_examples
from kilobayes.tasks.table import LONGEST_LINE


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.tsv", "a.parquet", "A.CSV", "a.json.jsonl"],
)
def test_every_kind_of_file_gives_the_same_examples(
    sample: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    path = sample.write(tmp_path / name, sample.rows)
    assert load_examples(path) == load_examples(str(path), "train") == sample.expected
    assert available_splits(path) == ["train"]


def test_json_in_other_shapes(sample: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    columns = {key: [row[key] for row in sample.rows] for key in sample.rows[0]}
    lines = "\n".join(json.dumps(row) for row in sample.rows)
    for text in (
        json.dumps(sample.rows),
        json.dumps({"version": 1, "data": sample.rows}),
        json.dumps(columns),
        lines,
    ):
        path.write_text(text)
        assert load_examples(path) == sample.expected


def test_csv_variants(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("\ufefftext;label\r\n\r\nun, deux;1\r\ntrois;0\r\n".encode())
    assert load_examples(path) == Examples(["un, deux", "trois"], None, [1, 0], ["0", "1"])
    glue = tmp_path / "a.tsv"
    glue.write_text('label\ttext\n1\t"Yes," he said.\n0\tAn inch is 1" more.\n')
    assert load_examples(glue).texts == ['"Yes," he said.', 'An inch is 1" more.']


def test_directories_and_their_splits(sample: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("test.csv", "dev.jsonl.gz", "train.jsonl", "extra.parquet", "README.md"):
        (tmp_path / name).write_text("") if name.endswith(".md") else sample.write(
            tmp_path / name, sample.rows
        )
    assert available_splits(tmp_path) == ["train", "test", "dev", "extra"]
    assert load_examples(tmp_path, "validation") == sample.expected
    with pytest.raises(
        KilobayesError, match='has no split "tset"; found: train, test, dev, extra; did you mean "test"'
    ):
        load_examples(tmp_path, "tset")
    with pytest.raises(KilobayesError, match=r"which split .*found: train, test, dev, extra"):
        load_examples(tmp_path)
    with pytest.raises(KilobayesError, match=r'train.jsonl has no split "test"; found: train'):
        load_examples(tmp_path / "train.jsonl", "test")
    sample.write(tmp_path / "train.csv", sample.rows)
    with pytest.raises(KilobayesError, match=r"twice; train.csv and train.jsonl"):
        available_splits(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(KilobayesError, match="holds no data"):
        available_splits(empty)


GOOD = b'{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": "b", "la', "line 2 of a.jsonl is not JSON"),
        ("a.jsonl", GOOD + b"\n[1, 2]\n", "line 3 of a.jsonl is not an object"),
        ("a.jsonl", GOOD + b"\xff\xfe\x00\x01\n", "line 2 of a.jsonl is not UTF-8 text; found byte 0xff"),
        ("a.jsonl", GOOD + b"\0\0\n", "line 2 of a.jsonl is not UTF-8 text; found a zero byte"),
        (
            "a.jsonl",
            GOOD + b"[" * 200_000,
            "line 2 of a.jsonl is not usable JSON|line 2 of a.jsonl is not JSON",
        ),
        (
            "a.jsonl",
            GOOD + b'{"text": "a", "label": ' + b"1" * 9999 + b"}",
            "line 2 of a.jsonl is not usable JSON",
        ),
        ("a.jsonl", b'{"text": "' + b"a" * LONGEST_LINE, "line 1 of a.jsonl is longer than 16 MiB"),
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.jsonl.gz", gzip.compress(GOOD * 9999, mtime=0)[:60], "a.jsonl.gz is a damaged gzip file"),
        ("a.jsonl.gz", GOOD, "a.jsonl.gz is a damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-8] + b"\0" * 8, "a.jsonl.gz is a damaged gzip file"),
        ("a.json", b'[{"text": "a",\n "label": }]', "a.json is not JSON; .*line 2"),
        ("a.json", b"3", "a.json is not a list of objects"),
        ("a.csv", b"text,label\na,1\nb,c,0\n", "line 3 of a.csv has 3 fields; the header has 2: text, label"),
        ("a.csv", b"text,label\na,1\nb\n", "line 3 of a.csv has 1 fields"),
        ("a.csv", b'text,label\na,1\n"b,0\n', "line 3 of a.csv is not valid CSV"),
        (
            "a.csv",
            b"text,label\n" + b"a" * 200_000 + b",1\n",
            "line 2 of a.csv is not valid CSV; field larger",
        ),
        ("a.csv", b"text,text\na,1\n", "names a column twice"),
        ("a.csv", b"text,label\n", "a.csv has no rows; columns: text, label"),
        ("a.tsv", b"text\tlabel\na\t1\tb\n", "line 2 of a.tsv has 3 fields"),
        ("a.parquet", b"PAR1" + b"\0" * 50, "a.parquet is not a readable Parquet file"),
        ("a.parquet", b"", "a.parquet is not a readable Parquet file"),
        ("a.xlsx", b"PK", "cannot tell what kind of file a.xlsx is"),
    ],
)
def test_damaged_files_say_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KilobayesError, match=message):
        load_examples(tmp_path / name)


def test_a_truncated_parquet_file(sample: SimpleNamespace, tmp_path: Path) -> None:
    path = sample.write(tmp_path / "a.parquet", sample.rows)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(KilobayesError, match="not a readable Parquet"):
        load_examples(path)


def test_paths_never_reach_the_network_and_hub_names_fail_at_once(
    sample: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network() -> bool:
        raise AssertionError("a local path asked for the network")

    monkeypatch.setattr(kilobayes.tasks.sources, "reachable", no_network)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    sample.write(tmp_path / "train.jsonl", sample.rows)
    assert load_examples(str(tmp_path), "train") == sample.expected
    monkeypatch.chdir(tmp_path.parent)
    for wrong in (
        str(tmp_path / "trian.jsonl"),
        f"{tmp_path.name}/trian.jsonl",
        "nowhere.csv",
        Path("nowhere"),
        "a/b/c",
        "",
    ):
        with pytest.raises(KilobayesError, match="there is no file or directory"):
            load_examples(wrong)
    monkeypatch.setattr(kilobayes.tasks.sources, "reachable", lambda: False)
    for name in ("imdb", "nyu-mll/glue:rte"):
        with pytest.raises(
            KilobayesError, match=r"and the hub cannot be reached; no connection; give a file"
        ) as caught:
            load_examples(name, "train")
        assert caught.value.wrong.startswith('there is no local file or directory "')


def test_reading_small_files_needs_no_heavy_library(sample: SimpleNamespace, tmp_path: Path) -> None:
    sample.write(tmp_path / "a.csv", sample.rows)
    code = (
        "import sys; from kilobayes.tasks.data import load_examples\n"
        f"assert len(load_examples({str(tmp_path / 'a.csv')!r})) == 3\n"
        "assert not {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
