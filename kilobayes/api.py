"""What the package offers in Python beside the classifier."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kilobayes.card import Card, read_card
from kilobayes.errors import KilobayesError
from kilobayes.estimator import Classifier
from kilobayes.language import LanguageModel
from kilobayes.tasks.data import available_splits
from kilobayes.workflows import arithmetic as _arithmetic
from kilobayes.workflows import calibrate as _calibrate
from kilobayes.workflows import compare as _compare
from kilobayes.workflows import language_calibrate as _language_calibrate
from kilobayes.workflows import language_compare as _language_compare
from kilobayes.workflows.calibration_rows import Sources
from kilobayes.workflows.data import first_test, reads
from kilobayes.workflows.lora_folder import task_of
from kilobayes.workflows.terms import parse
from kilobayes.workflows.texts import for_run


def load(folder: str | Path, *, model: str | None = None, device: str = "auto") -> Any:
    """What a run's folder holds: a :class:`~kilobayes.Classifier` or a :class:`~kilobayes.LanguageModel`.

    So ``kb.load("runs/a").predict_proba(texts)``, or ``kb.load("runs/b").generate(prompts)``.

    Raises:
        KilobayesError: no run there, damaged files, or another base than it was trained on.
    """
    if read_card(Path(folder), "").task == "lm":
        return LanguageModel.load(folder, model=model, device=device)
    return Classifier.load(folder, model=model, device=device)


def calibrate(
    adapter: str | Path,
    data: Any,
    posterior: Any = None,
    *,
    train: Any = None,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    model: str | None = None,
    max_length: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
    task: str | None = None,
) -> Any:
    """A finished PEFT LoRA, or a run, with a posterior fitted to it; ``.save(folder)`` makes it a run.

    A :class:`~kilobayes.Classifier`; of an adapter that continues texts a
    :class:`~kilobayes.LanguageModel`.

    Notes, such as that there are few rows, come as warnings.

    Args:
        adapter: folder of a LoRA that PEFT saved, or of a run.
        data: labelled rows that it was not trained on, as :func:`kilobayes.tasks.data.load_examples` reads
            them; of a language model texts, as :func:`kilobayes.tasks.text.load_documents` does.
        posterior: what to fit, such as ``Temperature(TFB())``; by default a temperature around what a run
            has.
        train: rows that it was trained on, for posteriors that need them.
        split: of ``data``.
        classes: names in index order of a LoRA, where no configuration has them and they are not sorted.
        model: where the base model is now, if it moved.
        max_length, dtype, seed: of a LoRA; a run keeps its own.
        task: classify or lm; by default what the adapter's configuration says.

    Raises:
        KilobayesError: no adapter, one that cannot be calibrated, or rows that do not fit it.
    """
    sources = Sources(data, split, train)
    given: dict[str, Any] = {
        "model": model, "max_length": max_length, "dtype": dtype, "device": device, "seed": seed,
    }  # fmt: skip
    found: Any
    if (task or task_of(Path(adapter))) == "lm":
        texts = _language_calibrate.calibrate(Path(adapter), sources, posterior, **given)
        notes, found = texts.notes, LanguageModel.around(texts.fitted)
    else:
        done = _calibrate.calibrate(Path(adapter), sources, posterior, classes=classes, **given)
        notes, found = done.notes, Classifier.around(done.fitted, model, device)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return found


def combine(
    terms: Mapping[str | Path, float] | str,
    out: str | Path,
    *,
    how: str = "auto",
    rank: int | None = None,
    head: str | Path = "",
    posterior: str = "auto",
    samples: int | None = None,
    model: str | None = None,
    device: str = "auto",
) -> Any:
    """A sum of runs, written to ``out`` and loaded: averages, interpolations, task vectors.

    So ``kb.combine({"runs/a": 0.5, "runs/b": 0.5}, "runs/mean")``; options as in
    :func:`kilobayes.workflows.arithmetic.combine`.

    Args:
        terms: coefficients by folder, or text as ``"0.5*runs/a + 0.5*runs/b"``.

    Raises:
        KilobayesError: ``out`` holds a run, or runs that do not go together.
    """
    if (Path(out) / "posterior.json").exists():
        raise KilobayesError(f"{out} holds a run already", remedy="name another folder")
    found = parse(terms) if isinstance(terms, str) else {str(name): float(c) for name, c in terms.items()}
    done = _arithmetic.combine(
        found, how=how, rank=rank, head=str(head), posterior=posterior, samples=samples, model=model,
        device=device,
    )  # fmt: skip
    _arithmetic.write(done, Path(out), found, str(head))
    return load(out, model=model, device=device)


def compare(
    runs: Sequence[str | Path],
    test: Any,
    ood: Any = None,
    *,
    out: str | Path = "runs/compare",
    split: str | None = None,
    limit: int | None = None,
    samples: int | None = None,
) -> _compare.Compared | _language_compare.ComparedTexts:
    """Evaluate runs on the same rows; ``report.html`` and ``metrics.json`` go to ``out``.

    Args:
        test, ood: labelled rows as :func:`kilobayes.tasks.data.load_examples` reads them (a file, a folder, a
            hub id, a data frame), or for language models texts.

    Raises:
        KilobayesError: no runs, a damaged one, or runs of different classes.
    """

    folders = [Path(run) for run in runs]
    if folders and read_card(folders[0], "").task == "lm":

        def texts() -> tuple[Any, Any, str]:
            as_trained: dict[str, Any] = {"text_column": None, "label_column": None}
            found, name = for_run(folders[0], test, split, as_trained, limit)
            return found, None if ood is None else for_run(folders[0], ood, None, {}, limit)[0], name

        return _language_compare.compare(folders, texts, Path(out), str(test), samples)

    def rows(card: Card) -> tuple[Any, Any, str]:
        read = reads(card)
        name = split or first_test(available_splits(test))
        other = None
        if ood is not None:
            other = read(ood, first_test(available_splits(ood)), need_labels=False, limit=limit)
        return read(test, name, classes=card.classes, limit=limit), other, name or ""

    return _compare.compare(folders, rows, Path(out), str(test), samples)
