"""What a model answers to the prompts of facts, by teacher forcing and by writing freely, and its scores.

Rows meet the members of a stack one block each: single edits are asked together, each its own prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kilobayes import host, tree
from kilobayes.host.cache import accepts
from kilobayes.lm.prompts import padded
from kilobayes.lm.replies import after
from kilobayes.metrics import editing
from kilobayes.metrics.editing import Answered
from kilobayes.modes import evaluation
from kilobayes.tasks.edits import Fact, Pair, Probe, encode_pair
from kilobayes.types import Params
from kilobayes.workflows.edit import batch

TOGETHER = 64  # facts that are asked about at once


@dataclass(frozen=True)
class Questions:
    """A fact's prompts in tokens, with their kinds: its own, rephrased, portability's and locality's."""

    own: Pair
    groups: dict[str, list[tuple[str, Pair]]]

    @classmethod
    def of(cls, tokenizer: Any, fact: Fact, longest: int | None = None) -> Questions:
        """Raises:
        KilobayesError: a prompt that does not fit, or an answer the tokenizer does not know.
        """

        def pairs(probes: Sequence[Probe]) -> list[tuple[str, Pair]]:
            return [(p.kind, encode_pair(tokenizer, p.prompt, p.answer, longest)) for p in probes]

        own = encode_pair(tokenizer, fact.prompt, fact.target, longest)
        groups = {"success": [("", own)], "generality": pairs(fact.rephrased)}
        return cls(own, groups | {"portability": pairs(fact.portability), "locality": pairs(fact.locality)})

    def rows(self) -> list[Pair]:
        """All pairs, group by group."""
        return [pair for group in self.groups.values() for _, pair in group]


@contextmanager
def using(model: nn.Module, theta: Params | None) -> Iterator[None]:
    """Within it the forward is that of a stack of edits, or with None of the base without any."""
    with evaluation(model), torch.inference_mode():
        if theta is None:
            off: Any = model
            with off.disable_adapter():
                yield
            return
        device = next(model.parameters()).device
        host.install(model, host.build(model, {k: v.detach().to(device) for k, v in theta.items()}))
        try:
            yield
        finally:
            host.install(model, None)


def columns(rows: Sequence[Sequence[Pair]], most: int) -> Iterator[tuple[list[Pair], list[int]]]:
    """Batches in which every member has as many rows, and where each belongs: member m's row i at m + i S.

    Where a member has no more rows its last one stands in, and its place is -1.
    """
    stack, longest = len(rows), max(map(len, rows))
    size = max(1, most // stack)
    for at in range(0, longest, size):
        span = range(at, min(at + size, longest))
        places = [m + i * stack if i < len(own) else -1 for m, own in enumerate(rows) for i in span]
        yield [own[min(i, len(own) - 1)] for own in rows for i in span], places


def forced(model: nn.Module, pairs: Sequence[Pair], pad: int) -> list[list[int]]:
    """The most probable token at each place of each answer, those before it given."""
    inputs, labels = batch(pairs, pad)
    device = next(model.parameters()).device
    best = model(**{k: v.to(device) for k, v in inputs.items()}).logits[:, :-1].argmax(dim=-1).cpu()
    return [row[own != -100].tolist() for row, own in zip(best, labels[:, 1:], strict=True)]


def greedy(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], tokens: int, stop: set[int]
) -> list[list[int]]:
    """The most probable tokens after each prompt, up to one that ends a text or ``tokens``, over a cache."""
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in padded(tokenizer, [list(pair.prompt) for pair in pairs]))
    options: dict[str, Any] = {"use_cache": True}
    options |= {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    positions, written = (mask.cumsum(dim=1) - 1).clamp(min=0), []
    ended = torch.zeros(len(pairs), dtype=torch.bool, device=device)
    cache: Any = None
    for _ in range(tokens):
        if accepts(model, "position_ids"):
            options["position_ids"] = positions
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
        ids = output.logits[:, -1:].argmax(dim=-1)
        written.append(torch.where(ended[:, None], -1, ids))
        for token in stop:
            ended = ended | (ids[:, 0] == token)
        if bool(ended.all()):
            break
        cache, positions = output.past_key_values, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(pairs), 1)], dim=1)
    found = torch.cat(written, dim=1).tolist()
    return [[t for t in row if t != -1 and t not in stop] for row in found]


