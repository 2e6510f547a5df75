"""Fine-tune language models with adapters of kilobytes that carry a Bayesian posterior.

Importing the package is cheap: what needs torch is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "AdapterCallback": "kilobayes.integrations",
    "Classifier": "kilobayes.estimator",
    "Ensemble": "kilobayes.posteriors",
    "KilobayesConfig": "kilobayes.host",
    "KilobayesError": "kilobayes.errors",
    "LanguageModel": "kilobayes.language",
    "LoRA": "kilobayes.adapters",
    "Point": "kilobayes.posteriors",
    "PosteriorCallback": "kilobayes.integrations",
    "Predictive": "kilobayes.predict",
    "SWA": "kilobayes.posteriors",
    "SWAG": "kilobayes.posteriors",
    "Temperature": "kilobayes.posteriors",
    "adopt": "kilobayes.host.adopt",
    "calibrate": "kilobayes.api",
    "collaborate": "kilobayes.together",
    "combine": "kilobayes.api",
    "compare": "kilobayes.api",
    "export_compact": "kilobayes.host.compact",
    "export_lora": "kilobayes.host.export",
    "load": "kilobayes.api",
    "load_compact": "kilobayes.host.compact",
    "load_peft": "kilobayes.host.peft_folder",
    "outer": "kilobayes.host",
    "packed": "kilobayes.host",
    "parameter_groups": "kilobayes.integrations",
    "read": "kilobayes.host",
    "train_discriminator": "kilobayes.transferring",
    "transfer": "kilobayes.transferring",
    "write": "kilobayes.host",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'kilobayes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
