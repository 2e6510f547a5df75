"""A prompt in a tokenizer's tokens: where answers begin, and which tokens a long row loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kilobayes.errors import KilobayesError
from kilobayes.tasks.prompt import Prompt


@dataclass(frozen=True, eq=False)
class Prompted:
    """A template and its answers, as a tokenizer reads them.

    An answer follows the cue as a word follows a word, after one space, unless the cue ends its line.
    Tokenizers differ in where that space goes: into the answer's token, into one of its own, or into the
    cue's last. So the answer's tokens are those that cue and answer together have beyond the prompt's.

    Attributes:
        start: special tokens before a row.
        cue: the cue as it stands in rows; where the space is no part of the answers' tokens, it is here.
        after: tokens that follow it whatever the answer is.
        answers: tokens of each answer from there on.
        lead: what stands before an answer, and its tokens, without those of the answer.
    """

    tokenizer: Any
    prompt: Prompt
    start: list[int]
    cue: str
    after: list[int]
    answers: list[list[int]]
    lead: tuple[str, list[int]]

    @classmethod
    def of(cls, tokenizer: Any, prompt: Prompt, words: Sequence[str]) -> Prompted:
        """What of the answers' tokens follows the cue.

        Raises:
            KilobayesError: the tokenizer joins cue and answer in one token.
        """
        cue = prompt.cue.rstrip(" ")
        shown = cue or "."  # stands for the row's own text, where nothing follows that
        gap = "" if shown[-1].isspace() else " "
        ways = list(_ways(tokenizer, shown, gap, words))
        if ways:
            # the space goes where the answers' first tokens differ
            told = next(
                (way for way in ways if len({ids[0] for ids in way[2] if ids}) == len(words)), ways[0]
            )
            end, after, answers = told
            lead = (shown + gap, tokens(tokenizer, shown + end))
            return cls(tokenizer, prompt, _start(tokenizer), cue + end, after, answers, lead)
        whole = tokens(tokenizer, shown + gap + words[0])
        raise KilobayesError(
            "the tokenizer joins the end of the template and the answer into one token",
            f"{shown[-12:] + gap + words[0]!r} is {tokenizer.convert_ids_to_tokens(whole)}",
            'end the template with a cue such as "Answer:"',
        )

    @property
    def pad(self) -> int:
        """The id that fills short rows."""
        own = self.tokenizer.pad_token_id
        own = self.tokenizer.eos_token_id if own is None else own
        if own is None:
            raise KilobayesError("the tokenizer has neither a pad token nor an end-of-text token")
        return int(own)

    @property
    def fixed(self) -> int:
        """Tokens that a row has beside its own text."""
        return len(self.start) + len(tokens(self.tokenizer, self.prompt.head + self.cue)) + len(self.after)

    def following(self, text: str) -> list[int]:
        """Tokens of a text that follows the cue, its space included; at least one."""
        shown, before = self.lead
        whole = tokens(self.tokenizer, shown + text)
        own = whole[len(before) :] if whole[: len(before)] == before else []
        return own or tokens(self.tokenizer, text)

    def check(self, max_length: int) -> None:
        """Raises:
        KilobayesError: rows of this length have no room for text, or are longer than the tokenizer allows.
        """
        longest = self.tokenizer.model_max_length  # about 1e30 where the tokenizer states none
        if not self.fixed + 1 <= max_length <= longest:
            raise KilobayesError(
                f"a prompt of {max_length} tokens does not fit",
                f"the template alone takes {self.fixed}, the tokenizer allows {min(longest, 10**9)}",
                "change --max-length or --template",
            )
        _ = self.pad

    def rows(self, texts: Sequence[str], most: Sequence[int]) -> tuple[list[list[int]], int]:
        """Tokens of the prompts, and how many lost some: from the left of the row's own text.

        Args:
            most: of each row.

        Raises:
            KilobayesError: a long row, and a tokenizer that does not tell where in a text its tokens stand.
        """
        if not texts:
            return [], 0
        prompts = [f"{self.prompt.head}{text}{self.cue}" for text in texts]
        fast = bool(self.tokenizer.is_fast)
        found = self.tokenizer(
            prompts,
            padding=False,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=fast,
            verbose=False,
        )
        rows, cut = [], 0
        around = len(self.start) + len(self.after)
        for number, ids in enumerate(found["input_ids"]):
            excess = len(ids) + around - most[number]
            if excess > 0:
                if not fast:
                    raise KilobayesError(
                        f"row {number + 1} has {len(ids)} tokens, and {most[number] - around} fit",
                        f"{type(self.tokenizer).__name__} does not tell where they stand in the text",
                        "raise --max-length",
                    )
                cut += 1
                ids = self._cut(ids, found["offset_mapping"][number], texts[number], excess, number)
            rows.append([*self.start, *ids, *self.after])
        return rows, cut

    def _cut(
        self, ids: list[int], offsets: list[tuple[int, int]], text: str, excess: int, number: int
    ) -> list[int]:
        begin, end = len(self.prompt.head), len(self.prompt.head) + len(text)
        own = [i for i, (a, b) in enumerate(offsets) if begin <= a and b <= end and a < b]
        if len(own) < excess:
            raise KilobayesError(
                f"row {number + 1} does not fit", "its instruction and cue are too long", "raise --max-length"
            )
        left_out = set(own[:excess])
        return [token for i, token in enumerate(ids) if i not in left_out]


def tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, without special ones."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer puts before a text; what it puts after one would end the prompt."""
    bare = tokens(tokenizer, "a")
    whole = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at]


def _ways(
    tokenizer: Any, shown: str, gap: str, words: Sequence[str]
) -> Iterator[tuple[str, list[int], list[list[int]]]]:
    """What to add to the cue, the tokens after it and each answer's, as :class:`Prompted` has them.

    First as the tokenizer writes cue and answer together; then with the space as a token of its own, for
    tokenizers that have " B" as one token but not " A".
    """
    whole = [tokens(tokenizer, shown + gap + word) for word in words]
    for end in dict.fromkeys(("", gap)):
        before = tokens(tokenizer, shown + end)
        if all(ids[: len(before)] == before for ids in whole):
            answers = [ids[len(before) :] for ids in whole]
            after = _blank(tokenizer, answers)
            yield end, after, [ids[len(after) :] for ids in answers]
    before, spaced = tokens(tokenizer, shown), tokens(tokenizer, shown + gap)
    joined = [tokens(tokenizer, shown + word) for word in words]
    if gap and all(ids[: len(before)] == before for ids in joined):
        answers = [ids[len(before) :] for ids in joined]
        if spaced[: len(before)] == before:
            yield "", spaced[len(before) :], answers
        else:
            yield gap, [], answers


def _blank(tokenizer: Any, answers: Sequence[list[int]]) -> list[int]:
    """Tokens that all answers begin with and that are blank: a space that is a token of its own."""
    blank: list[int] = []
    for column in zip(*answers):
        piece = tokenizer.convert_ids_to_tokens(column[0])
        if len(set(column)) > 1 or piece.strip("\u2581\u0120 "):
            break
        blank.append(column[0])
    return blank
