"""The metrics of an evaluation by name: what each is called, what it means, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kilobayes.errors import KilobayesError, nearest
from kilobayes.metrics import calibration, scores, uncertainty
from kilobayes.metrics.record import Evaluation
from kilobayes.metrics.weighted import Value, average

Weights = np.ndarray | None
Statistic = Callable[[Weights, Weights], Value]
"""From the weights of the test rows and of the OOD rows to the metric."""

COVERAGE = 0.8

DEFINITIONS = {
    "accuracy": "share of rows whose most probable class is the label",
    "macro_f1": "F1 averaged over the classes that occur as label or prediction",
    "mcc": "Matthews correlation of label and prediction, all classes at once",
    "nll": f"negative log-likelihood, nats, mean over rows; probabilities floored at {scores.EPSILON:g}",
    "brier": "squared distance to the one-hot label, sum over classes, mean over rows (0 to 2)",
    "ece": "expected calibration error of the top class, {bins} bins of equal width, closed on the right",
    "ece_mass": "expected calibration error of the top class, {bins} bins of equal mass, ties kept together",
    "mce": "largest gap of confidence and accuracy in one of {bins} bins of equal width that holds a row",
    "entropy": "predictive entropy, nats, mean over rows",
    "mutual_information": "mutual information of class and posterior sample, nats, mean over rows",
    "error_auroc": "chance that a right row is more confident than a wrong one; undefined without both",
    "aurc": "error rate averaged over all coverages, most confident rows first",
    "error_at_80": "error rate among the 80% most confident rows",
    "ood_auroc": "chance that an OOD row has higher predictive entropy than a test row",
    "ood_aupr": "average precision of finding OOD rows by predictive entropy; chance is their share",
    "ood_auroc_mi": "chance that an OOD row has higher mutual information than a test row",
}
"""One line for each metric, in the order of tables; ``{bins}`` stands for the number of bins."""

HIGHER_IS_BETTER = frozenset(
    {"accuracy", "macro_f1", "mcc", "error_auroc", "ood_auroc", "ood_aupr", "ood_auroc_mi"}
)
LOWER_IS_BETTER = frozenset({"nll", "brier", "ece", "ece_mass", "mce", "aurc", "error_at_80"})


def statistics(evaluation: Evaluation, bins: int = calibration.BINS) -> dict[str, Statistic]:
    """The metrics that the evaluation allows, by name, as functions of row weights (see ``weighted``)."""
    probs, labels = evaluation.probs, evaluation.labels
    confidence, correct = calibration.top(probs, labels)
    entropy = uncertainty.entropy(probs)
    information = evaluation.mutual_information
    table: dict[str, Statistic] = {
        "accuracy": lambda rows, ood: scores.accuracy(probs, labels, rows),
        "macro_f1": lambda rows, ood: scores.macro_f1(probs, labels, rows),
        "mcc": lambda rows, ood: scores.matthews(probs, labels, rows),
        "nll": lambda rows, ood: scores.nll(probs, labels, rows),
        "brier": lambda rows, ood: scores.brier(probs, labels, rows),
        "ece": lambda rows, ood: calibration.ece(probs, labels, bins, "width", rows),
        "ece_mass": lambda rows, ood: calibration.ece(probs, labels, bins, "mass", rows),
        "mce": lambda rows, ood: calibration.mce(probs, labels, bins, "width", rows),
        "entropy": lambda rows, ood: average(entropy, rows),
        "mutual_information": lambda rows, ood: average(information, rows),
        "error_auroc": lambda rows, ood: uncertainty.error_auroc(confidence, correct, rows),
        "aurc": lambda rows, ood: uncertainty.aurc(confidence, correct, rows),
        "error_at_80": lambda rows, ood: uncertainty.error_at_coverage(confidence, correct, COVERAGE, rows),
    }
    if evaluation.ood_probs is not None:
        outside = uncertainty.entropy(evaluation.ood_probs)
        table["ood_auroc"] = lambda rows, ood: uncertainty.auroc(outside, entropy, ood, rows)
        table["ood_aupr"] = lambda rows, ood: uncertainty.aupr(outside, entropy, ood, rows)
    if evaluation.ood_probs is not None and evaluation.ood_mutual_information is not None:
        novelty = evaluation.ood_mutual_information
        table["ood_auroc_mi"] = lambda rows, ood: uncertainty.auroc(novelty, information, ood, rows)
    return table


def statistic(metric: str, evaluation: Evaluation, bins: int = calibration.BINS) -> Statistic:
    """One metric by name; raises KilobayesError when there is none of that name for the evaluation."""
    table = statistics(evaluation, bins)
    if metric not in table:
        guess = nearest(metric, table) or ", ".join(table)
        raise KilobayesError(f"no metric {metric!r} of {evaluation.name!r}", "", f"try {guess}")
    return table[metric]
