"""Blocks that are recomputed in the backward pass, under either name of transformers' switch."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from kilobayes.adapters import LoRA
from kilobayes.modes import recomputing
from kilobayes.testing.tiny import tiny_model


def chosen(model: Any) -> set[bool]:
    return {block.gradient_checkpointing for block in model.base_model.model.bert.encoder.layer}


def test_it_is_switched_on_and_off_again_without_a_warning() -> None:
    model = tiny_model(LoRA(r=2))
    with recomputing(model):
        assert chosen(model) == {True}
    assert chosen(model) == {False}
    with pytest.raises(ZeroDivisionError), recomputing(model):
        1 / 0  # noqa: B018
    assert chosen(model) == {False}
    with recomputing(model, wanted=False):
        assert chosen(model) == {False}


class Older(nn.Module):
    """A model of a transformers that knows the old name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def gradient_checkpointing_enable(self, options: dict[str, bool]) -> None:
        self.calls.append(options)

    def gradient_checkpointing_disable(self) -> None:
        self.calls.append("off")


def test_the_old_name_where_there_is_no_other() -> None:
    model = Older()
    with recomputing(model):
        assert model.calls == [{"use_reentrant": False}]
    assert model.calls[1:] == ["off"]
