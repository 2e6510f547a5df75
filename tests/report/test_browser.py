"""The page in a real browser: light, dark, on a phone and in print."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from kilobayes.metrics.evaluation import summarise
from kilobayes.report import write_report

from . import browser, simulated

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    tab = browser.Page(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = simulated.four_arms()
    # Names and texts that do not break into lines, as file names and hashes do.
    long = "x" * 120
    arms[2] = dataclasses.replace(arms[2], name=f"LoRA-XS_{long}", spec={"adapter": long}, texts=[long] * 500)
    summaries = [summarise(arm, resamples=50) for arm in arms]
    return write_report(tmp_path_factory.mktemp("report") / "report.html", arms, summaries, simulated.META)


LOOKS = [
    pytest.param(1280, "light", "", id="desktop-light"),
    pytest.param(1280, "dark", "", id="desktop-dark"),
    pytest.param(390, "light", "", id="phone-light"),
    pytest.param(390, "dark", "", id="phone-dark"),
    pytest.param(760, "light", "print", id="print"),
]


@pytest.mark.parametrize(("width", "scheme", "media"), LOOKS)
def test_page_fits_and_is_painted(
    page: browser.Page, report: Path, tmp_path: Path, width: int, scheme: str, media: str
) -> None:
    page.requests.clear()
    page.complaints.clear()
    page.open(report, width, scheme=scheme, media=media)
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture = imread(page.picture(tmp_path / "page.png"))[..., :3]
    assert picture.shape[0] > 3000
    assert picture.shape[1] == width
    background = picture[2, 2].mean()
    assert background > 0.95 if scheme == "light" else background < 0.15
    # Every stretch of three screens holds something that stands out from the background.
    for start in range(0, len(picture) - 2700, 2700):
        assert np.abs(picture[start : start + 2700] - picture[2, 2]).max() > 0.5
    assert page.requests == [report.as_uri()]
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(page: browser.Page, report: Path, scheme: str) -> None:
    page.open(report, 1280, scheme=scheme)
    surface = _luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    for selector in ("p.lead", "figcaption", "td .interval", "nav a", ".plot svg text"):
        property_ = "fill" if "svg" in selector else "color"
        found = page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).{property_}")
        light, dark = sorted((_luminance(found), surface), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (selector, found)


def test_ids_are_unique_and_links_lead_somewhere(page: browser.Page, report: Path) -> None:
    page.open(report, 1280)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(part => part.id)")
    assert len(ids) == len(set(ids))
    missing = "[...document.links].filter(link => !document.getElementById(link.hash.slice(1))).length"
    assert page.evaluate("document.links.length") > 0
    assert page.evaluate(missing) == 0


def test_markup_in_texts_stays_text(page: browser.Page, tmp_path: Path) -> None:
    hostile = (
        "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">{{ 7 * 7 }}"
    )
    arm = simulated.four_arms()[0]
    arm = dataclasses.replace(
        arm,
        name=hostile,
        classes=[hostile + str(number) for number in range(6)],
        texts=[hostile] * 500,
        ood_texts=[hostile] * 200,
        spec={hostile: hostile},
    )
    meta = {"title": "safe", "command": hostile, "notes": [hostile], "data": {hostile: hostile}}
    path = write_report(tmp_path / "report.html", [arm], [summarise(arm, resamples=20)], meta)
    page.requests.clear()
    page.complaints.clear()
    page.open(path, 1280)
    assert page.evaluate("document.title") == "safe"
    assert page.evaluate("document.scripts.length + document.images.length") == 0
    assert page.evaluate("document.querySelector('pre').textContent") == hostile
    assert hostile in page.evaluate("document.body.textContent")
    assert page.requests == [path.as_uri()]
    assert page.complaints == []


def _luminance(colour: str) -> float:
    channels = np.array([float(part) for part in colour[4:-1].split(",")]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
