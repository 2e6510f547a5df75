"""Every adapter with every posterior, from the catalogue: there is no list of exemptions."""

from __future__ import annotations

import pytest

from kilobayes import adapters, posteriors, spec
from kilobayes.catalog import catalog
from kilobayes.testing import check_adapter, check_pair, check_posterior

# settings away from the defaults, by name; methods that are not named here run with their defaults alone
OTHER = {
    "LoRA": ["LoRA(r=3, alpha=5.0, rslora=True, dropout=0.2)"],
    "NOLA": [
        'NOLA(r=3, k=20, alpha=5.0, basis="shape", seed=4)',
        "NOLA(r=2, k=9, held=0)",
        'NOLA(r=2, k=9, basis="shape", held=0)',
    ],
    "LoRAXS": ["LoRAXS(r=3, alpha=5.0)", "LoRAXS(r=40)"],
    "OLoRA": ["OLoRA(r=3, alpha=5.0)", "OLoRA(r=40)"],
    "VeRA": ["VeRA(r=9, d_initial=-0.3, projection=5)"],
    "MoRA": ["MoRA(r=3, kind='share')", "MoRA(r=40)"],
    "HydraLoRA": [
        "HydraLoRA(r=3, heads=2, alpha=5.0, router='rank', dropout=0.2)",
        "HydraLoRA(r=2, heads=1)",
    ],
    "RoseLoRA": ["RoseLoRA(r=3, alpha=5.0, keep=0.2, start=0.0, end=0.5, beta=0.5, clamp=0.5, dropout=0.2)"],
    "VBLoRA": ["VBLoRA(r=3, h=7, b=16, k=3)"],
    "BLoRA": ["BLoRA(r=3, alpha=5.0, bits_prior=0.1, rank_prior=0.02, start=1.0, speed=30.0)", "BLoRA(r=1)"],
    "ASWA": ['ASWA(start=0.3, score="accuracy", rate_held=0.7, anneal=0.2)'],
    "BLoB": [
        'BLoB(noise="flipout", over="*", prior=0.5, epsilon=0.2, kl=0.9, cost=0.02, cycle=5, speed=2.0)',
        'BLoB(noise="step", kl=0.0)',
    ],
    "MCDropout": [
        'MCDropout(p=0.3, over="*", prior_precision=2.0)',
        'MCDropout(p=0.2, noise="step")',
        'MCDropout(p=0.3, noise="token", prior_precision=2.0)',
        'Temperature(Ensemble(Scale(MCDropout(over="*", noise="token")), members=2), samples=4)',
        "MCDropout(p=0.0)",
    ],
    "Point": ["Point(prior_precision=3.0)"],
    "SWA": ["SWA(start=0.3, snapshots=4, rate_held=0.7, anneal=0.2)"],
    "SWAG": ["SWAG(rank=0, by_epoch=True)", "SWAG(rank=3, scale=0.5, snapshots=5)", "SWAG(scale=0.0)"],
    "IVON": [
        "IVON(ess=0, weight_decay=3.0, hessian=0.2, gain=6.0, clip=0.0, beta1=0.8, beta2=0.9)",
        "Ensemble(IVON(), members=2)",
    ],
    "MonteCLoRA": [
        "MonteCLoRA(mixture=True, components=3, epsilon=0.1, eta=0.3)",
        "MonteCLoRA(over='*/*', components=1, epsilon=0.1, cooperative=False, noise='row', speed=3.0)",
        "Temperature(Ensemble(MonteCLoRA(components=8), members=2), samples=4)",
    ],
    "Ensemble": [
        "Ensemble(SWAG(rank=2), members=3)",
        "Ensemble(Temperature(SWAG(rank=3), samples=4), members=2)",
    ],
    "TFB": [
        "TFB(SWA(), measure='accuracy', tolerance=0.02, labels='true', anchor='calibration', rows=20)",
        "Temperature(Ensemble(TFB(tolerance=0.02, samples=3, bisections=2), members=2))",
    ],
    "Scale": [
        "Scale(Temperature(SWAG(rank=2)), of='scores', samples=3)",
        "Temperature(Ensemble(Scale(SWAG(rank=2), tempered=False, samples=4), members=2))",
    ],
    "Laplace": [
        "Temperature(Laplace(over='head', structure='full', tempered=True, samples=20))",
        "Laplace(structure='diag', rank=3, prior=5.0, linearised=False)",
        "Ensemble(Laplace(over='', rank=2, prior='evidence', samples=7), members=2)",
    ],
    "Temperature": [
        "Temperature(SWAG(rank=4), samples=5)",
        "Temperature(Ensemble(SWAG(), members=3), samples=2)",
    ],
}
ADAPTERS = [text for name in catalog("adapters") for text in (name, *OTHER.get(name, []))]
POSTERIORS = [text for name in catalog("posteriors") for text in (name, *OTHER.get(name, []))]


@pytest.mark.parametrize("text", ADAPTERS)
def test_adapter(text: str) -> None:
    check_adapter(spec.adapter(text))


@pytest.mark.parametrize("text", POSTERIORS)
def test_posterior(text: str) -> None:
    check_posterior(spec.posterior(text))


class Pairs:
    """One adapter with every posterior: a class for each, so that processes share them."""

    adapter = ""

    @pytest.mark.parametrize("posterior", POSTERIORS)
    def test_pair(self, posterior: str) -> None:
        check_pair(spec.adapter(self.adapter), spec.posterior(posterior))


for name in catalog("adapters"):
    globals()[f"Test{name}"] = type(f"Test{name}", (Pairs,), {"adapter": name})


@pytest.mark.parametrize("adapter", [text for text in ADAPTERS if "(" in text])
def test_other_settings(adapter: str) -> None:
    check_pair(spec.adapter(adapter), spec.posterior("Temperature(SWAG(rank=4), samples=5)"))


def test_catalogue_is_the_registry() -> None:
    assert list(catalog("adapters")) == sorted(adapters.__all__, key=list(catalog("adapters")).index)
    assert set(catalog("posteriors")) == set(posteriors.__all__)
