"""Facts from files in EasyEdit's and KnowEdit's forms, and prompts with answers in tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kilobayes.errors import KilobayesError
from kilobayes.tasks.edits import Probe, encode_pair, read_facts

from .. import small_lm
from ..small import write

DATA = Path(os.environ.get("KILOBAYES_DATA", ""))
STORIES = Path(os.environ.get("KILOBAYES_MODELS", "")) / "stories260K"
PLAIN = {"prompt": "Rome is in", "target_new": "France", "subject": "Rome", "ground_truth": "Italy"}


def test_the_flat_form(tmp_path: Path) -> None:
    row = PLAIN | {"rephrase_prompt": "Where is Rome? In", "locality_prompt": "Bonn is in"}
    row |= {"locality_ground_truth": "Germany", "portability_prompt": ["Romans live in", "The Pope is in"]}
    row |= {"portability_ground_truth": [["France", "Gaul"], "France"]}
    (fact,) = read_facts(write(tmp_path / "facts.jsonl", [row]))
    assert (fact.prompt, fact.target, fact.subject, fact.truth) == ("Rome is in", "France", "Rome", "Italy")
    assert fact.rephrased == (Probe("Where is Rome? In", "France"),)
    assert fact.locality == (Probe("Bonn is in", "Germany"),)
    assert fact.portability == (Probe("Romans live in", "France"), Probe("The Pope is in", "France"))


def test_the_nested_form_and_lists_in_csv(tmp_path: Path) -> None:
    nested: dict[str, Any] = {
        "Reasoning": [{"prompt": "Romans speak", "ground_truth": [["French", "french"]]}]
    }
    row = PLAIN | {
        "portability": nested,
        "locality": {"Other": {"prompt": "Bonn is in", "ground_truth": "Germany"}},
    }
    (fact,) = read_facts(write(tmp_path / "facts.jsonl", [row]))
    assert fact.portability == (Probe("Romans speak", "French", "Reasoning"),)
    assert fact.locality == (Probe("Bonn is in", "Germany", "Other"),)
    import csv

    with open(tmp_path / "facts.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "target_new", "rephrase_prompts", "portability", "locality"])
        rows.writerow(["Rome is in", "France", '["a", "b"]', json.dumps(nested), ""])
    (from_csv,) = read_facts(tmp_path / "facts.csv")
    assert [p.prompt for p in from_csv.rephrased] == ["a", "b"]
    assert from_csv.portability == fact.portability
    assert from_csv.locality == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"target_new": "a"}, "has no column prompt"),
        ({"prompt": "a", "targetnew": "b"}, "rename targetnew"),
        ({"prompt": " ", "target_new": "b"}, "row 1 of facts.jsonl has no prompt"),
        ({"prompt": "a", "target_new": None}, "row 1 of facts.jsonl has no target_new"),
        (PLAIN | {"locality_prompt": ["a", "b"], "locality_ground_truth": "c"}, "2 of locality_prompt"),
        (PLAIN | {"locality": [1]}, "not an object of kinds"),
        (PLAIN | {"locality": {"x": [{"prompt": "a"}]}}, "lacks prompt or ground_truth"),
        (PLAIN | {"rephrase_prompt": [{"a": 1}]}, "holds what is no text"),
        (PLAIN | {"rephrase_prompt": '["a", '}, "damaged list"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(KilobayesError, match=message):
        read_facts(write(tmp_path / "facts.jsonl", [row]))


@pytest.mark.parametrize(("name", "count"), [("counterfact", 1000), ("zsre", 298), ("known_facts", 1209)])
def test_real_files(name: str, count: int) -> None:
    path = DATA / name / "test.jsonl"
    if not path.is_file():
        pytest.skip("KILOBAYES_DATA names no folder with these facts")
    found = read_facts(path)
    assert len(found) == count
    assert len(read_facts(path, limit=7)) == 7
    assert all(f.target and f.prompt for f in found)
    if name != "known_facts":
        assert all(len(f.locality) == len(f.rephrased) == 1 for f in found)


def test_the_answer_is_what_it_adds_to_the_prompt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_lm.base())
    at = {word: 4 + i for i, word in enumerate(small_lm.WORDS)}
    pair = encode_pair(tokenizer, "ba de ", " fi go")
    assert pair.prompt == (1, at["ba"], at["de"])
    assert pair.answer == (at["fi"], at["go"])
    assert pair.text == "fi go"
    with pytest.raises(KilobayesError, match="does not know the answer 'xyz'"):
        encode_pair(tokenizer, "ba", "xyz")
    with pytest.raises(KilobayesError, match="have 4 tokens"):
        encode_pair(tokenizer, "ba de", "fi", longest=3)
    with pytest.raises(KilobayesError, match="no tokens"):
        encode_pair(tokenizer, "ba", " ")


def test_where_prompt_and_answer_would_share_a_token() -> None:
    """A tokenizer with "a b" as one token still reads the prompt alone, then the answer."""
    words = {"<unk>": 0, "a": 1, "b": 2, " ": 3, "a ": 4, "a b": 5}
    bpe = Tokenizer(models.BPE(words, [("a", " "), ("a ", "b")], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Split("#", "isolated")
    bpe.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", pad_token="<unk>")
    assert tokenizer("a b")["input_ids"] == [5]
    pair = encode_pair(tokenizer, "a", "b")
    assert pair.prompt == (1,)
    assert pair.answer == (3, 2)


@pytest.mark.skipif(not STORIES.is_dir(), reason="KILOBAYES_MODELS names no folder with stories260K")
def test_sentence_pieces_keep_one_space() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    for answer in ("Islam", "the sea"):
        pair = encode_pair(tokenizer, "The official religion is ", answer)
        assert (
            tokenizer.decode([*pair.prompt[1:], *pair.answer]).strip() == f"The official religion is {answer}"
        )
