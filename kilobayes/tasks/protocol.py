"""What turns rows of data into batches of a model, and its output into class scores."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from kilobayes.tasks.classify import Encoded
from kilobayes.tasks.data import Examples


class Task(Protocol):
    """Choosing one of C classes, by a head or by a decoder's next token.

    Attributes:
        tokenizer: a Hugging Face tokenizer; never changed.
        classes: class names in index order.
        max_length: longest row in tokens, special tokens included.
    """

    @property
    def tokenizer(self) -> Any: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def max_length(self) -> int: ...

    def encode(self, examples: Examples) -> Encoded:
        """Tokens of every row, unpadded."""
        ...

    def collate(self, encoded: Encoded, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Model inputs ``(B, T)`` of some rows, padded, without labels."""
        ...

    def labels(self, encoded: Encoded, indices: Sequence[int] | Tensor) -> Tensor:
        """Class indices ``(B,)`` of these rows."""
        ...

    def within(self, model: nn.Module) -> AbstractContextManager[None]:
        """What the model is put into while it runs this task."""
        ...

    def readout(self, output: Any) -> Tensor:
        """Class scores ``(rows, C)`` in float32 from the model's output."""
        ...

    def nll(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``-log softmax(logits)[label]`` ``(S, B)`` in nats, of scores ``(S, B, C)``."""
        ...
