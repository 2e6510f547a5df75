"""Collaboration in Python: :func:`collaborate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilobayes.collaboration.settings import read
from kilobayes.workflows.collaborate import Collaborated
from kilobayes.workflows.collaborate import collaborate as _collaborate


def collaborate(
    users: str | Path | Mapping[str, Any], out: str | Path, scheme: str = "validation", **settings: Any
) -> Collaborated:
    """Train users together, each to a model of its own, written to ``out``.

    So ``kb.collaborate({"ann": "ann.csv", "bob": frame}, "runs/both", steps=300)``, and then
    ``kb.load("runs/both/users/ann")``.

    Args:
        users: a folder with a folder or file of data for each user; or data by name, each a path or in
            memory, as :func:`kilobayes.tasks.data.load_examples` takes them.
        scheme: with whom users average: local, fedavg, oracle, weights, predictions or validation.
        settings: as the flags of ``kilobayes collaborate``: those of the collaboration (``steps``, ``every``,
            ``reference``, ...) and of training (``model``, ``adapter``, ``task``, ``lr``, ...).

    Raises:
        KilobayesError: unknown or wrong settings, users or data, or a folder that holds something else.
    """
    values = {k: v for k, v in settings.items() if v is not None} | {"out": str(out), "scheme": scheme}
    options, together, _ = read(values, "collaborate()")
    return _collaborate(options, together, users)
