"""Arms with realistic predictions: six kinds of question, 500 test rows, 200 rows of another kind of text."""

from __future__ import annotations

import dataclasses

import numpy as np

from kilobayes.metrics.evaluation import Evaluation

CLASSES = ["abbreviation", "entity", "description", "human", "location", "number"]
QUESTIONS = {
    "abbreviation": [
        "What does {a} stand for ?",
        "What is the full form of {a} ?",
        "What does the acronym {a} mean ?",
    ],
    "entity": [
        "What breed of dog was {b} ?",
        "What instrument did {b} play ?",
        "What colour is {c} 's flag ?",
    ],
    "description": ["Why do people in {c} eat late ?", "What is the origin of {d} ?", "How do {d} work ?"],
    "human": ["Who discovered {d} ?", "Which president visited {c} first ?", "Who taught {b} to paint ?"],
    "location": [
        "Where was {b} born ?",
        "What is the highest mountain in {c} ?",
        "Which city in {c} has most bridges ?",
    ],
    "number": ["How many people live in {c} ?", "When was {b} born ?", "How far is {c} from the equator ?"],
}
WORDS = {
    "a": ["NASA", "DNA", "CNN", "R.S.V.P.", "HTML", "UNICEF"],
    "b": [
        "Wolfgang Amadeus Mozart",
        "Frida Kahlo",
        "Ella Fitzgerald",
        "Marie Curie",
        "the Lone Ranger",
        "Bobby Fischer",
    ],
    "c": ["Peru", "Finland", "Madagascar", "Nepal", "the Netherlands", "Uruguay"],
    "d": ["fibre-optic cables", "the word « quiz »", "penicillin", "tides", "the pH scale", "solar eclipses"],
}
REVIEW = [
    [
        "A quietly devastating film",
        "The second season",
        "This phone case",
        "The new branch line",
        "Her last novel",
    ],
    [
        "earns every one of its silences",
        "gave up after two weeks",
        "was hardly worth the wait",
        "cost more than promised",
    ],
    [
        "and nobody answered my letters.",
        "but I would buy it again.",
        "as the critics said it would.",
        "for once.",
    ],
]


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _information(members: np.ndarray) -> np.ndarray:
    mean = members.mean(axis=0)
    return np.maximum((members * np.log(members)).sum(-1).mean(0) - (mean * np.log(mean)).sum(-1), 0.0)


def _question(kind: str, generator: np.random.Generator) -> str:
    words = {key: str(generator.choice(choices)) for key, choices in WORDS.items()}
    return str(generator.choice(QUESTIONS[kind])).format(**words)


def arm(name: str, scale: float, samples: int, noise: float, posterior: str, rows: int = 500) -> Evaluation:
    """An arm whose logits are ``scale`` times too sharp and whose ``samples`` members differ by ``noise``."""
    outside = 200
    world = np.random.default_rng(0)  # every arm meets the same rows
    labels = world.choice(len(CLASSES), size=rows, p=[0.04, 0.19, 0.27, 0.2, 0.16, 0.14])
    texts = [_question(CLASSES[label], world) for label in labels]
    evidence = np.eye(len(CLASSES))[labels] * 4.4 + world.normal(size=(rows, len(CLASSES))) * 1.65
    foreign = world.normal(size=(outside, len(CLASSES))) * 1.6 + world.normal(size=len(CLASSES))
    own = np.random.default_rng([len(name), samples])

    def drawn(scores: np.ndarray, spread: float) -> np.ndarray:
        own_error = own.normal(size=scores.shape) * 0.35
        return _softmax(scale * (scores + own_error + own.normal(size=(samples, *scores.shape)) * spread))

    members, strangers = drawn(evidence, noise), drawn(foreign, 2.2 * noise)
    return Evaluation(
        name=name,
        classes=CLASSES,
        labels=labels,
        probs=members.mean(axis=0),
        mutual_information=_information(members),
        texts=texts,
        ood_probs=strangers.mean(axis=0),
        ood_mutual_information=_information(strangers),
        ood_texts=[" ".join(str(world.choice(part)) for part in REVIEW) for _ in range(outside)],
        cost={"seconds": 41.0 + 37 * samples, "peak_bytes": 7.1e8, "stored_bytes": 20_480.0 * samples},
        spec={"adapter": "LoRA(r=4)", "posterior": posterior, "model": "all-MiniLM-L6-v2"},
    )


def four_arms() -> list[Evaluation]:
    """A sharp point estimate, one with a temperature, and two posteriors."""
    return [
        arm("LoRA, point", 2.6, 1, 0.0, "Point()"),
        arm("LoRA + temperature", 1.6, 1, 0.0, "Temperature()"),
        arm("LoRA-XS + SWAG", 2.0, 10, 1.0, "SWAG(rank=10)"),
        arm("LoRA ensemble of 4", 2.1, 4, 0.9, "Ensemble(4)"),
    ]


def plain(evaluation: Evaluation) -> Evaluation:
    """The same arm without out-of-distribution rows, costs or a specification."""
    return dataclasses.replace(
        evaluation, ood_probs=None, ood_mutual_information=None, ood_texts=None, cost={}, spec={}
    )


META = {
    "title": "Question types, 6 classes",
    "command": 'kilobayes bench --model all-MiniLM-L6-v2 --data trec.tsv --adapter "LoRA(r=4)" '
    '--posterior "SWAG(rank=10)" --ood reviews.tsv --out runs/trec',
    "versions": {
        "kilobayes": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.1.0",
        "peft": "0.21.0",
        "numpy": "2.4.6",
    },
    "created": "2026-03-02T14:05:00+00:00",
    "data": {
        "source": "trec.tsv",
        "rows": "5,452 train, 500 test, 200 out of distribution",
        "sha256": "9b2f4c7de0a15b0c3f3a6a3f0f8f5bd0d1f2f7a76f1f0e6bb0f6e0a0c43c1a77",
    },
    "notes": ["Simulated predictions; nothing was trained."],
    "bins": 15,
    "resamples": 1000,
}
