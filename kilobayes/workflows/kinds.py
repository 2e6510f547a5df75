"""What differs between tasks that choose a class: the base, and how rows are put to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kilobayes.errors import KilobayesError
from kilobayes.models import Base, load_base, load_causal
from kilobayes.tasks.choice import Choice
from kilobayes.tasks.classify import Classify
from kilobayes.tasks.likelihood import OptionLikelihood
from kilobayes.tasks.prompt import Prompt
from kilobayes.tasks.protocol import Task

Load = Callable[[str, Sequence[str], str, str], Base]  # name, classes, dtype, device
Make = Callable[[Base, Sequence[str], int, Prompt | None], Task]  # the third is the longest row in tokens


@dataclass(frozen=True)
class Kind:
    """A task as the workflows need it.

    Attributes:
        load: the base with its tokenizer.
        make: the task on that base.
    """

    load: Load
    make: Make


def _classifier(name: str, classes: Sequence[str], dtype: str, device: str) -> Base:
    return load_base(name, classes, dtype=dtype, device=device)


def _causal(name: str, classes: Sequence[str], dtype: str, device: str) -> Base:
    return load_causal(name, dtype=dtype, device=device)


def _classify(base: Base, classes: Sequence[str], longest: int, prompt: Prompt | None) -> Task:
    return Classify(base.tokenizer, tuple(classes), longest)


def _choice(base: Base, classes: Sequence[str], longest: int, prompt: Prompt | None) -> Task:
    if prompt is None:
        raise KilobayesError(
            "these rows were not read as prompts", remedy="read them with kilobayes.tasks.questions"
        )
    kind = OptionLikelihood if prompt.scoring else Choice
    return kind(base.tokenizer, tuple(classes), prompt, longest)


KINDS = {"classify": Kind(_classifier, _classify), "choice": Kind(_causal, _choice)}


def kind_of(task: str) -> Kind:
    """What the workflows need of a task that chooses a class.

    Raises:
        KilobayesError: the task chooses none.
    """
    if task not in KINDS:
        raise KilobayesError(f"--task {task} does not choose between classes", f"known: {', '.join(KINDS)}")
    return KINDS[task]
