import itertools

import numpy as np
import pytest
from sklearn import metrics as reference

from kilobayes.errors import KilobayesError
from kilobayes.metrics import (
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


def test_entropy_of_uniform_and_certain():
    np.testing.assert_allclose(entropy(np.array([[0.25] * 4, [1.0, 0, 0, 0]])), [np.log(4), 0.0])


def test_members_that_disagree_completely():
    members = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert predictive_entropy(members) == pytest.approx(np.log(2))
    assert expected_entropy(members) == pytest.approx(0.0)
    assert mutual_information(members) == pytest.approx(np.log(2))


def test_members_that_agree_have_no_mutual_information(gen):
    one = gen.dirichlet(np.ones(3), 5)
    np.testing.assert_allclose(mutual_information(np.stack([one] * 4)), np.zeros(5), atol=1e-12)
    assert (mutual_information(one[None]) == 0).all()


def test_mutual_information_is_the_mean_divergence_from_the_mean(gen):
    members = gen.dirichlet(np.ones(4), (6, 9))
    mean = members.mean(axis=0)
    expected = (members * np.log(members / mean)).sum(axis=-1).mean(axis=0)
    np.testing.assert_allclose(mutual_information(members), expected, rtol=1e-9)
    assert (mutual_information(members) >= 0).all()
    assert (mutual_information(members) <= np.log(6)).all()


def test_members_need_three_axes():
    with pytest.raises(KilobayesError, match=r"\(S, N, C\)"):
        mutual_information(np.ones((2, 3)))


def test_auroc_counts_pairs(gen):
    outside, inside = gen.integers(0, 6, 20), gen.integers(0, 5, 30)
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(outside, inside)]
    assert auroc(outside, inside) == pytest.approx(np.mean(pairs))
    labels = np.r_[np.ones(20), np.zeros(30)]
    assert auroc(outside, inside) == pytest.approx(reference.roc_auc_score(labels, np.r_[outside, inside]))
    assert aupr(outside, inside) == pytest.approx(
        reference.average_precision_score(labels, np.r_[outside, inside])
    )


def test_auroc_at_its_limits():
    low, high = np.array([0.0, 1.0]), np.array([2.0, 3.0])
    assert (auroc(high, low), auroc(low, high), auroc(low, low)) == (1.0, 0.0, 0.5)
    assert aupr(high, low) == 1.0
    assert np.isnan(auroc(low, low[:0]))
    assert np.isnan(aupr(low, low[:0]))
    assert np.isnan(aupr(low[:0], low))


def test_nan_scores_are_refused():
    with pytest.raises(KilobayesError, match="nan"):
        auroc(np.array([np.nan, 1.0]), np.array([0.0]))


def test_error_auroc():
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    assert error_auroc(confidence, np.array([True, True, False, False])) == 1.0
    assert error_auroc(confidence, np.array([True, False, True, False])) == 0.75
    assert np.isnan(error_auroc(confidence, np.ones(4)))
    assert np.isnan(error_auroc(confidence, np.zeros(4)))


def test_risk_coverage_without_ties():
    coverage, risk = risk_coverage(np.array([0.6, 0.9, 0.7, 0.8]), np.array([False, True, True, False]))
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(risk, [0, 1 / 2, 1 / 3, 2 / 4])
    assert aurc(np.array([0.6, 0.9, 0.7, 0.8]), np.array([0, 1, 1, 0])) == pytest.approx(risk.mean())


def test_ties_are_the_mean_over_all_orders():
    confidence, correct = np.array([0.9, 0.8, 0.8, 0.8, 0.5]), np.array([1, 0, 1, 0, 1])
    curves = []
    for middle in itertools.permutations([1, 2, 3]):
        wrong = 1 - correct[[0, *middle, 4]]
        curves.append(np.cumsum(wrong) / np.arange(1, 6))
    expected = np.mean(curves, axis=0)
    np.testing.assert_allclose(risk_coverage(confidence, correct)[1], expected)
    assert aurc(confidence, correct) == pytest.approx(expected.mean())
    for k in range(1, 6):
        assert error_at_coverage(confidence, correct, k / 5) == pytest.approx(expected[k - 1])


def test_error_at_coverage_takes_enough_rows():
    confidence, correct = np.arange(10, 0, -1.0), np.array([1, 1, 1, 1, 1, 1, 1, 0, 1, 0])
    assert error_at_coverage(confidence, correct, 0.7) == 0.0
    assert error_at_coverage(confidence, correct, 0.71) == pytest.approx(1 / 8)
    assert error_at_coverage(confidence, correct, 1.0) == pytest.approx(0.2)
    assert error_at_coverage(confidence, correct, 1e-6) == 0.0  # at least one row
    rounded = np.r_[np.ones(7), np.zeros(18)]
    assert error_at_coverage(np.arange(25, 0, -1.0), rounded, 0.28) == 0.0  # 7 rows, though 0.28 * 25 > 7
    for wrong in (0.0, 1.1):
        with pytest.raises(KilobayesError, match="coverage"):
            error_at_coverage(confidence, correct, wrong)


def test_order_of_rows_does_not_matter(gen):
    confidence, correct = gen.integers(0, 8, 50) / 8, gen.random(50) < 0.6
    order = gen.permutation(50)
    np.testing.assert_allclose(
        risk_coverage(confidence, correct)[1], risk_coverage(confidence[order], correct[order])[1]
    )


def test_weights_equal_repeated_rows(gen):
    confidence, correct = gen.integers(0, 8, 40) / 8, gen.random(40) < 0.6
    outside = gen.integers(2, 10, 25) / 8
    rows = gen.multinomial(40, np.full(40, 1 / 40), size=7)
    ood = gen.multinomial(25, np.full(25, 1 / 25), size=7)
    for metric in (aurc, error_auroc, lambda a, b, w=None: error_at_coverage(a, b, 0.8, w)):
        expected = [metric(np.repeat(confidence, w), np.repeat(correct, w)) for w in rows]
        np.testing.assert_allclose(metric(confidence, correct, rows), expected, rtol=1e-9)
    for metric in (auroc, aupr):
        expected = [metric(np.repeat(outside, v), np.repeat(confidence, w)) for v, w in zip(ood, rows)]
        np.testing.assert_allclose(metric(outside, confidence, ood, rows), expected, rtol=1e-9)


def test_shapes_are_checked():
    with pytest.raises(KilobayesError, match="confidence"):
        aurc(np.ones(3), np.ones(2))
