"""Choosing between options by how likely a language model finds the text of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.errors import KilobayesError
from kilobayes.host.continuations import continuations
from kilobayes.tasks.choice import check_prompt
from kilobayes.tasks.classify import Encoded, class_indices, class_nll, labels_of, padded, scores_of
from kilobayes.tasks.data import Examples
from kilobayes.tasks.prompt import Prompt
from kilobayes.tasks.prompted import Prompted


@dataclass(frozen=True, eq=False)
class Continued(Encoded):
    """Rows with their options; ``ids`` are all sequences of a row, prompt and option, after each other.

    Attributes:
        spans: of each sequence of a row, its length and how many of its last tokens are the option's.
        units: what the log-likelihood of each option is divided by.
    """

    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    units: list[list[float]] = field(default_factory=list)

    def take(self, rows: Tensor) -> Continued:
        """Some of the rows, in the order given."""
        plain, which = super().take(rows), rows.tolist()
        spans, units = [self.spans[i] for i in which], [self.units[i] for i in which]
        return Continued(plain.ids, None, plain.labels, plain.truncated, plain.counts, spans, units)


@dataclass(frozen=True, eq=False)
class OptionLikelihood:
    r"""The task of choosing one of a row's options by the likelihood of its text after the prompt.

    .. math:: f_c = \frac1{n_c} \sum_t \log p(w_{c,t} \mid \text{prompt}, w_{c,<t}), \qquad
              p(c) = \operatorname{softmax}(f)_c

    with n_c = 1 ("sum"), the option's tokens ("token") or its bytes in UTF-8 ("byte"). Over a posterior these
    p(c) are averaged, as any classifier's probabilities are. The prompt is read once for each option.

    Attributes:
        tokenizer: a Hugging Face tokenizer; never changed.
        classes: names of the options' places, as many as a row has at most.
        prompt: template, and which ``scoring``.
        max_length: longest prompt with an option, in tokens; of longer ones the own text loses its beginning.
    """

    tokenizer: Any
    classes: Sequence[str]
    prompt: Prompt
    max_length: int = 128

    def __post_init__(self) -> None:
        if self.prompt.scoring not in ("sum", "token", "byte") or len(self.classes) < 2:
            raise KilobayesError(
                "options are scored by sum, token or byte, two or more of them",
                f"found {self.prompt.scoring!r}, and {len(self.classes)} classes",
            )
        self.written.check(self.max_length)

    @cached_property
    def written(self) -> Prompted:
        """The prompt in this tokenizer's tokens; a space of its own is scored with the option."""
        return dataclasses.replace(Prompted.of(self.tokenizer, self.prompt, ("the", "a", "1")), after=[])

    def encode(self, examples: Examples) -> Continued:
        """Tokens of every row's prompt and options.

        Raises:
            KilobayesError: the rows were not read as prompts, have no options, or do not fit.
        """
        check_prompt(examples, self.prompt)
        if examples.options is None:
            raise KilobayesError("these rows have no options to score", remedy="leave out --answers text")
        options = [[self.written.following(text) for text in row] for row in examples.options]
        longest = [max(map(len, row)) for row in options]
        prompts, cut = self.written.rows(examples.texts, [self.max_length - n for n in longest])
        ids = [[t for option in row for t in (*p, *option)] for p, row in zip(prompts, options)]
        spans = [[(len(p) + len(o), len(o)) for o in row] for p, row in zip(prompts, options)]
        units = [
            [self._unit(text, len(option)) for text, option in zip(texts, row)]
            for texts, row in zip(examples.options, options)
        ]
        counts = torch.tensor([len(row) for row in options], dtype=torch.int64)
        return Continued(ids, None, class_indices(examples, self.classes), cut, counts, spans, units)

    def _unit(self, text: str, count: int) -> float:
        return {"sum": 1.0, "token": float(count), "byte": float(len(text.encode()))}[self.prompt.scoring]

    def collate(self, encoded: Encoded, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """One batch ``(B C, T)`` int64, the sequences of a row after each other.

        Where a row has fewer options, its first stands for the others, which ``counts`` leaves out.
        """
        assert isinstance(encoded, Continued)
        rows = torch.as_tensor(indices, dtype=torch.int64)
        ids: list[list[int]] = []
        marks: list[list[int]] = []
        units: list[float] = []
        for i in rows.tolist():
            start, found = 0, []
            for (length, own), unit in zip(encoded.spans[i], encoded.units[i]):
                found.append((encoded.ids[i][start : start + length], [0] * (length - own) + [1] * own, unit))
                start += length
            found += found[:1] * (len(self.classes) - len(found))
            for sequence, mark, unit in found:
                ids.append(sequence)
                marks.append(mark)
                units.append(unit)
        left = self.tokenizer.padding_side == "left"
        batch = padded(ids, self.written.pad, left)
        batch["answer"] = padded(marks, 0, left)["input_ids"]
        batch["units"] = torch.tensor(units)
        assert encoded.counts is not None
        if bool((encoded.counts[rows] < len(self.classes)).any()):
            batch["counts"] = encoded.counts[rows]
        return batch

    def labels(self, encoded: Encoded, indices: Sequence[int] | Tensor) -> Tensor:
        """Indices ``(B,)`` of these rows' right options. Raises KilobayesError when the rows carry none."""
        return labels_of(encoded, indices)

    def within(self, model: nn.Module) -> AbstractContextManager[None]:
        """The output matrix is applied where options are scored, and nowhere else."""
        return continuations(model, len(self.classes))

    def readout(self, output: Any) -> Tensor:
        """Options' scores ``(rows, C)`` in float32."""
        return scores_of(output)

    def nll(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As :func:`kilobayes.tasks.classify.class_nll`: nats of the right option among a row's options."""
        return class_nll(logits, labels)
