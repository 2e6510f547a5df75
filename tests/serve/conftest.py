"""Runs that all tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from kilobayes.serve.shelf import Shelf, load

from . import runs


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifiers a (three classes), b (two) and d (three, linearised); language models one and two."""
    root = tmp_path_factory.mktemp("served")
    runs.classifier(root / "a", "Temperature(SWAG(rank=2))")
    runs.classifier(root / "b", "SWAG(rank=2)", classes=2, samples=3, seed=1)
    runs.classifier(root / "d", "Laplace(structure='diag', samples=5)")
    base = runs.speaking(root / "base")
    runs.language_model(root / "one", base, seed=0, members=3)
    runs.language_model(root / "two", base, seed=1, members=2)
    return root


@pytest.fixture(scope="package")
def shelf(folder: Path) -> Iterator[Shelf]:
    """Loaded once; applications on it take turns."""
    found = load({name: folder / name for name in ("a", "b", "d", "one", "two")}, device="cpu")
    yield found
    for part in (*found.pools, *found.decoders):
        part.close()
