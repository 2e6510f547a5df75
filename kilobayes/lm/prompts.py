"""Prompts: texts and conversations, as a model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kilobayes.errors import KilobayesError
from kilobayes.hub import first_line


def listed(prompts: Any) -> list[Any]:
    """Prompts as a list of texts and conversations.

    Raises:
        KilobayesError: an empty list.
    """
    if isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], Mapping)
    ):
        return [prompts]
    found = list(prompts)
    if not found:
        raise KilobayesError("there are no prompts")
    return found


def templated(tokenizer: Any, messages: Any) -> str:
    """A conversation in the model's template, where its reply begins."""
    fine = isinstance(messages, Sequence) and messages and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in messages
    )  # fmt: skip
    if not fine:
        raise KilobayesError(
            "a prompt is a text or a conversation", f"found {messages!r:.80}",
            'as in [{"role": "user", "content": "Hello"}]',
        )  # fmt: skip
    if not getattr(tokenizer, "chat_template", None):
        raise KilobayesError(
            "the model has no template for conversations", "its tokenizer has no chat_template", "give a text"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise KilobayesError("the template refuses this conversation", first_line(error)) from None


def encode(tokenizer: Any, prompt: Any) -> tuple[str, list[int]]:
    """A prompt as the model reads it, and its tokens, without an end of text.

    Raises:
        KilobayesError: neither a text nor a conversation; a conversation, and no template.
    """
    chat = not isinstance(prompt, str)
    if chat:
        prompt = templated(tokenizer, prompt)
    ids = list(tokenizer(prompt, add_special_tokens=not chat, verbose=False)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not chat:
        ids.pop()  # some tokenizers end every text
    return prompt, ids


def check(given: Sequence[tuple[str, list[int]]], longest: int | None) -> None:
    """Refuse prompts that cannot be continued.

    Raises:
        KilobayesError: one is empty, or leaves no room in the model.
    """
    for number, (text, ids) in enumerate(given, 1):
        if not text.strip() or not ids:
            raise KilobayesError(f"prompt {number} is empty", f"found {text!r:.40}", "give it a text")
        if longest is not None and len(ids) >= longest:
            raise KilobayesError(
                f"prompt {number} has {len(ids)} tokens",
                f"the model takes {longest}, what it writes included",
                "shorten it",
            )


def padded(tokenizer: Any, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``(B, T)``, padded to the left."""
    width, pad = max(map(len, rows)), tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
