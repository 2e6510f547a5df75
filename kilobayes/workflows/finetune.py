"""From examples to a posterior: host the adapter, train, fit what is fitted afterwards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kilobayes import host, spec, store, train
from kilobayes.energy import ModelEnergy, predict
from kilobayes.errors import KilobayesError
from kilobayes.files import digest
from kilobayes.metrics.conformal import Calibration, missing
from kilobayes.models import Base, fingerprint
from kilobayes.options import Options
from kilobayes.predict import Predictive, Rows, class_nll
from kilobayes.random import generator
from kilobayes.tasks.classify import Encoded
from kilobayes.tasks.data import Examples
from kilobayes.tasks.protocol import Task
from kilobayes.types import Posterior
from kilobayes.workflows import conformal
from kilobayes.workflows.attach import attach, card_of, device_of
from kilobayes.workflows.kinds import kind_of
from kilobayes.workflows.learn import Watch, check_calibration, choosing, learn


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model with its posterior, ready to predict.

    Attributes:
        card: what is saved beside the posterior.
        truncated: training rows that lost their end.
        trained: what the loop returned; None for a loaded run.
        cost: seconds, bytes; empty for a loaded run.
        calibration: predictions of labelled rows that it was not trained on, if it was given any.
    """

    model: nn.Module
    task: Task
    posterior: Posterior
    state: Any
    card: store.Card
    truncated: int = 0
    trained: train.Trained | None = None
    cost: dict[str, float] = dataclasses.field(default_factory=dict)
    calibration: Calibration | None = None

    def encode(self, examples: Examples) -> Encoded:
        """Tokens of rows that are of the kind that the run was trained on.

        Raises:
            KilobayesError: single texts where the run was trained on pairs, or pairs where it was not.
        """
        if (examples.pairs is not None) != self.card.paired:
            one, two = "single texts", "pairs of texts"
            raise KilobayesError(
                f"this run was trained on {two if self.card.paired else one}",
                f"the data hold {one if self.card.paired else two}",
                "name the columns with --text-column A --pair-column B"
                if self.card.paired
                else "name the column with --text-column A",
            )
        return self.task.encode(examples)

    def predict(
        self, rows: Examples | Encoded, samples: int | None = None, batch_size: int = 32
    ) -> Predictive:
        """The posterior predictive; draws come from the run's own seed, so it repeats."""
        if samples is not None and samples < 1:
            raise KilobayesError("samples must be at least 1", f"found {samples}")
        encoded = rows if isinstance(rows, Encoded) else self.encode(rows)
        return predict(
            ModelEnergy(self.model, self.task, encoded, batch_size),
            self.posterior,
            self.state,
            samples=samples or self.card.samples,
            gen=generator(self.card.seed, 7),
        )

    def calibrated(self, rows: Examples | None, samples: int | None = None) -> Fitted:
        """The same with other calibration rows, which are seen through the draws of every prediction.

        Raises:
            KilobayesError: they have no labels, or are of another kind than the rows trained on.
        """
        if rows is None:
            return dataclasses.replace(self, calibration=None)
        if rows.labels is None:
            raise KilobayesError("calibration rows need labels", remedy="name them with --label-column")
        probs = self.predict(rows, samples).probs.numpy().astype(np.float32)
        found = Calibration(probs, np.asarray(rows.labels, dtype=np.int64))
        return dataclasses.replace(self, calibration=found)

    def held(self) -> Calibration:
        """The calibration rows.

        Raises:
            KilobayesError: there are none.
        """
        if self.calibration is None:
            raise missing()
        return self.calibration


def fit_examples(
    options: Options,
    examples: Examples,
    calibration: Examples | None,
    *,
    checkpoint: Path | None = None,
    watch: Watch | None = None,
) -> Fitted:
    """Fine-tune on examples and fit the posterior.

    Args:
        calibration: for posteriors that are fitted after training; never trained on.
        checkpoint: file to keep the training state in, and to resume from if ``options.resume``.

    Raises:
        KilobayesError: as everything it calls; a posterior that needs calibration rows and gets none.
    """
    posterior = spec.posterior(options.posterior)
    check_calibration(posterior, options, calibration)
    kind = kind_of(options.task)
    base = kind.load(options.model, examples.classes, options.dtype, device_of(options.device))
    print_ = fingerprint_of(base)
    model = attach(base, options)
    longest = min(options.max_length, base.longest or options.max_length)
    task = kind.make(base, examples.classes, longest, examples.prompt)
    encoded = task.encode(examples)
    held = task.encode(calibration) if calibration else encoded
    energy = ModelEnergy(model, task, held, trained=encoded)
    within = choosing(model, task, class_nll(task))
    done = learn(
        model, base, Rows(task, encoded), within, posterior, options, energy,
        about={"base": print_, "rows": digest_of(examples)}, checkpoint=checkpoint, watch=watch,
    )  # fmt: skip
    about = {"classes": list(examples.classes), "paired": examples.pairs is not None}
    card = card_of(options, model, posterior, print_, task.max_length, **about, **store.put(examples.prompt))
    return Fitted(model, task, posterior, done.state, card, encoded.truncated, done.trained, done.cost)


def fingerprint_of(base: Base) -> str:
    """The fingerprint of what stays frozen: heads, and what the files did not hold, are trained and saved."""
    return fingerprint(base.model, exclude=(*base.fresh, "classifier", "score"))


def digest_of(examples: Examples) -> str:
    """SHA-256 of texts, options and labels: what a checkpoint was trained on."""
    rows = zip(examples.texts, examples.pairs or examples.options or examples.texts, examples.labels or [])
    return digest("\x1f".join(map(str, row)) for row in rows)


def load(folder: Path, *, model: str | None = None, device: str = "auto") -> Fitted:
    """A saved run, ready to predict.

    Args:
        model: where the base is now, if not where it was.

    Raises:
        KilobayesError: no run, damaged files, or another base than the run was trained on.
    """
    card = store.read_card(folder)
    name = model or card.base
    kind = kind_of(card.task)
    base = kind.load(name, card.classes, card.dtype, device_of(device))
    store.check_fingerprint(card, fingerprint_of(base))
    model_ = store.read_adapter(folder, base.model, card)
    posterior, state = store.read_state(folder, card, host.read(model_))
    task = kind.make(base, card.classes, card.max_length, card.prompt)
    calibration = conformal.read(folder, len(card.classes))
    return Fitted(model_, task, posterior, state, card, calibration=calibration)
