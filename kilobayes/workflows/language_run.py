"""One run of a language model from settings to a folder, and its evaluation on other texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kilobayes import spec
from kilobayes.files import write_text_atomically
from kilobayes.metrics import Interval
from kilobayes.metrics.language import BINS, TokenScores
from kilobayes.metrics.texts import TextEvaluation
from kilobayes.model_files import model_folder
from kilobayes.options import Options
from kilobayes.workflows import frame
from kilobayes.workflows import language_evaluate as evaluation
from kilobayes.workflows.evaluate import metadata
from kilobayes.workflows.folder import CHECKPOINT, Log, place
from kilobayes.workflows.language import FittedLanguage, fit_documents
from kilobayes.workflows.learn import check_calibration
from kilobayes.workflows.texts import Texts, load_texts

LABELS = {
    "perplexity": "perplexity per token",
    "nll": "negative log-likelihood, nats per token",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy of the most probable token",
    "ece": f"expected calibration error of its probability, {BINS} equal-width bins",
    "entropy": "entropy, nats",
    "mutual_information": "mutual information, nats",
}


@dataclass(frozen=True, eq=False)
class FinishedLanguage:
    """A run that is on disk."""

    folder: Path
    fitted: FittedLanguage
    texts: Texts
    evaluation: TextEvaluation
    summary: dict[str, Interval]
    sizes: dict[str, int]


def train(
    options: Options, *, source: Any = None, watch: Any = None, say: Callable[[str], None] = lambda line: None
) -> FinishedLanguage:
    """Train, calibrate, save, evaluate and report.

    Args:
        source: data in memory instead of ``options.data``.
        watch: called after each optimiser step.
        say: told of each stage in a line.

    Raises:
        KilobayesError: as everything it calls; a folder that holds another run, or this one finished.
    """
    spec.adapter(options.adapter)
    posterior = spec.posterior(options.posterior)
    options = place(options)
    folder = Path(options.out)
    texts = load_texts(options, source)
    model_folder(options.model)
    check_calibration(posterior, options, texts.calibration)
    say(f"model {options.model}, adapter {options.adapter}, posterior {options.posterior}")
    say(f"data  {options.data or 'in memory'}: {len(texts.train)} rows to train on; run {folder}")
    frame.begin(folder, options)

    def fit(log: Log) -> FittedLanguage:
        return fit_documents(
            options, texts.train, texts.calibration, checkpoint=folder / CHECKPOINT, watch=log
        )

    fitted, told = frame.fitted_in(folder, options, watch, fit)
    fitted, sizes = frame.save(folder, fitted)
    notes = [*texts.notes, *told, *warnings_of(fitted)]
    for line in notes:
        say(f"note: {line}")
    found = evaluation.evaluate(fitted, texts.test, texts.ood)
    title = f"{Path(options.data).name or 'data'}: {found.name}"
    (summary,) = evaluation.write_outputs(folder, [found], metadata(title, facts(options, texts), notes))
    # the last file: what is not there yet after a kill, --resume writes again
    write_text_atomically(
        folder / "README.md", readme(fitted, found.scores, summary, texts.test_name, sizes, notes)
    )
    return FinishedLanguage(folder, fitted, texts, found, summary, sizes)


def facts(options: Options, texts: Texts) -> dict[str, Any]:
    """Counts of the data, for the report."""
    out: dict[str, Any] = {
        "source": options.data or "in memory",
        "form": texts.train.form,
        "training rows": len(texts.train),
        "calibration rows": len(texts.calibration or []),
        f"rows evaluated ({texts.test_name})": len(texts.test),
    }
    if texts.ood is not None:
        out["out-of-distribution rows"] = f"{len(texts.ood)} of {options.ood}"
    return out


def warnings_of(fitted: FittedLanguage) -> list[str]:
    """What a person should know about how training went."""
    out, tokens = [], fitted.tokens
    if tokens is not None and tokens.truncated:
        out.append(f"{tokens.truncated} training rows were cut at {fitted.task.max_length} tokens.")
    if tokens is not None and tokens.dropped:
        out.append(f"{tokens.dropped} training rows were left out: their answers begin after that.")
    return out + frame.went(fitted.trained)


def readme(
    fitted: FittedLanguage,
    scores: TokenScores,
    summary: dict[str, Interval],
    name: str,
    sizes: dict[str, int],
    notes: list[str],
) -> str:
    """The page of a run: how to use it, and how well it knows what it knows."""
    card = fitted.card
    head = {"base_model": card.base, "library_name": "peft", "tags": ["kilobayes", "text-generation"]}
    prefixes = ("", "ood_") if any(k.startswith("ood_") for k in summary) else ("",)
    rows = "\n".join(
        f"| {'elsewhere: ' if prefix else ''}{label} | {v.value:.4f} | {v.low:.4f} to {v.high:.4f} |"
        for prefix in prefixes
        for key, label in LABELS.items()
        for v in [summary[prefix + key]]
    )
    told = "".join(f"\n* {note}" for note in notes)
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {spec.format(fitted.posterior)} on {card.base}

`kilobayes generate` this folder writes with it; `PeftModel.from_pretrained(base, "this folder")` after
`import kilobayes` loads the posterior's mean alone.

On {len(scores.bytes)} rows ({name}), {len(scores.nll):,} tokens, with probabilities averaged over draws and
95% bootstrap intervals over rows:

| metric | value | interval |
|---|---|---|
{rows}
{told}

Adapter {sizes["adapter"]:,} bytes, posterior file {sizes["posterior"]:,} bytes. Adapter `{card.adapter}`,
posterior `{card.posterior}`, seed {card.seed}, kilobayes {card.version}. `kilobayes train --config run.yaml
--out OTHER` repeats the run.
"""
