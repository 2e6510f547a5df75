"""``manifest.json``: which adapters stand for a posterior. Nothing here imports torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kilobayes.errors import KilobayesError

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Which adapters stand for the posterior.

    Attributes:
        name: that of the average.
        members: names that the server knows them by.
        weights: they add up to 1.
    """

    name: str
    members: list[str]
    weights: list[float]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """What ``kilobayes export --to samples`` wrote.

        Raises:
            KilobayesError: there is none, it is damaged, or newer than this.
        """
        path = folder / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if int(found["format"]) > FORMAT:
                raise KilobayesError(
                    f"{path} was written by a newer kilobayes", remedy="pip install -U kilobayes"
                )
            members = [str(sample["name"]) for sample in found["samples"]]
            weights = [float(sample["weight"]) for sample in found["samples"]]
            if not members or min(weights) <= 0 or abs(sum(weights) - 1.0) > 1e-6:
                raise ValueError("the weights do not add up to 1")
            return cls(str(found["name"]), members, weights)
        except FileNotFoundError:
            raise KilobayesError(
                f"{folder} holds no samples", f"there is no {MANIFEST}", "kilobayes export RUN --to samples"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise KilobayesError(f"{path} is damaged", str(error)[:200], "export the samples again") from None
