"""What each number in a report means, for a reader who did not make it."""

from __future__ import annotations

from collections.abc import Iterable

from kilobayes.metrics.table import DEFINITIONS
from kilobayes.report.words import TITLES

_MORE = {
    "nll": "It rewards being right and being honest at once; guessing uniformly among C classes gives ln C.",
    "ece": "Confidence is the highest probability of a row; the gaps of confidence and accuracy are averaged "
    "over bins, weighted by their rows. It is biased upwards on few rows, and resampling adds to that bias, "
    "so its interval may lie above its value.",
    "error_at_80": "That is, when the other 20% are handed to a person.",
    "entropy": "0 when all probability is on one class, ln C when it is uniform.",
    "mutual_information": "It is the part of the entropy that comes from posterior samples disagreeing; 0 "
    "for a point estimate.",
    "ood_auroc": "OOD is short for out of distribution. Ties count half; 0.5 is chance and 1 is perfect.",
}
COSTS = {
    "stored_bytes": ("Stored", "Bytes of what must be kept beside the base model; 1 kB is 1,000 bytes."),
    "seconds": ("Time", "Wall-clock time as recorded by the run."),
}


def definitions(
    metrics: Iterable[str], costs: Iterable[str], bins: int, resamples: int | None = None
) -> list[tuple[str, str]]:
    """The terms of the page with their definitions.

    Args:
        metrics: the metrics shown, by key; those without a definition are left out.
        costs: the costs shown, by key; likewise.
        bins: bins of the calibration errors and of the reliability diagrams.
        resamples: bootstrap resamples, where known.
    """
    shown, paid = set(metrics), set(costs)
    found = []
    for key, title in TITLES.items():
        if key in shown and key in DEFINITIONS:
            text = DEFINITIONS[key].format(bins=bins)
            found.append(
                (title.format(bins=bins), f"{text[0].upper()}{text[1:]}. {_MORE.get(key, '')}".strip())
            )
    found += [meaning for key, meaning in COSTS.items() if key in paid]
    number = f"{resamples:,} resamples" if resamples else "resamples"
    interval = (
        f"Percentile bootstrap from {number} of the test rows. It covers the choice of test rows, not that "
        "of training rows or seeds, and is not corrected for picking the best of several arms. "
        "Overlap does not show that two arms are equal: on the same rows, the paired comparison is sharper."
    )
    return [*found, ("95% interval", interval)]
