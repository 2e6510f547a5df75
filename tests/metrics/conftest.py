from collections.abc import Callable

import numpy as np
import pytest

from kilobayes.metrics import Evaluation


@pytest.fixture
def gen() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def draw() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Probabilities rounded so that many rows tie, and labels drawn from them, so calibrated."""

    def make(gen: np.random.Generator, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        shares = gen.multinomial(10, gen.dirichlet(np.ones(width), rows))
        probs = shares / 10
        return probs, np.array([gen.choice(width, p=row) for row in probs])

    return make


@pytest.fixture
def evaluate() -> Callable[..., Evaluation]:
    def make(
        gen: np.random.Generator,
        rows: int,
        width: int,
        ood: int = 0,
        name: str = "run",
        sharpness: float = 1.0,
    ) -> Evaluation:
        probs = gen.dirichlet(np.ones(width), rows)
        labels = np.array([gen.choice(width, p=row) for row in probs])
        stated = probs**sharpness
        return Evaluation(
            name=name,
            classes=[f"c{i}" for i in range(width)],
            labels=labels,
            probs=stated / stated.sum(axis=1, keepdims=True),
            mutual_information=gen.random(rows),
            texts=[f"row {i}" for i in range(rows)],
            ood_probs=gen.dirichlet(np.full(width, 3.0), ood) if ood else None,
            ood_mutual_information=gen.random(ood) if ood else None,
            ood_texts=[f"ood {i}" for i in range(ood)] if ood else None,
        )

    return make
