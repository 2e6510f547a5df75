import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from kilobayes.errors import KilobayesError
from kilobayes.metrics import (
    DEFINITIONS,
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    accuracy,
    auroc,
    ece,
    entropy,
    mce,
    summarise,
    to_json,
)


def test_summary_holds_the_defined_metrics_in_order(evaluate, gen):
    run = evaluate(gen, 60, 3, ood=20)
    found = summarise(run, resamples=20)
    assert list(found) == list(DEFINITIONS)
    bare = dataclasses.replace(run, ood_probs=None, ood_mutual_information=None, ood_texts=None)
    assert list(summarise(bare, resamples=20)) == [key for key in DEFINITIONS if not key.startswith("ood_")]


def test_every_metric_but_the_descriptive_ones_has_a_direction():
    directed = HIGHER_IS_BETTER | LOWER_IS_BETTER
    assert directed | {"entropy", "mutual_information"} == set(DEFINITIONS)
    assert not HIGHER_IS_BETTER & LOWER_IS_BETTER


def test_values_are_those_of_the_functions(evaluate, gen):
    run = evaluate(gen, 90, 4, ood=30)
    found = {key: interval.value for key, interval in summarise(run, bins=8, resamples=10).items()}
    assert found["accuracy"] == accuracy(run.probs, run.labels)
    assert found["ece"] == ece(run.probs, run.labels, 8)
    assert found["ece_mass"] == ece(run.probs, run.labels, 8, "mass")
    assert found["mce"] == mce(run.probs, run.labels, 8)
    assert found["entropy"] == pytest.approx(entropy(run.probs).mean())
    assert found["mutual_information"] == pytest.approx(run.mutual_information.mean())
    assert found["ood_auroc"] == auroc(entropy(run.ood_probs), entropy(run.probs))
    assert found["ood_auroc_mi"] == auroc(run.ood_mutual_information, run.mutual_information)


def test_overconfidence_raises_ece_and_nll_but_not_accuracy(evaluate):
    fair = summarise(evaluate(np.random.default_rng(1), 800, 3), resamples=100)
    sharp = summarise(evaluate(np.random.default_rng(1), 800, 3, sharpness=4.0), resamples=100)
    assert sharp["accuracy"] == fair["accuracy"]
    assert sharp["ece"].low > fair["ece"].high
    assert sharp["nll"].low > fair["nll"].high


def test_json_is_valid_and_says_what_numbers_mean(evaluate, gen):
    run = evaluate(gen, 40, 3, name="all right")
    sure = dataclasses.replace(
        run, probs=np.eye(3)[run.labels], cost={"seconds": 1.5}, spec={"adapter": "LoRA(r=8)"}
    )
    found = summarise(sure, bins=9, resamples=20)
    assert math.isnan(found["error_auroc"].value)
    text = json.dumps(to_json([sure], [found], {"data": "toy"}, bins=9, resamples=20), allow_nan=False)
    read = json.loads(text)
    assert read["bins"] == 9
    assert read["meta"] == {"data": "toy"}
    assert read["interval"] == "95% percentile bootstrap over rows, 20 resamples"
    assert "9 bins of equal width, closed on the right" in read["definitions"]["ece"]
    assert set(read["definitions"]) == set(found)
    (only,) = read["runs"]
    assert only["metrics"]["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert only["metrics"]["error_auroc"] == {"value": None, "low": None, "high": None}
    assert (only["name"], only["rows"], only["ood_rows"]) == ("all right", 40, 0)
    assert (only["cost"], only["spec"]) == ({"seconds": 1.5}, {"adapter": "LoRA(r=8)"})


def test_json_needs_a_summary_each(evaluate, gen):
    with pytest.raises(KilobayesError, match="summary"):
        to_json([evaluate(gen, 5, 2)], [], {})


@pytest.mark.parametrize(
    "change",
    [
        {"labels": np.zeros(9, int)},
        {"labels": np.full(10, 3)},
        {"labels": np.full(10, -1)},
        {"labels": np.zeros(10)},
        {"labels": np.zeros((10, 1), int)},
        {"probs": np.full((10, 3), 0.5)},
        {"probs": np.full((10, 2), 0.5)},
        {"probs": np.full((10, 3), np.nan)},
        {"probs": np.tile([1.5, -0.5, 0.0], (10, 1))},
        {"mutual_information": np.zeros(9)},
        {"texts": ["one"]},
        {"ood_probs": np.full((4, 2), 0.5)},
        {"ood_mutual_information": np.zeros(5)},
        {"ood_texts": ["one"]},
    ],
)
def test_what_does_not_fit_is_refused(evaluate, gen, change):
    run = evaluate(gen, 10, 3, ood=4)
    with pytest.raises(KilobayesError, match="'run' cannot be evaluated"):
        dataclasses.replace(run, **change)


def test_half_precision_probabilities_are_accepted(evaluate, gen):
    run = evaluate(gen, 30, 3)
    half = dataclasses.replace(run, probs=run.probs.astype(np.float16))
    assert summarise(half, resamples=5)["nll"].value == pytest.approx(
        summarise(run, resamples=5)["nll"].value, rel=0.01
    )


def test_importing_loads_neither_pytorch_nor_scikit_learn():
    code = (
        "import sys, kilobayes.metrics; print([m for m in ('torch', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
