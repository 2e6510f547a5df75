"""One run of a language model from settings to a folder, and its evaluation on other texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kilobayes import spec, store
from kilobayes.files import write_json, write_text_atomically
from kilobayes.metrics import Interval
from kilobayes.metrics.language import BINS, TokenScores, summarise
from kilobayes.model_files import model_folder
from kilobayes.options import Options
from kilobayes.run_yaml import write_yaml
from kilobayes.workflows.evaluate import command, metadata, versions
from kilobayes.workflows.folder import CHECKPOINT, Log, place
from kilobayes.workflows.language import FittedLanguage, fit_documents
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
    summary: dict[str, Interval]
    sizes: dict[str, int]


def train(
    options: Options, *, source: Any = None, watch: Any = None, say: Callable[[str], None] = lambda line: None
) -> FinishedLanguage:
    """Train, calibrate, save and evaluate.

    Args:
        source: data in memory instead of ``options.data``.
        watch: called after each optimiser step.
        say: told of each stage in a line.

    Raises:
        KilobayesError: as everything it calls; a folder that holds another run, or this one finished.
    """
    spec.adapter(options.adapter)
    spec.posterior(options.posterior)
    options = place(options)
    folder = Path(options.out)
    texts = load_texts(options, source)
    model_folder(options.model)
    say(f"model {options.model}, adapter {options.adapter}, posterior {options.posterior}")
    say(f"data  {options.data or 'in memory'}: {len(texts.train)} rows to train on; run {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(folder / "run.yaml", options)
    write_json(folder / "env.json", versions() | {"command": command()})
    log = Log(folder / "log.jsonl", options.resume, watch)
    texts.notes.extend(
        ["The run was resumed: seconds and memory are those since."]
        if options.resume and (folder / CHECKPOINT).exists()
        else []
    )

    try:
        fitted = fit_documents(
            options, texts.train, texts.calibration, checkpoint=folder / CHECKPOINT, watch=log
        )
    finally:
        log.close()
    if fitted.trained is not None:
        log.whole(fitted.trained.losses.tolist())
    sizes = store.save(folder, fitted.model, fitted.posterior, fitted.state, fitted.card)
    cost = fitted.cost | {"stored_bytes": float(sizes["checkpoint"] + sizes["posterior"])}
    fitted = replace(fitted, cost=cost)
    write_json(folder / "cost.json", {k: round(v, 3) for k, v in cost.items()} | {"sizes": sizes})
    notes = [*texts.notes, *warnings_of(fitted)]
    for line in notes:
        say(f"note: {line}")
    scores = fitted.scores(texts.test)
    other = fitted.scores(texts.ood) if texts.ood else None
    facts: dict[str, Any] = {"source": options.data or "in memory", "form": texts.train.form}
    facts |= {"training rows": len(texts.train), "calibration rows": len(texts.calibration or [])}
    summary = write_figures(folder, fitted, scores, other, facts | {"split": texts.test_name}, notes)
    # the last file: what is not there yet after a kill, --resume writes again
    write_text_atomically(
        folder / "README.md", readme(fitted, scores, summary, texts.test_name, sizes, notes)
    )
    return FinishedLanguage(folder, fitted, texts, summary, sizes)


def warnings_of(fitted: FittedLanguage) -> list[str]:
    """What a person should know about how training went."""
    out, tokens = [], fitted.tokens
    if tokens is not None and tokens.truncated:
        out.append(f"{tokens.truncated} training rows were cut at {fitted.task.max_length} tokens.")
    if tokens is not None and tokens.dropped:
        out.append(f"{tokens.dropped} training rows were left out: their answers begin after that.")
    if fitted.trained is not None and fitted.trained.diverged:
        out.append(f"Members {fitted.trained.diverged} diverged and were left out; try a lower --lr.")
    if fitted.trained is not None and fitted.trained.stopped:
        out.append("Training stopped at --max-minutes, before its schedule ended.")
    return out


def figures(summary: dict[str, Interval]) -> dict[str, Any]:
    """Values and limits as JSON takes them; what is not defined is null."""
    return {
        k: [None if v != v else round(float(v), 6) for v in (i.value, i.low, i.high)]
        for k, i in summary.items()
    }


def write_figures(
    folder: Path | None,
    fitted: FittedLanguage,
    scores: TokenScores,
    other: TokenScores | None,
    data: dict[str, Any],
    notes: list[str],
) -> dict[str, Interval]:
    """The figures with their intervals, and ``metrics.json`` of them where a folder is named."""
    summary = summarise(scores, other)
    told = {"value, low, high": "95% bootstrap over documents", "bins": BINS, "unit": "learned tokens"}
    counts = {"documents": len(scores.bytes), "tokens": len(scores.nll), "bytes": int(scores.bytes.sum())}
    name = f"{spec.format(spec.adapter(fitted.card.adapter))} + {spec.format(fitted.posterior)}"
    meta = metadata(name, data | counts, notes)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        found = {"task": "lm", "definitions": told, "metrics": figures(summary)}
        write_json(folder / "metrics.json", found | meta)
    return summary


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
