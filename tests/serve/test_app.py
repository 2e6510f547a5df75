"""The endpoints, in this process: what is answered, what is refused, and how."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from kilobayes.language import LanguageModel
from kilobayes.serve.app import application
from kilobayes.serve.engine import Limits
from kilobayes.serve.shelf import Shelf
from kilobayes.tasks.data import load_examples
from kilobayes.workflows.finetune import load as load_alone

from .. import small

TEXTS = [row["text"] for row in small.rows(9, 5)]
Start = Callable[..., TestClient]


@pytest.fixture
def start(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Servers on the shared runs; pools are not closed, since others use them after."""
    for part in (*shelf.pools, *shelf.decoders):
        monkeypatch.setattr(part, "close", lambda: None)
    begun: list[TestClient] = []

    def started(limits: Limits | None = None, **options: Any) -> TestClient:
        begun.append(TestClient(application(shelf, limits, **options)))
        return begun[-1].__enter__()

    yield started
    for client in begun:
        client.__exit__(None, None, None)


def told(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()["error"]["message"]


def test_a_prediction_is_that_of_the_command_line(start: Start, folder: Path) -> None:
    client = start()
    asked = {"model": "a", "texts": TEXTS, "coverage": 0.8}
    answer = client.post("/predict", json=asked).json()
    fitted = load_alone(folder / "a", device="cpu")
    alone = fitted.predict(load_examples(TEXTS, need_labels=False))
    assert [one["text"] for one in answer["results"]] == TEXTS
    assert answer["samples"] == 4
    for at, one in enumerate(answer["results"]):
        assert list(one["probs"].values()) == pytest.approx(alone.probs[at].tolist(), abs=2e-6)
        assert one["label"] == fitted.card.classes[int(alone.probs[at].argmax())]
        assert one["entropy"] == pytest.approx(float(alone.entropy[at]), abs=2e-6)
        assert one["mutual_information"] == pytest.approx(float(alone.mutual_info[at]), abs=2e-6)
        assert set(one["set"]) <= set(fitted.card.classes)
        assert one["abstain"] == (len(one["set"]) != 1)
    assert (
        client.post("/predict", json={"model": "a", "texts": TEXTS[0]}).json()["results"][0]["text"]
        == TEXTS[0]
    )


def test_concurrent_mixed_requests_have_the_answers_of_each_alone(start: Start) -> None:
    client = start(Limits(max_batch=16, max_wait=0.03))
    asked = [("abd"[at % 3], TEXTS[at % 9 : at % 9 + 1 + at % 2]) for at in range(24)]

    def probs(name: str, texts: list[str]) -> list[list[float]]:
        found = client.post("/predict", json={"model": name, "texts": texts}).json()["results"]
        return [list(one["probs"].values()) for one in found]

    alone = [probs(*one) for one in asked]
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda one: probs(*one), asked))
    for one, other in zip(alone, together, strict=True):
        assert np.array(other) == pytest.approx(np.array(one), abs=1e-5)
    counts = client.get("/metrics").text
    mixed = float(counts.split("kilobayes_batch_adapters_sum ")[1].split()[0])
    batches = float(counts.split("kilobayes_batch_adapters_count ")[1].split()[0])
    assert mixed > batches  # some forwards did hold rows of both runs


def test_completions_are_those_of_the_run(start: Start, folder: Path) -> None:
    asked = {
        "model": "two",
        "prompt": ["once there was", "a dog"],
        "max_tokens": 5,
        "temperature": 1.2,
        "n": 2,
    }
    answer = start().post("/v1/completions", json=asked | {"seed": 7, "logprobs": 2}).json()
    model = LanguageModel.load(folder / "two", device="cpu")
    replies = model.generate(
        ["once there was", "a dog"], max_new_tokens=5, temperature=1.2, completions=2, seed=7
    )
    wanted = [one for reply in replies for one in reply.completions]
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice, one in zip(answer["choices"], wanted, strict=True):
        assert choice["text"] == one.text
        assert choice["finish_reason"] == one.generated.finish
        count = len(choice["logprobs"]["tokens"])
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(
            one.generated.log_probs[:count], abs=1e-5
        )
        assert choice["uncertainty"]["entropy"] == pytest.approx(one.generated.entropy[:count], abs=1e-5)
        assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"])
        assert choice["uncertainty"]["samples"] == 2
    written = sum(len(one.generated.tokens) for one in wanted)
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": written, "total_tokens": 5 + written}


