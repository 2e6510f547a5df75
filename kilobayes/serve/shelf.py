"""Which runs are served: loaded once a base, and put together where they can share a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kilobayes import host, spec, store
from kilobayes.card import Card, read_card
from kilobayes.errors import KilobayesError
from kilobayes.language import LanguageModel
from kilobayes.models import Base
from kilobayes.serve.decoder import Decoder
from kilobayes.serve.pool import Pool, linearised
from kilobayes.types import Params
from kilobayes.workflows import conformal
from kilobayes.workflows import kinds as tasks
from kilobayes.workflows.finetune import Fitted
from kilobayes.workflows.finetune import load as load_fitted


@dataclass(eq=False)
class Shelf:
    """The runs by name: where each of them is computed, and its place there."""

    classifiers: dict[str, tuple[Pool, int]] = field(default_factory=dict)
    speakers: dict[str, tuple[Decoder, int]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.classifiers, *self.speakers]

    @property
    def pools(self) -> list[Pool]:
        return list({id(pool): pool for pool, _ in self.classifiers.values()}.values())

    @property
    def decoders(self) -> list[Decoder]:
        return list({id(decoder): decoder for decoder, _ in self.speakers.values()}.values())

    def fitted(self, name: str) -> Fitted:
        """A classifier's run."""
        pool, at = self.classifiers[name]
        return pool.fitted[at]


def named(words: Sequence[str]) -> dict[str, Path]:
    """Runs by the name that they are asked for by: ``NAME=FOLDER``, or a folder, whose name is taken.

    Raises:
        KilobayesError: two of one name.
    """
    out: dict[str, Path] = {}
    for word in words:
        name, found, folder = word.partition("=")
        path = Path(folder) if found and not Path(word).exists() else Path(word)
        name = name if found and not Path(word).exists() else path.resolve().name
        if name in out:
            raise KilobayesError(
                f"two runs are called {name}", f"{out[name]} and {path}", f"name one, as in other={path}"
            )
        out[name] = path
    return out


def load(
    runs: dict[str, Path],
    *,
    samples: int | None = None,
    model: str | None = None,
    device: str = "auto",
    at_once: int = 32,
) -> Shelf:
    """Runs ready to answer; those of one base and kind of adapter are over one model in memory.

    Args:
        samples: draws of each; None takes the run's own number.
        model: where the base is now, if not where it was.
        at_once: sequences that are written at a time.

    Raises:
        KilobayesError: as loading a run alone.
    """
    cards = {name: read_card(path, "") for name, path in runs.items()}
    kinds: dict[Any, list[str]] = {}
    for name, card in cards.items():
        kinds.setdefault(kind_of(card), []).append(name)
    shelf = Shelf()
    for names in kinds.values():
        paths = [runs[name] for name in names]
        if cards[names[0]].task == "lm":
            decoder = Decoder(_speakers(paths, model, device), at_once, samples)
            shelf.speakers |= {name: (decoder, at) for at, name in enumerate(names)}
            continue
        for together in _classifiers(dict(zip(names, paths)), model, device):
            for alike in _alike(together, samples):
                pool = Pool([together[name] for name in alike], samples)
                shelf.classifiers |= {name: (pool, at) for at, name in enumerate(alike)}
    return shelf


def kind_of(card: Card) -> Any:
    """What runs over one model in memory have in common."""
    adapter = repr(spec.adapter(card.adapter))
    return card.task, card.fingerprint, adapter, tuple(sorted(card.target_modules)), card.dtype


def _classifiers(paths: dict[str, Path], model: str | None, device: str) -> list[dict[str, Fitted]]:
    """Runs over one model each; one whose leaves are not those of the others has a model of its own."""
    groups: list[dict[str, Fitted]] = []
    for name, path in paths.items():
        for group in groups:
            found = _beside(next(iter(group.values())), path)
            if found is not None:
                group[name] = found
                break
        else:
            groups.append({name: load_fitted(path, model=model, device=device)})
    return groups


def _beside(first: Fitted, path: Path) -> Fitted | None:
    """A run over the model of another; None where its leaves are others."""
    card = store.read_card(path)
    leaves = _leaves(first, len(card.classes))
    try:
        posterior, state = store.read_state(path, card, leaves)
    except KilobayesError:
        return None  # loaded alone, where a damaged file is told of
    base = Base(first.model, first.task.tokenizer, card.base, ())
    task = tasks.kind_of(card.task).make(base, card.classes, card.max_length, card.prompt)
    calibration = conformal.read(path, len(card.classes))
    return Fitted(first.model, task, posterior, state, card, calibration=calibration)


def _leaves(first: Fitted, classes: int) -> Params:
    """The model's leaves with a last layer for so many classes."""
    leaves = {key: value.detach() for key, value in host.read(first.model).items()}
    heads = list(host.heads(first.model))
    for key in [k for k in leaves if heads and k.rpartition("/")[0] == heads[-1]]:
        value = leaves[key]
        leaves[key] = value.new_empty(value.shape[0], classes, *value.shape[2:])
    return leaves


def _alike(fitted: dict[str, Fitted], samples: int | None) -> list[list[str]]:
    """Names of runs that can share a forward: leaves of one kind, and draws, not derivatives."""
    groups: dict[Any, list[str]] = {}
    for name, run in fitted.items():
        alone = linearised(run) or run.card.task == "choice"
        key = name if alone else tuple(sorted(run.posterior.sample(run.state, 1, _any(run))))
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _any(run: Fitted) -> Any:
    from kilobayes.random import generator

    return generator(run.card.seed)


def _speakers(paths: Sequence[Path], model: str | None, device: str) -> list[LanguageModel]:
    """Language models over one model in memory."""
    first = LanguageModel.load(paths[0], model=model, device=device)
    out = [first]
    for path in paths[1:]:
        card = store.read_card(path, "lm")
        posterior, state = store.read_state(path, card, host.read(first.model))
        out.append(replace(first, posterior=posterior, state=state, samples=card.samples, seed=card.seed))
    return out
