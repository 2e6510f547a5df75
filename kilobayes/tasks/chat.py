"""Conversations as pieces of text, and pieces as tokens of which some are answers.

Where a tokenizer has no chat template, conversations are written as in Alpaca, without its first sentence::

    ### Instruction:
    What the user says

    ### Response:
    What the assistant says</s>

A system's words come first, under ``### System:``. ``</s>`` stands for the tokenizer's end of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kilobayes.errors import KilobayesError
from kilobayes.hub import first_line

HEADINGS = {"system": "System", "user": "Instruction", "assistant": "Response"}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text.

    Attributes:
        text: as the model reads or writes it, with a template's marks.
        bytes: UTF-8 bytes of an answer's own words; 0 of what is not learned.
        answer: whether it is learned.
    """

    text: str
    bytes: int = 0
    answer: bool = False


def messages_of(value: Any, where: str) -> list[dict[str, str]]:
    """A conversation in ``role`` and ``content``; ``from`` and ``value`` (ShareGPT) are understood.

    Raises:
        KilobayesError: no list of messages, a role or content that is no text, or no answer to learn.
    """
    remedy = 'as in [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]'
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) for m in value):
        raise KilobayesError(f"{where} is no conversation", f"found {value!r:.60}", remedy)
    out = []
    for message in value:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise KilobayesError(f"{where} has a message without text", f"found {message!r:.80}", remedy)
        out.append({"role": ROLES.get(role, role), "content": content})
    if not any(m["role"] == "assistant" and m["content"].strip() for m in out):
        roles = ", ".join(dict.fromkeys(m["role"] for m in out))
        raise KilobayesError(f"{where} has no answer to learn", f"roles: {roles}", remedy)
    return out


def rendered(tokenizer: Any, messages: Messages, reply: bool = False) -> str:
    """A conversation as text, in the tokenizer's own template or the default one.

    Args:
        reply: end where the assistant's reply begins.

    Raises:
        KilobayesError: the template refuses it.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            return str(
                tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=reply)
            )
        except Exception as error:  # templates raise what they like
            raise KilobayesError("the template refuses this conversation", first_line(error)) from None
    out = []
    for message in messages:
        heading = HEADINGS.get(message["role"], message["role"].capitalize())
        end = tokenizer.eos_token or "" if message["role"] == "assistant" else ""
        out.append(f"### {heading}:\n{message['content']}{end}\n\n")
    if reply:
        return "".join(out) + "### Response:\n"
    return "".join(out)[:-2]


def conversation(tokenizer: Any, messages: Messages) -> list[Piece]:
    """The pieces of a conversation: every reply of the assistant is learned, with the mark that ends it.

    A template that writes earlier replies in another way than the last one, as those do that leave reasoning
    out, has its last reply learned alone.

    Raises:
        KilobayesError: the template refuses it, or does not start with what it shows before a reply.
    """
    whole = rendered(tokenizer, messages)
    spans: list[tuple[int, int, int]] = []
    consistent = True
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = rendered(tokenizer, messages[:index], reply=True)
        after = rendered(tokenizer, messages[: index + 1])
        if whole.startswith(before) and whole.startswith(after) and after.startswith(before):
            spans.append((len(before), len(after), len(message["content"].encode())))
        elif whole.startswith(before) and index == len(messages) - 1:
            spans.append((len(before), len(whole), len(message["content"].encode())))
        else:
            consistent = False
    spans = spans if consistent else [s for s in spans[-1:] if s[1] == len(whole)]
    if not spans:
        raise KilobayesError(
            "the chat template writes a conversation otherwise than what comes before a reply",
            "so there is no telling which tokens are the reply",
            "give the rows as prompt and completion",
        )
    pieces, at = [], 0
    for first, last, size in spans:
        pieces += [Piece(whole[at:first]), Piece(whole[first:last], size, True)]
        at = last
    return [p for p in pieces if p.text]  # what follows the last reply teaches nothing


def tokens_of(tokenizer: Any, pieces: Sequence[Piece], special: bool) -> tuple[list[int], list[bool]]:
    """Token ids of the pieces in a row, and which of them belong to answers.

    A piece begins on a token of its own, as it does when a reply is written after a prompt. It is tokenised
    together with what comes before, so that nothing is put between them; where that would join the two in
    one token, alone.

    Args:
        special: add what the tokenizer puts before a text; templates bring it themselves.
    """
    ids: list[int] = []
    answers: list[bool] = []
    text = ""
    for number, piece in enumerate(pieces):
        text += piece.text
        found = plain(tokenizer, text, special)
        if number and found[: len(ids)] != ids:
            found = ids + plain(tokenizer, piece.text, False)
        answers += [piece.answer] * (len(found) - len(ids))
        ids = found
    return ids, answers


def plain(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Token ids of a text, without an end of text that the tokenizer adds of itself."""
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if special and len(ids) > 1 and ids[-1] == end and not text.endswith(tokenizer.eos_token or "\0"):
        ids.pop()
    return ids
