"""What :mod:`study` trains and scores."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

MEMBERS = 3  # of a pooled arm
KINDS = {  # what is trained
    "LoRA": "Point()",
    "MAP": "Point(prior_precision=1.0)",
    "MC dropout": "MCDropout()",
    "SWAG": "SWAG(rank=10, start=0.5, rate_held=0.5)",
    "SWAG early": "SWAG(rank=10, start=0.25, rate_held=1.0)",
    "ASWA": "ASWA()",
    "BLoB": "BLoB()",
    "MonteCLoRA": "MonteCLoRA()",
    "IVON": "IVON()",
}


@dataclass(frozen=True)
class Arm:
    """What is scored: posterior ``how``, from the training of ``kind``; ``pooled`` over three members.

    Attributes:
        scaled: also with its spread tuned on the calibration rows.
    """

    kind: str
    how: str
    pooled: bool = False
    scaled: bool = True


ARMS = {
    "LoRA": Arm("LoRA", "Point()", scaled=False),
    "MAP": Arm("MAP", "Point(prior_precision=1.0)", scaled=False),
    "MC dropout": Arm("MC dropout", "MCDropout()"),
    "SWA": Arm("SWAG", "SWAG(rank=10, scale=0.0, start=0.5, rate_held=0.5)", scaled=False),
    "ASWA": Arm("ASWA", "ASWA()", scaled=False),
    "SWAG-diagonal": Arm("SWAG", "SWAG(rank=0, start=0.5, rate_held=0.5)"),
    "SWAG": Arm("SWAG", "SWAG(rank=10, start=0.5, rate_held=0.5)"),
    "SWAG early": Arm("SWAG early", "SWAG(rank=10, start=0.25, rate_held=1.0)"),
    "Laplace, last layer": Arm("LoRA", "Laplace(over='classifier/*', structure='full')"),
    "Laplace, Kronecker": Arm("LoRA", "Laplace(over='*')"),
    "TFB": Arm("LoRA", "TFB()"),
    "BLoB": Arm("BLoB", "BLoB()"),
    "MonteCLoRA": Arm("MonteCLoRA", "MonteCLoRA()"),
    "IVON": Arm("IVON", "IVON()"),
    "ensemble": Arm("LoRA", "Ensemble(Point(), members=3)", pooled=True),
    "MultiSWAG": Arm("SWAG", "Ensemble(SWAG(rank=10, start=0.5, rate_held=0.5), members=3)", pooled=True),
}


def arguments(description: str) -> argparse.Namespace:
    """The command line of the study."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--data", action="append", required=True, help="NAME=FOLDER, repeated")
    p.add_argument("--ood", action="append", default=[], help="NAME=FOLDER of rows of another kind, repeated")
    p.add_argument(
        "--shift", action="append", default=[], help="NAME=FOLDER, the same classes elsewhere, repeated"
    )
    p.add_argument("--cache", type=Path, default=Path("runs/study"))
    p.add_argument("--only", help="arms to work on, separated by semicolons; all if left out")
    p.add_argument("--rates", default="5e-4,1.5e-3,5e-3")
    p.add_argument("--replicates", type=int, default=3)
    p.add_argument("--rows", type=int, default=300)
    p.add_argument("--calibration", type=int, default=150)
    p.add_argument("--test-rows", type=int, default=400)
    p.add_argument("--ood-rows", type=int, default=200)
    p.add_argument("--train-only", action="store_true")
    p.add_argument(
        "--one-rate", action="store_true", help="the rate that is best after a temperature, for all"
    )
    p.add_argument("--no-scaled", action="store_true", help="leave out what has its spread tuned")
    p.add_argument("--shift-rows", type=int, default=300)
    p.add_argument("--max-length", type=int, default=64)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--samples", type=int, default=10)
    p.add_argument("--dtype", default="bfloat16")
    return p.parse_args()
