"""Which scheme of trust, and what it needs from users: settings and one pure function, no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kilobayes.collaboration import trust
from kilobayes.errors import KilobayesError, nearest

NEEDS = {
    "local": "",
    "fedavg": "",
    "oracle": "kinds",
    "weights": "gram",
    "predictions": "predictions",
    "validation": "losses",
}
TEMPERATURES = {"weights": 0.5, "predictions": 0.05, "validation": 0.1}


@dataclass(frozen=True)
class Scheme:
    """With whom users average; the scores behind each name are in :mod:`kilobayes.collaboration.trust`.

    Args:
        name: local, fedavg, oracle, weights, predictions or validation.
        temperature: tau of the softmax: of cosines ("weights"), of nats a row or token ("predictions",
            "validation"); None for the scheme's own, 0.5, 0.05 and 0.1.
        top: average with the so many most trusted, oneself among them; None with all.
        least: average with those of at least this score, and oneself; None with all.

    Raises:
        KilobayesError: an unknown name, a temperature that is not above 0, or ``top`` below 1.
    """

    name: str = "validation"
    temperature: float | None = None
    top: int | None = None
    least: float | None = None

    def __post_init__(self) -> None:
        if self.name not in NEEDS:
            guess = nearest(self.name, list(NEEDS))
            raise KilobayesError(
                f"there is no scheme of trust {self.name!r:.40}",
                f"known: {', '.join(NEEDS)}",
                f"did you mean {guess}?" if guess else "",
            )
        if self.temperature is not None and not 0.0 < self.temperature < math.inf:
            raise KilobayesError("a temperature must be a number above 0", f"found {self.temperature}")
        if self.top is not None and self.top < 1:
            raise KilobayesError("top must be at least 1", f"found {self.top}")

    @property
    def needs(self) -> str:
        """What :meth:`trust` takes as evidence: "", or

        * "kinds": the kind of each user ``(U,)``, or shares of kinds ``(U, K)``, known beforehand;
        * "gram": inner products of updates ``(U, U)``, which the server has from the updates;
        * "predictions": log-probabilities of every user on the shared rows ``(U, N, C)``;
        * "losses": ``(U, U)``, row u from user u, who needs everybody's update for it.
        """
        return NEEDS[self.name]

    def trust(self, evidence: Tensor | None, rows: Sequence[int]) -> Tensor:
        """Row-stochastic W ``(U, U)`` in doubles, of the users who take part.

        Args:
            evidence: what :attr:`needs` says, of these users in this order; None where nothing is needed.
            rows: numbers of training rows, the prior of every scheme.

        Raises:
            KilobayesError: as the functions of :mod:`kilobayes.collaboration.trust`.
        """
        if self.name == "local":
            return trust.local(len(rows))
        if self.name == "fedavg":
            return trust.fedavg(list(rows))
        if evidence is None:
            raise KilobayesError(f"the scheme {self.name} needs {self.needs}", "none")
        if self.name == "oracle":
            return trust.oracle(evidence, list(rows))
        tau = TEMPERATURES[self.name] if self.temperature is None else self.temperature
        if self.name == "weights":
            cosines = trust.cosines_of(evidence)
            return trust.weight_trust(cosines, temperature=tau, rows=rows, top=self.top, least=self.least)
        of = trust.prediction_trust if self.name == "predictions" else trust.validation_trust
        return of(evidence, temperature=tau, rows=rows, top=self.top, least=self.least)
