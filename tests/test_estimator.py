"""The classifier as scikit-learn and MAPIE use it, on a tiny model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks, get_tags

import kilobayes as kb
from kilobayes.errors import KilobayesError

from . import small

TRAIN, TEST = small.rows(90, 11), small.rows(60, 12)


def columns(rows: list[dict[str, Any]]) -> tuple[list[str], np.ndarray]:
    return [r["text"] for r in rows], np.array([r["label"] for r in rows])


X, Y = columns(TRAIN)
NEW, TRUE = columns(TEST)


def make(**settings: Any) -> kb.Classifier:
    given = {
        "adapter": "LoRA(r=2)",
        "posterior": "Temperature(SWAG(rank=2))",
        "epochs": 6,
        "lr": 0.02,
        "batch_size": 8,
    }
    return kb.Classifier(small.base(), **(given | {"target_modules": "all-linear"} | settings))


@pytest.fixture(scope="module")
def fitted() -> kb.Classifier:
    return make().fit(X, Y)


def test_it_learns(fitted: kb.Classifier) -> None:
    assert fitted.score(NEW, TRUE) > 0.6  # chance is a third
    found = fitted.predictive(NEW)
    assert np.array_equal(found.labels, fitted.predict(NEW))
    assert np.array_equal(found.probs, fitted.predict_proba(NEW))
    assert found.probs.shape == (60, 3)
    np.testing.assert_allclose(found.probs.sum(axis=1), 1)
    assert np.array_equal(found.confidence, found.probs.max(axis=1))
    assert (found.epistemic <= found.entropy + 1e-12).all()


def test_a_seed_is_a_result(fitted: kb.Classifier) -> None:
    again = make().fit(X, Y)
    assert np.array_equal(again.predict_proba(NEW), fitted.predict_proba(NEW))
    assert not np.array_equal(make(seed=1).fit(X, Y).predict_proba(NEW), fitted.predict_proba(NEW))


def test_parameters_and_clone() -> None:
    posterior = kb.Temperature(kb.SWAG(rank=2))
    made = make(posterior=posterior, seed=4)
    assert made.get_params()["posterior"] is posterior
    copied = clone(made)
    assert copied.get_params() == made.get_params()
    assert copied.set_params(lr=0.5).lr == 0.5
    assert made.lr == 0.02
    with pytest.raises(ValueError, match="Invalid parameter"):
        made.set_params(rank=3)
    assert is_classifier(made)


# Those checks of scikit-learn that feed no numbers: the estimator takes texts, and says so in its tags.
CHECKS = [
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_do_not_raise_errors_in_init_or_set_params",
]


@pytest.mark.parametrize("name", CHECKS)
def test_checks_of_scikit_learn(name: str) -> None:
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip("this scikit-learn has no such check")
    check("Classifier", kb.Classifier())


def test_tags_say_that_it_takes_texts() -> None:
    tags = get_tags(make())
    assert tags.input_tags.string
    assert not tags.input_tags.two_d_array
    assert tags.target_tags.required


def test_not_fitted() -> None:
    for method in ("predict", "predict_proba", "predictive"):
        with pytest.raises(NotFittedError):
            getattr(make(), method)(["red"])
    with pytest.raises(NotFittedError):
        make().save("nowhere")


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (Y, str),
        (np.array([{"warm": 10, "cold": -2, "fresh": 9}[y] for y in Y]), np.integer),
        (Y == "warm", np.bool_),
        (list(Y), str),
        (np.array(Y, dtype=object), str),
        (np.array([float(y == "warm") for y in Y]), np.floating),
    ],
    ids=["text", "numbers", "truth", "list", "objects", "floats"],
)
def test_labels_come_back_in_their_type(labels: Any, kind: type, tmp_path: Path) -> None:
    made = make(epochs=2).fit(X, labels)
    found = made.predict(NEW)
    assert isinstance(found[0], kind)
    assert set(found) <= set(np.asarray(labels).tolist())
    assert list(made.classes_) == sorted(set(np.asarray(labels).tolist()))
    made.save(tmp_path)
    again = kb.load(tmp_path)
    assert np.array_equal(again.predict(NEW), found)
    assert isinstance(again.predict(NEW)[0], kind)
    assert np.array_equal(again.predict_proba(NEW), made.predict_proba(NEW))


def test_a_loaded_classifier_can_be_cloned_and_fitted(fitted: kb.Classifier, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    again = kb.load(tmp_path)
    assert np.array_equal(again.predict_proba(NEW), fitted.predict_proba(NEW))
    assert clone(again).set_params(epochs=1).fit(X, Y).predict(NEW[:2]).shape == (2,)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (X, Y[:-1], "90 texts need as many labels"),
        ([], [], "there are no texts"),
        (X, ["warm"] * 90, "at least two classes"),
        (X, np.linspace(0, 1, 90), "no classes"),
        (X, [None, *Y[1:]], "no classes"),
        (X, np.array([np.nan, *range(89)]), "no classes"),
        ([*X[:-1], 3], Y, "row 90 is no text"),
        ([*X[:-1], ""], Y, "row 90"),
        ([(x, x, x) for x in X], Y, "row 1 is no text"),
        ("one text", ["a"], "texts"),
    ],
)
def test_what_cannot_be_fitted(texts: Any, labels: Any, message: str) -> None:
    with pytest.raises(KilobayesError, match=message):
        make().fit(texts, labels)


def test_pairs_of_texts() -> None:
    rows = small.rows(40, 5, pairs=True)
    pairs = [(r["premise"], r["hypothesis"]) for r in rows]
    made = make(epochs=1).fit(pairs, [r["label"] for r in rows])
    expected = made.predict_proba(pairs)
    assert np.array_equal(made.predict_proba(np.array(pairs)), expected)
    with pytest.raises(KilobayesError, match="trained on pairs"):
        made.predict(X)


def test_frames_and_series(fitted: kb.Classifier) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": NEW})
    expected = fitted.predict_proba(NEW)
    for given in (frame, frame["text"], np.array(NEW), np.array(NEW, dtype=object)[:, None], tuple(NEW)):
        assert np.array_equal(fitted.predict_proba(given), expected)


def test_in_a_pipeline() -> None:
    lower = FunctionTransformer(lambda texts: [t.lower() for t in texts])
    pipeline = make_pipeline(lower, make()).fit([x.upper() for x in X], Y)
    assert pipeline.score([x.upper() for x in NEW], TRUE) > 0.6  # chance is a third


def test_in_cross_validation_and_a_search() -> None:
    scores = cross_val_score(make(posterior="Point()"), X, Y, cv=3, error_score="raise")
    assert len(scores) == 3
    assert scores.mean() > 0.5
    search = GridSearchCV(make(posterior="Point()"), {"lr": [1e-7, 0.02]}, cv=2, error_score="raise").fit(
        X, Y
    )
    assert search.best_params_ == {"lr": 0.02}
    assert search.predict(NEW).shape == (60,)


def test_calibrated_by_scikit_learn(fitted: kb.Classifier) -> None:
    prefit = CalibratedClassifierCV(FrozenEstimator(fitted)).fit(NEW, TRUE)
    np.testing.assert_allclose(prefit.predict_proba(X).sum(axis=1), 1)
    crossed = CalibratedClassifierCV(make(posterior="Point()", epochs=2), cv=2).fit(X, Y)
    assert crossed.predict_proba(NEW).shape == (60, 3)


def test_conformal_sets_cover(fitted: kb.Classifier) -> None:
    classification = pytest.importorskip("mapie.classification")
    held, held_labels = columns(small.rows(400, 21))
    test, test_labels = columns(small.rows(600, 22))
    held, test = np.array(held), np.array(test)  # MAPIE counts columns, and lists have none
    made = classification.SplitConformalClassifier(fitted, confidence_level=0.9, prefit=True)
    made.conformalize(held, held_labels)
    _, sets = made.predict_set(test)
    index = np.searchsorted(fitted.classes_, test_labels)
    covered = sets[np.arange(len(test)), index, 0].mean()
    # 0.9 up to the noise of both samples: deviations of 0.015 and 0.012
    assert 0.85 < covered < 0.96


def test_compare_in_python(fitted: kb.Classifier, tmp_path: Path) -> None:
    fitted.save(tmp_path / "a")
    make(seed=1, epochs=1).fit(X, Y).save(tmp_path / "b")
    done = kb.compare(
        [tmp_path / "a", tmp_path / "b"], test=(NEW, TRUE), ood=["w1 w2", "w3"], out=tmp_path / "out"
    )
    assert done.summaries[0]["accuracy"].value == pytest.approx(fitted.score(NEW, TRUE))
    assert (tmp_path / "out" / "report.html").exists()
    assert "ood_auroc" in done.summaries[1]


def test_it_is_not_pickled_by_accident(fitted: kb.Classifier) -> None:
    """Joblib's processes, as in n_jobs=2, send the unfitted estimator; that works."""
    assert pickle.loads(pickle.dumps(make())).get_params() == make().get_params()
