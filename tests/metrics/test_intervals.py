import dataclasses
import math
import time

import numpy as np
import pytest

from kilobayes.errors import KilobayesError
from kilobayes.metrics import Interval, accuracy, intervals, over_seeds, paired_difference, summarise
from kilobayes.metrics.intervals import percentile_interval, resampled_rows


def test_each_resample_draws_as_many_rows_as_there_are(gen):
    weights = resampled_rows(30, 2000, gen)
    assert weights.shape == (2000, 30)
    assert (weights.sum(axis=1) == 30).all()
    # A row's count is binomial(30, 1/30): mean 1, variance 29/30.
    assert np.abs(weights.mean(axis=0) - 1).max() < 5 * math.sqrt(29 / 30 / 2000)
    assert weights.var() == pytest.approx(29 / 30, rel=0.05)


def test_the_seed_decides(evaluate, gen):
    run = evaluate(gen, 80, 3, ood=20)
    assert summarise(run, resamples=50, seed=3) == summarise(run, resamples=50, seed=3)
    assert summarise(run, resamples=50, seed=3)["nll"] != summarise(run, resamples=50, seed=4)["nll"]


def test_ood_rows_do_not_change_the_other_intervals(evaluate, gen):
    run = evaluate(gen, 80, 3, ood=20)
    bare = dataclasses.replace(run, ood_probs=None, ood_mutual_information=None, ood_texts=None)
    with_ood, without = summarise(run, resamples=50), summarise(bare, resamples=50)
    assert {key: with_ood[key] for key in without} == without


def test_interval_of_accuracy_is_binomial(evaluate, gen):
    run = evaluate(gen, 400, 3)
    found = summarise(run, resamples=4000)["accuracy"]
    p = float(accuracy(run.probs, run.labels))
    half = 1.96 * math.sqrt(p * (1 - p) / 400)
    assert found.value == p
    # The 2.5% quantile of R draws has standard error sqrt(0.025 * 0.975 / R) / density, density 0.0584 / sd;
    # and accuracy comes in steps of 1 / 400.
    error = math.sqrt(0.025 * 0.975 / 4000) / 0.0584 * half / 1.96 + 1 / 400
    assert abs(found.low - (p - half)) < 5 * error
    assert abs(found.high - (p + half)) < 5 * error


def test_chunks_do_not_change_the_answer(evaluate, gen, monkeypatch):
    run = evaluate(gen, 60, 3, ood=15)
    whole = summarise(run, resamples=40)
    monkeypatch.setattr(intervals, "_CELLS", 75 * 7)
    for key, chunked in summarise(run, resamples=40).items():
        # Equal but for rounding: matrix products of another shape add in another order.
        assert (chunked.value, chunked.low, chunked.high) == pytest.approx(
            (whole[key].value, whole[key].low, whole[key].high), rel=1e-9
        )


def test_percentiles_of_what_is_defined():
    draws = np.r_[np.arange(101.0), np.nan]
    found = percentile_interval(50.0, draws)
    assert (found.value, found.low, found.high) == pytest.approx((50.0, 2.5, 97.5))
    undefined = percentile_interval(math.nan, draws)
    assert math.isnan(undefined.value)
    assert math.isnan(undefined.low)
    assert math.isnan(undefined.high)


def test_one_run_against_itself_differs_by_nothing(evaluate, gen):
    run = evaluate(gen, 50, 3)
    assert paired_difference("nll", run, run, resamples=30) == Interval(0.0, 0.0, 0.0)


def test_paired_difference_is_the_bootstrap_of_row_differences(evaluate, gen):
    a = evaluate(gen, 300, 3, name="a")
    softer = a.probs**0.8
    b = dataclasses.replace(a, name="b", probs=softer / softer.sum(axis=1, keepdims=True))
    found = paired_difference("nll", a, b, resamples=2000)
    rows = np.arange(300)
    difference = np.log(a.probs[rows, a.labels]) - np.log(b.probs[rows, b.labels])
    assert found.value == pytest.approx(difference.mean())
    # Like the mean of the row differences, and so narrower than the two runs' own intervals.
    width = 2 * 1.96 * difference.std() / math.sqrt(300)
    assert found.high - found.low == pytest.approx(width, rel=0.15)
    own = summarise(a, resamples=500)["nll"]
    assert found.high - found.low < 0.5 * (own.high - own.low)


def test_paired_difference_of_ood_detection(evaluate, gen):
    a = evaluate(gen, 80, 3, ood=40, name="a")
    b = dataclasses.replace(a, name="b", ood_probs=np.full((40, 3), 1 / 3))
    found = paired_difference("ood_auroc", a, b, resamples=200)
    assert 0 < found.low <= found.value <= found.high


def test_different_rows_are_refused(evaluate, gen):
    a, b = evaluate(gen, 50, 3, name="a"), evaluate(gen, 50, 3, name="b")
    with pytest.raises(KilobayesError, match="same rows"):
        paired_difference("nll", a, b)
    with pytest.raises(KilobayesError, match="try brier"):
        paired_difference("brierr", a, a)
    with pytest.raises(KilobayesError, match="resamples"):
        summarise(a, resamples=0)


def test_over_seeds():
    summaries = [{"nll": Interval(value, 0.0, 1.0)} for value in (0.2, 0.4, 0.6)]
    found = over_seeds(summaries)["nll"]
    assert found.mean == pytest.approx(0.4)
    assert found.std == pytest.approx(0.2)
    # The 97.5% point of Student's t with 2 degrees of freedom is 4.302653.
    assert found.high - found.mean == pytest.approx(4.302653 * 0.2 / math.sqrt(3), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert (found.min, found.max, found.n) == (0.2, 0.6, 3)


def test_over_seeds_leaves_out_what_is_undefined():
    values = (math.nan, 0.5, 0.7)
    found = over_seeds([{"error_auroc": Interval(v, v, v)} for v in values])["error_auroc"]
    assert found.mean == pytest.approx(0.6)
    assert found.n == 2
    alone = over_seeds([{"nll": Interval(1.0, 0.0, 2.0)}])["nll"]
    assert (alone.mean, alone.n) == (1.0, 1)
    assert math.isnan(alone.std)
    assert math.isnan(alone.low)
    none = over_seeds([{"nll": Interval(math.nan, math.nan, math.nan)}])["nll"]
    assert none.n == 0
    assert math.isnan(none.mean)


def test_over_seeds_needs_equal_metrics():
    one = Interval(1.0, 0.0, 2.0)
    with pytest.raises(KilobayesError):
        over_seeds([])
    with pytest.raises(KilobayesError, match="same metrics"):
        over_seeds([{"nll": one}, {"nll": one, "ece": one}])


def test_a_thousand_resamples_take_no_time_to_speak_of(evaluate, gen):
    run = evaluate(gen, 500, 6, ood=200)
    start = time.process_time()
    summarise(run)
    assert time.process_time() - start < 10  # about 0.3 s of one thread; room for slow machines
