from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys

import pytest

from kilobayes.catalog import catalog

KINDS = ["adapters", "posteriors"]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_classes(kind: str) -> None:
    package = importlib.import_module(f"kilobayes.{kind}")
    found = catalog(kind)
    assert set(found) == set(package.__all__)
    for name, entry in found.items():
        method = getattr(package, name)
        fields = dataclasses.fields(method)
        assert list(entry.defaults) == [f.name for f in fields]
        for field in fields:
            text = entry.defaults[field.name]
            if dataclasses.is_dataclass(field.default):  # a nested method
                assert text == f"{type(field.default).__name__}()"
                assert type(field.default)() == field.default
            elif text:
                assert ast.literal_eval(text) == field.default
        assert entry.name == name
        assert entry.summary == method.__doc__.split("\n")[0]
        assert entry.summary.endswith(".")


def test_papers() -> None:
    assert catalog("posteriors")["SWAG"].paper == "1902.02476"
    assert catalog("posteriors")["Temperature"].paper == "1706.04599"
    assert catalog("adapters")["LoRA"].paper == "2106.09685"


def test_listing_and_checking_import_no_torch() -> None:
    program = (
        "import sys; from kilobayes import catalog, spec; catalog.catalog('adapters');"
        "spec.check('Temperature(SWAG(rank=3))', 'posteriors');"
        "print([m for m in ('torch', 'transformers', 'peft', 'scipy', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
