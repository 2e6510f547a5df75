"""``/v1/completions`` and ``/v1/chat/completions``: OpenAI's API, with the uncertainty of every token."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from kilobayes.errors import KilobayesError
from kilobayes.language import LanguageModel
from kilobayes.lm.generated import Step
from kilobayes.lm.prompts import check, encode
from kilobayes.lm.sampling import Sampling
from kilobayes.random import generator
from kilobayes.serve.answers import Service
from kilobayes.serve.bodies import CHAT_TOKENS, Chat, Completion, Written
from kilobayes.serve.decoder import Writing
from kilobayes.serve.guard import Refused
from kilobayes.serve.reply import Reply
from kilobayes.serve.texts import Shown


class Completions:
    """Answers requests for text.

    Args:
        chat: conversations instead of texts.
    """

    def __init__(self, service: Service, chat: bool) -> None:
        self.service, self.chat = service, chat

    async def __call__(self, request: Request) -> Response:
        """One JSON object, or a stream of them."""
        service = self.service
        asked: Any = await service.body(request, Chat if self.chat else Completion)
        name = service.chosen(asked.model, service.shelf.speakers, "language models")
        decoder, run = service.shelf.speakers[name]
        model = decoder.models[run]
        prompts = await service.aside(lambda: self._prompts(model, asked))
        work = Work(service, name, model, decoder.stops, asked, prompts, self.chat)
        service.put(lambda: service.engine.write(name, work.texts))
        service.metrics.tokens.labels("read").inc(sum(map(len, prompts)))
        try:
            first = await service.until(request, anext(work.events))
        except BaseException:
            work.end()
            raise
        if asked.stream:
            return StreamingResponse(work.stream(first), media_type="text/event-stream")
        try:
            return JSONResponse(await service.until(request, work.whole(first)))
        finally:
            work.end()

    def _prompts(self, model: LanguageModel, asked: Any) -> list[list[int]]:
        """Tokens of each prompt."""
        tokenizer = model.tokenizer
        if isinstance(asked, Chat):
            given = [encode(tokenizer, [m.model_dump(exclude_none=True) for m in asked.messages])]
        elif isinstance(asked.prompt, list) and isinstance(asked.prompt[0], int):
            odd = next((i for i in asked.prompt if not 0 <= i < len(tokenizer)), None)
            if odd is not None:
                raise KilobayesError(f"there is no token {odd}", f"tokens are 0 to {len(tokenizer) - 1}")
            given = [("tokens", asked.prompt)]
        else:
            texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
            given = [encode(tokenizer, text) for text in texts]
        check(given, model.longest)
        ids = [tokens for _, tokens in given]
        most = self.service.limits.max_queue
        if len(ids) * asked.n > most:
            raise KilobayesError(f"a request asks for at most {most} texts", f"found {len(ids) * asked.n}")
        return ids


def sampling(asked: Any) -> Sampling:
    """The settings of a request.

    Raises:
        KilobayesError: one out of its range.
    """
    if isinstance(asked, Chat):
        most = asked.max_completion_tokens or asked.max_tokens or CHAT_TOKENS
        alternatives = (asked.top_logprobs or 0) if asked.logprobs else 0
    else:
        most, alternatives = asked.max_tokens, asked.logprobs or 0
    return Sampling(
        max_new_tokens=most, temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p,
        stop_entropy=asked.stop_entropy, stop_information=asked.stop_mutual_information,
        alternatives=alternatives,
    )  # fmt: skip


class Work:
    """The texts of one request, position by position as they are written."""

    def __init__(
        self, service: Service, name: str, model: LanguageModel, ends: set[int], asked: Written,
        prompts: list[list[int]], chat: bool,
    ) -> None:  # fmt: skip
        self.service, self.asked = service, asked
        self._arrived: asyncio.Queue[tuple[int, Step | BaseException]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        settings, self.texts, self.shown = sampling(asked), [], []
        if model.longest is not None:  # so that what cannot be written takes no room
            most = min(settings.max_new_tokens, model.longest - min(map(len, prompts)))
            settings = replace(settings, max_new_tokens=most)
        for at in range(len(prompts) * asked.n):
            row, number = divmod(at, asked.n)
            own = generator(seed, 9, row, number)  # as LanguageModel.generate has it
            emit = self._emitter(loop, at)
            self.texts.append(Writing(prompts[row], settings, own, emit))
            self.shown.append(Shown(model.tokenizer, prompts[row], asked.stops, ends))
        draws = service.shelf.speakers[name][0].draws[service.shelf.speakers[name][1]]
        self.reply = Reply(name, chat, asked, len(next(iter(draws.values()))), sum(map(len, prompts)))
        self.events = self._events()
        self.end_time = time.monotonic() + service.limits.timeout

    def _emitter(self, loop: asyncio.AbstractEventLoop, at: int) -> Any:
        def emit(step: Step | BaseException) -> None:
            loop.call_soon_threadsafe(self._arrived.put_nowait, (at, step))

        return emit

    async def _events(self) -> AsyncIterator[tuple[int, Any]]:
        """(text, piece) until all texts have ended."""
        going = set(range(len(self.texts)))
        while going:
            at, step = await self._arrived.get()
            if isinstance(step, KilobayesError):
                raise Refused(400, str(step))
            if isinstance(step, BaseException):
                raise step
            if at not in going:  # a stop string has ended it
                continue
            piece = await self.service.aside(lambda at=at, step=step: self.shown[at].add(step))  # type: ignore[misc]
            if piece.finish:
                going.discard(at)
                self.texts[at].ended = True
            yield at, piece

    async def whole(self, first: tuple[int, Any]) -> dict[str, Any]:
        """Everything in one object."""
        self.reply.add(*first)
        async for at, piece in self.events:
            self.reply.add(at, piece)
        return self.reply.whole()

    async def stream(self, first: tuple[int, Any]) -> AsyncIterator[bytes]:
        """Server-sent events: what each position adds, then ``[DONE]``; an error where there was one."""
        try:
            async with asyncio.timeout_at(self._deadline()):
                yield _event(self.reply.chunk(*first))
                async for at, piece in self.events:
                    yield _event(self.reply.chunk(at, piece))
            if self.asked.stream_options and self.asked.stream_options.include_usage:
                yield _event(self.reply.usage_chunk())
            yield b"data: [DONE]\n\n"
        except TimeoutError:
            yield _event({"error": {"message": "the time is over", "type": "server_error", "code": "504"}})
        except Refused as refused:
            found = {"message": refused.message, "type": "server_error", "code": str(refused.status)}
            yield _event({"error": found})
        finally:
            self.end()

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.end_time - time.monotonic()

    def end(self) -> None:
        """Nobody wants more of it."""
        for text in self.texts:
            text.ended = True


def _event(found: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(found, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
