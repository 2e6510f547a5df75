"""The conformance kit: what every adapter and posterior must do, for tests of one's own methods.

``check_adapter(MyAdapter())`` and ``check_posterior(MyPosterior())`` raise AssertionError with what is
wrong; they run on a tiny random BERT and synthetic rows, in about a second. ``check_pair`` trains the two
together.
"""

from kilobayes.testing.adapters import check_adapter
from kilobayes.testing.pairs import check_pair
from kilobayes.testing.posteriors import check_posterior

__all__ = ["check_adapter", "check_pair", "check_posterior"]
