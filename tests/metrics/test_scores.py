import numpy as np
import pytest
from sklearn import metrics as reference

from kilobayes.errors import KilobayesError
from kilobayes.metrics import accuracy, brier, macro_f1, matthews, nll
from kilobayes.metrics.scores import EPSILON

PROBS = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
LABELS = np.array([0, 1, 1, 2])


def test_known_answers():
    assert accuracy(PROBS, LABELS) == 0.75
    # F1 of the classes: 2/3, 2/3, 1.
    assert macro_f1(PROBS, LABELS) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    # c = 3, s = 4, true 1 2 1, predicted 2 1 1: (12 - 5) / sqrt((16 - 6) (16 - 6)).
    assert matthews(PROBS, LABELS) == pytest.approx(0.7)
    assert nll(PROBS, LABELS) == pytest.approx(-np.log([0.7, 0.8, 0.3, 1.0]).mean())
    # Rows: .09+.04+.01, .01+.04+.01, .25+.49+.04, 0.
    assert brier(PROBS, LABELS) == pytest.approx((0.14 + 0.06 + 0.78 + 0.0) / 4)


@pytest.mark.parametrize("width", [2, 5])
def test_agree_with_scikit_learn(gen, draw, width):
    probs, labels = draw(gen, 200, width)
    predicted = probs.argmax(axis=1)
    assert accuracy(probs, labels) == pytest.approx(reference.accuracy_score(labels, predicted))
    assert macro_f1(probs, labels) == pytest.approx(reference.f1_score(labels, predicted, average="macro"))
    assert matthews(probs, labels) == pytest.approx(reference.matthews_corrcoef(labels, predicted))
    safe = (probs + 0.01) / (1 + 0.01 * width)
    assert nll(safe, labels) == pytest.approx(reference.log_loss(labels, safe, labels=range(width)))


def test_macro_f1_skips_only_classes_that_never_occur():
    probs = np.eye(4)[[0, 0, 1]]
    assert macro_f1(probs, np.array([0, 0, 1])) == 1.0
    assert macro_f1(probs, np.array([0, 0, 2])) == pytest.approx(1 / 3)  # class 1 predicted, class 2 missed


def test_one_predicted_class_has_no_correlation():
    assert matthews(np.eye(2)[[0, 0, 0]], np.array([0, 1, 0])) == 0.0


def test_nll_of_an_impossible_label_is_finite():
    assert nll(np.eye(2)[[0]], np.array([1])) == pytest.approx(-np.log(EPSILON))


@pytest.mark.parametrize("metric", [accuracy, macro_f1, matthews, nll, brier])
def test_weights_equal_repeated_rows(gen, draw, metric):
    probs, labels = draw(gen, 60, 4)
    weights = gen.multinomial(60, np.full(60, 1 / 60), size=5)
    expected = [metric(np.repeat(probs, w, axis=0), np.repeat(labels, w)) for w in weights]
    np.testing.assert_allclose(metric(probs, labels, weights=weights), expected, rtol=1e-12)


def test_answers_are_floats():
    assert all(
        isinstance(metric(PROBS, LABELS), float) for metric in (accuracy, macro_f1, matthews, nll, brier)
    )


@pytest.mark.parametrize(
    ("probs", "labels"),
    [
        (PROBS, LABELS[:3]),
        (PROBS, LABELS + 1),
        (PROBS, LABELS - 1),
        (PROBS, LABELS.astype(float)),
        (PROBS[0], LABELS),
        (PROBS[:0], LABELS[:0]),
        (np.full((4, 3), np.nan), LABELS),
    ],
)
def test_bad_input_is_refused(probs, labels):
    with pytest.raises(KilobayesError):
        accuracy(probs, labels)


def test_weights_of_another_length_are_refused():
    with pytest.raises(KilobayesError, match="weights"):
        accuracy(PROBS, LABELS, weights=np.ones(3))
