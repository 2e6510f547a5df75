"""Which inputs a transfer may see, and what makes up new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilobayes.card import Card
from kilobayes.distil.generators import (
    FORMS,
    Continuation,
    Given,
    Perturbation,
    Retrieval,
    Similarity,
    by_embeddings,
    by_words,
)
from kilobayes.distil.rows import Row, half, of_documents, of_examples
from kilobayes.distil.synthesis import Generator
from kilobayes.errors import KilobayesError, nearest
from kilobayes.language import LanguageModel
from kilobayes.lm.sampling import Sampling
from kilobayes.tasks.data import available_splits, load_examples
from kilobayes.workflows.data import load_as_trained
from kilobayes.workflows.texts import for_run

WAYS = ("auto", "continue", "retrieve", "perturb", "given")
CROSSED = 2000  # texts nearest to the seeds that are crossed
TRAINING, JUDGING = 0, 1  # halves of the unlabelled texts


@dataclass(frozen=True)
class Making:
    """How inputs are made up.

    Args:
        how: ``continue`` a list of seeds, ``retrieve`` the nearest unlabelled texts, ``perturb`` these,
            or take unlabelled texts as ``given``; ``auto`` is the first that there is something for.
        generator: language model that continues, a base or a run.
        form: of the list, as :class:`~kilobayes.distil.generators.Continuation` has it.
        near: nearness to the seeds by ``words`` or by ``embeddings`` of the source's base.
        words: of a language model's input that is the beginning of a text.
        max_new_tokens, temperature: of what is continued.
        seed: of everything drawn.

    Raises:
        KilobayesError: a word that is not known.
    """

    how: str = "auto"
    generator: str = ""
    form: str = "auto"
    near: str = "words"
    words: int = 24
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        known = {"how": WAYS, "form": ("auto", *FORMS), "near": ("words", "embeddings")}
        for name, values in known.items():
            found = getattr(self, name)
            if found not in values:
                guess = nearest(found, values)
                raise KilobayesError(
                    f"--{name} {found} is not known", f"known: {', '.join(values)}",
                    f"did you mean {guess}?" if guess else "",
                )  # fmt: skip


def check_source(folder: Path, card: Card) -> None:
    """Refuse a run whose inputs cannot be made up."""
    if card.task == "choice":
        raise KilobayesError(
            f"{folder} answers questions put by a template", "task choice",
            "transfer a run of --task classify or --task lm",
        )  # fmt: skip


def read(
    folder: Path, card: Card, source: Any, words: int, split: str | None = None, **columns: str | None
) -> list[Row]:
    """Inputs of one split, from the columns that the run was trained on where they are there.

    Args:
        words: of a language model's inputs that are beginnings of texts.

    Raises:
        KilobayesError: as reading rows; single texts for a run of pairs, or the other way round.
    """
    there = available_splits(source) if card.task != "lm" else []
    if card.task == "lm":
        from kilobayes.tasks.text import splits

        names = splits(source)
        given = {"text_column": columns.get("text_column")}
        return of_documents(
            for_run(folder, source, split or ("train" if "train" in names else None), given, None)[0], words
        )
    name = split or ("train" if "train" in there else there[0])
    rows = of_examples(
        load_as_trained(folder, source, name, read=load_examples, need_labels=False, **columns)
    )
    if rows and (len(rows[0]) == 2) != card.paired:
        one, two = "single texts", "pairs of texts"
        raise KilobayesError(
            f"{folder} was trained on {two if card.paired else one}",
            f"{source if isinstance(source, str | Path) else 'the rows'} hold {one if card.paired else two}",
            "name the columns with --text-column and --pair-column",
        )
    return rows


def maker(
    making: Making,
    card: Card,
    seeds: Sequence[Row],
    unlabelled: Sequence[Row],
    writer: str,
    part: int | None,
    device: str = "auto",
) -> Generator:
    """What proposes inputs.

    Args:
        writer: the base that continues where no generator is named; "" for none.
        part: of the unlabelled texts, :data:`TRAINING` or :data:`JUDGING`, so that a discriminator never
            judges what it was trained on; None for all.

    Raises:
        KilobayesError: nothing to make inputs from.
    """
    how = making.how
    if how == "auto":
        how = "continue" if making.generator or (writer and not unlabelled) else "retrieve"
    pool = [row for row in dict.fromkeys(unlabelled) if part is None or half(row) == part]
    if how == "continue":
        name = making.generator or writer
        if not name:
            raise KilobayesError("there is nothing that writes inputs", remedy="name a --generator")
        form = making.form
        if form == "auto":
            form = "opening" if card.task == "lm" else "numbered"
        sampling = Sampling(making.max_new_tokens, making.temperature, alternatives=0)
        words = making.words if form == "opening" else 0
        model = LanguageModel.load(name, device=device, dtype=card.dtype)
        return Continuation(model, seeds, form, words=words, sampling=sampling, seed=making.seed)
    if not pool:
        raise KilobayesError(
            "there is nothing to make inputs from", "no unlabelled texts, and no language model",
            "name texts with --unlabelled, or a language model with --generator",
        )  # fmt: skip
    if how == "given":
        return Given(pool)
    if not seeds:
        raise KilobayesError("nearness needs seeds to be near to", remedy="name some with --seeds")
    similarity: Similarity = by_words
    if making.near == "embeddings":
        similarity = by_embeddings(card.base, "cpu" if device == "auto" else device)
    found = Retrieval(seeds, pool, similarity)
    if how == "retrieve":
        return found
    return Perturbation(seeds, [pool[int(at)] for at in found.order[:CROSSED]], seed=making.seed)
