from __future__ import annotations

from pathlib import Path

import pytest

from kilobayes.errors import KilobayesError
from kilobayes.options import Options, from_mapping, names
from kilobayes.run_yaml import read_yaml, write_yaml


def test_written_settings_are_read_back(tmp_path: Path) -> None:
    options = Options(data="é: #.csv", out="o", lr=3e-4, layers="0,1", clip=0, limit=7, text_column="null")
    write_yaml(tmp_path / "run.yaml", options)
    assert Options(**read_yaml(tmp_path / "run.yaml")) == options


def test_written_settings_do_not_resume(tmp_path: Path) -> None:
    write_yaml(tmp_path / "run.yaml", Options(data="d", resume=True))
    assert not Options(**read_yaml(tmp_path / "run.yaml")).resume


def test_spellings_of_hugging_face() -> None:
    given = {
        "model_name_or_path": "m",
        "dataset-name": "d",
        "learning_rate": 0.1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 3,
        "output_dir": "o",
        "max_seq_length": 9,
    }
    found = Options(**from_mapping(given, "here"))
    assert (found.model, found.data, found.lr, found.epochs, found.batch_size) == ("m", "d", 0.1, 2, 3)
    assert (found.out, found.max_length) == ("o", 9)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lr": "1e-3"}, 1e-3),  # YAML 1.1 reads 1e-3 as text
        ({"epochs": 2.0}, 2),
        ({"layers": [3, 4]}, "3,4"),
        ({"calibration": 0.3}, "0.3"),
        ({"calibration": 50}, "50"),
        ({"limit": None}, None),
    ],
)
def test_values_take_the_type_of_their_key(values: dict, expected: object) -> None:
    (name,) = values
    found = getattr(Options(**values), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "many"}, "--epochs takes a whole number; found 'many'"),
        ({"epochs": 1.5}, "--epochs takes a whole number"),
        ({"epochs": True}, "--epochs takes a whole number"),
        ({"epochs": float("inf")}, "--epochs takes a whole number"),
        ({"lr": [1]}, "--lr takes a number"),
        ({"lr": False}, "--lr takes a number"),
        ({"resume": "yes"}, "--resume takes true or false"),
        ({"model": {"a": 1}}, "--model takes text"),
        ({"model": None}, "--model takes text"),
        ({"layers": [[1]]}, "--layers takes text"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"limit_train": -3}, "--limit-train must be at least 1"),
        ({"max_length": 3}, "--max-length must be at least 4"),
        ({"warmup": 1.5}, "--warmup must be between 0 and 1"),
        ({"warmup": float("nan")}, "--warmup must be between"),
        ({"clip": -1}, "--clip must be at least 0"),
        ({"seed": -1}, "--seed must be between 0"),
        ({"lr": 0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"lr": float("inf")}, "--lr must be above 0"),
        ({"dtype": "bfloat"}, "did you mean --dtype bfloat16"),
        ({"autocast": "fp16"}, "known: no, bf16"),
        ({"task": "generate"}, "known: classify"),
        ({"layers": "last"}, "as in --layers 3,4,5"),
        ({"calibration": 1.5}, "--calibration must be a share"),
        ({"calibration": -0.1}, "--calibration must be a share"),
        ({"calibration": "nan"}, "--calibration must be a share"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict, message: str) -> None:
    with pytest.raises(KilobayesError) as error:
        Options(**values)
    assert message in str(error.value)
    assert error.value.found


def test_an_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(KilobayesError, match=r"unknown key 'epoch'.*did you mean epochs\?"):
        from_mapping({"epoch": 3}, "run.yaml")
    with pytest.raises(KilobayesError, match="did you mean learning_rate"):
        from_mapping({"learning_rat": 3}, "run.yaml")


def test_a_key_in_two_spellings_is_refused() -> None:
    with pytest.raises(KilobayesError, match="sets lr twice"):
        from_mapping({"lr": 1, "learning_rate": 2}, "run.yaml")


def test_an_empty_value_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: x\nood:\nlr: ~\n")
    assert read_yaml(tmp_path / "c.yaml") == {"data": "x"}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{k}: &{k} [{','.join([f'*{p}'] * 9)}]\n" for p, k in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + "model: *i\n", "references"),
        ("lr: !!python/object/apply:os.system ['exit 1']\n", "not valid YAML"),
        ("lr: !!python/name:os.system\n", "not valid YAML"),
        ("lr: [1\n", "not valid YAML.*line"),
        ("- 1\n- 2\n", "a list"),
        ("just words", "a str"),
        ("[" * 500_000, "not flat"),
        ("lr: 2020-13-45\n", "not valid YAML|takes a number"),
        ("? [1, 2]\n: 3\n", "not valid YAML|unknown key"),
        ("x" * (1 << 21), "bytes"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(KilobayesError, match=message) as error:
        Options(**read_yaml(tmp_path / "c.yaml"))
    assert len(str(error.value)) < 1500


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(KilobayesError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(KilobayesError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"data: \xff\xfe")
    with pytest.raises(KilobayesError, match="not valid YAML"):
        read_yaml(tmp_path / "c.yaml")


def test_identity_leaves_out_what_does_not_change_the_run() -> None:
    one = Options(data="d", out="a", samples=3, resume=True, test="t", device="cpu")
    other = Options(data="d", out="b", limit=4, ood="o", max_minutes=3)
    assert one.identity() == other.identity()
    for change in (
        {"lr": 0.5},
        {"seed": 1},
        {"posterior": "Point()"},
        {"calibration": 0.3},
        {"dtype": "bfloat16"},
    ):
        assert Options(data="d", **change).identity() != other.identity()


def test_every_option_has_help_and_a_default() -> None:
    assert Options()
    for name, f in Options.__dataclass_fields__.items():
        assert f.metadata["help"].endswith("."), name
    assert len(set(names())) == len(names())
