"""Distributions over the trainable leaves, one paper in one file; ``__all__`` is the registry."""

from kilobayes.posteriors.aswa import ASWA
from kilobayes.posteriors.blob import BLoB
from kilobayes.posteriors.dropout import MCDropout
from kilobayes.posteriors.ensemble import Ensemble
from kilobayes.posteriors.ivon import IVON
from kilobayes.posteriors.laplace import Laplace
from kilobayes.posteriors.monteclora import MonteCLoRA
from kilobayes.posteriors.point import Point
from kilobayes.posteriors.scale import Scale
from kilobayes.posteriors.swa import SWA
from kilobayes.posteriors.swag import SWAG
from kilobayes.posteriors.temperature import Temperature
from kilobayes.posteriors.tfb import TFB

__all__ = [
    "ASWA",
    "IVON",
    "SWA",
    "SWAG",
    "TFB",
    "BLoB",
    "Ensemble",
    "Laplace",
    "MCDropout",
    "MonteCLoRA",
    "Point",
    "Scale",
    "Temperature",
]
