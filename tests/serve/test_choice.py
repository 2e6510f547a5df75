"""Decoders that choose, served: rows with columns in, the answers of each run alone out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

import kilobayes as kb
from kilobayes.serve.app import application
from kilobayes.serve.server import listen, prepared
from kilobayes.serve.shelf import Shelf, load

from .. import small_choice
from ..report import browser

ROWS = [{k: row[k] for k in ("question", "choices")} for row in small_choice.questions(12, 5)]
LABELLED = [row["text"] for row in small_choice.labelled(6, 4)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions by letter (q) and by the options' texts (t), labels that are words (w)."""
    folder = tmp_path_factory.mktemp("choices")
    given: dict[str, Any] = {
        "task": "choice", "adapter": "LoRA(r=4)", "epochs": 1, "lr": 0.02, "batch_size": 8, "samples": 3,
        "max_length": 40,
    }  # fmt: skip
    asked = small_choice.questions(24, 1)
    right = [row["answer"] for row in asked]
    rows = [{k: row[k] for k in ("question", "choices")} for row in asked]
    kb.Classifier(small_choice.base(), posterior="SWAG(rank=2)", **given).fit(rows, right).save(folder / "q")
    kb.Classifier(small_choice.base(), posterior="Temperature()", answers="text", **given).fit(
        rows, right
    ).save(folder / "t")
    words = small_choice.labelled(24, 3)
    said = kb.Classifier(
        small_choice.base(), posterior="Temperature(SWAG(rank=2))", template="{text} ? Answer :",
        answers="no,yes", calibration=0.4, **given,
    )  # fmt: skip
    said.fit([row["text"] for row in words], [row["label"] for row in words]).save(folder / "w")
    return folder


@pytest.fixture(scope="module")
def shelf(root: Path) -> Shelf:
    return load({name: root / name for name in "qtw"}, device="cpu")


@pytest.fixture(scope="module")
def client(shelf: Shelf) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        for part in shelf.pools:
            patch.setattr(part, "close", lambda: None)  # the page asks them after
        with TestClient(application(shelf)) as opened:
            yield opened


def test_they_are_one_model_in_memory_and_apart_in_forwards(shelf: Shelf) -> None:
    assert len({id(shelf.fitted(name).model) for name in "qtw"}) == 1
    assert len(shelf.pools) == 3


@pytest.mark.parametrize("name", ["q", "t", "w"])
def test_answers_are_those_of_the_run_alone(client: TestClient, root: Path, name: str) -> None:
    alone = kb.load(root / name, device="cpu")
    body = {"texts": LABELLED} if name == "w" else {"rows": ROWS}
    found = client.post("/predict", json={"model": name, **body}).json()
    expected = alone.predictive(LABELLED if name == "w" else ROWS)
    for one, probs, label in zip(found["results"], expected.probs, expected.labels, strict=True):
        assert list(one["probs"].values()) == pytest.approx(probs.tolist(), abs=2e-6)
        assert one["label"] == str(label)
    if name != "w":
        assert found["results"][0]["answer"] == ROWS[0]["choices"][int(expected.labels[0])]


def test_requests_of_one_run_are_joined(client: TestClient) -> None:
    asked: list[dict[str, Any]] = [{"model": "qt"[i % 2], "rows": [ROWS[i]]} for i in range(8)]
    # of a run without a question some rows have options, which leave one word out, and some have none
    asked += [{"model": "w", "rows": [{"text": text}]} for text in LABELLED[:2]]
    asked += [{"model": "w", "rows": [{"text": LABELLED[2], "choices": ["w1", "w2"]}]}]
    alone = [client.post("/predict", json=body).json()["results"] for body in asked]
    with ThreadPoolExecutor(11) as pool:
        together = list(pool.map(lambda body: client.post("/predict", json=body).json()["results"], asked))
    for one, other in zip(alone, together, strict=True):
        assert list(one[0]["probs"].values()) == pytest.approx(list(other[0]["probs"].values()), abs=2e-6)


def test_sets_and_single_rows(client: TestClient) -> None:
    body = {"model": "w", "rows": {"text": LABELLED[0]}, "coverage": 0.8}
    (one,) = client.post("/predict", json=body).json()["results"]
    assert set(one["set"]) <= {"0", "1"}


def test_models_say_what_they_read(client: TestClient) -> None:
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert models["q"]["task"] == "choice"
    assert (models["q"]["fields"], models["q"]["options"]) == (["question"], True)
    assert (models["w"]["fields"], models["w"]["options"]) == (["text"], False)
    assert models["t"]["options"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "q"}, "give texts or rows"),
        ({"model": "q", "rows": [{"question": "a"}], "texts": ["a"]}, "give texts or rows"),
        ({"model": "q", "rows": [{"question": "a"}]}, "choices"),
        ({"model": "q", "rows": [{"question": "a", "choices": [*"abcde"]}]}, "has 5 options"),
        ({"model": "w", "rows": [{"other": "a"}]}, "names the column {text}"),
        ({"model": "w", "texts": [["a", "b"]]}, "trained on single texts"),
        ({"model": "q", "rows": [{"question": {"a": 1}, "choices": ["a", "b"]}]}, "rows.0.question"),
    ],
)
def test_what_does_not_fit_is_refused(client: TestClient, body: dict[str, Any], message: str) -> None:
    answer = client.post("/predict", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium on this machine")
def test_the_page_asks_with_options(shelf: Shelf, tmp_path: Path) -> None:
    ready = threading.Event()
    with listen("127.0.0.1", 0) as listening:
        server = prepared(application(shelf), 60.0, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert ready.wait(60)
        page = browser.Page(tmp_path)
        try:
            url: Any = SimpleNamespace(as_uri=lambda: f"http://127.0.0.1:{listening.getsockname()[1]}/")
            page.open(url, 1000)
            until(page, "models.length === 3")
            assert page.evaluate("document.getElementById('pair-label').textContent") == "Options, one a line"
            filled = f"at('text').value = {ROWS[0]['question']!r}; at('pair').value = 'w1\\nw2'; "
            page.evaluate(filled + "label(models[0]).then(() => { window.done = 1 }); 0")
            until(page, "window.done === 1")
            said = page.evaluate("document.getElementById('verdict').textContent")
            assert said.split(",")[0] in ("0: w1", "1: w2")
            assert page.complaints == []
        finally:
            page.close()
            server.should_exit = True
            thread.join(60)


def until(page: browser.Page, expression: str) -> None:
    """Waits for something to become true in the page."""
    import time

    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)
