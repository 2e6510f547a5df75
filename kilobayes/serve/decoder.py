"""Language models of one base and one kind of adapter: sequences of different runs, written side by side.

Every sequence has a row for each draw of its run, and every row its own member of the stack, so sequences of
different runs, settings and ages share the forward of a position; one may begin or end at any position. What
is written is what :func:`kilobayes.lm.decode.generate` writes from the same draws and the same generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kilobayes import host, tree
from kilobayes.errors import KilobayesError
from kilobayes.host import joined
from kilobayes.host.cache import accepts
from kilobayes.language import LanguageModel
from kilobayes.lm.decode import CACHED_TOKENS, choose
from kilobayes.lm.generated import Step
from kilobayes.lm.sampling import Sampling
from kilobayes.posteriors import ask
from kilobayes.predict import TOKENS_IN_FLIGHT
from kilobayes.serve.queue import Job, Waiting
from kilobayes.types import Params


@dataclass(eq=False)
class Writing:
    """A text to be written.

    Attributes:
        ids: tokens of the prompt.
        gen: chooses the tokens; unused at temperature 0.
        emit: told of each position, and of an error that ends it.
        ended: set by whoever wants no more of it.
        written: tokens so far.
    """

    ids: list[int]
    sampling: Sampling
    gen: torch.Generator
    emit: Callable[[Step | BaseException], None]
    ended: bool = False
    written: int = 0
    run: int = field(default=0)


class Decoder:
    """Runs that share a forward.

    Args:
        models: language models over one and the same base, each with its posterior.
        at_once: sequences that are written at a time.
        samples: draws of each; None takes the run's own number.
    """

    def __init__(self, models: Sequence[LanguageModel], at_once: int, samples: int | None = None) -> None:
        self.models, self.model, self.at_once = list(models), models[0].model, at_once
        self.draws: list[Params] = []
        for each in models:
            drawn = each.draws(samples)
            if drawn is None:
                raise KilobayesError("a base model alone has no posterior to serve", remedy="name a run")
            self.draws.append(drawn)
        self.stops = models[0].stop_ids()
        self.waiting = Waiting()
        self.active: list[Writing] = []
        self.cache: Any = None
        self.mask = torch.empty(0, 0, dtype=torch.int64)
        self.tokens: list[int] = []
        self._built: Any = None
        self._joinable = True
        self._device = next(self.model.parameters()).device
        self._positions = accepts(self.model, "position_ids")
        self._last = {"logits_to_keep": 1} if accepts(self.model, "logits_to_keep") else {}
        self._open = ExitStack()
        self.model.eval()
        dtype = next(self.model.parameters()).dtype
        self._open.enter_context(host.packed(self.model, dtype, backward=False))

    def close(self) -> None:
        """Give back what was made for serving."""
        self._open.close()

    def put(self, run: int, sequence: Writing) -> None:
        """A text to be written by a run."""
        sequence.run = run
        self.waiting.put(Job(run, [sequence]))

    @property
    def busy(self) -> bool:
        return bool(self.active or self.waiting.rows)

    @torch.inference_mode()
    def step(self) -> int:
        """One position of all sequences, or the prompts of new ones; returns the tokens written.

        An error of the model ends the sequences that were computed, and is told to them.
        """
        self._leave([s.ended for s in self.active])
        fresh = self._admit()
        some = fresh or self.active
        if not some:
            return 0
        try:
            return self._begin(fresh) if fresh else self._go_on()
        except Exception as error:  # whatever it was, those who wait must be told
            if not fresh:
                self.active, self.cache = [], None
            for sequence in some:
                sequence.emit(error)
            return 0

    def _admit(self) -> list[Writing]:
        """New sequences that there is room for; one alone always has it."""
        if self.active and not self._joinable:
            return []
        out: list[Writing] = []
        room = CACHED_TOKENS - sum(self._size(s) for s in self.active)
        flight = TOKENS_IN_FLIGHT
        while self.waiting.rows and len(self.active) + len(out) < self.at_once:
            if (self.active or out) and (room <= 0 or flight <= 0):
                break
            for job, at in self.waiting.take(1):
                sequence = job.rows[at]
                if not sequence.ended:
                    room -= self._size(sequence)
                    flight -= self._count(sequence) * len(sequence.ids)
                    out.append(sequence)
        return out

    def _count(self, sequence: Writing) -> int:
        return tree.size(self.draws[sequence.run])

    def _size(self, sequence: Writing) -> int:
        """Tokens that it may come to hold in the cache."""
        return self._count(sequence) * (len(sequence.ids) + sequence.sampling.max_new_tokens)

    def _build(self, some: Sequence[Writing]) -> Any:
        theta = tree.concatenate([self.draws[s.run] for s in some])
        return host.build(self.model, {k: v.to(self._device) for k, v in theta.items()})

    def _forward(self, built: Any, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Scores ``(R, V)`` after each row's last token, and the cache."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        if self._positions:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        host.install(self.model, built)
        try:
            out: Any = self.model(**inputs, use_cache=True, **self._last)
        finally:
            host.install(self.model, None)
        return out.logits[:, -1], out.past_key_values

    def _begin(self, fresh: list[Writing]) -> int:
        width = max(len(s.ids) for s in fresh)
        counts = torch.tensor([self._count(s) for s in fresh])
        ids = torch.tensor([[0] * (width - len(s.ids)) + s.ids for s in fresh]).repeat_interleave(counts, 0)
        mask = torch.tensor([[0] * (width - len(s.ids)) + [1] * len(s.ids) for s in fresh])
        mask = mask.repeat_interleave(counts, 0).to(self._device)
        scores, cache = self._forward(self._build(fresh), ids.to(self._device), mask, None)
        self._joinable = joined.check(cache, type(host.base_of(self.model)).__name__)
        tokens, ended = self._emit(fresh, scores)
        if self.active:
            self.cache, self.mask = joined.join(self.cache, cache), joined.join_masks(self.mask, mask)
        else:
            self.cache, self.mask = cache, mask
        old = len(self.active)
        self.active, self.tokens = self.active + fresh, self.tokens + tokens
        self._built = None
        self._leave([False] * old + ended)
        return len(fresh)

    def _go_on(self) -> int:
        if self._built is None:
            self._built = self._build(self.active)
        counts = torch.tensor([self._count(s) for s in self.active])
        ids = torch.tensor(self.tokens).repeat_interleave(counts)[:, None].to(self._device)
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        scores, self.cache = self._forward(self._built, ids, mask, self.cache)
        self.mask = mask
        written = len(self.active)
        self.tokens, ended = self._emit(self.active, scores)
        self._leave(ended)
        return written

    def _emit(self, some: Sequence[Writing], scores: Tensor) -> tuple[list[int], list[bool]]:
        """The next token of each, and whether it is the last."""
        tokens, ended = [], []
        for sequence, own in zip(some, scores.split([self._count(s) for s in some])):
            model = self.models[sequence.run]
            each = ask.transform(model.posterior, model.state, own[:, None])  # type: ignore[arg-type]
            sampling = sequence.sampling
            uniform = (
                torch.rand(1, generator=sequence.gen, dtype=torch.float64) if sampling.temperature else None
            )
            step = choose(each, [0], sampling, uniform)
            sequence.written += 1
            full = len(sequence.ids) + sequence.written == model.longest
            if not step.finish[0]:
                if step.tokens[0] in self.stops:
                    step.finish[0] = "stop"
                elif full or sequence.written == sampling.max_new_tokens:
                    step.finish[0] = "length"
            tokens.append(step.tokens[0])
            ended.append(bool(step.finish[0]))
            sequence.emit(step)
        return tokens, ended

    def _leave(self, ended: Sequence[bool]) -> None:
        """Sequences that have ended make room."""
        if not any(ended):
            return
        counts = [self._count(s) for s in self.active]
        staying = [i for i, end in enumerate(ended) if not end]
        rows = [r for i, part in enumerate(torch.arange(sum(counts)).split(counts)) if not ended[i]
                for r in part.tolist()]  # fmt: skip
        self.active, self.tokens = [self.active[i] for i in staying], [self.tokens[i] for i in staying]
        self._built = None
        if not staying:
            self.cache = None
            return
        self.mask = joined.keep(self.cache, self.mask, torch.tensor(rows, device=self._device))
