"""The page in a real browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from kilobayes.serve.app import application
from kilobayes.serve.server import listen, prepared
from kilobayes.serve.shelf import Shelf

from ..report import browser
from .served import until

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium on this machine")
TOKEN = "a long token"


@pytest.fixture(scope="module")
def address(shelf: Shelf) -> Iterator[str]:
    """A server in a thread of this process."""
    ready = threading.Event()
    with pytest.MonkeyPatch.context() as patch, listen("127.0.0.1", 0) as listening:
        for part in (*shelf.pools, *shelf.decoders):
            patch.setattr(part, "close", lambda: None)  # others use them after
        server = prepared(application(shelf, token=TOKEN), 60.0, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert ready.wait(60)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)


def opened(page: browser.Page, address: str, width: int = 1100, scheme: str = "light") -> None:
    url: Any = SimpleNamespace(as_uri=lambda: f"{address}/")
    page.open(url, width, scheme=scheme)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    tab = browser.Page(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


def text(page: browser.Page, selector: str) -> str:
    return page.evaluate(f"document.querySelector({selector!r}).textContent")


def type_in(page: browser.Page, **values: Any) -> None:
    for name, value in values.items():
        page.evaluate(
            f"(() => {{ const part = document.getElementById({name!r}); part.value = {value!r}; "
            "part.dispatchEvent(new Event('change')) })()"
        )


def ask(page: browser.Page) -> None:
    page.evaluate("document.getElementById('go').click()")
    until(lambda: not page.evaluate("document.getElementById('go').disabled"))


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_one_types_a_text_and_sees_how_sure_the_model_is(
    page: browser.Page, address: str, tmp_path: Path, width: int, scheme: str
) -> None:
    page.requests.clear()
    page.complaints.clear()
    opened(page, address, width, scheme)
    until(lambda: "token" in text(page, "#status"))
    refused = [line for line in page.complaints if "401" not in line]
    page.complaints.clear()
    type_in(page, token=TOKEN)
    until(lambda: page.evaluate("document.getElementById('model').options.length") == 5)
    type_in(page, model="a", text="<b>red</b> w1 w2", coverage="0.8")
    assert "cold, fresh, warm" in text(page, "#about")
    ask(page)
    assert text(page, "#status") == "Answered by a."
    assert text(page, "#verdict").split(",")[0] in ("cold", "fresh", "warm")
    shares = page.evaluate("[...document.querySelectorAll('#bars progress')].map(bar => bar.value)")
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)
    in_set = page.evaluate(
        "[...document.querySelectorAll('#bars .in')].filter(cell => cell.textContent).length"
    )
    assert page.evaluate("document.getElementById('abstain').hidden") == (in_set == 1)
    picture = imread(page.picture(tmp_path / f"labels-{width}.png"))[..., :3]
    assert np.abs(picture - picture[2, 2]).max() > 0.5

    type_in(page, model="one", text="once there was", tokens="12", temperature="1.3")
    ask(page)
    assert text(page, "#status") == "Answered by one."
    written = text(page, "#written")
    shades = page.evaluate("[...document.querySelectorAll('#written span')].map(part => part.className)")
    assert written.strip()
    assert 0 < len(shades) <= int(text(page, "#count")) <= 12
    assert all(shade in ("u0", "u1", "u2", "u3", "u4", "u5") for shade in shades)
    assert float(text(page, "#mean-information")) > 0
    page.picture(tmp_path / f"text-{width}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not refused
    assert page.complaints == []  # nothing that the policy forbids, no exception
    assert all(url.startswith(f"{address}/") for url in page.requests)


def test_parts_have_names_for_those_who_do_not_see_them(page: browser.Page, address: str) -> None:
    opened(page, address)
    nameless = (
        "[...document.querySelectorAll('input, select, textarea, button')].filter(part => "
        "!(part.labels && part.labels.length) && !part.textContent.trim()).length"
    )
    assert page.evaluate(nameless) == 0
    assert page.evaluate("document.documentElement.lang") == "en"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(part => part.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("document.getElementById('status').getAttribute('aria-live')") == "polite"


def test_an_error_is_shown(page: browser.Page, address: str) -> None:
    opened(page, address)
    type_in(page, token=TOKEN)
    until(lambda: page.evaluate("document.getElementById('model').options.length") == 5)
    type_in(page, model="one", text="dog " * 70)
    ask(page)
    assert "the model takes 64" in text(page, "#status")
