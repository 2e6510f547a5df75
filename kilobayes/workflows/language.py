"""From texts to a language model with a posterior over its adapter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes import host, spec, store, train
from kilobayes.errors import KilobayesError
from kilobayes.files import digest
from kilobayes.host.vocabulary import HiddenHead, check_output, hidden_states
from kilobayes.lm.energy import LanguageEnergy
from kilobayes.lm.predict import token_scores
from kilobayes.metrics.language import TokenScores
from kilobayes.models import fingerprint, load_causal
from kilobayes.options import Options
from kilobayes.posteriors import ask
from kilobayes.random import generator
from kilobayes.step import Nll
from kilobayes.tasks.lm import Language, TokenRows
from kilobayes.tasks.packing import Tokens, collate, pack
from kilobayes.tasks.text import Documents
from kilobayes.types import Posterior
from kilobayes.workflows.attach import attach, card_of, device_of
from kilobayes.workflows.learn import Watch, check_calibration, learn, writing


@dataclass(frozen=True, eq=False)
class FittedLanguage:
    """A language model with its posterior.

    Attributes:
        card: what is saved beside the posterior.
        tokens: rows trained on; None for a loaded run.
        trained: what the loop returned; None for a loaded run.
        cost: seconds, bytes; empty for a loaded run.
    """

    model: nn.Module
    task: Language
    posterior: Posterior
    state: Any
    card: store.Card
    tokens: Tokens | None = None
    trained: train.Trained | None = None
    cost: dict[str, float] = dataclasses.field(default_factory=dict)

    def scores(
        self, documents: Documents | Tokens, samples: int | None = None, batch_size: int = 32
    ) -> TokenScores:
        """What the averaged predictions say of every learned token; draws come from the run's own seed.

        Raises:
            KilobayesError: fewer than one sample, or nothing to learn in the documents.
        """
        if samples is not None and samples < 1:
            raise KilobayesError("samples must be at least 1", f"found {samples}")
        tokens = self.task.encode(documents) if isinstance(documents, Documents) else documents
        count = ask.count(self.posterior, self.state, samples or self.card.samples)
        energy = LanguageEnergy(self.model, self.task, tokens)
        draws = ask.draws(self.posterior, self.state, energy, count, generator(self.card.seed, 7))

        def transform(scores: Tensor) -> Tensor:
            return ask.transform(self.posterior, self.state, scores)

        return token_scores(self.model, draws, self.task, tokens, transform=transform, batch_size=batch_size)


def sampling(posterior: Posterior) -> Posterior:
    """The posterior, with what it would linearise sampled: a vocabulary has too many classes."""
    made: Any = posterior
    if hasattr(made, "base"):
        made = dataclasses.replace(made, base=sampling(made.base))
    return dataclasses.replace(made, linearised=False) if getattr(made, "linearised", False) else made


def row_nll(head: HiddenHead, per_row: float | Tensor) -> Nll:
    """The loop's loss: labels ``(S, B T)`` to rows' sums over learned tokens, over ``per_row``: ``(S, B)``.

    Args:
        per_row: mean number of learned tokens of a training row; ``(S, 1)`` where members have others.
    """

    def nll(output: Any, labels: Tensor) -> Tensor:
        found = head.row_nll(labels).reshape(len(labels), -1)
        return found / (per_row.to(found) if isinstance(per_row, Tensor) else per_row)

    return nll


def fit_documents(
    options: Options,
    documents: Documents,
    calibration: Documents | None,
    *,
    checkpoint: Path | None = None,
    watch: Watch | None = None,
) -> FittedLanguage:
    """Fine-tune on documents and fit the posterior.

    Args:
        calibration: for posteriors that are fitted after training; never trained on.
        checkpoint: file to keep the training state in, and to resume from if ``options.resume``.

    Raises:
        KilobayesError: as everything it calls; a posterior that needs calibration rows and gets none; rows to
            be packed for a model that cannot keep them apart.
    """
    posterior = sampling(spec.posterior(options.posterior))
    check_calibration(posterior, options, calibration)
    base = load_causal(options.model, dtype=options.dtype, device=device_of(options.device))
    print_ = fingerprint(base.model)
    task = Language(base.tokenizer, min(options.max_length, base.longest or options.max_length))
    tokens = task.encode(documents, packed=options.packing)
    device = next(base.model.parameters()).device
    check_output(base.model, torch.tensor([tokens.ids[0]], device=device))
    if tokens.packed:
        check_packing(base.model, task)
    model = attach(base, options)
    held = task.encode(calibration) if calibration else tokens
    energy = LanguageEnergy(model, task, held, trained=tokens, per_row=tokens.mean_counted)
    within = writing(model, lambda head: row_nll(head, tokens.mean_counted))
    done = learn(
        model, base, TokenRows(task, tokens), within, posterior, options, energy,
        about={"base": print_, "rows": digest(map(repr, documents.rows))}, checkpoint=checkpoint, watch=watch,
    )  # fmt: skip
    card = card_of(options, model, posterior, print_, task.max_length)
    return FittedLanguage(model, task, posterior, done.state, card, tokens, done.trained, done.cost)


@torch.no_grad()
def check_packing(model: nn.Module, task: Language) -> None:
    """Refuse to pack rows for a model in which they would see each other.

    Raises:
        KilobayesError: hidden states of a text differ when another stands before it.
    """
    first, second = task.start, task.end[0] if task.end else task.start
    texts = [[first, second, first, second], [second, first, first]]
    rows = Tokens(texts, texts, [[0], [0]], [0, 1], [0, 0])
    device = next(model.parameters()).device
    outputs = []
    for tokens in (rows, pack(rows, 8)):
        inputs, _ = collate(tokens, range(len(tokens)), first)
        with hidden_states(model) as head:
            model(**{k: v.to(device) for k, v in inputs.items()})
            outputs.append(head.take().float())
    alone = torch.cat([outputs[0][0, :4], outputs[0][1, :3]])
    if not torch.allclose(alone, outputs[1][0], atol=1e-3 * float(alone.abs().max()), rtol=0):
        raise KilobayesError(
            f"{type(model).__name__} lets packed texts see each other", remedy="leave --packing out"
        )


def load(folder: Path, *, model: str | None = None, device: str = "auto") -> FittedLanguage:
    """A saved run of a language model.

    Args:
        model: where the base is now, if not where it was.

    Raises:
        KilobayesError: no run of a language model, damaged files, or another base than it was trained on.
    """
    card = store.read_card(folder, "lm")
    base = load_causal(model or card.base, dtype=card.dtype, device=device_of(device))
    store.check_fingerprint(card, fingerprint(base.model))
    hosted = store.read_adapter(folder, base.model, card)
    posterior, state = store.read_state(folder, card, host.read(hosted))
    return FittedLanguage(hosted, Language(base.tokenizer, card.max_length), posterior, state, card)
