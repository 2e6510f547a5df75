"""Writing like the rows: tokens in, a loss on what is to be learned of them.

Of a plain text every token is learned, and that it ends; it is cut into windows. Of a prompt with its answer,
and of a conversation, the answers are learned, with the mark that ends them; what is too long loses its end.
The loss of a row is the sum over its learned tokens divided by the mean number of them in a training row, so
the mean over rows is in nats per token, whatever rows are together in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kilobayes.errors import KilobayesError
from kilobayes.tasks.chat import Piece, conversation, plain, tokens_of
from kilobayes.tasks.packing import IGNORED, Tokens, collate, pack, windows
from kilobayes.tasks.text import Documents


@dataclass(frozen=True, eq=False)
class Language:
    """The task of a causal language model.

    Attributes:
        tokenizer: a Hugging Face tokenizer; never changed.
        max_length: longest row in tokens.

    Raises:
        KilobayesError: a ``max_length`` with no room for a text.
    """

    tokenizer: Any
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise KilobayesError(f"{self.max_length} tokens hold no text", remedy="as in --max-length 512")

    @property
    def start(self) -> int:
        """The token before a text: of its beginning where there is one, else of the end of another text."""
        some = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return next(int(i) for i in some if i is not None)

    @property
    def end(self) -> list[int]:
        """The token that ends a text, or none."""
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [int(eos)]

    def encode(self, documents: Documents, packed: bool = False) -> Tokens:
        """Tokens of every row.

        Args:
            packed: put short rows together.

        Raises:
            KilobayesError: no row has anything to learn in ``max_length`` tokens.
        """
        found = self._texts(documents.rows) if documents.form == "text" else self._answers(documents)
        if not len(found):
            raise KilobayesError(
                f"no answer lies within the first {self.max_length} tokens of its row",
                f"{found.dropped} rows",
                "raise --max-length",
            )
        return pack(found, self.max_length) if packed else found

    def _texts(self, texts: Sequence[str]) -> Tokens:
        ids, labels, documents = [], [], []
        each = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        for number, tokens in enumerate(each):
            for read, learned in windows([self.start, *tokens, *self.end], self.max_length):
                ids.append(read)
                labels.append(learned)
                documents.append(number)
        return Tokens(ids, labels, [[0]] * len(ids), documents, [len(t.encode()) for t in texts])

    def _answers(self, documents: Documents) -> Tokens:
        ids, labels, kept, sizes = [], [], [], []
        truncated = 0
        for number, row in enumerate(documents.rows):
            tokens, answers, size = self._row(documents.form, row, number)
            sizes.append(size)
            if len(tokens) > self.max_length:
                tokens, answers = tokens[: self.max_length], answers[: self.max_length]
                truncated += 1
                own = [t for t, answer in zip(tokens, answers, strict=True) if answer]
                sizes[-1] = len(self.tokenizer.decode(own, skip_special_tokens=True).encode())
            if any(answers[1:]):
                ids.append(tokens[:-1])
                follows = zip(tokens[1:], answers[1:], strict=True)
                labels.append([token if answer else IGNORED for token, answer in follows])
                kept.append(number)
        dropped = len(documents) - len(kept)
        return Tokens(ids, labels, [[0]] * len(ids), kept, sizes, truncated - dropped, dropped)

    def _row(self, form: str, row: Any, number: int) -> tuple[list[int], list[bool], int]:
        """Tokens of a row, which of them are learned, and the bytes of its answers."""
        if form == "pairs":
            prompt, answer = row
            pieces = [Piece(prompt), Piece(answer, len(answer.encode()), True)]
            tokens, answers = tokens_of(self.tokenizer, pieces, special=True)
            if answers[:1] == [True]:
                tokens, answers = [self.start, *tokens], [False, *answers]
            return [*tokens, *self.end], [*answers, *(True for _ in self.end)], pieces[1].bytes
        try:
            pieces = conversation(self.tokenizer, row)
        except KilobayesError as error:
            raise KilobayesError(f"row {number + 1}: {error.wrong}", error.found, error.remedy) from None
        own = bool(getattr(self.tokenizer, "chat_template", None))
        tokens, answers = tokens_of(self.tokenizer, pieces, special=not own)
        if self.end and tokens[-1] not in self.end and not (own and self.end[0] in tokens[-3:]):
            tokens, answers = [*tokens, *self.end], [*answers, True]
        return tokens, answers, sum(piece.bytes for piece in pieces)

    def prompt(self, text: str) -> list[int]:
        """Tokens of a prompt, as the model reads it before its answer."""
        return plain(self.tokenizer, text, True)

    def collate(self, tokens: Tokens, rows: Sequence[int] | Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs and labels ``(B, T)`` of some rows."""
        pad = self.tokenizer.pad_token_id
        return collate(tokens, rows, self.start if pad is None else int(pad))


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Token rows, as the training loop asks for them."""

    task: Language
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs, and labels ``(B, T)``, -100 where nothing is learned."""
        return self.task.collate(self.tokens, rows)
