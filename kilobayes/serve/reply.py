"""Replies as OpenAI's API words them, with ``uncertainty`` beside each text."""

from __future__ import annotations

import secrets
import time
from typing import Any

from kilobayes.serve.bodies import Written
from kilobayes.serve.texts import Piece


class Reply:
    """The texts of one request, gathered, or passed on piece by piece.

    Args:
        name: of the run.
        chat: a conversation's reply.
        samples: draws that probabilities are averaged over.
        read: tokens of the prompts.
    """

    def __init__(self, name: str, chat: bool, asked: Written, samples: int, read: int) -> None:
        self.chat, self.samples, self.read, self.written = chat, samples, read, 0
        wanted: Any = asked
        self.logprobs = wanted.logprobs not in (None, False)
        self.top = (wanted.top_logprobs or 0) if chat else (wanted.logprobs or 0)
        self.pieces: dict[int, list[Piece]] = {}
        self.lengths: dict[int, int] = {}
        prefix = "chatcmpl-" if chat else "cmpl-"
        self.head = {"id": prefix + secrets.token_hex(12), "created": int(time.time()), "model": name}

    def add(self, at: int, piece: Piece) -> None:
        """The next position of a text."""
        self.pieces.setdefault(at, []).append(piece)
        self.written += 1

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written, those that end a text included."""
        total = self.read + self.written
        return {"prompt_tokens": self.read, "completion_tokens": self.written, "total_tokens": total}

    def whole(self) -> dict[str, Any]:
        """All texts in one object."""
        choices = []
        for at, pieces in sorted(self.pieces.items()):
            text = "".join(piece.text for piece in pieces)
            choice: dict[str, Any] = {"index": at}
            choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choice |= self._rest(at, pieces) | {"uncertainty": self.uncertainty(pieces)}
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return self.head | {"object": kind, "choices": choices, "usage": self.usage}

    def chunk(self, at: int, piece: Piece) -> dict[str, Any]:
        """What a position adds to a stream."""
        first = at not in self.pieces
        self.add(at, piece)
        choice: dict[str, Any] = {"index": at}
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | {"content": piece.text}
        else:
            choice["text"] = piece.text
        choice |= self._rest(at, [piece]) | {"uncertainty": self.uncertainty([piece], means=False)}
        return self._chunk([choice])

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream, where it was asked for."""
        return self._chunk([]) | {"usage": self.usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self.head | {"object": kind, "choices": choices}

    def _rest(self, at: int, pieces: list[Piece]) -> dict[str, Any]:
        finish = pieces[-1].finish
        finish = "stop" if finish == "uncertain" else finish  # the API knows no other word
        logprobs = None
        if self.logprobs:
            logprobs = self._chat_logprobs(pieces) if self.chat else self._logprobs(at, pieces)
        return {"logprobs": logprobs, "finish_reason": finish or None}

    def _chat_logprobs(self, pieces: list[Piece]) -> dict[str, Any]:
        def one(token: str, log_prob: float) -> dict[str, Any]:
            return {"token": token, "logprob": log_prob, "bytes": list(token.encode())}

        content = [
            one(p.token, p.log_prob) | {"top_logprobs": [one(t, v) for t, v in p.top[: self.top]]}
            for p in pieces
            if p.token is not None
        ]
        return {"content": content}

    def _logprobs(self, at: int, pieces: list[Piece]) -> dict[str, Any]:
        tokens = [p for p in pieces if p.token is not None]
        offsets = []
        for p in tokens:
            offsets.append(self.lengths.get(at, 0))
            self.lengths[at] = offsets[-1] + len(p.token or "")
        return {
            "tokens": [p.token for p in tokens],
            "token_logprobs": [p.log_prob for p in tokens],
            "top_logprobs": [dict(p.top[: self.top]) for p in tokens] if self.top else None,
            "text_offset": offsets,
        }

    def uncertainty(self, pieces: list[Piece], means: bool = True) -> dict[str, Any]:
        """Entropy and mutual information of each token, nats, and what ended a text that was too unsure."""
        tokens = [p for p in pieces if p.token is not None]
        out: dict[str, Any] = {
            "samples": self.samples,
            "tokens": [p.token for p in tokens],
            "entropy": [p.entropy for p in tokens],
            "mutual_information": [p.information for p in tokens],
        }
        if means:
            count = max(len(tokens), 1)
            out["mean_entropy"] = sum(out["entropy"]) / count
            out["mean_mutual_information"] = sum(out["mutual_information"]) / count
        last = pieces[-1]
        if last.finish == "uncertain":
            out["stopped"] = {"entropy": last.entropy, "mutual_information": last.information}
        return out
