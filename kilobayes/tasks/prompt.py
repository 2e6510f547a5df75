"""How a row is put to a language model: a template over the data's columns, and the words it may answer."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kilobayes.errors import KilobayesError, nearest

SCORINGS = {"text": "sum", "text/token": "token", "text/byte": "byte"}
LETTERS = string.ascii_uppercase
CHOICES, QUESTION = "choices", "question"  # fields that are made of the data, whatever its columns are called


@dataclass(frozen=True)
class Prompt:
    """A template such as ``"Question: {question}\\n{choices}\\nAnswer:"``, and the answers to choose from.

    A field in braces is a column of the data; ``{choices}`` lists the options of a question, each after its
    letter. What stands before the first field is the instruction, what stands after the last the cue; what
    lies between is the row's own text. ``{{`` and ``}}`` are braces.

    Attributes:
        answers: the word that stands for each class, in index order.
        scoring: "" where the answers' first tokens are scored after the cue; "sum", "token" or "byte" where
            the options' own texts are, by their log-likelihood as it is, or divided by that unit.

    Raises:
        KilobayesError: braces that do not match, a field with a conversion or format, or no field.
    """

    template: str
    answers: tuple[str, ...]
    scoring: str = ""

    def __post_init__(self) -> None:
        if not self.fields:
            raise KilobayesError(
                "the template names no column",
                f"found {self.template!r:.80}",
                'as in --template "{text}\\nAnswer:"',
            )

    @property
    def shown(self) -> str:
        """The template on one line, as ``--template`` takes it."""
        return self.template.replace("\n", "\\n")

    @property
    def spelled(self) -> str:
        """The answers as ``--answers`` takes them."""
        return next((word for word, kind in SCORINGS.items() if kind == self.scoring), ",".join(self.answers))

    @property
    def parts(self) -> list[tuple[str, str | None]]:
        """Literal texts, each with the field that follows it."""
        try:
            found = [*string.Formatter().parse(self.template)]
        except ValueError as error:
            raise KilobayesError(
                "the template's braces do not match",
                f"{error}: {self.template!r:.80}",
                "write {{ for a brace",
            ) from None
        for _, name, form, conversion in found:
            if name is not None and (not name or form or conversion):
                raise KilobayesError(
                    "a field of the template is a column's name and nothing else",
                    f"found {name}{'!' + conversion if conversion else ''}{':' + form if form else ''!r}",
                    "as in {question}",
                )
        return [(literal, name) for literal, name, _, _ in found]

    @property
    def fields(self) -> list[str]:
        """Columns that the template names, in order."""
        return [name for _, name in self.parts if name is not None]

    @property
    def head(self) -> str:
        """The instruction: what stands before the first field."""
        out = ""
        for literal, name in self.parts:
            out += literal
            if name is not None:
                break
        return out

    @property
    def cue(self) -> str:
        """What stands after the last field."""
        out = ""
        for literal, name in self.parts:
            out = "" if name is not None else out + literal
        return out

    def texts(self, columns: Mapping[str, Sequence[Any]], where: str) -> list[str]:
        """The rows' own texts, from the first field to the last.

        Raises:
            KilobayesError: a column that is not there, or a row without a usable value in it.
        """
        for name in self.fields:
            if name not in columns:
                guess = nearest(name, columns)
                raise KilobayesError(
                    f"the template names the column {{{name}}}, which is not in {where}",
                    f"found: {', '.join(columns)}",
                    f"did you mean {{{guess}}}?" if guess else "name one of these in --template",
                )
        values = {
            name: [_text(value, name, row, where) for row, value in enumerate(columns[name], 1)]
            for name in dict.fromkeys(self.fields)
        }
        count = len(values[self.fields[0]])
        pieces = self._between()
        return ["".join(p if name is None else values[name][i] for p, name in pieces) for i in range(count)]

    def _between(self) -> list[tuple[str, str | None]]:
        """Literals and fields from the first field to the last; a field's literal is not used."""
        out: list[tuple[str, str | None]] = []
        last = max(i for i, (_, name) in enumerate(self.parts) if name is not None)
        first = True
        pending = ""
        for literal, name in self.parts[: last + 1]:
            pending += literal
            if name is not None:
                out += [] if first else [(pending, None)]
                out.append(("", name))
                first, pending = False, ""
        return out

    def listing(self, options: Iterable[str]) -> str:
        """Options on lines of their own, each after its answer's word."""
        return "\n".join(f"{word}. {text}" for word, text in zip(self.answers, options))


def _text(value: Any, name: str, row: int, where: str) -> str:
    if isinstance(value, bool | int | float) and value == value:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        found = "it is empty" if value is None or isinstance(value, str) else f"it holds {value!r:.60}"
        raise KilobayesError(f'row {row} of {where} has no usable text in column "{name}"', found)
    return value
