"""The runs of a sum: read, and refused where they do not go together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import nn

from kilobayes import host, parametrise, store, sums, tree
from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError
from kilobayes.models import Base, fingerprint, load_causal
from kilobayes.random import generator
from kilobayes.types import Params, Posterior
from kilobayes.workflows.attach import device_of
from kilobayes.workflows.finetune import fingerprint_of
from kilobayes.workflows.kinds import kind_of

# fields of the card that all runs share, and those that they share unless one run gives the head
SAME = {
    "task": "do different things",
    "fingerprint": "have different bases",
    "dtype": "have bases of different dtypes",
    "paired": "read single texts and pairs",
    "scoring": "score answers in different ways",
}
LEARNED = {
    "classes": "have different classes",
    "template": "have different templates",
    "answers": "have different answers",
}


@dataclass(frozen=True, eq=False)
class Addend:
    """A run in a sum.

    Attributes:
        weight: its coefficient.
        share: of its head.
        model: hosts its adapter; its leaves do not matter.
    """

    folder: str
    weight: float
    share: float
    card: store.Card
    model: nn.Module
    posterior: Posterior
    state: Any

    def weights(self, n: int, place: int) -> Params:
        """The mean ``(1, ...)`` for n = 0, else n draws, of a stream that no other addend has."""
        mean = self.posterior.mean(self.state)
        if not n:
            return sums.mean(self.posterior, self.state, self.folder)
        gen = generator(self.card.seed, 11, place)
        drawn = sums.draws(self.posterior, self.state, n, gen)
        if n % tree.size(mean):  # no member has as many as another
            raise KilobayesError(
                f"{n} draws do not come in equal parts from the {tree.size(mean)} members of {self.folder}",
                remedy=f"take a multiple, as in --samples {tree.size(mean)}",
            )
        return parametrise.restrict(host.method(self.model), drawn, mean)


def read(
    terms: Mapping[str, float], head: str, model: str | None, device: str
) -> tuple[nn.Module, list[Addend]]:
    """A model that hosts the first run's adapter (with ``head``, that one's), and all runs.

    Raises:
        KilobayesError: none, one that is damaged, or some that do not go together.
    """
    if not terms:
        raise KilobayesError("there is nothing to sum", remedy='as in "0.5*runs/a + 0.5*runs/b"')
    lead = head or next(iter(terms))
    if lead not in terms:
        raise KilobayesError(f"{head} is not in the sum, so it gives no head", f"found {', '.join(terms)}")
    cards = {folder: store.read_card(Path(folder), "") for folder in terms}
    for folder, card in cards.items():
        _check(folder, card, lead, cards[lead], bool(head))
    first = hosted(Path(lead), cards[lead], model, device)
    shares = _shares(terms, head) if host.heads(first) else dict.fromkeys(terms, 0.0)
    out = []
    for folder, weight in terms.items():
        card = cards[folder]
        alike = (card.adapter, card.classes) == (cards[lead].adapter, cards[lead].classes)
        own = first if alike else hosted(Path(folder), card, model, device)
        posterior, state = store.read_state(Path(folder), card, host.read(own))
        out.append(Addend(folder, weight, shares[folder], card, own, posterior, state))
    return first, out


def _check(folder: str, card: store.Card, lead: str, first: store.Card, apart: bool) -> None:
    for name, wrong in (SAME | ({} if apart else LEARNED)).items():
        ours, theirs = getattr(card, name), getattr(first, name)
        if ours != theirs:
            remedy = f"--head {lead} takes that one's" if name in LEARNED else "sum runs of one base and task"
            raise KilobayesError(
                f"{folder} and {lead} {wrong}", f"{_short(ours)} and {_short(theirs)}", remedy
            )
    if set(card.target_modules) != set(first.target_modules):
        found = sorted(set(card.target_modules) ^ set(first.target_modules))
        raise KilobayesError(
            f"{folder} and {lead} adapt different modules",
            f"only one has {found[0]}",
            "train both on the same",
        )


def _short(value: Any) -> str:
    return str(value)[:80]


def _shares(terms: Mapping[str, float], head: str) -> dict[str, float]:
    """Coefficients of heads."""
    if head:
        return {folder: float(folder == head) for folder in terms}
    total = sum(terms.values())
    if total <= 1e-6 * sum(map(abs, terms.values())):
        raise KilobayesError(
            "a head cannot be the sum of these runs' heads",
            f"the coefficients sum to {total:g}; they are divided by it",
            "--head RUN takes one run's",
        )
    return {folder: weight / total for folder, weight in terms.items()}


def base(card: store.Card, model: str | None, device: str) -> Base:
    """The base of a run.

    Raises:
        KilobayesError: it is not the one the run was trained on.
    """
    name, place = model or card.base, device_of(device)
    if card.task == "lm":
        found = load_causal(name, dtype=card.dtype, device=place)
        store.check_fingerprint(card, fingerprint(found.model))
    else:
        found = kind_of(card.task).load(name, card.classes, card.dtype, place)
        store.check_fingerprint(card, fingerprint_of(found))
    return found


def hosted(folder: Path, card: store.Card, model: str | None, device: str) -> nn.Module:
    """A run's mean on its base."""
    return store.read_adapter(folder, base(card, model, device).model, card)


def as_lora(like: nn.Module, card: store.Card, rank: int, model: str | None, device: str) -> nn.Module:
    """The base with a LoRA of scale 1 on the modules, and with the heads, of another hosted model."""
    config: Any = copy.deepcopy(like.peft_config[host.active(like)])  # type: ignore[union-attr, index]
    config.adapter, config.stack = repr(LoRA(r=rank, alpha=float(rank))), 1
    config.inference_mode = False
    return get_peft_model(base(card, model, device).model, config)  # type: ignore[arg-type, return-value]
