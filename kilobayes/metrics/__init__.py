"""Scores, calibration, uncertainty, their intervals, and cost; importing it loads NumPy only."""

from kilobayes.metrics.calibration import Reliability, ece, mce, reliability
from kilobayes.metrics.cost import measure
from kilobayes.metrics.evaluation import Evaluation, summarise, to_json
from kilobayes.metrics.intervals import Interval, Spread, over_seeds, paired_difference
from kilobayes.metrics.scores import accuracy, brier, macro_f1, matthews, nll
from kilobayes.metrics.table import DEFINITIONS, HIGHER_IS_BETTER, LOWER_IS_BETTER
from kilobayes.metrics.uncertainty import (
    aupr,
    aurc,
    auroc,
    entropy,
    error_at_coverage,
    error_auroc,
    expected_entropy,
    mutual_information,
    predictive_entropy,
    risk_coverage,
)

__all__ = [
    "DEFINITIONS",
    "HIGHER_IS_BETTER",
    "LOWER_IS_BETTER",
    "Evaluation",
    "Interval",
    "Reliability",
    "Spread",
    "accuracy",
    "aupr",
    "aurc",
    "auroc",
    "brier",
    "ece",
    "entropy",
    "error_at_coverage",
    "error_auroc",
    "expected_entropy",
    "macro_f1",
    "matthews",
    "mce",
    "measure",
    "mutual_information",
    "nll",
    "over_seeds",
    "paired_difference",
    "predictive_entropy",
    "reliability",
    "risk_coverage",
    "summarise",
    "to_json",
]
