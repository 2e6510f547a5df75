from __future__ import annotations

import random

import pytest

from kilobayes import spec
from kilobayes.adapters import LoRA
from kilobayes.catalog import catalog
from kilobayes.errors import KilobayesError
from kilobayes.posteriors import SWA, SWAG, Ensemble, Point, Temperature


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SWAG", SWAG()),
        ("SWAG()", SWAG()),
        (" SWAG( rank = 7 ,scale=2) ", SWAG(rank=7, scale=2)),
        ("SWAG(3, 0.5)", SWAG(rank=3, scale=0.5)),
        ("SWA(by_epoch=True, rate_held=1e-2)", SWA(by_epoch=True, rate_held=0.01)),
        ("Ensemble(SWAG, 3)", Ensemble(SWAG(), members=3)),
        (
            "Temperature(Ensemble(base=Point(prior_precision=2), members=4))",
            Temperature(Ensemble(Point(2), members=4)),
        ),
    ],
)
def test_posteriors(text: str, expected: object) -> None:
    found = spec.parse(text, "posteriors")
    assert found == expected
    assert spec.check(text, "posteriors") == text
    assert spec.parse(spec.format(found), "posteriors") == expected
    assert spec.parse(repr(found), "posteriors") == expected


def test_format_leaves_defaults_out() -> None:
    assert spec.format(Temperature(SWAG(rank=4, scale=1.0))) == "Temperature(SWAG(rank=4))"
    assert spec.format(LoRA(r=8)) == "LoRA()"
    assert spec.format(LoRA(alpha=3.5, rslora=True)) == "LoRA(alpha=3.5, rslora=True)"


@pytest.mark.parametrize("kind", ["adapters", "posteriors"])
def test_every_default_round_trips(kind: str) -> None:
    for name in catalog(kind):
        made = spec.parse(name, kind)
        assert spec.parse(spec.format(made), kind) == made
        assert spec.parse(repr(made), kind) == made


def test_objects_pass_through() -> None:
    method = SWAG(rank=5)
    assert spec.posterior(method) is method
    assert spec.posterior("SWAG(rank=5)") == method
    assert spec.adapter("LoRA(r=2)") == LoRA(r=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "SWAG(",
        "SWAG(rank=)",
        "SWAG;Point",
        "SWAG, Point",
        "lambda: 1",
        "__import__('os')",
        "__import__('os').system('true')",
        "SWAG.__class__",
        "SWAG(rank=__import__('os').getpid())",
        "SWAG(rank=(lambda: 3)())",
        "SWAG(rank=2**3**9**9)",
        "SWAG(rank=[x for x in (1, 2)])",
        "SWAG(**{'rank': 3})",
        "SWAG(*[3])",
        "SWAG(rank=3, rank=4)",
        "SWAG(3, rank=4)",
        "SWAG(1, 2, 3, 4, 5, 6, 7, 8)",
        "SWAG(rank='10')",
        "SWAG(rank=2.5)",
        "SWAG(rank=True)",
        "SWAG(rank=1)",
        "SWAG(rank=-2)",
        "SWAG(scale=-1.0)",
        "SWAG(scale=1e999)",
        "SWAG(scale=None)",
        "SWAG(by_epoch=1)",
        "SWAG(start=1.0)",
        "SWA(start=0.8, anneal=0.3)",
        "SWA(snapshots=0)",
        "SWA(rate_held=0.0)",
        "Point(prior_precision=-1)",
        "Point(prior_precision='1')",
        "Ensemble(3)",
        "Ensemble(base=3)",
        "Ensemble(base='Point()')",
        "Ensemble(LoRA(r=2))",
        "Ensemble(Point(), members=0)",
        "Ensemble(Ensemble(Point(), members=2))",
        "Ensemble(Temperature(Ensemble(Point(), members=2)))",
        "Temperature(samples=0)",
        "Nothing(rank=3)",
        "SWAG(\x00)",
        "SWAG(" * 150 + ")" * 150,
        "Temperature(" * 5000 + ")" * 5000,
        "Point(prior_precision=" + "-" * 1900 + "1)",
        "Point(prior_precision=" + "9" * 6000 + ")",
        "(" * 90 + "SWAG" + ".a" * 800 + ")" * 90,
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(KilobayesError) as caught:
        spec.parse(text, "posteriors")
    assert caught.value.wrong
    assert len(str(caught.value)) < 5000


def test_deep_but_sound_nesting_works() -> None:
    made = spec.parse("Temperature(" * 40 + "SWAG(rank=3)" + ")" * 40, "posteriors")
    for _ in range(40):
        made = made.base
    assert made == SWAG(rank=3)


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("SWAGG(rank=3)", "SWAG"),
        ("Temprature", "Temperature"),
        ("SWAG(rnk=3)", "rank="),
        ("Ensemble(membres=2)", "members="),
    ],
)
def test_near_misses_are_suggested(text: str, guess: str) -> None:
    with pytest.raises(KilobayesError, match="did you mean") as caught:
        spec.check(text, "posteriors")
    assert guess in caught.value.remedy


def test_anything_else_is_an_error_of_ours() -> None:
    draw = random.Random(3)
    parts = [
        "SWAG",
        "Point",
        "Temperature",
        "rank",
        "(",
        ")",
        "=",
        ",",
        "3",
        "-",
        ".",
        "[",
        "{",
        "'",
        '"',
        "\\",
        "\n",
        "*",
        ":",
        "é",
    ]
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randint(1, 9)))
        try:
            made = spec.parse(text, "posteriors")
        except KilobayesError:
            continue
        assert type(made).__name__ in catalog("posteriors")
