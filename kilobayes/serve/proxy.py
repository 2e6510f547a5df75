"""One model in front of K adapters of an OpenAI-compatible server: every request is asked K times.

A text is written by one of the adapters, and its tokens' probabilities are averaged over all of them, each
reading the same text (``echo``). An answer of a single token is the most probable one of the average of the
listed probabilities. Nothing else is averaged, and what cannot be is refused.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from fastapi import FastAPI, Request

from kilobayes import __version__
from kilobayes.serve.averaging import average, forced
from kilobayes.serve.bodies import CHAT_TOKENS, Chat, Completion, Written, read
from kilobayes.serve.guard import Guard, Refused
from kilobayes.serve.manifest import Manifest
from kilobayes.serve.metrics import Metrics
from kilobayes.serve.routes import add_routes

LISTED = 20  # tokens that are asked of each adapter; vLLM lists no more unless told to
PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


class Proxy:
    """Asks the server about each adapter, and averages.

    Args:
        client: to the server that has the adapters.
    """

    def __init__(self, manifest: Manifest, client: httpx2.AsyncClient) -> None:
        self.manifest, self.client = manifest, client

    async def completions(self, request: Request) -> dict[str, Any]:
        """A text by one adapter, its probabilities averaged over all; or one token of the average."""
        asked = self._read(Completion, await request.body())
        if not isinstance(asked.prompt, str):
            raise Refused(400, "the prompt must be one text: scores are matched to it by their place in it")
        if asked.max_tokens == 1:
            body = {"prompt": asked.prompt, "max_tokens": 1, "temperature": 0, "logprobs": LISTED}
            answers = await self._all("/v1/completions", body)
            return self._single(asked, [a["logprobs"]["top_logprobs"][0] for a in answers], chat=False)
        return await self._text(asked, asked.prompt)

    async def chat(self, request: Request) -> dict[str, Any]:
        """One token of the average; longer replies cannot be scored under other adapters."""
        asked = self._read(Chat, await request.body())
        most = asked.max_completion_tokens or asked.max_tokens or CHAT_TOKENS
        if most != 1:
            raise Refused(
                400, "a conversation's reply is averaged at max_tokens 1 alone, since servers do not score "
                "a given reply; for longer texts ask /v1/completions",
            )  # fmt: skip
        messages = [message.model_dump(exclude_none=True) for message in asked.messages]
        body = {
            "messages": messages,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": LISTED,
        }
        answers = await self._all("/v1/chat/completions", body)
        tops = [a["logprobs"]["content"][0]["top_logprobs"] for a in answers]
        return self._single(asked, [{one["token"]: one["logprob"] for one in top} for top in tops], chat=True)

    def _read(self, kind: Any, raw: bytes) -> Any:
        asked = read(kind, raw)
        if asked.model not in (None, self.manifest.name):
            raise Refused(404, f"there is no model {asked.model!r:.80} here; there is {self.manifest.name}")
        for name, default in (
            ("stream", False),
            ("n", 1),
            ("stop_entropy", None),
            ("stop_mutual_information", None),
        ):
            if getattr(asked, name) != default:
                raise Refused(400, f"{name} is not possible over several adapters of another server")
        if getattr(asked, "max_tokens", None) == 1 and asked.temperature not in (0, 1):
            raise Refused(400, "one token is the most probable of the average: leave the temperature out")
        return asked

    async def _text(self, asked: Any, prompt: str) -> dict[str, Any]:
        """A text that one adapter wrote, read by all."""
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        members = self.manifest.members
        writer = members[seed % len(members)]
        body = {
            "prompt": prompt, "max_tokens": asked.max_tokens, "temperature": asked.temperature,
            "top_p": asked.top_p, "seed": seed,
        } | ({"stop": asked.stops} if asked.stops else {})  # fmt: skip
        (written,) = await self._all("/v1/completions", body, [writer])
        text = written["text"]
        tokens: list[str] = []
        log_probs: list[float] = []
        spreads: list[float] = []
        if text:
            forced_body = {
                "prompt": prompt + text,
                "max_tokens": 0,
                "temperature": 0,
                "echo": True,
                "logprobs": 1,
            }
            echoed = [a["logprobs"] for a in await self._all("/v1/completions", forced_body)]
            first = echoed[0]
            if any(each["tokens"] != first["tokens"] for each in echoed):
                raise Refused(502, "the adapters read the same text as different tokens")
            own = [at for at, place in enumerate(first["text_offset"]) if place >= len(prompt)]
            own = [at for at in own if all(each["token_logprobs"][at] is not None for each in echoed)]
            tokens = [first["tokens"][at] for at in own]
            log_probs, spreads = forced(
                [[each["token_logprobs"][at] for at in own] for each in echoed], self.manifest.weights
            )
        doubt = {"samples": len(members), "written_by": writer, "tokens": tokens, "probability_std": spreads}
        choice = {"index": 0, "text": text, "finish_reason": written["finish_reason"], "uncertainty": doubt}
        shown = {"tokens": tokens, "token_logprobs": log_probs, "top_logprobs": None}
        choice["logprobs"] = shown | {"text_offset": offsets(tokens)}
        return self._head(False) | {"choices": [choice]}

    def _single(self, asked: Written, lists: list[dict[str, float]], chat: bool) -> dict[str, Any]:
        """The most probable token of the average."""
        if not all(lists):
            raise Refused(502, "the server lists no probabilities; does it allow logprobs?")
        found = average(lists, self.manifest.weights)
        token = next(iter(found.low))
        logs = {t: math.log(p) for t, p in found.low.items() if p > 0}
        doubt = {
            "samples": len(lists), "entropy": found.entropy, "mutual_information": found.information,
            "certain": found.certain, "probabilities": found.low, "at_most": found.high,
        }  # fmt: skip
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "uncertainty": doubt}
        wanted: Any = asked
        top = list(logs.items())[: (wanted.top_logprobs if chat else wanted.logprobs) or 0]
        if chat:
            listed = [{"token": t, "logprob": v, "bytes": list(t.encode())} for t, v in top]
            one = {
                "token": token,
                "logprob": logs[token],
                "bytes": list(token.encode()),
                "top_logprobs": listed,
            }
            choice["message"] = {"role": "assistant", "content": token}
            choice["logprobs"] = {"content": [one]}
        else:
            choice["text"] = token
            choice["logprobs"] = {
                "tokens": [token], "token_logprobs": [logs[token]], "top_logprobs": [dict(top)],
                "text_offset": [0],
            }  # fmt: skip
        return self._head(chat) | {"choices": [choice]}

    def _head(self, chat: bool) -> dict[str, Any]:
        kind = "chat.completion" if chat else "text_completion"
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "object": kind}
        return head | {"model": self.manifest.name}

    async def _all(
        self, path: str, body: dict[str, Any], members: list[str] | None = None
    ) -> list[dict[str, Any]]:
        """The first choice of each adapter's answer."""
        names = self.manifest.members if members is None else members
        found = await asyncio.gather(*(self._one(path, {"model": name} | body) for name in names))
        return [answer["choices"][0] for answer in found]

    async def _one(self, path: str, body: dict[str, Any]) -> Any:
        try:
            answer = await self.client.post(path, json=body)
            if answer.status_code == 200:
                found = answer.json()
                found["choices"][0]["finish_reason"]  # so that another shape is told of
                return found
            told = answer.text[:300]
        except httpx2.TimeoutException:
            raise Refused(504, f"the server did not answer about {body['model']} in time") from None
        except httpx2.HTTPError as error:
            raise Refused(502, f"the server cannot be asked: {type(error).__name__}") from None
        except (ValueError, LookupError, TypeError):
            raise Refused(502, "the server's answer has another shape than OpenAI's") from None
        raise Refused(502, f"the server answered {answer.status_code} about {body['model']}: {told}")


