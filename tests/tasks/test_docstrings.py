"""The demonstration corpus: disjoint, readable, masked, the same each time."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

from kilobayes.errors import KilobayesError
from kilobayes.tasks.docstrings import MASK, DemoCorpus, _readable, docstring_corpus


@pytest.fixture(scope="module")
def corpus() -> DemoCorpus:
    return docstring_corpus()


def test_sizes_classes_and_balance(corpus: DemoCorpus) -> None:
    splits = (corpus.train, corpus.calibration, corpus.test)
    assert [len(part) for part in (*splits, corpus.ood)] == [300, 200, 500, 200]
    for part in splits:
        assert part.classes == corpus.train.classes
        assert part.labels is not None
        assert min(part.labels.count(i) for i in range(len(part.classes))) >= 8
        assert max(part.labels.count(i) for i in range(len(part.classes))) <= len(part) / 5
        assert part.labels[:20] != sorted(part.labels[:20])
    assert corpus.ood.labels is None


def test_no_sentence_occurs_twice(corpus: DemoCorpus) -> None:
    texts = [t for part in (corpus.train, corpus.calibration, corpus.test, corpus.ood) for t in part.texts]
    assert len({re.sub("[^a-z]", "", text.lower()) for text in texts}) == len(texts) == 1200


def test_sentences_are_readable(corpus: DemoCorpus) -> None:
    for text in (*corpus.train.texts, *corpus.test.texts, *corpus.ood.texts):
        words = [word for word in re.findall(r"[A-Za-z][\w'-]*", text) if word != MASK]
        assert 5 <= len(words) <= 40, text
        assert text[0].isupper(), text
        assert text[-1] in ".!?", text
        assert not re.search(r">>>|[`_={}<>\\|]|\n|:[a-z]+:", text), text


def test_same_seed_same_corpus_in_any_process_and_whatever_the_warnings(corpus: DemoCorpus) -> None:
    code = "from kilobayes.tasks.docstrings import docstring_corpus; print(docstring_corpus().digest)"
    for flags in ((), ("-W", "error")):
        out = subprocess.run([sys.executable, *flags, "-c", code], check=True, capture_output=True, text=True)
        assert out.stdout.strip() == corpus.digest
        assert out.stderr == ""
    other = docstring_corpus(seed=1)
    assert other.digest != corpus.digest
    assert set(other.train.texts) != set(corpus.train.texts)


def test_nothing_of_what_is_read_is_imported() -> None:
    code = (
        "import sys; from kilobayes.tasks.docstrings import docstring_corpus; docstring_corpus()\n"
        "assert not {'torch', 'sklearn', 'matplotlib', 'imaplib', 'turtle', 'sched'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_too_much_asked_for() -> None:
    with pytest.raises(KilobayesError, match="ask for fewer"):
        docstring_corpus(train=100_000)


def test_masks_and_what_is_left_out() -> None:
    docstring = """Release a socket that was held by the Listener object for a while.

    Call close_all() or `stop` first, then wait until every SSLContext of this process has gone.

    >>> Listener().run for a while and then stop.

    Parameters are listed here:
        name -- the first of them, which is left out.

    :param name: the second of them, which is left out.
    * The third of them, in a list, which is left out.
    """
    found = list(_readable(inspect.cleandoc(docstring), {"socket"}, "Listener"))
    assert found == [
        "Release a X that was held by the X object for a while.",
        "Call X or X first, then wait until every X of this process has gone.",
    ]


def test_topics_can_be_learned_and_are_not_trivial(corpus: DemoCorpus) -> None:
    """A bag of words does far better than the largest class, and far from perfectly."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0, max_iter=500))
    accuracy = model.fit(corpus.train.texts, corpus.train.labels).score(corpus.test.texts, corpus.test.labels)
    assert 0.3 < accuracy < 0.9
