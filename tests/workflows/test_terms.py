from __future__ import annotations

import pytest

from kilobayes.errors import KilobayesError
from kilobayes.workflows.terms import parse


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("runs/a", {"runs/a": 1.0}),
        ("0.5*runs/a + 0.5*runs/b - 0.2*runs/c", {"runs/a": 0.5, "runs/b": 0.5, "runs/c": -0.2}),
        (" - runs/a  +  2 * runs/b ", {"runs/a": -1.0, "runs/b": 2.0}),
        ("1/4*a + 3 / 4 * b", {"a": 0.25, "b": 0.75}),
        ("1e-1*runs/a-b+c_3.x - .5*/tmp/d", {"runs/a-b+c_3.x": 0.1, "/tmp/d": -0.5}),
        ("0.5*'my runs/a * b' + \"it's\"", {"my runs/a * b": 0.5, "it's": 1.0}),
        ("a + 0.5*a - b", {"a": 1.5, "b": -1.0}),
        ("-2", {"2": -1.0}),
    ],
)
def test_sums(text: str, wanted: dict[str, float]) -> None:
    found = parse(text)
    assert found == pytest.approx(wanted)
    assert list(found) == list(wanted)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "+",
        "0.5*",
        "a +",
        "a + + b",
        "a b",
        "a*0.5",
        "0.5*a+0.5*b",
        "1/0*a",
        "1e999*a",
        "'a",
        "(a + b)/2 + c*d",
    ],
)
def test_what_is_no_sum(text: str) -> None:
    with pytest.raises(KilobayesError, match="no sum of runs"):
        parse(text)
