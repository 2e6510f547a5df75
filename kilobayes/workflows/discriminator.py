r"""A classifier that tells real inputs from made-up ones, trained once, while the task's data is there.

.. math:: \max_\phi\; E_{x \sim D} \log p_\phi(\text{real} \mid x)
          + E_{x \sim G} \log p_\phi(\text{synthetic} \mid x)

as in Trans-LoRA (arXiv:2405.17258): an adapter on the source's own base. Its folder is a run like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kilobayes import store
from kilobayes.card import Card, read_card
from kilobayes.distil.duplicates import duplicates
from kilobayes.distil.generators import Given, Retrieval
from kilobayes.distil.rows import Row, normal, to_examples
from kilobayes.distil.synthesis import Accept, synthesise
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_lines, write_text_atomically
from kilobayes.options import Options
from kilobayes.run_yaml import read_yaml, write_yaml
from kilobayes.tasks.split import stratified_holdout
from kilobayes.workflows.evaluate import command, versions
from kilobayes.workflows.finetune import Fitted, fit_examples, load
from kilobayes.workflows.learn import Watch
from kilobayes.workflows.transfer_inputs import TRAINING, Making, check_source, maker, read

CLASSES = ["synthetic", "real"]
HELD = 0.2  # of the rows, to measure on
FACTS = "discriminator.json"


@dataclass(frozen=True, eq=False)
class Discriminator:
    """A trained discriminator.

    Attributes:
        report: what is in ``discriminator.json``.
    """

    folder: Path
    fitted: Fitted
    report: dict[str, Any]

    def real(self, rows: Sequence[Row]) -> np.ndarray:
        """Probability of each input to be real ``(N,)``."""
        return self.fitted.predict(to_examples(rows)).probs[:, CLASSES.index("real")].numpy()

    def accept(self, threshold: float = 0.5) -> Accept:
        """The filter that keeps what is more probably real than ``threshold``."""
        return lambda rows: self.real(rows) > threshold


def train_discriminator(
    run: str | Path,
    data: Any,
    out: str | Path = "",
    *,
    seeds: Any = None,
    unlabelled: Any = None,
    making: Making | None = None,
    examples: int = 5,
    limit: int = 1000,
    split: str | None = None,
    columns: dict[str, str | None] | None = None,
    model: str | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda line: None,
    **training: Any,
) -> Discriminator:
    """Train a discriminator for a run, and keep a handful of seeds for its later transfers.

    Real rows and made-up ones are as many, so that one half is the threshold. The rest of ``data`` is not
    needed again.

    Args:
        run: folder of the source.
        data: what it was trained on.
        out: folder of the discriminator; by default ``discriminator`` in the run's.
        seeds: examples that later transfers start from; by default ``examples`` of them are drawn from
            ``data``. They are written out: look at them.
        unlabelled: texts to make inputs from.
        limit: at most so many real rows.
        columns: ``text_column`` and ``pair_column`` of ``unlabelled``; others have the source's.
        model: where the source's base is now, if it moved.
        training: of the discriminator, as :class:`~kilobayes.options.Options` has them.

    Raises:
        KilobayesError: as reading, making and training; too few rows; a folder that holds a run.
    """
    source, making = Path(run), making or Making()
    card = read_card(source, "")
    check_source(source, card)
    folder = Path(out) if str(out) else source / "discriminator"
    if (folder / "posterior.json").exists():
        raise KilobayesError(f"{folder} holds a run already", remedy="name another folder with --out")
    seed = int(training.get("seed", 0))
    real = list({normal(r): r for r in read(source, card, data, making.words, split)}.values())
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(real))
    chosen = [real[int(at)] for at in order[:examples]]
    if seeds is not None:
        chosen = read(source, card, seeds, making.words)
    among = {normal(row) for row in chosen}
    real = [real[int(at)] for at in order if normal(real[int(at)]) not in among][:limit]
    pool = [] if unlabelled is None else read(source, card, unlabelled, making.words, **(columns or {}))
    writer = (model or card.base) if card.task == "lm" else ""
    generator = maker(making, card, chosen, pool, writer, TRAINING, training.get("device", "auto"))
    wanted = len(real)
    if isinstance(generator, Given | Retrieval):  # of which there is an end
        wanted = min(wanted, len({normal(row) for row in generator.texts} - among))
    if wanted < 10:
        raise KilobayesError(
            f"{wanted} rows do not make a discriminator",
            f"{len(real)} real rows, and {len(pool)} unlabelled ones, of which one half is for it",
        )
    say(f"making {wanted} inputs to tell from the real ones")
    made = synthesise(generator, chosen, n=wanted, max_tries=20 * wanted + 100)
    copies, known = duplicates(made.rows, real), {normal(row) for row in real}
    others = [row for row in made.rows if normal(row) not in known]
    both = [*real[: len(others)], *others]
    labels = [1] * (len(both) - len(others)) + [0] * len(others)
    kept, held = stratified_holdout(labels, HELD, seed)
    rows = to_examples(both, CLASSES, labels)
    given: dict[str, Any] = {
        "adapter": "LoRA(r=8)",
        "posterior": "Point()",
        "max_length": card.max_length,
    } | training
    options = Options(
        model=model or card.base, dtype=card.dtype, out=str(folder), data="real and made-up inputs",
        calibration="0", **given,
    )  # fmt: skip
    fitted = fit_examples(options, rows.take(kept), None, watch=watch)
    judge = Discriminator(folder, fitted, {})
    report = {
        "source": {"run": str(source), "base": card.base, "task": card.task},
        "making": asdict(making),
        "rows": {"real": len(both) - len(others), "synthetic": len(others), "held_out": len(held)},
        "seeds": len(chosen),
        "made": {k: v for k, v in asdict(made).items() if k != "rows"},
        "duplicates_of_real": asdict(copies),
        "held_out": _measured(judge, [both[int(i)] for i in held], [labels[int(i)] for i in held]),
    }
    _write(judge, options, card, source, chosen, report)
    return replace(judge, report=report)


def _measured(judge: Discriminator, rows: list[Row], labels: list[int]) -> dict[str, float]:
    """What the discriminator makes of rows that it was not trained on."""
    from sklearn.metrics import roc_auc_score

    real, truth = judge.real(rows), np.array(labels, dtype=bool)
    return {
        "accepts_real": float((real[truth] > 0.5).mean()),
        "accepts_synthetic": float((real[~truth] > 0.5).mean()),
        "auroc": float(roc_auc_score(truth, real)),
    }


def _write(
    judge: Discriminator, options: Options, card: Card, source: Path, seeds: list[Row], report: dict[str, Any]
) -> None:
    folder, fitted = judge.folder, judge.fitted
    store.save(folder, fitted.model, fitted.posterior, fitted.state, fitted.card)
    write_yaml(folder / "run.yaml", options)
    write_json(folder / "env.json", versions() | {"command": command()})
    write_lines(folder / "seeds.jsonl", [named(source, row) for row in seeds])
    write_json(folder / FACTS, report)
    held = report["held_out"]
    write_text_atomically(
        folder / "README.md",
        f"# A discriminator for {source.name}\n\nOn {card.base}. It tells inputs of the task from made-up "
        f"ones: of those held out it lets {held['accepts_real']:.0%} of the real and "
        f"{held['accepts_synthetic']:.0%} of the made-up pass.\n\n"
        "It is a function of the data that it was trained on, and `seeds.jsonl` are rows of them: keep both "
        "as private as the data.\n",
    )


def named(run: Path, row: Row) -> dict[str, str]:
    """An input under the names of the columns that a run was trained on."""
    settings = read_yaml(run / "run.yaml") if (run / "run.yaml").exists() else {}
    names = [settings.get("text_column") or "text"]
    if len(row) == 2:
        names = [settings.get("text_column") or "sentence1", settings.get("pair_column") or "sentence2"]
    return dict(zip(names, row, strict=True))


def read_discriminator(
    folder: Path, card: Card, model: str | None = None, device: str = "auto"
) -> Discriminator:
    """A saved discriminator of a source.

    Raises:
        KilobayesError: none there, one that is no discriminator, or one of another base.
    """
    import json

    path = folder / FACTS
    if not path.is_file():
        raise KilobayesError(
            f"{folder} is no discriminator", f"it has no {FACTS}", "kilobayes discriminator RUN makes one"
        )
    own = read_card(folder)
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["source"]["base"] != card.base or report["source"]["task"] != card.task:
        raise KilobayesError(
            f"{folder} is for another source", f"on {report['source']['base']}", f"name one on {card.base}"
        )
    if own.classes != CLASSES or math.isnan(report["held_out"]["auroc"]):
        raise KilobayesError(f"{folder} is no discriminator", f"classes {', '.join(own.classes)}")
    return Discriminator(folder, load(folder, model=model, device=device), report)
