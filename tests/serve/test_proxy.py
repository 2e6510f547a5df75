"""Draws as plain adapters, and their average in front of a server that knows nothing of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from starlette.testclient import TestClient

from kilobayes import cli, host, tree
from kilobayes.language import LanguageModel
from kilobayes.lm.prompts import encode
from kilobayes.serve.averaging import average, forced
from kilobayes.serve.manifest import Manifest
from kilobayes.serve.proxy import application

from .upstream import Upstream

PROMPT = "once there was a"


@pytest.fixture(scope="module")
def samples(folder: Path) -> Path:
    out = folder / "samples"
    assert cli.run(["export", str(folder / "one"), "--to", "samples", "--count", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def upstream(folder: Path, samples: Path) -> Upstream:
    return Upstream(folder / "base", samples)


@pytest.fixture
def client(samples: Path, upstream: Upstream) -> Iterator[TestClient]:
    transport = httpx2.ASGITransport(app=upstream.app)
    ours = httpx2.AsyncClient(transport=transport, base_url="http://upstream")
    upstream.asked.clear()
    with TestClient(application(Manifest.read(samples), ours)) as found:
        yield found


def each(folder: Path, ids: list[int]) -> torch.Tensor:
    """Probabilities ``(S, T, V)`` of what follows each token, under every draw of the run itself."""
    model = LanguageModel.load(folder / "one", device="cpu")
    theta = model.draws()
    assert theta is not None
    found = []
    for at in range(tree.size(theta)):
        host.install(model.model, host.build(model.model, tree.member(theta, at)))
        with torch.no_grad():
            found.append(model.model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1))
    host.install(model.model, None)
    return torch.stack(found)


def test_a_manifest_says_what_the_folders_are(folder: Path, samples: Path) -> None:
    manifest = json.loads((samples / "manifest.json").read_text())
    assert [sample["name"] for sample in manifest["samples"]] == ["one_0", "one_1", "one_2"]
    for sample in manifest["samples"]:
        file = samples / sample["name"] / "adapter_model.safetensors"
        assert sample["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert sample["weight"] == pytest.approx(1 / 3)
        config = json.loads((file.parent / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
    assert manifest["task"] == "lm"
    assert manifest["seed"] == 0
    assert manifest["transformed"] is False


def test_one_token_is_that_of_the_average(client: TestClient, folder: Path, upstream: Upstream) -> None:
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1, "logprobs": 3}).json()
    ids = encode(upstream.tokenizer, PROMPT)[1]
    probs = each(folder, ids)[:, -1].mean(dim=0)
    doubt, choice = answer["choices"][0]["uncertainty"], answer["choices"][0]
    words = upstream.tokenizer.convert_ids_to_tokens(range(len(probs)))
    # the vocabulary is smaller than what is listed, so nothing is missing and all is exact
    for word, p in zip(words, probs.tolist(), strict=True):
        assert doubt["probabilities"][f" {word}"] == pytest.approx(p, abs=1e-6)
    assert doubt["at_most"] == pytest.approx(doubt["probabilities"])
    assert doubt["certain"]
    assert choice["text"] == f" {words[int(probs.argmax())]}"
    entropy = -(probs * probs.log()).sum()
    own = each(folder, ids)[:, -1]
    assert doubt["entropy"] == pytest.approx(float(entropy), abs=1e-5)
    assert doubt["mutual_information"] == pytest.approx(
        float(entropy + (own * own.log()).sum(-1).mean()), abs=1e-5
    )
    assert len(choice["logprobs"]["top_logprobs"][0]) == 3
    assert sorted(one["model"] for one in upstream.asked) == ["one_0", "one_1", "one_2"]


def test_a_conversation_is_answered_with_one_token(
    client: TestClient, folder: Path, upstream: Upstream
) -> None:
    messages = [{"role": "user", "content": "a dog"}]
    asked = {"messages": messages, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
    choice = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
    probs = each(folder, encode(upstream.tokenizer, messages)[1])[:, -1].mean(dim=0)
    best = int(probs.argmax())
    assert choice["message"]["content"] == f" {upstream.tokenizer.convert_ids_to_tokens(best)}"
    assert choice["logprobs"]["content"][0]["logprob"] == pytest.approx(math.log(probs[best]), abs=1e-5)


def test_a_text_is_read_by_all_adapters(client: TestClient, folder: Path, upstream: Upstream) -> None:
    asked = {"model": "one", "prompt": PROMPT, "max_tokens": 5, "temperature": 1.1, "seed": 7, "logprobs": 1}
    choice = client.post("/v1/completions", json=asked).json()["choices"][0]
    assert choice["uncertainty"]["written_by"] == "one_1"  # 7 modulo 3
    ids = encode(upstream.tokenizer, PROMPT + choice["text"])[1]
    start = len(encode(upstream.tokenizer, PROMPT)[1])
    probs = each(folder, ids)
    wanted = [float(probs[:, at - 1, ids[at]].mean().log()) for at in range(start, len(ids))]
    spread = [float(probs[:, at - 1, ids[at]].std(correction=0)) for at in range(start, len(ids))]
    assert len(wanted) == 5
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted, abs=1e-5)
    assert choice["uncertainty"]["probability_std"] == pytest.approx(spread, abs=1e-6)
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert [one["max_tokens"] for one in upstream.asked] == [5, 0, 0, 0]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", {"prompt": "a", "stream": True}, "stream"),
        ("/v1/completions", {"prompt": "a", "n": 2}, "n is not possible"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "one text"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "temperature": 0.5}, "temperature"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "max_tokens 1"),
    ],
)
def test_what_cannot_be_averaged_is_refused(client: TestClient, path: str, body: Any, said: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_faults_of_the_server_are_told(client: TestClient, upstream: Upstream) -> None:
    upstream.fault = 404
    try:
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    finally:
        upstream.fault = 0
    assert answer.status_code == 502
    assert "404" in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json={"model": "two", "prompt": "a"}).status_code == 404
    assert client.get("/v1/models").json()["data"][0]["id"] == "one"
    assert 'status="502"' in client.get("/metrics").text


def test_bounds_where_adapters_list_different_tokens() -> None:
    lists = [{"a": math.log(0.6), "b": math.log(0.3)}, {"a": math.log(0.5), "c": math.log(0.4)}]
    found = average(lists, [0.5, 0.5])
    assert found.low == pytest.approx({"a": 0.55, "c": 0.2, "b": 0.15})
    # what is left over is 0.1 for each, and less than the least that is listed
    assert found.high == pytest.approx({"a": 0.55, "c": 0.25, "b": 0.2})
    assert found.certain
    close = average([{"a": math.log(0.5)}, {"b": math.log(0.45)}], [0.5, 0.5])
    assert not close.certain
    merged = [0.55, 0.15, 0.2, 0.1]
    assert found.entropy == pytest.approx(-sum(p * math.log(p) for p in merged))
    own = [-sum(p * math.log(p) for p in rest) for rest in ([0.6, 0.3, 0.1], [0.5, 0.4, 0.1])]
    assert found.information == pytest.approx(found.entropy - sum(own) / 2)


def test_averages_of_probabilities_not_of_their_logarithms() -> None:
    logs, spreads = forced([[math.log(0.2), -1000.0], [math.log(0.4), -1000.0]], [0.25, 0.75])
    assert logs == pytest.approx([math.log(0.35), -1000.0])
    assert spreads == pytest.approx([math.sqrt(0.25 * 0.15**2 + 0.75 * 0.05**2), 0.0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--upstream", "http://x"], "holds no samples"),
        (["--upstream", "http://x", "--host", "0.0.0.0"], "KILOBAYES_TOKEN"),
    ],
)
def test_the_command_refuses_to_start(words: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.run(["proxy", str(tmp_path), *words]) == 2
    assert said in capsys.readouterr().err


def test_samples_of_classifiers_keep_their_heads(folder: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["export", str(folder / "a"), "--to", "samples", "--out", str(tmp_path / "out"), "--json"]
    assert cli.run(arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["samples"] == ["a_0", "a_1", "a_2", "a_3"]
    assert "temperature" in printed.err  # which no adapter holds
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["transformed"] is True
    assert manifest["classes"] == ["cold", "fresh", "warm"]
    assert cli.run(["export", str(folder / "d"), "--to", "samples", "--out", str(tmp_path / "d")]) == 2
    assert "linearised" in capsys.readouterr().err
    assert (
        cli.run(["export", str(folder / "a"), "--to", "lora", "--count", "2", "--out", str(tmp_path / "x")])
        == 2
    )
