"""Choosing between answers with a language model: the first token after a prompt tells which."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.errors import KilobayesError
from kilobayes.host.answers import answers
from kilobayes.tasks.classify import Encoded, class_indices, class_nll, labels_of, padded, scores_of
from kilobayes.tasks.data import Examples
from kilobayes.tasks.prompt import Prompt
from kilobayes.tasks.prompted import Prompted


@dataclass(frozen=True, eq=False)
class Choice:
    """The task of choosing one of C classes by the answer that follows a prompt.

    The scores are the language model's own, of the first token of each class's answer after the last token of
    the prompt. A class's answer is a word of the prompt: a letter before an option, or a label such as "yes".
    Only these C rows of the output matrix are computed, and no head is trained.

    Attributes:
        tokenizer: a Hugging Face tokenizer; never changed.
        classes: class names in index order.
        prompt: template, and the answers of the classes.
        max_length: longest row in tokens. Of longer ones the beginning of the row's own text is left out;
            instruction and cue stay.

    Raises:
        KilobayesError: two classes whose answers begin with the same token; another number of answers than
            classes; a ``max_length`` without room for the row, or beyond the tokenizer's own limit.
    """

    tokenizer: Any
    classes: Sequence[str]
    prompt: Prompt
    max_length: int = 128

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(self.prompt.answers) != len(self.classes):
            raise KilobayesError(
                "each of two or more classes needs an answer",
                f"classes: {', '.join(self.classes)}; answers: {', '.join(self.prompt.answers)}",
                "name them in the order of the classes, as in --answers no,yes",
            )
        self.written.check(self.max_length)
        _ = self.tokens

    @cached_property
    def written(self) -> Prompted:
        """The prompt in this tokenizer's tokens."""
        return Prompted.of(self.tokenizer, self.prompt, self.prompt.answers)

    @cached_property
    def tokens(self) -> list[int]:
        """The first token of each class's answer.

        Raises:
            KilobayesError: some are the same.
        """
        first = [ids[0] if ids else None for ids in self.written.answers]
        alike: dict[int | None, list[int]] = {}
        for index, token in enumerate(first):
            alike.setdefault(token, []).append(index)
        clash = next((group for token, group in alike.items() if len(group) > 1 or token is None), None)
        if clash is not None:
            pieces = self.tokenizer.convert_ids_to_tokens(self.written.answers[clash[0]][:1])
            raise KilobayesError(
                "the answers of some classes begin with the same token"
                if len(clash) > 1
                else "an answer has no token of its own",
                f"{', '.join(f'{self.classes[i]} ({self.prompt.answers[i]!r})' for i in clash)}: {pieces}",
                "name others, as in --answers A,B",
            )
        return [token for token in first if token is not None]

    def encode(self, examples: Examples) -> Encoded:
        """Tokens of every row's prompt.

        Raises:
            KilobayesError: the rows were not read as prompts, or have another template.
        """
        check_prompt(examples, self.prompt)
        ids, cut = self.written.rows(examples.texts, [self.max_length] * len(examples))
        counts = None
        if examples.options is not None:
            counts = torch.tensor([len(options) for options in examples.options], dtype=torch.int64)
        return Encoded(ids, None, class_indices(examples, self.classes), cut, counts)

    def collate(self, encoded: Encoded, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """One batch ``(B, T)`` int64, padded on the tokenizer's side; ``counts`` where rows lack options."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        ids = [encoded.ids[i] for i in rows.tolist()]
        batch = padded(ids, self.written.pad, self.tokenizer.padding_side == "left")
        if encoded.counts is not None and bool((encoded.counts[rows] < len(self.classes)).any()):
            batch["counts"] = encoded.counts[rows]
        return batch

    def labels(self, encoded: Encoded, indices: Sequence[int] | Tensor) -> Tensor:
        """Class indices ``(B,)`` of these rows. Raises KilobayesError when the rows carry none."""
        return labels_of(encoded, indices)

    def within(self, model: nn.Module) -> AbstractContextManager[None]:
        """Only the answers' rows of the output matrix are computed, after each row's last token."""
        return answers(model, self.tokens)

    def readout(self, output: Any) -> Tensor:
        """Class scores ``(rows, C)`` in float32."""
        return scores_of(output)

    def nll(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As :func:`kilobayes.tasks.classify.class_nll`."""
        return class_nll(logits, labels)


def check_prompt(examples: Examples, prompt: Prompt) -> None:
    """Raises:
    KilobayesError: the rows were not read as prompts of this template.
    """
    if examples.prompt is None or examples.prompt.template != prompt.template:
        found = "texts alone" if examples.prompt is None else f"the template {examples.prompt.template!r:.80}"
        raise KilobayesError(
            "these rows were not read for this task's template",
            f"found {found}; the task has {prompt.template!r:.80}",
            "read them with kilobayes.tasks.questions.load_questions(rows, prompt=task.prompt)",
        )