def events(text: str) -> list[Any]:
    found = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    assert found[-1] == "[DONE]"
    return [json.loads(part) for part in found[:-1]]


def test_a_stream_says_what_the_whole_says(start: Start) -> None:
    client = start()
    asked = {"model": "one", "messages": [{"role": "user", "content": "a dog"}], "max_tokens": 6, "seed": 1}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = client.post("/v1/chat/completions", json=asked).json()
    more = {"stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/chat/completions", json=asked | more)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    choice = whole["choices"][0]
    assert "".join(delta["content"] for delta in deltas) == choice["message"]["content"]
    tokens = [part for chunk in chunks for part in chunk["choices"][0]["logprobs"]["content"]]
    assert [part["token"] for part in tokens] == [part["token"] for part in choice["logprobs"]["content"]]
    assert [part["logprob"] for part in tokens] == pytest.approx(
        [part["logprob"] for part in choice["logprobs"]["content"]], abs=1e-5
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert last["usage"] == whole["usage"]
    assert last["choices"] == []


def test_a_stop_string_ends_a_text_and_is_not_shown(start: Start) -> None:
    client = start()
    asked = {"model": "one", "prompt": "once there", "max_tokens": 12, "temperature": 0}
    text = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    word = text.split()[1]
    cut = client.post("/v1/completions", json=asked | {"stop": [word, "never"]}).json()["choices"][0]
    assert cut["text"] == text[: text.index(word)]
    assert cut["finish_reason"] == "stop"
    stream = events(client.post("/v1/completions", json=asked | {"stop": word, "stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in stream) == cut["text"]


def test_a_text_ends_where_the_draws_disagree(start: Start) -> None:
    asked = {"model": "one", "prompt": "once there", "stop_mutual_information": 0.0}
    choice = start().post("/v1/completions", json=asked).json()["choices"][0]
    assert choice["text"] == ""
    assert choice["finish_reason"] == "stop"
    assert choice["uncertainty"]["stopped"]["mutual_information"] > 0


BAD: list[tuple[str, bytes, int]] = [
    ("/predict", b"", 400),
    ("/predict", b'{"texts": ["x"]', 400),
    ("/predict", b'{"texts": ["\xff\xfe"]}', 400),
    ("/predict", b'{"texts": ["\\ud800"]}', 400),
    ("/predict", b"[" * 100_000, 400),
    ("/predict", b'{"model": "a", "texts": []}', 400),
    ("/predict", b'{"model": "a", "texts": [3]}', 400),
    ("/predict", b'{"model": "a", "texts": [["x", "y"]]}', 400),
    ("/predict", b'{"model": "a", "texts": ["x"], "coverage": NaN}', 400),
    ("/predict", b'{"model": "a", "texts": ["x"], "coverage": 1.5}', 400),
    ("/predict", b'{"model": "a", "texts": ["x"], "covrage": 0.9}', 400),
    ("/predict", b'{"texts": ["x"]}', 400),
    ("/predict", b'{"model": "one", "texts": ["x"]}', 404),
    ("/v1/completions", b'{"model": "one", "prompt": ""}', 400),
    ("/v1/completions", b'{"model": "one", "prompt": [99999]}', 400),
    ("/v1/completions", b'{"model": "one", "prompt": "a", "temperature": -1}', 400),
    ("/v1/completions", b'{"model": "one", "prompt": "a", "logit_bias": {"5": 1}}', 400),
    ("/v1/completions", b'{"model": "a", "prompt": "a"}', 404),
    ("/v1/chat/completions", b'{"model": "one", "messages": []}', 400),
    ("/v1/chat/completions", b'{"model": "one", "messages": [{"role": "user"}]}', 400),
]


def test_malformed_requests_are_refused_in_json_and_the_server_goes_on(start: Start) -> None:
    client = start()
    for path, body, status in BAD:
        assert told(client.post(path, content=body, headers={"content-type": "application/json"}), status)
    long = {"model": "one", "prompt": " ".join(["dog"] * 64)}
    assert "64 tokens" in told(client.post("/v1/completions", json=long), 400)
    assert "JSON" in told(client.post("/predict", data={"texts": "x"}), 415)
    told(client.get("/predict"), 405)
    told(client.get("/nothing"), 404)
    assert client.post("/predict", json={"model": "a", "texts": ["red"]}).status_code == 200


def test_bodies_are_limited(start: Start) -> None:
    client = start(Limits(max_body=2000))
    text = {"model": "a", "texts": ["red " * 1000]}
    assert "2000 bytes" in told(client.post("/predict", json=text), 413)

    def chunks() -> Iterator[bytes]:  # a size that no header tells
        yield from [b" " * 1000] * 30

    headers = {"content-type": "application/json"}
    told(client.post("/predict", content=chunks(), headers=headers), 413)
    told(client.post("/predict", json={"model": "a", "texts": ["x"] * 2000}), 413)


@pytest.fixture
def held(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(begun, go on): a pool that computes nothing until it is let."""
    begun, go_on = threading.Event(), threading.Event()
    pool = shelf.classifiers["a"][0]
    real = pool.scores

    def scores(asked: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return real(asked)

    monkeypatch.setattr(pool, "scores", scores)
    yield begun, go_on
    go_on.set()


def test_a_full_queue_and_late_answers_are_told(
    start: Start, held: tuple[threading.Event, threading.Event]
) -> None:
    begun, go_on = held
    client = start(Limits(max_queue=3, max_batch=1, max_wait=0.0, timeout=0.6))
    one = {"model": "a", "texts": ["red"]}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/predict", json=one)
        assert begun.wait(30)
        second = pool.submit(client.post, "/predict", json=one | {"texts": ["red", "blue"]})
        while client.app.state.engine.queued < 2:  # type: ignore[attr-defined]
            pass
        full = client.post("/predict", json=one | {"texts": ["red", "blue"]})
        assert "wait already" in told(full, 429)
        assert full.headers["retry-after"] == "1"
        assert "0.6 s" in told(first.result(), 504)
        told(second.result(), 504)
    go_on.set()
    assert client.post("/predict", json=one).status_code == 200
    assert client.app.state.engine.queued == 0  # type: ignore[attr-defined]
    assert "at most 3" in told(client.post("/predict", json=one | {"texts": ["x"] * 4}), 400)


def test_a_fault_of_the_model_is_a_500_that_says_nothing_of_the_inside(
    start: Start, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(asked: Any) -> Any:
        raise RuntimeError("secret")

    client = start()
    with monkeypatch.context() as patch:
        patch.setattr(shelf.classifiers["a"][0], "scores", broken)
        assert "secret" not in told(client.post("/predict", json={"model": "a", "texts": ["red"]}), 500)
    assert client.post("/predict", json={"model": "a", "texts": ["red"]}).status_code == 200


def test_a_token_is_asked_for(start: Start) -> None:
    client = start(token="correct horse")
    assert client.get("/health").status_code == 200
    assert client.get("/").status_code == 200
    for path in ("/v1/models", "/metrics"):
        answer = client.get(path)
        told(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    told(client.get("/v1/models", headers={"authorization": "Bearer wrong"}), 401)
    told(client.post("/predict", json={"model": "a", "texts": ["red"]}), 401)
    good = {"authorization": "Bearer correct horse"}
    assert client.get("/v1/models", headers=good).status_code == 200


def test_a_server_of_this_machine_answers_to_its_own_names_alone(start: Start) -> None:
    client = start(hosts=["localhost", "127.0.0.1", "::1"])
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    told(client.get("/health", headers={"host": "evil.example:8000"}), 421)


def test_models_and_counts(start: Start) -> None:
    client = start()
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert set(models) == {"a", "b", "d", "one", "two"}
    assert models["b"]["classes"] == ["cold", "warm"]
    assert models["one"]["task"] == "lm"
    assert client.get("/health").json()["status"] == "ok"
    client.post("/predict", json={"model": "b", "texts": ["red", "blue"]})
    client.get("/unknown")
    counts = client.get("/metrics").text
    assert 'kilobayes_requests_total{path="/predict",status="200"} 1.0' in counts
    assert 'kilobayes_requests_total{path="other",status="404"} 1.0' in counts
    assert 'kilobayes_batch_rows_sum{kind="rows"} 2.0' in counts
    assert "kilobayes_queue_rows 0.0" in counts
    assert 'kilobayes_request_seconds_bucket{le="0.005",path="/predict"}' in counts
    assert "kilobayes_requests_under_way 1.0" in counts  # this one


def test_the_page_may_run_its_own_code_alone(start: Start) -> None:
    answer = start().get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in answer.text.replace("http-equiv", "")
    assert answer.headers["x-content-type-options"] == "nosniff"
