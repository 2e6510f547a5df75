r"""Classifiers of one base and one kind of adapter as one stack: rows of different runs in one forward.

Block s of the rows goes to member s. A row of run u is asked of each of its S_u draws, so a batch is made of
blocks (run, draw, some rows of this run), all of the same number of rows; the stack that is installed holds
the members in the order of the blocks. Heads of fewer classes than others are filled up with zeros, whose
scores nobody reads. Scores equal those of a run alone but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kilobayes import host, tree
from kilobayes.energy import ModelEnergy
from kilobayes.modes import evaluation
from kilobayes.posteriors import ask
from kilobayes.predict import TOKENS_IN_FLIGHT, logits
from kilobayes.random import generator
from kilobayes.tasks.classify import Encoded
from kilobayes.types import Params
from kilobayes.workflows.finetune import Fitted

BLOCK = 0.1  # what a block costs beside its rows, in rows


Row = Encoded  # of one


def rows_of(encoded: Encoded) -> list[Row]:
    """Encoded rows one by one."""
    return [encoded.take(torch.tensor([at])) for at in range(len(encoded))]


def joined(rows: Sequence[Row]) -> Encoded:
    """Rows one by one as one; all of one task, which says what they are made of."""
    columns: dict[str, Any] = {}
    for name in (field.name for field in fields(rows[0])):
        parts = [getattr(row, name) for row in rows]
        if isinstance(parts[0], Tensor):
            columns[name] = torch.cat(parts)
        elif isinstance(parts[0], list):
            columns[name] = [value for part in parts for value in part]
        else:
            columns[name] = parts[0]
    return type(rows[0])(**columns)


def linearised(fitted: Fitted) -> bool:
    """Whether a run predicts by derivatives instead of draws, and so shares no forward with others."""
    return any(getattr(part, "linearised", False) for part in ask.chain(fitted.posterior))


class Pool:
    """Runs that share a forward.

    Args:
        fitted: runs over one and the same model; a linearised one, and one of a decoder that chooses, whose
            answers are its own, is alone.
        samples: draws of each; None takes the run's own number.
    """

    def __init__(self, fitted: Sequence[Fitted], samples: int | None = None) -> None:
        self.fitted, self.samples = list(fitted), samples
        self.model = fitted[0].model
        self.alone = linearised(fitted[0])
        self.draws: list[Params] = []
        if not self.alone:
            self.draws = [self._drawn(f) for f in fitted]
        self.filled = filled(self.draws)
        self._open = ExitStack()
        self._open.enter_context(host.packed(self.model, backward=False))

    def close(self) -> None:
        """Give back what was made for serving."""
        self._open.close()

    def _drawn(self, fitted: Fitted) -> Params:
        """The draws that :meth:`Fitted.predict` takes: same seed, same number."""
        count = ask.count(fitted.posterior, fitted.state, self.samples or fitted.card.samples)
        energy = ModelEnergy(self.model, fitted.task, Encoded([], None, None, 0))
        return ask.draws(fitted.posterior, fitted.state, energy, count, generator(fitted.card.seed, 7))

    def scores(self, asked: Sequence[tuple[int, Row]]) -> list[Tensor]:
        """Class scores ``(S_u, C_u)`` of each row, transformed as the run's posterior wants them.

        Args:
            asked: which run, and the row.
        """
        encoded = joined([row for _, row in asked])
        runs = sorted({run for run, _ in asked})
        if len(runs) == 1:
            return list(self._one(self.fitted[runs[0]], runs[0], encoded).unbind(dim=1))
        with torch.inference_mode():
            raw = self._mixed(asked, runs, encoded)
            out = []
            for (run, _), scores in zip(asked, raw):
                fitted = self.fitted[run]
                own = scores[:, : len(fitted.card.classes)]
                out.append(ask.transform(fitted.posterior, fitted.state, own[:, None])[:, 0])
            return out

    def _one(self, fitted: Fitted, run: int, encoded: Encoded) -> Tensor:
        """Scores ``(S, N, C)`` of rows of one run.

        A linearised one draws scores for all rows of a call, so each row is a call of its own.
        """
        if self.alone:
            each = [encoded.take(torch.tensor([at])) for at in range(len(encoded))]
            return torch.cat([fitted.predict(row, self.samples).logits for row in each], dim=1)
        found = logits(self.model, self.draws[run], fitted.task, encoded, pack=False)
        return ask.transform(fitted.posterior, fitted.state, found)

    def _mixed(self, asked: Sequence[tuple[int, Row]], runs: list[int], encoded: Encoded) -> list[Tensor]:
        """Scores ``(S_u, C)`` of each row before any transform."""
        counts = [tree.size(self.draws[run]) for run in runs]
        theta = tree.concatenate([self.filled[run] for run in runs])
        where = [runs.index(run) for run, _ in asked]
        rows, members = blocks(where, counts)
        task, device = self.fitted[0].task, next(self.model.parameters()).device
        inputs = task.collate(encoded, range(len(asked)))
        longest = inputs["input_ids"].shape[1]
        at_once = max(1, TOKENS_IN_FLIGHT // (rows.shape[1] * longest))
        parts = []
        with ExitStack() as stack:
            stack.enter_context(evaluation(self.model))
            stack.callback(host.install, self.model, None)
            stack.enter_context(host.read_token(self.model))
            stack.enter_context(host.real_tokens(self.model))
            stack.enter_context(task.within(self.model))
            for some, which in zip(rows.split(at_once), members.split(at_once)):
                part = {k: v[which].to(device) for k, v in theta.items()}
                host.install(self.model, host.build(self.model, part))
                batch = {k: v[some.flatten()].to(device) for k, v in inputs.items()}
                found = host.check_rows(task.readout(self.model(**batch)), *some.shape)
                parts.append(found.float().cpu())
        return _by_row(torch.cat(parts), rows, members, where, counts)


def blocks(where: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How rows meet members: rows ``(blocks, b)`` by place, and members ``(blocks,)``.

    Members of run u are numbered from the sum of the counts before it; a run's last block repeats its last
    row where rows are missing. b is chosen so that least is computed.

    Args:
        where: the run of each row, 0 to U - 1.
        counts: draws of each run ``(U,)``.
    """
    of = [[at for at, run in enumerate(where) if run == u] for u in range(len(counts))]
    most = max(map(len, of))
    sizes = sorted({1, most} | {2**k for k in range(1, most.bit_length()) if 2**k < most})

    def cost(size: int) -> float:
        return sum(count * -(-len(rows) // size) * (size + BLOCK) for rows, count in zip(of, counts))

    size = min(sizes, key=cost)
    rows: list[list[int]] = []
    members: list[int] = []
    first = 0
    for own, count in zip(of, counts):
        for start in range(0, len(own), size):
            part = own[start : start + size]
            part = part + part[-1:] * (size - len(part))
            rows += [part] * count
            members += range(first, first + count)
        first += count
    return torch.tensor(rows), torch.tensor(members)


def _by_row(
    found: Tensor, rows: Tensor, members: Tensor, where: Sequence[int], counts: Sequence[int]
) -> list[Tensor]:
    """Scores ``(blocks, b, C)`` as ``(S_u, C)`` of each row."""
    firsts = [sum(counts[:u]) for u in range(len(counts))]
    out = [found.new_empty(counts[u], found.shape[-1]) for u in where]
    for block, (places, member) in enumerate(zip(rows.tolist(), members.tolist())):
        for at, row in enumerate(places):
            out[row][member - firsts[where[row]]] = found[block, at]
    return out


def filled(draws: Sequence[Params]) -> list[Params]:
    """The same draws with heads of as many classes as the largest; zeros are filled in."""
    if not draws:
        return []
    most = {key: max(own[key].shape[1] for own in draws) for key in draws[0]}

    def wide(key: str, value: Tensor) -> Tensor:
        missing = most[key] - value.shape[1]
        sides: Any = [0, 0] * (value.dim() - 2) + [0, missing]
        return pad(value, sides) if missing else value

    return [{key: wide(key, value) for key, value in own.items()} for own in draws]
