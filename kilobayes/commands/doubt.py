"""Sets of labels, and rows that are accepted or not: what ``--coverage`` and ``--max-error`` ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilobayes.card import Card
from kilobayes.commands import console
from kilobayes.errors import KilobayesError
from kilobayes.metrics import conformal


@dataclass(frozen=True)
class Doubt:
    """What was asked for.

    Args:
        coverage: share of sets that hold the right label; None makes no sets.
        sets: how sets are made.
        max_error: largest share of errors among accepted rows; None accepts all and says nothing.
        held_out: labelled rows in place of the run's own calibration rows.
    """

    coverage: float | None = None
    sets: str = "lac"
    max_error: float | None = None
    held_out: str | None = None

    @property
    def asked(self) -> bool:
        return self.coverage is not None or self.max_error is not None

    def check(self, folder: Path, samples: int | None, drawn: int) -> None:
        """Refuse what cannot be had, before a model is loaded.

        Args:
            samples: draws asked for; ``drawn`` are the run's own.
        """
        from kilobayes.workflows.conformal import FILE

        if not self.asked:
            if self.held_out is not None:
                raise KilobayesError("--held-out serves sets and risk control", remedy="add --coverage 0.9")
            return
        conformal.needed()
        if self.coverage is not None:
            conformal.check(self.coverage, self.sets)
        if self.held_out is None and not (folder / FILE).exists():
            raise conformal.missing()
        if self.held_out is None and samples not in (None, drawn):
            raise KilobayesError(
                f"the run's calibration rows were seen with {drawn} samples", f"found --samples {samples}",
                "leave it out, or name rows with --held-out FILE",
            )  # fmt: skip

    def rows(self, folder: Path, card: Card) -> Any:
        """The labelled rows to calibrate on, if they are not the run's own."""
        from kilobayes.tasks.data import available_splits
        from kilobayes.workflows.data import first_test, load_as_trained, reads

        if self.held_out is None:
            return None
        split = first_test(available_splits(self.held_out))
        return load_as_trained(folder, self.held_out, split, read=reads(card), classes=card.classes)

    def known(self, fitted: Any, rows: Any, samples: int | None) -> Any:
        """The run's calibration, on ``rows`` if there are any."""
        return (fitted if rows is None else fitted.calibrated(rows, samples)).held()

    def add(self, records: Sequence[dict[str, Any]], probs: Any, known: Any, classes: list[str]) -> None:
        """``set`` and ``accepted`` of each row, in place."""
        if self.coverage is not None:
            for record, inside in zip(records, conformal.sets(known, probs, self.coverage, self.sets)):
                record["set"] = [name for name, is_in in zip(classes, inside) if is_in]
        if self.max_error is not None:
            least = conformal.threshold(known, self.max_error)
            for record, best in zip(records, probs.max(axis=1)):
                record["accepted"] = bool(best >= least)
            accepted = sum(r["accepted"] for r in records)
            console.say(f"accepted: {accepted} of {len(records)} rows, of confidence {least:.2f} and above")

    def measured(self, probs: Any, labels: Any, known: Any) -> dict[str, float]:
        """How often sets of labelled rows hold the label, and their size; empty unless asked for."""
        if self.coverage is None:
            return {}
        found = conformal.observed(conformal.sets(known, probs, self.coverage, self.sets), labels)
        console.say(
            f"sets:   {found['coverage']:.1%} hold the label ({self.coverage:.1%} asked for), "
            f"{found['set_size']:.2f} labels on average, {found['empty_sets']:.1%} of the sets are empty"
        )
        return found
