"""A tiny random BERT and synthetic rows that it can learn, to run methods on in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from kilobayes import host, tree
from kilobayes.random import Streams, generator
from kilobayes.types import Adapter, Params

CLASSES, PAD, CLS, SEP, FIRST, VOCABULARY = 3, 0, 2, 3, 5, 90
TARGETS = ["query", "value", "dense"]


def expect(holds: bool, wrong: str) -> None:
    """Raises AssertionError, under ``python -O`` too."""
    if not holds:
        raise AssertionError(wrong)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to ``tolerance`` relative to the largest magnitude."""
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def tiny_base(seed: int = 0, layers: int = 2, width: int = 32) -> nn.Module:
    """A random BERT classifier with weights large enough for its attention to depend on the text."""
    from transformers import BertConfig, BertForSequenceClassification

    config: Any = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    config.num_labels = CLASSES
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return BertForSequenceClassification(config).eval()


def tiny_model(adapter: Adapter, stack: int = 1, base: nn.Module | None = None) -> PeftModel:
    """A tiny BERT with the adapter on its attention and feed-forward layers, and a trained head."""
    config = host.KilobayesConfig(
        adapter=adapter,
        stack=stack,
        target_modules=TARGETS,
        exclude_modules=["pooler.dense"],
        task_type="SEQ_CLS",
    )
    return get_peft_model(tiny_base() if base is None else base, config)  # type: ignore[arg-type, return-value]


def tiny_start(model: nn.Module, seeds: list[int]) -> Params:
    """Initial leaves of a stack, heads included; a member depends on its own seed alone."""
    theta, _ = host.initial(host.method(model), host.sites(model), seeds)
    for key, value in host.read(model).items():
        if key not in theta:
            draws = [torch.randn(value.shape[1:], generator=generator(seed, 4)) for seed in seeds]
            theta[key] = 0.1 * torch.stack(draws)
    return theta


def perturbed(theta: Params, seed: int = 1, size: float = 0.1) -> Params:
    """A stack with noise on every leaf: a point where nothing is zero by construction."""
    streams = Streams([generator(seed, member) for member in range(tree.size(theta))])
    return {key: value + size * streams.normal(value) for key, value in sorted(theta.items())}


@dataclass(frozen=True, eq=False)
class TinyRows:
    """Token rows of different lengths, frequencies as Zipf's, whose label is told by one of their tokens."""

    ids: list[list[int]]
    labels: Tensor

    @classmethod
    def make(cls, count: int = 48, seed: int = 0) -> TinyRows:
        """``count`` rows of 4 to 16 tokens, padding apart."""
        gen = generator(seed, 9)
        weights = 1.0 / torch.arange(1, VOCABULARY - FIRST - CLASSES + 1)
        labels = torch.randint(CLASSES, (count,), generator=gen)
        ids = []
        for label in labels.tolist():
            length = int(torch.randint(2, 15, (), generator=gen))
            words = torch.multinomial(weights, length, replacement=True, generator=gen) + FIRST + CLASSES
            words[int(torch.randint(length, (), generator=gen))] = FIRST + label
            ids.append([CLS, *words.tolist(), SEP])
        return cls(ids, labels)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> TinyRows:
        """Some of the rows."""
        return TinyRows([self.ids[i] for i in rows.tolist()], self.labels[rows])

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Padded model inputs and labels, as the training loop asks for them."""
        chosen = [self.ids[i] for i in rows.tolist()]
        width = max(len(ids) for ids in chosen)
        padded = torch.tensor([ids + [PAD] * (width - len(ids)) for ids in chosen])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in chosen])
        return {"input_ids": padded, "attention_mask": mask}, self.labels[rows]


class TinyTask:
    """The task of :class:`TinyRows`, as predictions ask for it."""

    classes = tuple("abc")

    def collate(self, rows: TinyRows, which: Tensor) -> dict[str, Tensor]:
        """Padded model inputs."""
        return rows.batch(which)[0]

    def labels(self, rows: TinyRows, which: Tensor) -> Tensor:
        """``(B,)``."""
        return rows.labels[which]

    def within(self, model: nn.Module) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def readout(self, output: Any) -> Tensor:
        """Class scores ``(S B, C)``."""
        return output.logits.float()


def nll(output: Any, labels: Tensor) -> Tensor:
    """Nats ``(S, B)`` of a classification output and labels ``(S, B)``."""
    scores = output.logits.float().reshape(*labels.shape, -1).log_softmax(-1)
    return -scores.gather(-1, labels[..., None])[..., 0]


@contextmanager
def installed(model: nn.Module, theta: Params) -> Iterator[None]:
    """Within it, the model runs on a stack."""
    host.install(model, host.build(model, theta))
    try:
        yield
    finally:
        host.install(model, None)


def scores(model: nn.Module, theta: Params, rows: TinyRows) -> Tensor:
    """Logits ``(S, N, C)`` of a stack on all rows, in one forward."""
    inputs, _ = rows.batch(torch.arange(len(rows)))
    stack = tree.size(theta)
    with installed(model, theta), host.outer(model, stack):
        return host.check_rows(model(**inputs).logits, stack, len(rows))
