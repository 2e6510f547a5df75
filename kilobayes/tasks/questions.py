"""Rows to put to a language model: questions with options, or texts with labels that are words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kilobayes.errors import KilobayesError
from kilobayes.tasks.columns import label_column as find_label
from kilobayes.tasks.columns import read_labels, text_columns
from kilobayes.tasks.data import Examples, limited
from kilobayes.tasks.layouts import CONTEXTS, Layout, find_answer, find_options, find_question, read_answers
from kilobayes.tasks.prompt import CHOICES, LETTERS, QUESTION, SCORINGS, Prompt
from kilobayes.tasks.sources import read_source
from kilobayes.tasks.table import Table


def load_questions(
    source: Any,
    split: str | None = None,
    *,
    prompt: Prompt | None = None,
    template: str | None = None,
    answers: Sequence[str] | str | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[Any] | None = None,
    limit: int | None = None,
    seed: int = 0,
    need_labels: bool = True,
) -> Examples:
    """Reads one split as prompts.

    Where rows have options, as a list (``choices``) or a column each (``option1``, ``answerA``, ...), the
    classes are letters, and the right option is given by index, letter, name or text. Other rows have classes
    as :func:`~kilobayes.tasks.data.load_examples` reads them.

    Args:
        source, split: as :func:`~kilobayes.tasks.data.load_examples` takes them, and its result.
        prompt: how rows of the same kind were put before; ``template`` and ``answers`` are then not used.
        template: by default the question, its options and "Answer:", or the texts and "Answer:". A
            ``\\\\n`` of two characters is a line's end.
        answers: a word for each class, by default the class names; "text", "text/token" or "text/byte" to
            score the options' own texts.
        text_column, pair_column, label_column: of the question or text, and of the right answer; guessed
            from well-known names otherwise. ``{question}`` is that column where none has this name.
        classes, limit, seed, need_labels: as :func:`~kilobayes.tasks.data.load_examples`.

    Raises:
        KilobayesError: anything that cannot be read as asked, with the row and what to do.
    """
    if isinstance(source, Examples):
        return source if limit is None else limited(source, limit, seed)
    table = read_source(source, split)
    layout = find_options(table)
    words = [w.strip() for w in answers.split(",")] if isinstance(answers, str) else answers
    if prompt is not None:
        template, words = prompt.template, None
    scoring = prompt.scoring if prompt else SCORINGS.get(words[0], "") if words and len(words) == 1 else ""
    if layout is None and (scoring or (template and CHOICES in Prompt(_lines(template), ()).fields)):
        raise KilobayesError(
            f"the rows of {table.name} have no options",
            f"found: {', '.join(table.columns)}",
            "give them as a list in a column choices, or in columns option1, option2, ...",
        )
    if layout is not None:
        found = _questions(
            table, layout, prompt, template, words, scoring, text_column, label_column, classes, need_labels
        )
    else:
        columns = (text_column, pair_column, label_column)
        found = _texts(table, prompt, template, words, columns, classes, need_labels)
    return found if limit is None else limited(found, limit, seed)


def _lines(template: str) -> str:
    return template.replace("\\n", "\n")


def _questions(
    table: Table,
    layout: Layout,
    prompt: Prompt | None,
    template: str | None,
    words: Sequence[str] | None,
    scoring: str,
    text_column: str | None,
    label_column: str | None,
    classes: Sequence[Any] | None,
    need_labels: bool,
) -> Examples:
    most = max(map(len, layout.options))
    if prompt is None:
        named = [str(name) for name in classes or ()] or [*LETTERS[:most]]
        said = tuple(words) if words and not scoring else tuple(named)
        prompt = Prompt(_lines(template) if template else _default(table, scoring), said, scoring)
    if most > len(prompt.answers):
        row = next(i for i, options in enumerate(layout.options, 1) if len(options) > len(prompt.answers))
        raise KilobayesError(
            f"row {row} of {table.name} has {len(layout.options[row - 1])} options",
            f"the answers are {', '.join(prompt.answers)}",
            "train with more, as in --answers A,B,C,D,E",
        )
    columns: dict[str, Sequence[Any]] = dict(table.columns)
    if QUESTION in prompt.fields and (QUESTION not in columns or text_column is not None):
        columns[QUESTION] = columns[find_question(table, text_column, layout)]
    columns[CHOICES] = [prompt.listing(options) for options in layout.options]
    answer = find_answer(table, label_column, layout, need_labels)
    wanted = answer is not None and (need_labels or label_column is not None)
    labels = read_answers(table, answer, layout) if wanted and answer is not None else None
    texts = prompt.texts(columns, table.name)
    names = [str(name) for name in classes or ()] or list(prompt.answers)
    return Examples(texts, None, labels, names, prompt, layout.options)


def _default(table: Table, scoring: str) -> str:
    lower = {name.lower(): name for name in reversed(table.columns)}
    context = next((f"{{{lower[name]}}}\n" for name in CONTEXTS if name in lower), "")
    listed = "" if scoring else f"{{{CHOICES}}}\n"
    return f"{context}Question: {{{QUESTION}}}\n{listed}Answer:"


def _texts(
    table: Table,
    prompt: Prompt | None,
    template: str | None,
    words: Sequence[str] | None,
    named: tuple[str | None, str | None, str | None],
    classes: Sequence[Any] | None,
    need_labels: bool,
) -> Examples:
    label = find_label(table, named[2], required=need_labels)
    labels, names = None, [str(name) for name in classes or ()]
    if label is not None and (need_labels or named[2] is not None):
        labels, names = read_labels(table, label, classes)
    if prompt is None:
        if template is None:
            first, second = text_columns(table, named[0], named[1], label)
            template = "\n".join([f"{{{name}}}" for name in (first, second) if name] + ["Answer:"])
        prompt = Prompt(_lines(template), tuple(words or names))
    columns: dict[str, Sequence[Any]] = dict(table.columns)
    only = set(prompt.fields)
    if len(only) == 1 and list(columns) == ["text"]:  # bare texts, for a template of one column
        columns |= dict.fromkeys(only, columns["text"])
    if QUESTION in only and (QUESTION not in columns or named[0] is not None):
        columns[QUESTION] = columns[find_question(table, named[0], None)]
    return Examples(prompt.texts(columns, table.name), None, labels, names, prompt)