def offsets(tokens: list[str]) -> list[int]:
    """Where each token begins in their text."""
    out = [0]
    for token in tokens[:-1]:
        out.append(out[-1] + len(token))
    return out if tokens else []


def application(
    manifest: Manifest, client: httpx2.AsyncClient, *, token: str = "", hosts: list[str] | None = None,
    max_body: int = 1 << 20, timeout: float = 60.0,
) -> FastAPI:  # fmt: skip
    """The ASGI application; the client is closed with it."""
    metrics, proxy = Metrics(), Proxy(manifest, client)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()

    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "samples": len(manifest.members)}

    async def models() -> dict[str, Any]:
        own = {"id": manifest.name, "object": "model", "created": 0, "owned_by": "kilobayes"}
        return {"object": "list", "data": [own | {"samples": manifest.members}]}

    app = FastAPI(title="kilobayes proxy", version=__version__, lifespan=lifespan, openapi_url=None)
    add_routes(app, metrics, {"/health": health, "/v1/models": models}, {
        "/v1/completions": proxy.completions, "/v1/chat/completions": proxy.chat,
    })  # fmt: skip
    app.add_middleware(
        Guard,
        metrics=metrics,
        token=token,
        hosts=hosts or (),
        paths=PATHS,
        max_body=max_body,
        timeout=timeout,
    )
    return app