def answered(
    model: nn.Module,
    tokenizer: Any,
    theta: Params | None,
    rows: Sequence[Sequence[Pair]],
    stop: set[int],
    most: int = 64,
) -> list[list[tuple[list[int], list[int], str]]]:
    """Forced tokens, tokens written and their text, of each row of each member.

    Args:
        rows: of each member; a single list of them goes with ``theta`` None.
        most: rows at once.
    """
    stack = len(rows)
    out: list[list[Any]] = [[None] * len(own) for own in rows]
    with using(model, theta):
        for pairs, places in columns(rows, most):
            length = max(len(pair.answer) for pair in pairs)
            best = forced(model, pairs, tokenizer.pad_token_id or 0)
            free = greedy(model, tokenizer, pairs, length, stop)
            for pair, place, of_best, of_free in zip(pairs, places, best, free, strict=True):
                if place >= 0:
                    cut = of_free[: len(pair.answer)]
                    out[place % stack][place // stack] = (of_best, cut, after(tokenizer, pair.prompt, cut))
    return out


def texts(
    model: nn.Module,
    tokenizer: Any,
    theta: Params | None,
    rows: Sequence[Sequence[Pair]],
    stop: set[int],
    tokens: int,
    most: int = 64,
) -> list[list[str]]:
    """The text that goes on from each prompt, ``tokens`` long at most: for fluency."""
    stack = len(rows)
    out = [[""] * len(own) for own in rows]
    with using(model, theta):
        for pairs, places in columns(rows, most):
            found = greedy(model, tokenizer, pairs, tokens, stop)
            for pair, place, ids in zip(pairs, places, found, strict=True):
                if place >= 0:
                    out[place % stack][place // stack] = after(tokenizer, pair.prompt, ids)
    return out


@dataclass(frozen=True)
class Told:
    """Answers to all of a fact's prompts by group, and the text that goes on from its own."""

    groups: dict[str, list[Answered]]
    text: str


def ask(
    model: nn.Module, tokenizer: Any, theta: Params | None, questions: Sequence[Questions], stop: set[int],
    tokens: int = 100,
) -> list[Told]:  # fmt: skip
    """What the model says to every fact's prompts.

    Args:
        theta: None asks the base; a stack of as many members as facts asks member s about fact s; a stack of
            one asks it about all.
        tokens: longest text for fluency; 0 writes none.
    """
    found: list[Any] = []
    written: list[str] = []
    alone = theta is not None and tree.size(theta) > 1  # a member for each fact, else one for all
    for at in range(0, len(questions), TOGETHER):
        some = questions[at : at + TOGETHER]
        rows, own = [q.rows() for q in some], [[q.own] for q in some]
        part = tree.member(theta, slice(at, at + TOGETHER)) if alone and theta is not None else theta
        if not alone:
            rows, own = [[pair for row in rows for pair in row]], [[q.own for q in some]]
        found += [reply for row in answered(model, tokenizer, part, rows, stop) for reply in row]
        if tokens:
            written += [t for row in texts(model, tokenizer, part, own, stop, tokens) for t in row]
    each = iter(found)
    out = []
    for q, text in zip(questions, written or [""] * len(questions), strict=True):
        groups: dict[str, list[Answered]] = {}
        for name, group in q.groups.items():
            groups[name] = []
            for kind, pair in group:
                best, free, said = next(each)
                groups[name].append(Answered(pair.answer, best, free, said, pair.text, kind))
        out.append(Told(groups, text))
    return out


def record(before: Told, after: Told) -> dict[str, float | None]:
    """A fact's scores, as :mod:`kilobayes.metrics.editing` defines them."""
    out: dict[str, float | None] = {}
    for name in ("success", "generality", "portability"):
        out |= editing.achieved(name, after.groups[name])
    out |= editing.untouched(before.groups["locality"], after.groups["locality"])
    for key, told in (("fluency", after), ("fluency_before", before)):
        out[key] = editing.fluency(told.text) if told.text else None
    return out


def stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end a text."""
    settings: Any = getattr(host.base_of(model), "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    found = list(named) if isinstance(named, list | tuple) else [named]
    return {int(i) for i in (*found, tokenizer.eos_token_id) if i is not None}
