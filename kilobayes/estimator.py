"""A scikit-learn classifier of texts whose probabilities are averaged over a posterior."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from kilobayes import spec, store
from kilobayes.errors import KilobayesError
from kilobayes.metrics import conformal
from kilobayes.options import Options
from kilobayes.posteriors import ask
from kilobayes.run_yaml import write_yaml
from kilobayes.tasks import given
from kilobayes.tasks.split import stratified_holdout
from kilobayes.workflows.conformal import write
from kilobayes.workflows.data import reads
from kilobayes.workflows.finetune import Fitted, fit_examples, load


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says of some texts, and how sure it is.

    Attributes:
        labels: ``(N,)`` most probable class.
        probs: ``(N, C)`` probabilities averaged over the posterior.
        confidence: ``(N,)`` probability of the label.
        entropy: ``(N,)`` of the probabilities, in nats: all uncertainty.
        epistemic: ``(N,)`` mutual information in nats: the part that comes of not knowing the weights.
    """

    labels: np.ndarray
    probs: np.ndarray
    confidence: np.ndarray
    entropy: np.ndarray
    epistemic: np.ndarray


class Classifier(ClassifierMixin, BaseEstimator):
    """Fine-tunes a pretrained encoder or decoder on texts; works wherever scikit-learn takes a classifier.

    ``fit(texts, labels)`` takes strings, pairs of strings, or an array of one or two columns of them. Where
    the posterior needs it, a share of the rows is held out for calibration, by class.

    With ``task="choice"`` a decoder answers. Rows are texts, or have columns: a data frame, or a list of
    dictionaries. Questions with options (``{"question": ..., "choices": [...]}``) take the right option's
    letter or number as their label, and ``classes_`` are the places of options.

    Args:
        model: base model: a folder, a hub id, or ``"minilm"``.
        adapter, posterior: objects or specifications.
        task, template, answers: classify, by a head; or choice, and how it puts a row, as flags of
            ``kilobayes train``.
        calibration: share of the rows held out for calibration.
        samples: posterior samples that predictions average over.
        lr, epochs, batch_size, at_once, max_length, target_modules, device, dtype: as flags of
            ``kilobayes train``.
        seed: of everything random.

    Attributes:
        classes_: labels as given to ``fit``, sorted.
        fitted_: the model with its posterior.
    """

    def __init__(
        self,
        model: str = "minilm",
        adapter: Any = "LoRA(r=8)",
        posterior: Any = "Temperature(SWAG(rank=10))",
        *,
        task: str = Options.task,
        template: str | None = None,
        answers: str | None = None,
        calibration: float = 0.2,
        samples: int = 10,
        lr: float = Options.lr,
        epochs: int = Options.epochs,
        batch_size: int = Options.batch_size,
        at_once: int = Options.at_once,
        max_length: int = Options.max_length,
        target_modules: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.posterior = posterior
        self.task = task
        self.template = template
        self.answers = answers
        self.calibration = calibration
        self.samples = samples
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.at_once = at_once
        self.max_length = max_length
        self.target_modules = target_modules
        self.device = device
        self.dtype = dtype
        self.seed = seed

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        return tags

    def fit(self, X: Any, y: Any) -> Classifier:
        """Fine-tune on texts and their labels.

        Raises:
            KilobayesError: no texts, one class only, lengths that differ, settings that do not work.
        """
        rows: Any = given.columns(X) if self.task == "choice" else given.texts(X)
        count = len(rows) if isinstance(rows, list) else len(next(iter(rows.values())))
        labels = np.asarray(y)
        if labels.ndim != 1 or len(labels) != count:
            raise KilobayesError(
                f"{count} texts need as many labels", f"found an array of shape {labels.shape}"
            )
        try:
            if labels.dtype.kind == "f" and not np.isfinite(labels).all():
                raise ValueError("some are missing")
            check_classification_targets(labels)
            self.classes_, indices = np.unique(labels, return_inverse=True)
        except (TypeError, ValueError) as error:  # missing ones, fractions, kinds that do not compare
            raise KilobayesError(
                "these labels are no classes", str(error), "give names or whole numbers"
            ) from None
        if len(self.classes_) < 2:
            raise KilobayesError("classification needs at least two classes", f"found {list(self.classes_)}")
        names = [str(c) for c in self.classes_]
        if self.task == "choice":
            examples, called = given.prompts(rows, labels, names, self.template, self.answers)
            self.classes_ = self.classes_ if called is None else called
        else:
            examples = given.labelled(rows, indices.tolist(), names)
        held, posterior = None, spec.posterior(self.posterior)
        if ask.needs_calibration(posterior):
            kept, out = stratified_holdout(examples.labels or [], float(self.calibration), self.seed)
            examples, held = examples.take(kept), examples.take(out)
        fitted = fit_examples(self._options(posterior), examples, held)
        kind = {"b": "bool", "i": "int", "u": "int", "f": "float"}.get(self.classes_.dtype.kind, "str")
        self.fitted_ = replace(fitted, card=replace(fitted.card, label_kind=kind)).calibrated(held)
        return self

    def _options(self, posterior: Any) -> Options:
        names = (
            "model", "task", "template", "answers", "samples", "lr", "epochs", "batch_size", "at_once",
            "max_length", "target_modules", "device", "dtype", "seed",
        )  # fmt: skip
        own = {name: getattr(self, name) for name in names}
        adapter = spec.adapter(self.adapter)
        return Options(
            data="in memory",
            adapter=repr(adapter),
            posterior=repr(posterior),
            calibration=str(self.calibration),
            **own,
        )

    def predictive(self, X: Any, samples: int | None = None) -> Prediction:
        """Labels with their probabilities and two kinds of uncertainty, row by row."""
        check_is_fitted(self)
        card = self.fitted_.card
        rows = reads(card)(given.rows_of(X, card.prompt), need_labels=False)
        out = self.fitted_.predict(rows, samples)
        probs = out.probs.numpy()
        return Prediction(
            labels=self.classes_[probs.argmax(axis=1)],
            probs=probs,
            confidence=probs.max(axis=1),
            entropy=out.entropy.numpy(),
            epistemic=out.mutual_info.numpy(),
        )

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``(N, C)`` averaged over the posterior, classes in the order of ``classes_``."""
        return self.predictive(X).probs

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each text; :meth:`predictive` says more."""
        return self.predictive(X).labels

    def predict_sets(self, X: Any, coverage: float = 0.9, method: str = "lac") -> np.ndarray:
        """Sets that hold the right label as often as asked: ``(N, C)`` booleans, classes as in ``classes_``.

        They rest on the rows held out in ``fit``; see :mod:`kilobayes.metrics.conformal`.
        """
        check_is_fitted(self)
        conformal.check(coverage, method)
        return conformal.sets(self.fitted_.held(), self.predict_proba(X), coverage, method)

    def threshold(self, max_error: float, confidence: float = 0.9) -> float:
        """The confidence from which on at most ``max_error`` of the labels are wrong."""
        check_is_fitted(self)
        return conformal.threshold(self.fitted_.held(), max_error, confidence)

    def save(self, folder: str | Path) -> dict[str, int]:
        """Write a run that :func:`kilobayes.load` and the command line read; returns bytes by part."""
        check_is_fitted(self)
        fitted: Fitted = self.fitted_
        learned: dict[str, Any] = fitted.card.settings
        write_yaml(Path(folder) / "run.yaml", replace(self._options(fitted.posterior), **learned))
        write(Path(folder), fitted.calibration)
        return store.save(Path(folder), fitted.model, fitted.posterior, fitted.state, fitted.card)

    @classmethod
    def load(cls, folder: str | Path, *, model: str | None = None, device: str = "auto") -> Classifier:
        """A fitted classifier from a run's folder; labels are of the type that they had in ``fit``.

        Raises:
            KilobayesError: no run there, damaged files, or another base than it was trained on.
        """
        return cls.around(load(Path(folder), model=model, device=device), model, device)

    @classmethod
    def around(cls, fitted: Fitted, model: str | None = None, device: str = "auto") -> Classifier:
        """A classifier that predicts with a model which has its posterior."""
        card = fitted.card
        own = {"samples": card.samples, "device": device, "dtype": card.dtype, **card.settings}
        out = cls(model or card.base, card.adapter, card.posterior, **own)
        read: Any = {"bool": lambda c: c == "True", "int": int, "float": float, "str": str}[card.label_kind]
        out.classes_ = np.asarray([read(c) for c in card.classes])
        out.fitted_ = fitted
        return out
