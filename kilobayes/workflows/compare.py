"""Several runs on the same rows; runs that differ in the seed alone are also pooled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kilobayes.card import Card
from kilobayes.errors import KilobayesError
from kilobayes.metrics import Evaluation, Interval, Spread, over_seeds
from kilobayes.options import Options
from kilobayes.run_yaml import read_yaml
from kilobayes.workflows import evaluate as work
from kilobayes.workflows.finetune import load
from kilobayes.workflows.folder import stored_cost

Rows = Callable[[Card], tuple[Any, Any, str]]  # for the first run


@dataclass(frozen=True, eq=False)
class Compared:
    """Evaluations on the same rows, their summaries, and the spread over seeds by arm."""

    evaluations: list[Evaluation]
    summaries: list[dict[str, Interval]]
    spreads: dict[str, dict[str, Spread]]

    def as_json(self) -> dict[str, Any]:
        runs = [work.headline(e, s) for e, s in zip(self.evaluations, self.summaries, strict=True)]
        return {"runs": runs, "over_seeds": plain(self.spreads)}


def spread_lines(spreads: Mapping[str, Mapping[str, Spread]], keys: Sequence[str]) -> list[str]:
    """One line an arm that ran with several seeds."""
    out = []
    for name, spread in spreads.items():
        shown = ", ".join(f"{k} {spread[k].mean:.3f}±{spread[k].std:.3f}" for k in keys)
        out.append(f"{name} over {spread['nll'].n} seeds: {shown}")
    return out


def plain(spreads: Mapping[str, Mapping[str, Spread]]) -> dict[str, dict[str, dict[str, float]]]:
    """For JSON; what is not defined is left out."""
    return {
        name: {
            k: {"mean": float(s.mean), "std": float(s.std), "n": int(s.n)}
            for k, s in spread.items()
            if s.mean == s.mean
        }
        for name, spread in spreads.items()
    }


def check_named(folders: Sequence[Path]) -> None:
    """Raises:
    KilobayesError: no run, or one twice.
    """
    twice = [str(f) for i, f in enumerate(folders) if f.resolve() in {g.resolve() for g in folders[:i]}]
    if twice:
        raise KilobayesError("a run is named twice", ", ".join(twice), "name each run once")
    if not folders:
        raise KilobayesError(
            "there is nothing to compare", remedy="name runs, as in kilobayes compare runs/a runs/b"
        )


def same_but_seed(folder: Path, spec: Mapping[str, str]) -> str:
    """Equal for runs whose settings differ in nothing but the seed."""
    try:
        settings = Options(**read_yaml(folder / "run.yaml")).identity()
    except KilobayesError:  # a run that was saved in Python, or whose settings are of another version
        settings = dict(spec)
    return repr(sorted((k, v) for k, v in settings.items() if k != "seed"))


def pool(
    folders: Sequence[Path], specs: Sequence[Mapping[str, str]], summaries: Sequence[dict[str, Interval]]
) -> dict[str, dict[str, Spread]]:
    """The spread over seeds of runs that share everything but the seed, by the names of their folders."""
    groups: dict[str, dict[str, tuple[Path, dict[str, Interval]]]] = {}
    for folder, about, summary in zip(folders, specs, summaries, strict=True):
        group = groups.setdefault(same_but_seed(folder, about), {})
        group.setdefault(about["seed"], (folder, summary))  # a seed counts once
    return {
        ", ".join(folder.name for folder, _ in group.values()): over_seeds([s for _, s in group.values()])
        for group in groups.values()
        if len(group) > 1
    }


def compare(
    folders: Sequence[Path],
    rows: Rows,
    out: Path,
    data: str,
    samples: int | None = None,
    model: str | None = None,
    device: str = "auto",
) -> Compared:
    """Evaluate each run on the same rows and write one table and one report into ``out``.

    Args:
        rows: gives examples, out-of-distribution examples or None, and the split's name, for a run's card.

    Raises:
        KilobayesError: fewer than one run, one twice, a damaged one, or runs of different classes.
    """
    check_named(folders)
    evaluations: list[Evaluation] = []
    first: Card | None = None
    found: tuple[Any, Any, str] | None = None
    for folder in folders:
        fitted = load(folder, model=model, device=device)
        fitted = replace(fitted, cost=stored_cost(folder))
        card = fitted.card
        if first is None:
            first, found = card, rows(card)
        if (card.classes, card.prompt) != (first.classes, first.prompt):
            raise KilobayesError(
                f"{folder} has other classes than {folders[0]}, or puts the rows in another way",
                f"{', '.join(card.classes)} and {', '.join(first.classes)}",
                "compare runs of one task",
            )
        assert found is not None
        name = f"{folder.name}: {work.arm_name(fitted)}" if len(folders) > 1 else work.arm_name(fitted)
        evaluation, _ = work.evaluate(fitted, found[0], found[1], name=name, samples=samples)
        evaluations.append(evaluation)
    assert found is not None
    facts = {"source": data, "split": found[2], "rows": len(found[0])}
    summaries = work.write_outputs(out, evaluations, work.metadata(f"Runs compared on {data}", facts, []))
    return Compared(evaluations, summaries, pool(folders, [e.spec for e in evaluations], summaries))
