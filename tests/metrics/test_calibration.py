import numpy as np
import pytest

from kilobayes.errors import KilobayesError
from kilobayes.metrics import ece, mce, reliability

SCHEMES = ["width", "mass"]


def brute_bins(confidence, bins, scheme):
    """The definition read aloud, one row at a time."""
    where = []
    for value in confidence:
        if scheme == "width":
            inside = [i for i in range(bins) if i / bins < value <= (i + 1) / bins]
            where.append(inside[0] if inside else 0)
        else:
            below = sum(1 for other in confidence if other < value)
            where.append((bins * below) // len(confidence))
    return np.array(where)


def brute(probs, labels, bins, scheme):
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    where = brute_bins(confidence, bins, scheme)
    total, worst = 0.0, 0.0
    for i in range(bins):
        members = [k for k in range(len(labels)) if where[k] == i]
        if members:
            gap = abs(np.mean([correct[k] for k in members]) - np.mean([confidence[k] for k in members]))
            total += len(members) / len(labels) * gap
            worst = max(worst, gap)
    return total, worst


def binary(confidence, correct):
    """Two-class predictions of class 0 with the given confidence."""
    confidence = np.asarray(confidence, dtype=float)
    return np.stack([confidence, 1 - confidence], axis=1), np.where(correct, 0, 1)


def test_known_answer():
    probs, labels = binary([0.6, 0.6, 0.9, 0.9], [1, 0, 1, 1])
    assert ece(probs, labels, bins=10) == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)
    probs, labels = binary([0.6, 0.6, 0.6, 1.0], [1, 0, 0, 0])
    assert ece(probs, labels, bins=10) == pytest.approx(0.75 * (0.6 - 1 / 3) + 0.25)
    assert mce(probs, labels, bins=10) == pytest.approx(1.0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bins", [1, 7, 15, 64])
@pytest.mark.parametrize("ties", [True, False])
def test_brute_force(gen, draw, scheme, bins, ties):
    probs, labels = draw(gen, 120, 4)
    if not ties:
        probs = 0.9 * probs + 0.1 * gen.dirichlet(np.ones(4), 120)
    total, worst = brute(probs, labels, bins, scheme)
    assert ece(probs, labels, bins, scheme) == pytest.approx(total)
    assert mce(probs, labels, bins, scheme) == pytest.approx(worst)


def test_confidence_of_one_is_in_the_last_bin():
    probs, labels = binary([1.0, 1.0, 0.95], [1, 0, 1])
    found = reliability(probs, labels, bins=10)
    assert found.count.tolist() == [0] * 9 + [3]
    assert found.accuracy[-1] == pytest.approx(2 / 3)
    assert ece(probs, labels, bins=10) == pytest.approx(2.95 / 3 - 2 / 3)


def test_confidence_above_one_by_rounding_is_in_the_last_bin():
    probs, labels = np.array([[1.0000001, 0.0]]), np.array([1])
    assert reliability(probs, labels, bins=4).count.tolist() == [0, 0, 0, 1]


def test_bins_of_equal_width_are_closed_on_the_right():
    probs, labels = binary([0.5, 0.75, np.nextafter(0.75, 1)], [1, 1, 1])
    assert reliability(probs, labels, bins=4).count.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("bins", [5, 15, 40])
def test_agrees_with_mapie(gen, draw, bins):
    # MAPIE's num_bins counts edges: one more than bins. Confidence exactly 1.0 is among these rows.
    mapie = pytest.importorskip("mapie.metrics.calibration")
    probs, labels = draw(gen, 300, 3)
    confidence, correct = probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(int)
    assert (confidence == 1.0).any()
    theirs = mapie.expected_calibration_error(
        correct, confidence, num_bins=bins + 1, split_strategy="uniform"
    )
    assert ece(probs, labels, bins) == pytest.approx(theirs)


def test_agrees_with_mapie_top_label(gen, draw):
    # Top-label ECE is the plain mean of the ECE of the rows predicted as each class.
    mapie = pytest.importorskip("mapie.metrics.calibration")
    probs, labels = draw(gen, 300, 3)
    predicted = probs.argmax(axis=1)
    ours = np.mean([ece(probs[predicted == c], labels[predicted == c], 10) for c in np.unique(predicted)])
    assert ours == pytest.approx(mapie.top_label_ece(labels, probs, num_bins=11, split_strategy="uniform"))
    one = predicted == 0
    theirs = mapie.top_label_ece(labels[one], probs[one], num_bins=11, split_strategy="uniform")
    assert ece(probs[one], labels[one], 10) == pytest.approx(theirs)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_equal_repeated_rows(gen, draw, scheme):
    probs, labels = draw(gen, 80, 3)
    weights = gen.multinomial(80, np.full(80, 1 / 80), size=6)
    for metric in (ece, mce):
        expected = [metric(np.repeat(probs, w, axis=0), np.repeat(labels, w), 9, scheme) for w in weights]
        np.testing.assert_allclose(metric(probs, labels, 9, scheme, weights), expected, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order_of_rows_does_not_matter(gen, draw, scheme):
    probs, labels = draw(gen, 100, 3)
    order = gen.permutation(100)
    assert ece(probs[order], labels[order], 15, scheme) == pytest.approx(ece(probs, labels, 15, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reliability_adds_up(gen, draw, scheme):
    probs, labels = draw(gen, 150, 4)
    found = reliability(probs, labels, 12, scheme)
    full = found.count > 0
    assert found.count.sum() == 150
    assert np.isnan(found.accuracy[~full]).all()
    gaps = np.abs(found.accuracy - found.confidence)
    assert (gaps * found.count)[full].sum() / 150 == pytest.approx(ece(probs, labels, 12, scheme))
    assert gaps[full].max() == pytest.approx(mce(probs, labels, 12, scheme))
    assert found.edges.shape == (13,)
    assert (np.diff(found.edges) >= 0).all()
    assert (found.confidence[full] <= found.edges[1:][full] + 1e-12).all()
    assert (found.confidence[full] >= found.edges[:-1][full] - 1e-12).all()


def test_bins_of_equal_mass_have_equal_counts_without_ties(gen):
    probs, labels = binary(gen.uniform(0.5, 1, 100), gen.random(100) < 0.7)
    assert reliability(probs, labels, 10, "mass").count.tolist() == [10] * 10
    assert set(reliability(probs, labels, 15, "mass").count) == {6, 7}
    few = reliability(probs[:3], labels[:3], 15, "mass")
    assert sorted(few.count.tolist()) == [0] * 12 + [1, 1, 1]


def test_a_calibrated_model_has_only_the_noise_of_its_bins(gen):
    rows, bins = 20_000, 10
    confidence = gen.uniform(0.5, 1, rows)
    probs, labels = binary(confidence, gen.random(rows) < confidence)
    found = reliability(probs, labels, bins, "mass")
    # A bin's gap is near normal with this standard error; its mean absolute value is sqrt(2 / pi) of it.
    error = np.sqrt(found.confidence * (1 - found.confidence) / found.count)
    expected = np.sqrt(2 / np.pi) * error.mean()
    spread = np.sqrt(1 - 2 / np.pi) * np.sqrt((error**2).sum()) / bins
    assert abs(ece(probs, labels, bins, "mass") - expected) < 5 * spread
    # Ten points of confidence too many show in full.
    probs, labels = binary(confidence, gen.random(rows) < confidence - 0.1)
    assert abs(ece(probs, labels, bins, "mass") - 0.1) < 5 * 0.5 / np.sqrt(rows)


def test_bad_settings_are_refused():
    probs, labels = binary([0.6], [1])
    with pytest.raises(KilobayesError, match="bins"):
        ece(probs, labels, bins=0)
    with pytest.raises(KilobayesError, match='try scheme="mass"'):
        ece(probs, labels, scheme="mas")
