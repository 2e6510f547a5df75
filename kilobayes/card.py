"""What a saved posterior says of itself: ``posterior.json``. Nothing here imports torch."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from kilobayes import __version__
from kilobayes.errors import KilobayesError
from kilobayes.tasks.prompt import Prompt

FORMAT = 1
LABEL_KINDS = ("str", "int", "float", "bool")


@dataclass(frozen=True)
class Card:
    """What a saved posterior says of itself, in ``posterior.json``.

    Attributes:
        posterior, adapter: specifications.
        base: name of the base model; ``fingerprint`` is of its frozen weights.
        classes: class names in index order.
        max_length: longest row in tokens.
        samples: draws at prediction unless asked otherwise.
        seed: seed of the draws.
        target_modules: sites of the adapter.
        dtype: of the base.
        paired: whether the rows are pairs of texts.
        label_kind: type of the labels that the classes name: str, int, float or bool.
        task: classify; choice, of a decoder that answers; or lm, of one that continues text, without classes.
        template, answers, scoring: of a choice, as :class:`~kilobayes.tasks.prompt.Prompt` has them.
        version, format: of the library and the files.
    """

    posterior: str
    adapter: str
    base: str
    fingerprint: str
    classes: list[str]
    max_length: int
    samples: int
    seed: int
    target_modules: list[str]
    dtype: str = "float32"
    paired: bool = False
    label_kind: str = "str"
    task: str = "classify"
    template: str = ""
    answers: list[str] = field(default_factory=list)
    scoring: str = ""
    version: str = __version__
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            parts = value if isinstance(value, list) else []
            if type(value) is not (get_origin(kind) or kind) or any(type(part) is not str for part in parts):
                raise ValueError(f"{name} is {reprlib.repr(value)}")
        least = {"classify": 2, "choice": 2, "lm": 0}.get(self.task)
        if least is None:
            raise ValueError(f"task is {self.task!r:.20}")
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < least:
            raise ValueError(f"classes are {reprlib.repr(self.classes)}")
        if self.samples < 1 or self.max_length < 1 or self.label_kind not in LABEL_KINDS:
            raise ValueError(
                f"{self.samples} samples, {self.max_length} tokens, labels of {self.label_kind!r:.20}"
            )
        if self.task == "choice" and len(self.answers) != len(self.classes):
            raise ValueError(f"answers are {reprlib.repr(self.answers)}")

    @property
    def prompt(self) -> Prompt | None:
        """How rows are put to a language model that chooses; None where they are not."""
        if self.task != "choice":
            return None
        return Prompt(self.template, tuple(self.answers), self.scoring)

    @property
    def settings(self) -> dict[str, Any]:
        """Options of training that say what is learned."""
        prompt = self.prompt
        put = {} if prompt is None else {"template": prompt.template, "answers": prompt.spelled}
        return {"task": self.task} | put


def put(prompt: Prompt | None) -> dict[str, Any]:
    """A card's fields that say how rows are put to a language model; none where they are not."""
    if prompt is None:
        return {}
    return {"template": prompt.template, "answers": list(prompt.answers), "scoring": prompt.scoring}


def read_card(folder: Path, task: str = "classify") -> Card:
    """The card of a run, without loading torch's tensors.

    Args:
        task: what the run must do, "" for anything; classify is any choice between classes.

    Raises:
        KilobayesError: there is no run, it is damaged or from a newer version, or it does something else.
    """
    path = folder / "posterior.json"
    if not folder.is_dir() or not path.exists():
        raise KilobayesError(
            f"{folder} is no kilobayes run",
            "it has no posterior.json" if folder.is_dir() else "there is no such folder",
            "kilobayes train --out RUN makes one",
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, Mapping):
            raise ValueError("not an object")
        known = set(Card.__dataclass_fields__)
        if int(found.get("format", FORMAT)) > FORMAT:
            raise KilobayesError(
                f"{path} was written by a newer kilobayes",
                f"version {found.get('version')}",
                "pip install -U kilobayes",
            )
        card = Card(**{k: v for k, v in found.items() if k in known})
    except (ValueError, TypeError, RecursionError) as error:
        raise KilobayesError(
            f"{path} is damaged", str(error)[:300], "copy it again from where it was made"
        ) from None
    if task not in ("", card.task) and (task, card.task) != ("classify", "choice"):
        other = card.task == "lm"
        raise KilobayesError(
            f"{folder} holds a {'language model' if other else 'classifier'}",
            f"task {card.task} where {task} was wanted",
            f"kilobayes {'generate' if other else 'predict'} {folder}",
        )
    return card


def check_fingerprint(card: Card, found: str) -> None:
    """Refuse a base whose frozen weights are not those the run was trained on.

    Raises:
        KilobayesError: the fingerprints differ.
    """
    if card.fingerprint != found:
        raise KilobayesError(
            f"the base model {card.base!r} is not the one this run was trained on",
            f"fingerprint {found[:12]}, trained on {card.fingerprint[:12]}",
            "name the original with --model, or train again",
        )
