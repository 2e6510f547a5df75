"""The page: what it says, how it escapes, and how it does without what is missing."""

from __future__ import annotations

import dataclasses
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kilobayes.errors import KilobayesError
from kilobayes.metrics.evaluation import Evaluation, Interval, summarise
from kilobayes.report import build_page, write_report

from . import simulated

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Outline(HTMLParser):
    """Tags that are open, text of the page, attributes seen; fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def arms() -> list[Evaluation]:
    return simulated.four_arms()


@pytest.fixture(scope="module")
def summaries(arms: list[Evaluation]) -> list[dict[str, Interval]]:
    return [summarise(arm, resamples=100) for arm in arms]


@pytest.fixture(scope="module")
def page(arms: list[Evaluation], summaries: list[dict[str, Interval]]) -> str:
    return build_page(arms, summaries, simulated.META)


def test_page_is_well_formed_and_says_what_was_found(page: str, arms: list[Evaluation]) -> None:
    outline = Outline(page)
    assert outline.open == []
    assert page.startswith("<!doctype html>")
    for words in (
        "Question types, 6 classes",
        "Of 4 arms, LoRA + temperature has the lowest NLL",
        simulated.META["command"],
        simulated.META["data"]["sha256"],
        "transformers 5.1.0",
        "ECE (15 bins)",
        "15 bins of equal width",
        "1,000 resamples",
        "Surest and wrong",
        "Out of distribution, and it shows",
        "SWAG(rank=10)",
        "20.5 kB",
        "1 min 18 s",
        "Simulated predictions; nothing was trained.",
        *(arm.name for arm in arms),
    ):
        assert words in outline.text, words


def test_table_shows_the_numbers_of_the_summaries(page: str, summaries: list[dict[str, Interval]]) -> None:
    text = Outline(page).text
    for summary in summaries:
        nll, accuracy = summary["nll"], summary["accuracy"]
        assert f"{nll.value:.3f}" in text
        assert f"{nll.low:.3f} – {nll.high:.3f}" in text
        assert f"{accuracy.value:.1%}" in text


def test_page_is_accessible(page: str) -> None:
    outline = Outline(page)
    tables = outline.tags.count("table")
    assert tables == outline.tags.count("caption") == 6
    assert {value for tag, name, value in outline.attributes if (tag, name) == ("th", "scope")} == {
        "col",
        "row",
    }
    assert outline.tags.count("th") == sum(
        tag == "th" and name == "scope" for tag, name, _ in outline.attributes
    )
    labels = [value for _, name, value in outline.attributes if name == "aria-label"]
    pictures = [
        value for tag, name, value in outline.attributes if (tag, name, value) == ("div", "role", "img")
    ]
    # Point estimates have no mutual information, so two arms have three figures and two have four.
    assert len(pictures) == outline.tags.count("figure") == 1 + 3 + 3 + 4 + 4
    assert all(labels)
    assert ("html", "lang", "en") in outline.attributes


def test_page_asks_the_network_for_nothing(page: str) -> None:
    assert not re.search("https?:", page)
    outline = Outline(page)
    assert not {"script", "iframe", "img", "object", "embed", "base", "form"} & set(outline.tags)
    for tag, name, value in outline.attributes:
        if name in ("href", "src", "srcset", "action", "data", "xlink:href"):
            assert value.startswith(("#", "data:,")), (tag, name, value)
        assert not name.startswith("on")
    urls = re.findall(r"url\(([^)]*)\)", page)
    assert all(url.startswith("#") for url in urls)
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_page_stays_small(page: str) -> None:
    assert len(page.encode()) < 700_000


HOSTILE = "<script>alert(1)</script>\"'><b onmouseover=x>&amp;{{ 7 * 7 }}{% raw %}{# #}"


def test_hostile_text_stays_text_wherever_it_comes_from(arms: list[Evaluation]) -> None:
    arm = dataclasses.replace(
        arms[0],
        name=HOSTILE,
        classes=[f"{HOSTILE}{index}" for index in range(6)],
        texts=[HOSTILE] * 500,
        ood_texts=[HOSTILE] * 200,
        cost={HOSTILE: 1.0},
        spec={HOSTILE: HOSTILE},
    )
    told = {"title": HOSTILE, "command": HOSTILE, "created": HOSTILE, "notes": [HOSTILE]}
    page = build_page(
        [arm, arm],
        [summarise(arm, resamples=10)] * 2,
        told | {"data": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}},
    )
    outline = Outline(page)
    assert outline.open == []
    assert "script" not in outline.tags
    assert "b" not in outline.tags
    assert not [name for _, name, _ in outline.attributes if name.startswith("on")]
    assert outline.text.count("<script>alert(1)</script>") > 20
    assert outline.text.count("{{ 7 * 7 }}{% raw %}{# #}") > 20
    assert ("time", "datetime", HOSTILE) in outline.attributes


def test_characters_that_cannot_be_written_are_replaced(arms: list[Evaluation], tmp_path: Path) -> None:
    odd = "nul \x00, escape \x1b, half a pair \ud800, tab\t, أهلا, 🙂"
    arm = dataclasses.replace(arms[0], name=odd, texts=[odd] * 500)
    path = write_report(tmp_path / "report.html", [arm], [summarise(arm, resamples=10)], {})
    written = path.read_text(encoding="utf-8")
    assert "nul \ufffd, escape \ufffd, half a pair \ufffd, tab\t, أهلا, 🙂" in written


def test_one_plain_arm_without_facts(arms: list[Evaluation]) -> None:
    plain = simulated.plain(arms[0])
    outline = Outline(build_page([plain], [summarise(plain, resamples=10)], {}))
    assert "LoRA, point has an NLL of" in outline.text.replace("“", "").replace("”", "")
    for absent in ("Out of distribution", "OOD", "Stored", "★", "≈", "Versions", "Notes", "None", "nan"):
        assert absent not in outline.text, absent
    assert outline.tags.count("figure") == 3
    assert "Calibration report" in outline.text


def test_arms_may_differ_in_what_they_have(arms: list[Evaluation]) -> None:
    mixed = [simulated.plain(arms[0]), arms[2]]
    text = Outline(build_page(mixed, [summarise(arm, resamples=10) for arm in mixed], {"bins": 10})).text
    assert "OOD AUROC" in text
    assert "ECE (10 bins)" in text
    assert "10 bins of equal width" in text


def test_summaries_may_be_empty(arms: list[Evaluation]) -> None:
    page = build_page(arms[:2], [{}, {}], {})
    assert "No arm has a finite NLL" in page


@pytest.mark.parametrize("count", [0, 1, 3])
def test_arms_and_summaries_must_pair_up(arms: list[Evaluation], count: int) -> None:
    evaluations: list[Any] = [] if count == 0 else arms[:2]
    with pytest.raises(KilobayesError, match=f"{len(evaluations)} evaluations and {count} summaries"):
        build_page(evaluations, [{}] * count, {})


def test_report_is_written_whole_or_not_at_all(
    arms: list[Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, summary = [arms[0]], [summarise(arms[0], resamples=10)]
    path = write_report(tmp_path / "new" / "folder" / "report.html", one, summary, {"title": "first"})
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, one, summary, {"title": "second"})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    monkeypatch.undo()
    write_report(str(path), one, summary, {"title": "second"})
    assert b"<title>second</title>" in path.read_bytes()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
