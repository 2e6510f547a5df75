"""``kilobayes generate`` from the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import kilobayes as kb
from kilobayes import cli

from . import small_lm

RUN = "RUN"


@pytest.fixture
def kilobayes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def run(*words: str, code: int = 0, given: str | None = None) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(given or ""))
        capsys.readouterr()
        found = [str(small_lm.run()) if word is RUN else word for word in words]
        assert cli.run(["generate", *found, "--device", "cpu"]) == code
        told = capsys.readouterr()
        return told.out, told.err

    return run


def lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_text_for_people_and_json_for_programs(kilobayes) -> None:
    flags = ["--prompt", "ba de", "--prompt", "go", "--max-new-tokens", "4"]
    expected = kb.load(small_lm.run(), device="cpu").generate(["ba de", "go"], max_new_tokens=4)
    out, err = kilobayes(RUN, *flags)
    assert out == "".join(f"{reply.text.strip()}\n" for reply in expected)
    assert "4 tokens, perplexity" in err
    out, _ = kilobayes(RUN, *flags, "--json", "--alternatives", "2")
    for row, reply in zip(lines(out), expected, strict=True):
        assert row["prompt"] == reply.prompt
        (found,) = row["completions"]
        assert found["text"] == reply.text
        assert found["finish"] == "length"
        assert found["perplexity"] == pytest.approx(reply.best.generated.perplexity)
        assert found["log_prob"] == pytest.approx(sum(t["log_prob"] for t in found["tokens"]))
        assert found["entropy"] == pytest.approx(sum(t["entropy"] for t in found["tokens"]) / 4)
        mutual = [t["mutual_information"] for t in found["tokens"]]
        assert found["mutual_information"] == pytest.approx(sum(mutual) / 4)
        assert [t["id"] for t in found["tokens"]] == reply.best.generated.tokens
        assert all(len(t["alternatives"]) == 2 for t in found["tokens"])
        assert all(t["token"] == t["alternatives"][0]["token"] for t in found["tokens"])


def test_prompts_from_a_file_or_a_pipe(kilobayes, tmp_path: Path) -> None:
    few = ["--max-new-tokens", "3"]
    direct, _ = kilobayes(RUN, *few, "--prompt", "ba de", "--prompt", "fi", "--json")
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "ba de", "id": 3}\n\n"fi"\n')
    assert kilobayes(RUN, *few, "--input", str(source), "--json")[0] == direct
    piped = '{"text": "ba de"}\n{"messages": [{"role": "ba", "content": "de"}]}\n'
    out, _ = kilobayes(RUN, *few, "--input", "-", "--json", given=piped)
    assert [row["prompt"] for row in lines(out)] == ["ba de", "ba de ba"]
    out, _ = kilobayes(RUN, *few, "--json", given="ba\nde\n")
    assert [row["prompt"] for row in lines(out)] == ["ba\nde"]
    target = tmp_path / "deep" / "out.jsonl"
    out, err = kilobayes(RUN, *few, "--input", str(source), "--output", str(target))
    assert (out, "2 prompts" in err) == ("", True)
    assert lines(target.read_text()) == lines(direct)


def test_completions_agree_or_not(kilobayes) -> None:
    flags = ["--prompt", "ba", "--temperature", "1", "--max-new-tokens", "2", "--completions", "5"]
    out, err = kilobayes(RUN, *flags)
    assert len(out.splitlines()) == 5
    assert "different answers in 5" in err
    (row,) = lines(kilobayes(RUN, *flags, "--json", "--seed", "3")[0])
    assert set(row["agreement"]) == {"clusters", "entropy", "share", "best"}
    assert len(row["agreement"]["clusters"]) == len(row["completions"]) == 5
    assert kilobayes(RUN, *flags, "--json", "--seed", "3")[0] == json.dumps(row, ensure_ascii=False) + "\n"
    assert kilobayes(RUN, *flags, "--json", "--seed", "4")[0] != json.dumps(row, ensure_ascii=False) + "\n"


def test_doubt_ends_a_text(kilobayes) -> None:
    (row,) = lines(kilobayes(RUN, "--prompt", "ba", "--stop-entropy", "0", "--json")[0])
    (found,) = row["completions"]
    assert (found["text"], found["finish"], found["tokens"]) == ("", "uncertain", [])
    assert found["perplexity"] is None
    assert found["doubt"]["entropy"] > 0
    out, err = kilobayes(RUN, "--prompt", "ba", "--stop-information", "0")
    assert out == "\n"
    assert "no tokens; stopped in doubt (entropy" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([RUN, "--prompt", ""], "prompt 1 is empty"),
        ([RUN, "--prompt", "ba", "--temperature", "-1"], "--temperature must be at least 0"),
        ([RUN, "--prompt", "ba", "--top-p", "2"], "--top-p must be above 0 and at most 1"),
        ([RUN, "--prompt", "ba", "--completions", "2"], "2 completions would be the same"),
        ([RUN, "--prompt", "ba " * 60], "prompt 1 has 61 tokens"),
        ([RUN, "--prompt", "ba", "--input", "x.jsonl"], "not both"),
        ([RUN, "--input", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        ([RUN], "standard input is empty"),
        (["nowhere/at/all", "--prompt", "ba"], "nowhere/at/all"),
    ],
)
def test_wrong_input_is_explained(kilobayes, words: list[str], told: str) -> None:
    out, err = kilobayes(*words, code=2)
    assert told in err
    assert out == ""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("{nonsense", "line 1 of standard input is no JSON"),
        ('{"promt": "ba"}', "did you mean prompt in place of promt?"),
        ('{"prompt": 3}', "prompt is not text"),
        ('{"prompt": "ba"}\n[1]', "line 2 of standard input has no prompt"),
        ('{"messages": "ba"}', "messages is not a list of messages"),
        ('{"messages": [{"content": "ba"}]}', "a text or a conversation"),
    ],
)
def test_wrong_lines_are_explained(kilobayes, given: str, told: str) -> None:
    assert told in kilobayes(RUN, "--input", "-", code=2, given=given)[1]


def test_a_classifier_is_named_as_such(kilobayes) -> None:
    err = kilobayes(str(small_lm.run(task="classify")), "--prompt", "ba", code=2)[1]
    assert "holds a classifier" in err
    assert "kilobayes predict" in err
